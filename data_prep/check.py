"""One row of a source: what it is, and whether it may become a sample.

Every picture is decoded here, once, to check, measure and hash it; what a set keeps are the bytes
as they came. Nothing is resized.
"""

import unicodedata
from dataclasses import dataclass
from typing import Any

from data_prep.filters import Filters, judge_caption, judge_size
from data_prep.hashes import HashList, phash
from data_prep.sources import RawPair
from pipeline.data.images import PIXEL_LIMIT, Decoded, ImageError, inspect_image
from pipeline.data.schema import image_sha, split_of

CAPTION_LIMIT = 10_000  # characters
IN_A_TABLE = "the picture stands in a column of a table"


class Reject(Exception):
    """A row that does not become a sample: ``reason`` is counted, ``detail`` is for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Fact:
    """What is known of a row; ``reason`` is empty for one that is accepted.

    ``width`` and ``height`` are pixels of the upright picture, 0 when it was not decoded, and so
    is ``phash``; ``source``, ``file``, ``offset`` and ``size`` tell where its bytes stand.
    """

    key: str
    reason: str = ""
    detail: str = ""
    caption: str = ""
    width: int = 0
    height: int = 0
    image_sha: bytes = bytes(16)
    phash: int = 0
    notes: tuple[str, ...] = ()
    is_val: bool = False
    source: int = 0
    file: str = ""
    offset: int = 0
    size: int = 0
    thumbnail: str = ""


def clean_caption(data: bytes) -> tuple[str, tuple[str, ...]]:
    """A caption on one line, and notes ("control characters stripped") about it.

    A byte order mark is dropped, runs of white space become one space, and other control characters
    go: the tokenizer would spend its vocabulary on them. Its case stays as it is.

    Raises:
        Reject: "caption empty", "caption blank", "caption not UTF-8" or "caption too long".
    """
    if not data:
        raise Reject("caption empty", "0 bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Reject("caption not UTF-8", f"byte {error.start}: {error.reason}") from error
    kept = [c for c in text if c.isspace() or unicodedata.category(c) != "Cc"]
    caption = " ".join("".join(kept).split())
    if not any(_is_read(c) for c in caption):
        raise Reject("caption blank", "nothing but white space, control and invisible characters")
    if len(caption) > CAPTION_LIMIT:
        raise Reject("caption too long", f"{len(caption)} characters, the limit is {CAPTION_LIMIT}")
    return caption, ("control characters stripped",) if len(kept) < len(text) else ()


def _is_read(char: str) -> bool:
    """Whether the tokenizer may keep a character: not spaces, joiners and marks for the unknown."""
    return not char.isspace() and unicodedata.category(char) != "Cf" and char not in "\u2581\ufffd"


def check_row(
    pair: RawPair,
    source: int,
    filters: Filters,
    val_fraction: float,
    excluded: HashList | None,
    must_refer: bool = False,
) -> tuple[Fact, Decoded | None]:
    """The facts of a row, and its picture when it could be decoded.

    ``must_refer`` refuses pictures that stand in no file of their own.

    The cheapest checks come first, so a row has the first reason that is found.
    """
    facts: dict[str, Any] = {
        "key": pair.key,
        "source": source,
        "file": pair.file,
        "offset": pair.offset,
    }
    decoded = None
    try:
        if pair.problem is not None or pair.caption is None or pair.image is None:
            raise Reject(pair.problem or "caption missing", pair.detail)
        if must_refer and not pair.file:
            raise Reject("cannot be referred to (without --reference it is kept)", IN_A_TABLE)
        facts["size"] = len(pair.image)
        facts["caption"], notes = clean_caption(pair.caption)
        _refuse(judge_caption(facts["caption"], filters))
        facts["image_sha"] = image_sha(pair.image)
        try:
            decoded = inspect_image(pair.image)
        except ImageError as error:
            raise Reject(error.reason, error.detail) from error
        height, width = decoded.height, decoded.width
        facts |= {"width": width, "height": height}
        _refuse(judge_size(width, height, filters))
        facts["phash"] = phash(decoded.luma)
        if excluded and (found := excluded.matches(facts["image_sha"], facts["phash"])):
            raise Reject("in the list of excluded pictures", found)
        facts["notes"] = notes + decoded.notes
        if (short := min(height, width)) < filters.image_size:
            facts["notes"] += (f"smaller than {filters.image_size}: enlarged when read",)
            _refuse(_judge_enlarged(height, width, filters.image_size / short))
        facts["is_val"] = split_of(pair.group or pair.key, val_fraction) == "val"
    except Reject as reject:
        facts |= {"reason": reject.reason, "detail": reject.detail}
    return Fact(**facts), decoded


def _judge_enlarged(height: int, width: int, scale: float) -> tuple[str, str] | None:
    height, width = round(height * scale), round(width * scale)
    if height * width <= PIXEL_LIMIT:
        return None
    return "too long to be enlarged", f"it would have {width}x{height} pixels"


def _refuse(verdict: tuple[str, str] | None) -> None:
    if verdict is not None:
        raise Reject(*verdict)
