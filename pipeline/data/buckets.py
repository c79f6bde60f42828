"""Buckets, s3:// and gs://, through ``pyarrow.fs``: what ``pipeline.data.places`` needs of them."""

import os
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, S3FileSystem, resolve_s3_region

from pipeline.console import InputError

SCHEMES = ("s3", "gs", "gcs")
GCS_SECONDS = 30  # that its client tries again by itself; its own default is 15 minutes
# in messages about what no later try will change
NO_ENTRY = (
    "ACCESS_DENIED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID",
    "INVALID_SIGNATURE",
    "SIGNATURE_DOES_NOT_MATCH",
    "UNRECOGNIZED_CLIENT",
    "EXPIRED",
)

Entry = tuple[str, bool, int]  # name, whether it is a folder, bytes


class Bucket:
    """One path of a bucket; the connection is made when it is first needed, in each process.

    Attributes:
        uri: as given, without a slash at the end.
        path: bucket and path, "/" between folders, as ``pyarrow.fs`` takes it.

    Raises:
        InputError: no URI of a bucket, or one with credentials in it.
    """

    def __init__(self, uri: str) -> None:
        try:
            parts = urlsplit(uri)
        except ValueError as error:
            raise InputError(f"{uri} is no URI: {error}") from error
        if parts.scheme not in SCHEMES:
            raise InputError(
                f"{parts.scheme}:// is not known: name a path, s3://bucket/path or gs://bucket/path"
            )
        if "@" in parts.netloc:
            # it would go into sets and messages
            raise InputError(
                f"the {parts.scheme}:// URI of {parts.path} carries credentials: set them in the "
                "environment, or write ?anonymous=true for a public bucket"
            )
        if not parts.netloc or parts.fragment or " " in uri:
            raise InputError(
                f"{uri} is no URI of a bucket: {parts.scheme}://bucket/path, "
                "with %20 for a space and %23 for a #"
            )
        self.is_s3 = parts.scheme == "s3"
        self._parts = parts._replace(path=parts.path.rstrip("/"))
        self.uri = urlunsplit(self._parts)
        self.path = parts.netloc + unquote(self._parts.path)
        self._fs: FileSystem | None = None
        self._process = 0

    def uri_of(self, path: str) -> str:
        """The URI of another path (bucket and path) that is reached in the same way."""
        bucket, _, rest = path.partition("/")
        return urlunsplit(self._parts._replace(netloc=bucket, path=quote(f"/{rest}").rstrip("/")))

    @property
    def fs(self) -> FileSystem:
        """The file system: one a process, for its threads do not live through a fork."""
        if self._fs is None or self._process != os.getpid():
            try:
                self._fs = self._connect()
            except (pa.ArrowException, ValueError, TypeError) as error:
                raise InputError(f"{self.uri} is no URI of a bucket: {error}") from error
            self._process = os.getpid()
        return self._fs

    def _connect(self) -> FileSystem:
        query = dict(parse_qsl(self._parts.query))
        is_public = query.pop("anonymous", "false").lower() in ("true", "1")
        if self.is_s3 and is_public:  # which URIs of pyarrow cannot say
            if "region" not in query and "endpoint_override" not in query:
                query["region"] = resolve_s3_region(self._parts.netloc)
            return S3FileSystem(anonymous=True, **query)
        bucket = self._parts.netloc
        if not self.is_s3:
            query.setdefault("retry_limit_seconds", str(GCS_SECONDS))
            bucket = f"anonymous@{bucket}" if is_public else bucket
        parts = self._parts._replace(netloc=bucket, query=urlencode(query))
        return FileSystem.from_uri(urlunsplit(parts))[0]

    def open(self, path: str) -> pa.NativeFile:
        """A file to read and to seek in; this and the methods below raise what pyarrow raises."""
        return self.fs.open_input_file(path)

    def kind(self) -> str:
        """What is there: "file", "folder" or ""."""
        found = self.fs.get_file_info(self.path).type
        return {FileType.File: "file", FileType.Directory: "folder"}.get(found, "")

    def are_files(self, paths: list[str]) -> list[bool]:
        """Whether there is a file at each path."""
        return [info.type == FileType.File for info in self.fs.get_file_info(paths)]

    def version(self, path: str) -> tuple[int, int]:
        """Size and time of a file, which change when it does."""
        info = self.fs.get_file_info(path)
        return info.size or 0, info.mtime_ns or 0

    def entries(self, folder: str) -> list[Entry]:
        """What a folder (bucket and path) of an S3 bucket holds."""
        found = self.fs.get_file_info(FileSelector(folder))
        # two slashes in a name: pyarrow lists the folder in itself
        return [
            (
                "" if info.path.rstrip("/") == folder else info.base_name,
                info.type == FileType.Directory,
                info.size or 0,
            )
            for info in found
        ]

    def tree(self) -> dict[str, list[Entry]]:
        """What each folder of a GCS bucket holds, by path relative to the root.

        There pyarrow lists only those folders that have an object of their own, which most have
        not; so all names are listed, and are in memory, at once.
        """
        tree: dict[str, list[Entry]] = {"": []}
        for info in self.fs.get_file_info(FileSelector(self.path, recursive=True)):
            if info.type != FileType.File:
                continue
            folder, _, name = info.path[len(self.path) + 1 :].rpartition("/")
            entries = tree.setdefault(folder, [])
            entries.append((name, False, info.size or 0))
            while folder and len(entries) == 1:  # a new folder: tell the one above
                folder, _, name = folder.rpartition("/")
                entries = tree.setdefault(folder, [])
                entries.append((name, True, 0))
        return tree
