"""Where pairs come from: folders of pictures with text files beside them, and WebDataset archives.

A pair is a picture and a ``.txt`` of the same path but for the last suffix; that path, relative to
the source, is its key. Archives in a folder count as the folder that they lie in. Nothing is
unpacked: a member is read where it stands. Memory holds the names of one folder or one archive,
and one pair.

Files that are neither picture nor caption, and hidden ones, are no rows.
"""

import errno
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import groupby
from pathlib import Path

from data_prep.sources.rows import CAPTION_LIMIT, IMAGE_LIMIT, IMAGE_SUFFIXES, RawPair
from pipeline.console import InputError

DEPTH_LIMIT = 64  # folders within folders
TAR_BLOCK = 512
TAR_RECORD = 10_240  # archives are padded to this


@dataclass(frozen=True)
class _File:
    """A file of a folder, or a member of an archive: ``size`` bytes at ``offset`` of ``path``.

    ``stem`` and ``suffix`` (lower case) make its name, relative to the source.
    """

    stem: str
    suffix: str
    path: str
    size: int = 0
    offset: int = 0
    n_bytes: int = 0
    archive: str = ""  # the path of the archive that it lies in
    problem: str | None = None
    detail: str = ""


def all_rows(path: str | Path) -> Iterator[RawPair]:
    """All rows of a folder tree or of one ``.tar``, sorted by key (by archive first).

    Raises:
        InputError: there is nothing at ``path``, or a file that is no ``.tar``.
    """
    for _, same_stem in groupby(_files(path), key=lambda file: (file.archive, file.stem)):
        yield _pair(list(same_stem))


def survey(path: str | Path) -> tuple[int, str]:
    """Size of a source in bytes, and a sha256 over names and sizes of its files; nothing is read.

    The size is the sum of ``RawPair.n_bytes`` but for the padding of archives.

    Raises:
        InputError: there is nothing at ``path``, or a file that is no ``.tar``.
    """
    total, digest = 0, sha256()
    for file in _files(path, look_into_archives=False):
        total += file.n_bytes
        digest.update(f"{file.stem}{file.suffix}\0{file.size}\n".encode(errors="surrogateescape"))
    return total, digest.hexdigest()


def _files(path: str | Path, look_into_archives: bool = True) -> Iterator[_File]:
    """The files of a source; files of one stem follow one another."""
    root = os.fspath(path)
    if os.path.isdir(root):
        yield from _walk(root, "", (), look_into_archives)
    elif not os.path.exists(root):
        raise InputError(f"source {root} does not exist: name a folder or a .tar archive")
    elif not root.lower().endswith(".tar"):
        raise InputError(f"source {root} is neither a folder nor a .tar archive: unpack it first")
    elif look_into_archives:
        yield from _members(root, "")
    else:
        size = os.path.getsize(root)
        yield _File(os.path.basename(root), "", root, size, n_bytes=size)


# ---- folders


def _walk(
    folder: str, prefix: str, above: tuple[tuple[int, int], ...], look_into_archives: bool
) -> Iterator[_File]:
    """The files under ``folder``, whose names start with ``prefix``, in the order of their stems.

    ``above`` holds device and inode of the folders that led here: a link to one of them is a loop.
    """
    try:
        status = os.stat(folder)
        with os.scandir(folder) as listing:
            found = [entry for entry in listing if not entry.name.startswith(".")]
    except OSError as error:
        loop = error.errno == errno.ELOOP
        problem = "link loop" if loop else "folder cannot be read"
        yield _File(prefix.rstrip("/"), "", folder, problem=problem, detail=str(error.strerror))
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        detail = "the link leads back to a folder above it"
        yield _File(prefix.rstrip("/"), "", folder, problem="link loop", detail=detail)
        return
    if len(above) == DEPTH_LIMIT:
        detail = f"more than {DEPTH_LIMIT} folders deep"
        yield _File(prefix.rstrip("/"), "", folder, problem="folder cannot be read", detail=detail)
        return
    for stem, name, path in sorted(map(_sorted_as, found)):
        suffix = os.path.splitext(name)[1].lower()
        if stem.endswith("/"):
            yield from _walk(path, prefix + stem, (*above, here), look_into_archives)
        elif suffix == ".tar" and look_into_archives and os.path.isfile(path):
            yield from _members(path, prefix)
        elif suffix == ".txt" or suffix in IMAGE_SUFFIXES or suffix == ".tar":
            yield _of_folder(path, prefix + stem, suffix)


def _sorted_as(entry: os.DirEntry[str]) -> tuple[str, str, str]:
    """What an entry of a folder sorts by (its stem), its name and its path.

    A folder sorts as the stems in it will, with a slash. An archive keeps its suffix, so that it
    does not come between a picture and its caption.
    """
    # a link that leads to itself makes DirEntry.is_dir raise
    is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
    stem, suffix = os.path.splitext(entry.name)
    if is_folder:
        stem = entry.name + "/"
    elif suffix.lower() == ".tar":
        stem = entry.name
    return stem, entry.name, entry.path


def _of_folder(path: str, stem: str, suffix: str) -> _File:
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            problem = "link loop"
        else:
            problem = "broken link" if os.path.islink(path) else "file cannot be read"
        return _File(stem, suffix, path, problem=problem, detail=str(error.strerror))
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        detail = f"{suffix} is a pipe, a socket or a device"
        return _File(stem, suffix, path, problem="not a regular file", detail=detail)
    return _File(stem, suffix, path, status.st_size, n_bytes=status.st_size)


# ---- archives


def _members(path: str, prefix: str) -> Iterator[_File]:
    """The pictures and captions of an archive sorted by stem, then what ails the archive itself.

    An archive that hides rows which nobody can count has one row of its own, named after its file.
    """
    files: list[_File] = []
    # an archive has a row of its own when something in it is lost, named after its file
    try:
        with tarfile.open(path, "r:", errors="surrogateescape") as tar:
            file_size = os.path.getsize(path)
            while (member := tar.next()) is not None:
                taken = tar.offset - member.offset
                if file := _of_archive(path, prefix, member, taken, file_size):
                    files.append(file)
            end = tar.offset
        problem, detail = _look_behind(path, end)
    except Exception as error:  # a damaged header makes tarfile raise nearly anything
        detail = f"after {len(files)} files: {error}"
        if "unexpected end" in detail or "truncated" in detail:
            problem = "truncated archive"
        else:
            problem = "damaged archive" if files else "not a tar archive"
    yield from sorted(files, key=lambda file: file.stem)
    if problem:
        name = prefix + os.path.basename(path)
        yield _File(name, "", path, archive=path, problem=problem, detail=detail)


def _of_archive(
    path: str, prefix: str, member: tarfile.TarInfo, taken: int, file_size: int
) -> _File | None:
    """A member as a file; None for folders, hidden files, and neither picture nor caption."""
    name = member.name.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if member.isdir():
        return None
    if name.startswith("/") or ".." in parts or name[1:2] == ":":
        detail = f"the archive names {member.name!r}"
        file = _File(os.path.splitext(member.name)[0], "", path, n_bytes=taken, archive=path)
        return replace(file, problem="path escapes the archive", detail=detail)
    if not parts or any(part.startswith(".") for part in parts):
        return None
    stem, suffix = os.path.splitext("/".join(parts))
    suffix = suffix.lower()
    file = _File(prefix + stem, suffix, path, member.size, member.offset_data, taken, path)
    if not member.isreg() or member.issparse():
        detail = f"{member.name!r} is a link, a device or a sparse file"
        return replace(file, problem="not a regular file", detail=detail)
    if suffix != ".txt" and suffix not in IMAGE_SUFFIXES:
        return None
    if (missing := member.offset_data + member.size - file_size) > 0:
        detail = f"{suffix} lacks its last {missing} bytes"
        return replace(file, problem="truncated archive", detail=detail)
    return file


def _look_behind(path: str, end: int) -> tuple[str | None, str]:
    """Problem and detail of an archive whose last readable header ended before ``end``.

    ``tarfile`` takes a damaged header, and the end of the file, for the end of the archive.
    """
    with open(path, "rb") as file:
        file.seek(end)
        behind = file.read(TAR_RECORD + TAR_BLOCK)
    if len(behind) < TAR_BLOCK:
        return "truncated archive", "the file ends without an end marker"
    if any(behind[:TAR_BLOCK]):
        return "damaged archive", f"no header can be read at byte {end}"
    if any(behind):
        return "damaged archive", f"more follows its end at byte {end}: joined archives?"
    return None, ""


# ---- pairs


def _pair(files: list[_File]) -> RawPair:
    """The row that files of one stem make."""
    stem, n_bytes = files[0].stem, sum(file.n_bytes for file in files)
    problem, detail = _problem_of(files)
    contents: dict[bool, bytes] = {}
    if problem is None:
        for file in files:
            try:
                content = _read(file)
            except OSError as error:
                problem, detail = "file cannot be read", f"{file.suffix}: {error.strerror}"
                break
            if len(content) < file.size:
                problem, detail = "file cannot be read", f"{file.suffix} shrank while it was read"
                break
            contents[file.suffix == ".txt"] = content
    # a key goes to ledgers and shards, which are UTF-8
    key = stem.encode(errors="backslashreplace").decode()
    if problem is not None:
        return RawPair(key, None, None, problem, detail, n_bytes)
    return RawPair(key, contents[False], contents[True], n_bytes=n_bytes)


def _problem_of(files: list[_File]) -> tuple[str | None, str]:
    """Why files of one stem make no pair, seen before any of them is read."""
    for file in files:
        if file.problem is not None:
            return file.problem, file.detail
    try:
        files[0].stem.encode()
    except UnicodeEncodeError:
        return "file name not UTF-8", "rename it"
    captions = [file for file in files if file.suffix == ".txt"]
    images = [file for file in files if file.suffix != ".txt"]
    if len(images) > 1:
        return "several images of one name", " ".join(file.suffix for file in images)
    if len(captions) > 1:
        return "several captions of one name", "suffixes that differ in case"
    if not captions:
        return "caption missing", f"no .txt beside the {images[0].suffix}"
    if not images:
        return "image missing", "no picture beside the .txt"
    if captions[0].size > CAPTION_LIMIT:
        return "caption too long", f"{captions[0].size} bytes, the limit is {CAPTION_LIMIT}"
    if images[0].size > IMAGE_LIMIT:
        return "image file too large", f"{images[0].size} bytes, the limit is {IMAGE_LIMIT}"
    return None, ""


def _read(file: _File) -> bytes:
    with open(file.path, "rb") as source:
        source.seek(file.offset)
        return source.read(file.size)
