"""Places that hold a user's own files: folders of this machine, and buckets (s3://, gs://)."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.console import InputError

DEPTH_LIMIT = 64  # folders within folders


class FileProblem(InputError):
    """One file cannot be had, while the place that it belongs to stands.

    ``problem`` is "missing", "escapes", "not a regular file", "cannot be read" or "too large";
    ``detail`` says more to people, without the names.
    """

    def __init__(self, problem: str, detail: str, where: str) -> None:
        super().__init__(f"{where}: {detail}")
        self.problem = problem
        self.detail = detail


@dataclass(frozen=True)
class FileInfo:
    """A file of a place: its path relative to the root ("/" between folders) and its bytes.

    ``problem`` is None, or why the listing could not say more: "broken link", "link loop",
    "not a regular file", "file cannot be read", "folder cannot be read".
    """

    path: str
    size: int = 0
    problem: str | None = None
    detail: str = ""


class Place:
    """A folder or a file, on this machine or in a bucket.

    Args:
        uri: a path, or ``s3://bucket/path`` and ``gs://bucket/path``.

    Attributes:
        uri: as given; a path is made absolute.
        name: the last part of the path.
    """

    def __init__(self, uri: str | Path) -> None:
        text = os.fspath(uri)
        if "://" in text:
            raise InputError(f"{text} is no path: name a folder or a file of this machine")
        self.uri = os.path.abspath(text)
        self.name = os.path.basename(self.uri) or self.uri

    @property
    def parent(self) -> "Place":
        """The folder that this lies in."""
        return Place(os.path.dirname(self.uri))

    def __truediv__(self, file: str) -> "Place":
        return Place(os.path.join(self.uri, file))

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
        return os.path.exists(self.uri)

    def is_folder(self) -> bool:
        """Whether there is a folder."""
        return os.path.isdir(self.uri)

    def size(self, file: str = "") -> int:
        """Bytes of ``file``, relative to the root; of the root itself by default.

        Raises:
            FileProblem: as of ``read``.
            InputError: the place is gone.
        """
        descriptor, size = self._open(file)
        os.close(descriptor)
        return size

    def read(self, file: str = "", offset: int = 0, size: int | None = None) -> bytes:
        """Bytes of ``file``, relative to the root; of the root itself by default.

        Args:
            file: its path, with "/" between folders.
            offset: of the first byte.
            size: how many; all that follow by default.

        Raises:
            FileProblem: there is no such file, it is no regular file, or it is shorter.
            InputError: the place is gone or cannot be reached.
        """
        descriptor, file_size = self._open(file)
        try:
            wanted = file_size - offset if size is None else size
            data = bytearray()
            while chunk := os.pread(descriptor, wanted - len(data), offset + len(data)):
                data += chunk
        except OSError as error:
            raise self._problem("cannot be read", str(error.strerror), file) from error
        finally:
            os.close(descriptor)
        if len(data) < wanted:
            detail = f"it has {file_size} bytes, byte {offset + wanted} was asked for"
            raise self._problem("cannot be read", detail, file)
        return bytes(data)

    @contextmanager
    def local(self, file: str = "") -> Iterator[Path]:
        """A path of this machine that holds ``file``: the file itself, else a temporary copy."""
        yield Path(self._path(file))

    def files(self) -> Iterator[FileInfo]:
        """All files, sorted by folder and stem; hidden files and folders are left out.

        A file sorts by its name without the last suffix and a folder by its name with a slash, so
        that files of one stem follow one another. Links are followed. Memory holds the names of
        one folder at each level.

        Raises:
            InputError: there is no such place, or it cannot be listed.
        """
        if self.is_folder():
            yield from _walk(self.uri, "", ())
        else:
            yield FileInfo("", self.size())

    def _path(self, file: str) -> str:
        parts = file.split("/")
        if file.startswith("/") or ".." in parts:
            raise self._problem("escapes", "the path leads out of the folder", file)
        return os.path.join(self.uri, file) if file else self.uri

    def _open(self, file: str) -> tuple[int, int]:
        """A file descriptor and the bytes behind it."""
        path = self._path(file)
        try:
            # reading a pipe would wait for ever
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except ValueError as error:  # a zero byte, or half of a surrogate pair
            raise self._problem("missing", "no file can have this name", file) from error
        except OSError as error:
            if not self.exists():
                raise InputError(
                    f"{self.uri} does not exist: bring it back or name another"
                ) from error
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise self._problem("missing", "there is no such file", file) from error
            raise self._problem("cannot be read", str(error.strerror), file) from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            detail = "it is a folder, a pipe, a socket or a device"
            raise self._problem("not a regular file", detail, file)
        return descriptor, status.st_size

    def _problem(self, problem: str, detail: str, file: str) -> FileProblem:
        where = f"{self.uri}, file {file}" if file else self.uri
        return FileProblem(problem, detail, where)


def _walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[FileInfo]:
    """The files under ``folder``, whose paths start with ``prefix``.

    ``above`` holds device and inode of the folders that led here: a link to one of them is a loop.
    """
    path = prefix.rstrip("/")
    try:
        status = os.stat(folder)
        with os.scandir(folder) as listing:
            found = [entry for entry in listing if not entry.name.startswith(".")]
    except OSError as error:
        if not above:
            raise InputError(f"{folder} cannot be listed: {error.strerror}") from error
        problem = "link loop" if error.errno == errno.ELOOP else "folder cannot be read"
        yield FileInfo(path, problem=problem, detail=str(error.strerror))
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        detail = "the link leads back to a folder above it"
        yield FileInfo(path, problem="link loop", detail=detail)
        return
    if len(above) == DEPTH_LIMIT:
        detail = f"more than {DEPTH_LIMIT} folders deep"
        yield FileInfo(path, problem="folder cannot be read", detail=detail)
        return
    for _, name, is_folder in sorted(map(_sorted_as, found)):
        inside = os.path.join(folder, name)
        if is_folder:
            yield from _walk(inside, f"{prefix}{name}/", (*above, here))
        else:
            yield _info(inside, prefix + name)


def _sorted_as(entry: os.DirEntry[str]) -> tuple[str, str, bool]:
    """What an entry of a folder sorts by, its name, and whether it is a folder."""
    # a link that leads to itself makes DirEntry.is_dir raise
    is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
    return sort_key(entry.name, is_folder), entry.name, is_folder


def sort_key(name: str, is_folder: bool) -> str:
    """The stem of a file; a folder sorts as the stems in it will, with a slash."""
    return f"{name}/" if is_folder else os.path.splitext(name)[0]


def _info(inside: str, path: str) -> FileInfo:
    try:
        status = os.stat(inside)
    except OSError as error:
        if error.errno == errno.ELOOP:
            problem = "link loop"
        else:
            problem = "broken link" if os.path.islink(inside) else "file cannot be read"
        return FileInfo(path, problem=problem, detail=str(error.strerror))
    if not stat.S_ISREG(status.st_mode):
        detail = f"{os.path.splitext(path)[1]} is a pipe, a socket or a device"
        return FileInfo(path, problem="not a regular file", detail=detail)
    return FileInfo(path, status.st_size)
