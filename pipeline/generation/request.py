"""What is to be drawn: captions, how many pictures of each, and the seed of every one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.console import InputError


@dataclass(frozen=True)
class Order:
    """One picture to be made."""

    caption: str
    caption_index: int
    image_index: int  # among the pictures of its caption
    index: int  # among all pictures
    seed: int

    @property
    def file(self) -> str:
        """Name of the PNG."""
        return f"{self.caption_index:05d}-{self.image_index:03d}.png"


def orders_of(captions: Sequence[str], count: int, seed: int) -> list[Order]:
    """``count`` pictures of each caption, seeds counted on from ``seed`` over all of them."""
    return [
        Order(caption, c, i, index=c * count + i, seed=seed + c * count + i)
        for c, caption in enumerate(captions)
        for i in range(count)
    ]


def read_captions(path: Path) -> list[str]:
    """The captions of a UTF-8 file, one a line.

    Raises:
        InputError: an empty caption, or a file that is missing, empty or no text.
    """
    try:
        # utf-8-sig: files from Windows may start with a byte order mark
        text = path.read_text(encoding="utf-8-sig").rstrip()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason}; convert it") from error
    if not text:
        raise InputError(f"{path} is empty; write one caption a line")
    captions = [line.strip() for line in text.split("\n")]
    if "" in captions:
        raise InputError(f"{path} has no caption in line {captions.index('') + 1}; delete the line")
    return captions
