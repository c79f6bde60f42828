"""An S3 server of this machine, for tests of what lies in buckets."""

import logging
import os
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote


class Server:
    """Its URL, and a bucket named "bucket"."""

    def __init__(self, url: str, stop) -> None:
        self.url, self.stop = url, stop
        self.request("PUT")

    def request(
        self, method: str, key: str = "", data: bytes | None = None, acl: str = "public-read"
    ) -> None:
        url = f"{self.url}/bucket" + (f"/{quote(key)}" if key else "")
        # urllib takes data for a form
        headers = {"Content-Type": "image/jpeg", "x-amz-acl": acl}
        with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method)):
            pass

    def put(self, key: str, data: bytes, acl: str = "public-read") -> None:
        self.request("PUT", key, data, acl)

    def delete(self, key: str) -> None:
        self.request("DELETE", key)

    def put_folder(self, folder: Path, key: str) -> str:
        """Upload a folder; returns its URI."""
        for where, _, names in os.walk(folder):
            for name in names:
                path = Path(where, name)
                self.put(f"{key}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return self.uri(key)

    def uri(self, key: str) -> str:
        return f"s3://bucket/{quote(key)}?endpoint_override={self.url}&region=us-east-1"


@contextmanager
def s3_server() -> Iterator[Server]:
    """Start it, with credentials in the environment, and stop it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is asked for S3 alone
        from moto.server import ThreadedMotoServer
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    names |= {"AWS_EC2_METADATA_DISABLED": "true"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield Server(f"http://{host}:{port}", server.stop)
    finally:
        server.stop()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
