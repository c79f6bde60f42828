import io
import os
import tarfile
from pathlib import Path

from data_prep.sources import open_source


def fill(folder, **files):
    """Write files named ``sub__name_suffix``: ``__`` is a slash and the last ``_`` a dot."""
    for name, content in files.items():
        path = folder / ".".join(name.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def make_tar(path, *members):
    """An archive of (name, bytes) and of ready-made TarInfo members."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def rows(uri, images=None, max_rows=1000):
    """All rows of a source."""
    source = open_source(uri, images)
    return [row for piece in source.pieces(max_rows) for row in source.rows(piece)]


def problems(uri, images=None):
    return {row.key: row.problem for row in rows(uri, images)}


def files_under(folder: Path):
    return {
        os.path.relpath(os.path.join(where, name), folder)
        for where, _, names in os.walk(folder)
        for name in names
    }
