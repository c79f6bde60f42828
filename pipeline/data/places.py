"""Places that hold a user's own files: folders of this machine, and buckets (s3://, gs://).

Buckets are reached through ``pyarrow.fs``, with the credentials of the environment. The query of a
URI may say ``endpoint_override``, ``scheme`` and ``region``, as pyarrow has them, and
``anonymous=true`` for a public bucket; a space or a question mark in a path is written %20, %3F.
"""

import errno
import io
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from pipeline.console import InputError
from pipeline.data.buckets import NO_ENTRY, Bucket
from pipeline.data.listing import FileInfo, walk_bucket, walk_folder

T = TypeVar("T")

CHUNK = 16 << 20  # bytes that a copy asks for at a time
BUFFER = 1 << 20  # bytes that a reader asks for ahead
RETRY_PAUSES = (1.0, 4.0, 16.0)  # seconds between the tries of what may pass
PASSING = frozenset({errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET})
OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})  # no matter of the file


class FileProblem(InputError):
    """One file cannot be had, while the place that it belongs to stands.

    ``problem`` is "missing", "escapes", "not a regular file", "too large" or "cannot be read";
    ``detail`` says more to people, without the names.
    """

    def __init__(self, problem: str, detail: str, where: str) -> None:
        super().__init__(f"{where}: {detail}")
        self.problem = problem
        self.detail = detail


class Place:
    """A folder or a file, on this machine or in a bucket; cheap to make and to pickle.

    Args:
        uri: a path, or ``s3://bucket/path`` or ``gs://bucket/path``.

    Attributes:
        uri: as given; a path is made absolute.
        name: the last part of the path.
        is_local: whether it is of this machine.

    Raises:
        InputError: a URI of another kind, or one with credentials in it.
    """

    def __init__(self, uri: str | Path) -> None:
        text = os.fspath(uri)
        self._bucket = Bucket(text) if "://" in text else None
        self.uri = os.path.abspath(text) if self._bucket is None else self._bucket.uri
        self._root = self.uri if self._bucket is None else self._bucket.path
        self.name = os.path.basename(self._root) or self.uri
        self.is_local = self._bucket is None

    def __reduce__(self) -> tuple[Any, ...]:
        return Place, (self.uri,)

    def __repr__(self) -> str:
        return f"Place({self.uri!r})"

    @property
    def parent(self) -> "Place":
        """The folder that this lies in."""
        if self._bucket is None:
            return Place(os.path.dirname(self.uri))
        return Place(self._bucket.uri_of(os.path.dirname(self._root)))

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
        if self._bucket is None:
            return os.path.exists(self.uri)
        return bool(self._tried("", self._bucket.kind))

    def is_folder(self) -> bool:
        """Whether there is a folder."""
        if self._bucket is None:
            return os.path.isdir(self.uri)
        return self._tried("", self._bucket.kind) == "folder"

    def first(self, files: list[str]) -> str | None:
        """The first of ``files``, relative to the root, that there is; asks for all at once."""
        paths = [self._path(file) for file in files]
        found: Iterable[bool] = map(os.path.exists, paths)
        if self._bucket is not None:
            bucket = self._bucket
            found = self._tried(files[0], lambda: bucket.are_files(paths))
        return next((file for file, is_there in zip(files, found, strict=True) if is_there), None)

    def size(self, file: str = "") -> int:
        """Bytes of ``file``, relative to the root; of the root itself by default.

        Raises:
            FileProblem, InputError: as of ``read``.
        """
        with _Reader(self, file) as reader:
            return reader.size

    def read(
        self, file: str = "", offset: int = 0, size: int | None = None, limit: int | None = None
    ) -> bytes:
        """Bytes of ``file``, relative to the root; of the root itself by default.

        What fails in passing is tried again after ``RETRY_PAUSES``.

        Args:
            file: its path, with "/" between folders.
            offset: of the first byte.
            size: how many; all that follow by default.
            limit: bytes of the largest file that is read.

        Raises:
            FileProblem: there is no such file, it is no regular file, too large, or shorter.
            InputError: the place is gone or cannot be reached.
        """
        with _Reader(self, file) as reader:
            if limit is not None and reader.size > limit:
                detail = f"{reader.size} bytes, the limit is {limit}"
                raise self._problem("too large", detail, file)
            stop = reader.size if size is None else offset + size
            if not 0 <= offset <= stop <= reader.size:
                detail = f"it has {reader.size} bytes, bytes {offset} to {stop} were asked for"
                raise self._problem("cannot be read", detail, file)
            reader.seek(offset)
            data = bytearray()
            while chunk := reader.read(stop - offset - len(data)):
                data += chunk
        if len(data) < stop - offset:
            raise self._problem("cannot be read", "it shrank while it was read", file)
        return bytes(data)

    def open(self, file: str = "") -> IO[bytes]:
        """``file`` as an open file, to read and to seek in.

        Raises:
            FileProblem, InputError: as of ``read``; later too.
        """
        return io.BufferedReader(_Reader(self, file), BUFFER)

    @contextmanager
    def local(self, file: str = "") -> Iterator[Path]:
        """A path of this machine that holds ``file``: the file itself, else a temporary copy.

        The copy lies where TMPDIR says and vanishes with the process, whatever ends it.

        Raises:
            FileProblem, InputError: as of ``read``; the file changes while it is copied.
        """
        if self._bucket is None:
            yield Path(self._path(file))
            return
        bucket, path = self._bucket, self._path(file)
        # without a name where that is possible: then a killed process leaves nothing behind
        has_proc = os.path.isdir("/proc/self/fd")
        with tempfile.TemporaryFile() if has_proc else tempfile.NamedTemporaryFile() as copy:
            with self.open(file) as source:
                version = self._tried(file, lambda: bucket.version(path))
                shutil.copyfileobj(source, copy, CHUNK)
            copy.flush()
            if self._tried(file, lambda: bucket.version(path)) != version:
                raise self._problem("cannot be read", "it changed while it was copied", file)
            yield Path(f"/proc/self/fd/{copy.fileno()}" if has_proc else copy.name)

    def files(self) -> Iterator[FileInfo]:
        """All files, sorted by folder and stem; hidden files and folders are left out.

        A file sorts by its name without the last suffix and a folder by its name with a slash, so
        that files of one stem follow one another. Links are followed. Memory holds the names of
        one folder at each level; of a gs:// place, all names.

        Raises:
            InputError: there is no such place, or it cannot be listed.
        """
        if not self.is_folder():
            yield FileInfo("", self.size())
        elif self._bucket is None:
            yield from walk_folder(self.uri)
        elif not self._bucket.is_s3:
            tree = self._tried("", self._bucket.tree)
            yield from walk_bucket(lambda path: tree[path])
        else:
            bucket = self._bucket
            yield from walk_bucket(
                lambda path: self._tried(path, lambda: bucket.entries(self._path(path)))
            )

    def _path(self, file: str) -> str:
        if file.startswith("/") or ".." in file.split("/"):
            raise self._problem("escapes", "the path leads out of the folder", file)
        return f"{self._root.rstrip('/')}/{file}" if file else self._root

    def _problem(self, problem: str, detail: str, file: str) -> FileProblem:
        return FileProblem(problem, detail, self._named(file))

    def _named(self, file: str) -> str:
        return f"{self.uri}, file {file}" if file else self.uri

    def _tried(self, file: str, call: Callable[[], T]) -> T:
        """``call()``, tried again when it fails in a way that may pass."""
        for pause in (*RETRY_PAUSES, None):
            try:
                return call()
            except (OSError, ValueError) as error:  # of pyarrow, too
                if isinstance(error, InputError) or getattr(error, "errno", None) in OURS:
                    raise
                final = self._judged(file, error)
                if final is not None:
                    raise final from error
                if pause is None:
                    raise self._given_up(file, error) from error
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _judged(self, file: str, error: Exception) -> InputError | None:
        """What an error means; None when it may pass."""
        if isinstance(error, ValueError):  # a zero byte, half a surrogate pair, two slashes
            return self._problem("missing", "no file can have this name", file)
        assert isinstance(error, OSError)
        if self._bucket is not None and any(word in str(error) for word in NO_ENTRY):
            return InputError(
                f"{self._named(file)}: access denied; set the credentials of its owner in the "
                f"environment, or write ?anonymous=true for a public bucket ({_first_line(error)})"
            )
        if error.errno in PASSING or (self._bucket is not None and error.errno != errno.ENOENT):
            return None
        if not self.exists():
            return InputError(f"{self.uri} does not exist: bring it back or name another place")
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return self._problem("missing", "there is no such file", file)
        return self._problem("cannot be read", str(error.strerror), file)

    def _given_up(self, file: str, error: Exception) -> InputError:
        tries = len(RETRY_PAUSES) + 1
        return InputError(
            f"{self._named(file)} cannot be reached after {tries} tries: look after the network "
            f"and the server, then start again ({_first_line(error)})"
        )


class _Reader(io.RawIOBase):
    """A file of a place that reads again what fails in passing."""

    def __init__(self, place: Place, file: str) -> None:
        super().__init__()
        self._place, self._file, self._at = place, file, 0
        self._descriptor, self._remote = -1, None
        path = place._path(file)
        if place._bucket is None:
            self._descriptor = place._tried(file, lambda: _open(path))
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                self.close()
                detail = "it is a folder, a pipe, a socket or a device"
                raise place._problem("not a regular file", detail, file)
            self.size = status.st_size
        else:
            bucket = place._bucket
            self._remote = place._tried(file, lambda: bucket.open(path))
            self.size = self._remote.size()

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` from where it stands; 0 at the end."""
        n_bytes = min(len(buffer), self.size - self._at)
        if n_bytes <= 0:
            return 0
        data = self._place._tried(self._file, lambda: self._fetch(n_bytes))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _fetch(self, n_bytes: int) -> bytes:
        if self._remote is None:
            return os.pread(self._descriptor, n_bytes, self._at)
        return self._remote.read_at(n_bytes, self._at)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte; returns its number."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        """The number of the next byte."""
        return self._at

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def close(self) -> None:
        """Let go of the file."""
        if not self.closed and self._descriptor >= 0:
            os.close(self._descriptor)
        if not self.closed and self._remote is not None:
            self._remote.close()
        super().close()


def _open(path: str) -> int:
    # reading a pipe would wait for ever
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
