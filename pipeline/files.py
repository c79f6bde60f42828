"""Files that a reader finds whole or not at all, whatever kills the writer."""

import errno
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# the disk, the quota of the user, the limit of a file's size (``ulimit -f``)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def filling(path: Path) -> Iterator[None]:
    """Where there is no room for ``path``, the OSError names it, whichever library wrote."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a temporary file beside ``path``, sync it, and give it its name."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with filling(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def json_bytes(content: Any) -> bytes:
    """JSON in UTF-8, its keys sorted: the same content gives the same bytes."""
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, content: Any) -> None:
    """Write ``json_bytes`` of ``content``."""
    write_bytes(path, json_bytes(content))
