"""Lists of the files of folders and buckets, in one order and with what is wrong with them."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.console import InputError

DEPTH_LIMIT = 64  # folders within folders


@dataclass(frozen=True)
class FileInfo:
    """A file of a place: its path relative to the root ("/" between folders) and its bytes.

    ``problem`` is None, or why the listing could not say more: "broken link", "link loop",
    "not a regular file", "file cannot be read", "folder cannot be read". The path of a folder that
    cannot be listed ends with a slash.
    """

    path: str
    size: int = 0
    problem: str | None = None
    detail: str = ""


def walk_folder(folder: str) -> Iterator[FileInfo]:
    """The files of a folder of this machine, ordered as of ``Place.files``.

    Raises:
        InputError: the folder cannot be listed.
    """
    return _walk_folder(folder, "", ())


def walk_bucket(
    entries: Callable[[str], list[tuple[str, bool, int]]], prefix: str = "", depth: int = 0
) -> Iterator[FileInfo]:
    """The files of a bucket, in the same order.

    Args:
        entries: name, whether it is a folder, and bytes of what a folder holds; its path is
            relative to the root.
        prefix: of the paths to list, "" or with a slash at its end.
        depth: folders above.
    """
    if depth == DEPTH_LIMIT:
        yield _too_deep(prefix)
        return
    found = sorted(
        (sort_key(name, is_folder), name, is_folder, size)
        for name, is_folder, size in entries(prefix.rstrip("/"))
    )
    for _, name, is_folder, size in found:
        if not name:
            detail = "names with two slashes cannot be read: rename them"
            yield FileInfo(f"{prefix}/", problem="folder cannot be read", detail=detail)
        elif name.startswith("."):
            continue
        elif is_folder:
            yield from walk_bucket(entries, f"{prefix}{name}/", depth + 1)
        else:
            yield FileInfo(prefix + name, size)


def sort_key(name: str, is_folder: bool) -> str:
    """The stem of a file; a folder sorts as the stems in it will, with a slash."""
    return f"{name}/" if is_folder else os.path.splitext(name)[0]


def _too_deep(prefix: str) -> FileInfo:
    detail = f"more than {DEPTH_LIMIT} folders deep"
    return FileInfo(prefix, problem="folder cannot be read", detail=detail)


def _walk_folder(
    folder: str, prefix: str, above: tuple[tuple[int, int], ...]
) -> Iterator[FileInfo]:
    """The files under ``folder``, whose paths start with ``prefix``.

    ``above`` holds device and inode of the folders that led here: a link to one of them is a loop.
    """
    try:
        status = os.stat(folder)
        with os.scandir(folder) as listing:
            found = [entry for entry in listing if not entry.name.startswith(".")]
    except OSError as error:
        if not above:
            raise InputError(f"{folder} cannot be listed: {error.strerror}") from error
        problem = "link loop" if error.errno == errno.ELOOP else "folder cannot be read"
        yield FileInfo(prefix, problem=problem, detail=str(error.strerror))
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        detail = "the link leads back to a folder above it"
        yield FileInfo(prefix, problem="link loop", detail=detail)
        return
    if len(above) == DEPTH_LIMIT:
        yield _too_deep(prefix)
        return
    for _, name, is_folder in sorted(map(_sorted_as, found)):
        inside = os.path.join(folder, name)
        if is_folder:
            yield from _walk_folder(inside, f"{prefix}{name}/", (*above, here))
        else:
            yield _info(inside, prefix + name)


def _sorted_as(entry: os.DirEntry[str]) -> tuple[str, str, bool]:
    """What an entry of a folder sorts by, its name, and whether it is a folder."""
    # a link that leads to itself makes DirEntry.is_dir raise
    is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
    return sort_key(entry.name, is_folder), entry.name, is_folder


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
