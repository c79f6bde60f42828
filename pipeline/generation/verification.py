"""What picture files say of their origin, a line a file: text chunks, pixels, invisible mark."""

import argparse
import sys
from pathlib import Path
from typing import Any

from pipeline.console import InputError, a_path, printable
from pipeline.data.images import decode_image
from pipeline.generation.mark import Finding, find_mark
from pipeline.generation.provenance import fingerprint, read_content

EXCERPT = 80  # characters of a caption
DIGITS = 19  # of a seed at most; of a fingerprint they do
SHOWN = ("model", "dvae", "tokenizer", "clip", "seed")  # facts that a line shows, where they are
SAYS, SILENT, UNREADABLE = 0, 1, 2  # exit codes

DESCRIPTION = """Say of PNG, JPEG and other picture files whether they were drawn here.

A file is told by its text chunks, which saving it again may drop, or by the invisible mark in its
pixels, which lives through JPEG and cropping but not through scaling. Neither is proof: chunks can
be written and marks be put by anybody.

Exit code 0: every file carries chunks or the mark; 1: one carries neither; 2: one cannot be read.
"""


def verify_main(argv: list[str]) -> int:
    """The command ``pipeline.sample verify FILE ...``; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="pipeline.sample verify",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=a_path, metavar="FILE", help="a picture")
    return verify(parser.parse_args(argv).files)


def verify(paths: list[Path]) -> int:
    """Write a line about each file to standard output, also after one that cannot be read.

    Returns:
        0 when every file carries text chunks or the mark, 1 when one carries neither, 2 when one
        cannot be read.
    """
    worst = SAYS
    for path in paths:
        try:
            code, line = _examine(path)
        except InputError as error:
            code, line = UNREADABLE, f"cannot be read ({error})"
        worst = max(worst, code)
        sys.stdout.write(printable(f"{path}: {line}") + "\n")
    return worst


def _examine(path: Path) -> tuple[int, str]:
    """Exit code and words of one file.

    Raises:
        InputError: it is no picture that can be decoded to its end.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(str(error.strerror)) from error
    pixels = decode_image(data)
    finding = find_mark(pixels)
    content = read_content(path, data)
    if content is None:
        code = SAYS if finding.found else SILENT
        return code, f"no text of ours; {_mark(finding)}"
    same = fingerprint(pixels) == content["pixels"]
    state = "pixels as written" if same else "pixels changed since"
    return SAYS, f"{_facts(content['facts'])}; {state}; {_mark(finding)}"


def _facts(facts: dict[str, Any]) -> str:
    caption = str(facts.get("caption", ""))
    cut = caption if len(caption) <= EXCERPT else caption[: EXCERPT - 1] + "…"
    shown = [f"{name} {str(facts[name])[:DIGITS]}" for name in SHOWN if facts.get(name) is not None]
    return ", ".join([*([f'"{cut}"'] if cut else []), *shown]) or "text chunks"


def _mark(finding: Finding) -> str:
    state = "mark found" if finding.found else "no mark"
    return f"{state} ({finding.matched} of {finding.of} bits, chance {finding.chance:.1e})"
