"""Pictures that say how they were made: text chunks, a visible signature and an invisible mark.

A PNG carries each fact as a text chunk of its name, for people and for other programs, and all of
them once more in the chunk ``daikon``, as JSON, with a hash of the pixels::

    {"schema_version": 1, "facts": {"caption": "a red circle", "seed": 7, ...}, "pixels": "1f0c..."}

Anybody can change or strip text chunks. They tell what an honest maker wrote down; the hash tells
whether these are the pixels that it was written for.
"""

import hashlib
import io
import json
import tomllib
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from pipeline.config import require
from pipeline.console import InputError
from pipeline.environment import ROOT, environment
from pipeline.files import write_bytes
from pipeline.generation.mark import add_mark
from pipeline.generation.signature import add_signature

SCHEMA_VERSION = 1
CHUNK = "daikon"
PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins, and what its last chunk is
END = b"\0\0\0\0IEND\xae\x42\x60\x82"
CONTROLS = ("Cc", "Cs")  # Unicode categories: control characters, halves of surrogate pairs
SIDECAR = "provenance.json"
LARGEST = 1 << 20  # bytes of facts: readers of PNG refuse chunks of a few MiB
LONGEST_NAME = 79  # characters of a chunk's name, by the PNG specification


def write_picture(
    path: Path, image_YXC: np.ndarray, facts: dict[str, Any], *, signature: bool, mark: bool
) -> None:
    """Write a PNG that carries ``facts``; the file has its name when it is whole.

    The facts ``signature`` and ``mark`` are added.

    Args:
        path: in a folder that exists.
        image_YXC: uint8, three colours; not changed.
        facts: JSON values. What is None has no chunk of its own.
        signature: put the visible signature over the lower right corner.
        mark: put the invisible mark into the pixels.

    Raises:
        InputError: facts that no PNG can carry, or a picture too small for what was asked.
    """
    facts = facts | {"signature": signature, "mark": mark}
    _check_names(facts)
    if signature:
        image_YXC = add_signature(image_YXC)
    if mark:
        image_YXC = add_mark(image_YXC)
    info = PngInfo()
    for name, value in facts.items():
        if value is not None:
            info.add_itxt(name, _visible(value if isinstance(value, str) else _json(value)))
    content = {"schema_version": SCHEMA_VERSION, "facts": facts, "pixels": fingerprint(image_YXC)}
    info.add_itxt(CHUNK, _json(content))
    file = io.BytesIO()
    Image.fromarray(image_YXC).save(file, "PNG", pnginfo=info)
    write_bytes(path, file.getvalue())


def fingerprint(image_YXC: np.ndarray) -> str:
    """16 hexadecimal digits that stand for the pixels of a picture, uint8 with three colours."""
    digest = hashlib.sha256(str(image_YXC.shape).encode())
    digest.update(np.ascontiguousarray(image_YXC).data)
    return digest.hexdigest()[:16]


def _check_names(facts: dict[str, Any]) -> None:
    for name in facts:
        fits = name.isascii() and name.isprintable() and name.strip() == name and "  " not in name
        require(
            fits and 0 < len(name) <= LONGEST_NAME and name != CHUNK,
            f"{name!r} cannot be the name of a fact in a PNG: take up to {LONGEST_NAME} printable "
            f"ASCII characters, and not {CHUNK!r}",
        )
    size = len(_json(facts).encode())
    require(
        size <= LARGEST,
        f"the facts of a picture have {size:,} bytes, and {LARGEST:,} are carried; shorten the "
        "caption",
    )


def _json(content: Any, indent: int | None = None) -> str:
    """JSON that is well-formed Unicode, whatever the strings in it hold."""
    try:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=indent)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"a fact about a picture is no JSON value: {error}; write it as a string or a number"
        ) from error
    # half of a surrogate pair becomes \udXXX, which is how JSON spells it
    return text.encode("utf-8", "backslashreplace").decode()


def _visible(text: str) -> str:
    """Text for a chunk of its own: what no chunk may hold is spelled out as in Python."""
    return "".join(
        repr(c)[1:-1] if c != "\n" and unicodedata.category(c) in CONTROLS else c for c in text
    )


def read_facts(path: Path) -> dict[str, Any]:
    """The facts that ``write_picture`` wrote, with their types.

    Raises:
        InputError: the file is missing, no PNG, damaged, or does not carry our chunk.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); name a picture") from error
    require(data.startswith(PNG), f"{path} is no PNG; only those carry how they were made")
    content = read_content(path, data)
    if content is None:
        raise InputError(
            f"{path} does not say how it was made: it has no chunk {CHUNK!r}; it was not drawn "
            "here, or was saved again by a program that drops text"
        )
    return dict(content["facts"])


def read_content(path: Path, data: bytes) -> dict[str, Any] | None:
    """What the chunk ``daikon`` says: ``schema_version``, ``facts`` and ``pixels``.

    Args:
        path: for the sentences.
        data: the file.

    Returns:
        None for a file of another format, and for a PNG without such a chunk.

    Raises:
        InputError: a PNG that is damaged, or whose chunk this code cannot read.
    """
    if not data.startswith(PNG):
        return None
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.verify()  # every chunk, which reading pixels and text alone does not
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            assert isinstance(image, PngImageFile)
            text = image.text.get(CHUNK)  # decodes the picture too
        if END not in data:
            raise EOFError
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise InputError(f"{path} is cut off or damaged") from error
    if text is None:
        return None
    try:
        content = json.loads(text)
        version = content["schema_version"]
        if version == SCHEMA_VERSION:
            kinds = (type(content["facts"]), type(content["pixels"]))
            if kinds != (dict, str):
                raise TypeError(f"facts and pixels are {kinds}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} has a chunk {CHUNK!r} that is not ours ({error})") from error
    require(
        version == SCHEMA_VERSION,
        f"{path} has schema version {version!r}, this code reads {SCHEMA_VERSION}; update the code",
    )
    return dict(content)


def write_sidecar(folder: Path, facts: dict[str, Any]) -> None:
    """Write ``provenance.json``: the facts of a whole request, and the software that served it.

    Args:
        folder: that exists; an older file in it is replaced.
        facts: JSON values: settings, seeds, fingerprints of models. No paths, for they tell nothing
            on another machine, and something about this one.

    Raises:
        InputError: something in ``facts`` is no JSON value.
    """
    content = {"schema_version": SCHEMA_VERSION, "facts": facts, "software": software()}
    write_bytes(folder / SIDECAR, (_json(content, indent=2) + "\n").encode())


def software() -> dict[str, str]:
    """Versions of the project, of what it computes with, and a hash of its code."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"daikon": project["version"], **environment()}
