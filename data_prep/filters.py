"""Which captions and pictures are taken: the filters of the paper, and a user's own.

The paper keeps a pair unless the caption is too short, not English or mostly boilerplate, or the
picture's aspect ratio is outside [1/2, 2]. Its language detector, cld3, calls every tenth of 2,000
English captions foreign; py3langid every two-hundredth.

Each filter is a pure function. Reasons are few and stable, for they are counted; each names the
flag that keeps such rows, where there is one. Nothing here judges what a picture shows: for that
there are the word list and ``load_score``.
"""

import argparse
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from py3langid.langid import MODEL_FILE, LanguageIdentifier  # type: ignore[import-untyped]

from data_prep.boilerplate import is_boilerplate
from pipeline.console import InputError, a_path
from pipeline.data.images import Pixels
from pipeline.plugin import blame, load_function

MIN_SIDE = 8  # pixels: what is smaller shows nothing, enlarged or not
CONFIDENT = 0.5  # probability from which a caption in Latin letters is foreign
FAR_BEHIND = 20  # times that English is less probable then
MAX_REASONS = 100  # of a user's score
MAX_REASON = 100  # characters of one
LATIN_END = "\u0250"
TOKEN = re.compile(r"\w+")
# scripts that put no blanks between words: Thai, Lao, Burmese, Khmer, kana and ideographs
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U000323af]"
)

Verdict = tuple[str, str] | None  # reason and detail of a filter that refuses
Score = Callable[[list[Pixels], list[str]], list[str | None]]


@dataclass(frozen=True)
class Filters:
    """What a set takes; ``dataclasses.asdict`` gives JSON values.

    Args:
        image_size: pixels a side that training crops; the least side of a picture.
        upscale: take smaller ones too, down to ``MIN_SIDE``.
        min_words: of a caption; 0 and 1 take any.
        english: leave out other languages.
        boilerplate: leave out captions without a word about the picture.
        max_aspect: the longer side over the shorter, at most; 0 takes any.
        words: no caption holds any of them; see ``load_words``.

    Raises:
        InputError: a number that is out of its bounds.
    """

    image_size: int = 256
    upscale: bool = False
    min_words: int = 2
    english: bool = True
    boilerplate: bool = True
    max_aspect: float = 2.0
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", tuple(self.words))  # JSON gives lists
        if self.image_size < MIN_SIDE:
            raise InputError(
                f"image size {self.image_size} is below {MIN_SIDE} pixels: take a larger one"
            )
        if self.min_words < 0:
            raise InputError(f"--min-words {self.min_words} is below 0, which takes any caption")
        if self.max_aspect != 0 and not 1 <= self.max_aspect < float("inf"):
            raise InputError(
                f"--max-aspect {self.max_aspect} is below 1, the aspect ratio of a square; "
                "0 takes any"
            )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that the reasons name; ``filters_of`` reads them."""
    default = Filters()
    group = parser.add_argument_group("filters")
    group.add_argument(
        "--min-words", type=int, default=default.min_words, metavar="N",
        help=f"leave out shorter captions (default: {default.min_words})",
    )  # fmt: skip
    group.add_argument(
        "--any-language", action="store_true", help="keep captions that are not English"
    )
    group.add_argument(
        "--keep-boilerplate", action="store_true",
        help='keep captions such as "photographed on 12 May 2008" and "IMG_1234"',
    )  # fmt: skip
    group.add_argument(
        "--max-aspect", type=float, default=default.max_aspect, metavar="R",
        help=f"leave out longer pictures; 0 keeps all (default: {default.max_aspect:g})",
    )  # fmt: skip
    group.add_argument(
        "--upscale", action="store_true",
        help="keep pictures smaller than the image size, to be enlarged when they are read",
    )  # fmt: skip
    group.add_argument(
        "--words", type=a_path, metavar="FILE",
        help="leave out captions with a word of this list, one a line",
    )  # fmt: skip


def filters_of(args: argparse.Namespace, image_size: int) -> Filters:
    """The filters that flags ask for.

    Raises:
        InputError: a number out of its bounds, or a word list that cannot be used.
    """
    return Filters(
        image_size=image_size,
        upscale=args.upscale,
        min_words=args.min_words,
        english=not args.any_language,
        boilerplate=not args.keep_boilerplate,
        max_aspect=args.max_aspect,
        words=() if args.words is None else load_words(args.words),
    )


def judge_caption(caption: str, filters: Filters) -> Verdict:
    """Reason and detail of the first filter that refuses a caption, the cheapest first; or None."""
    return (
        judge_length(caption, filters.min_words)
        or (judge_words(caption, filters.words) if filters.words else None)
        or (judge_boilerplate(caption) if filters.boilerplate else None)
        or (judge_language(caption) if filters.english else None)
    )


def judge_size(width: int, height: int, filters: Filters) -> Verdict:
    """Reason and detail of the first filter that refuses a picture of so many pixels; or None."""
    return judge_side(width, height, filters.image_size, filters.upscale) or judge_aspect(
        width, height, filters.max_aspect
    )


def judge_length(caption: str, min_words: int) -> Verdict:
    """Refuse captions of fewer words than ``min_words``."""
    if (n := count_words(caption)) >= min_words:
        return None
    return (
        f"caption under {min_words} words (--min-words lowers that)",
        f"{n} in {_excerpt(caption)}",
    )


def count_words(caption: str) -> int:
    """Words between blanks that hold a letter or digit; Chinese, Japanese and Thai by letter."""
    n = len(UNSPACED.findall(caption))
    if n:
        caption = UNSPACED.sub(" ", caption)
    return n + sum(any(c.isalnum() for c in word) for word in caption.split())


def judge_words(caption: str, words: tuple[str, ...]) -> Verdict:
    """Refuse captions with a word, or several in a row, of the user's list."""
    tokens = _tokens(caption)
    for n, listed in _by_length(words).items():
        for i in range(len(tokens) - n + 1):
            if tokens[i : i + n] in listed:
                return "a word of the --words list", f"{' '.join(tokens[i : i + n])!r}"
    return None


def _tokens(text: str) -> tuple[str, ...]:
    return tuple(TOKEN.findall(unicodedata.normalize("NFKC", text).casefold()))


@lru_cache(maxsize=4)
def _by_length(words: tuple[str, ...]) -> dict[int, frozenset[tuple[str, ...]]]:
    """The entries of a word list by how many words they have."""
    entries = {_tokens(word) for word in words}
    return {n: frozenset(e for e in entries if len(e) == n) for n in sorted(set(map(len, entries)))}


def load_words(path: str | Path) -> tuple[str, ...]:
    """The entries of a word list: one a line, empty lines and lines from ``#`` on left out.

    Whole words count, in any case: "cat" finds "Cat's" and "cat-like", not "cats" nor "scatter". An
    entry of several words finds them in a row.

    Raises:
        InputError: the file cannot be read, has no entry, or one without a letter or digit.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"word list {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"word list {path} is not UTF-8 ({error.reason}): save it so") from error
    words = []
    for number, line in enumerate(lines, 1):
        if not (entry := line.partition("#")[0].strip()):
            continue
        if not _tokens(entry):
            raise InputError(
                f"word list {path}, line {number}: {entry!r} holds no letter or digit, so no "
                "caption would match: delete the line"
            )
        words.append(entry)
    if not words:
        raise InputError(f"word list {path} is empty: it would keep nothing out")
    return tuple(dict.fromkeys(words))


def judge_boilerplate(caption: str) -> Verdict:
    """Refuse captions that ``is_boilerplate`` knows."""
    if not is_boilerplate(caption):
        return None
    return "boilerplate caption (--keep-boilerplate keeps it)", _excerpt(caption)


def judge_language(caption: str) -> Verdict:
    """Refuse captions that are not English.

    Detectors are weak on a few words and on names, so what is written in Latin letters is refused
    only when it is confidently foreign. Of 71 English captions one is refused; of 38 sentences in
    22 other languages none is taken, of 15 phrases of two to four words nine are.
    """
    detector = _detector()
    language, probability = detector.classify(caption)
    if language == "en":
        return None
    if all(c < LATIN_END or not c.isalpha() for c in caption):
        english = dict(detector.rank(caption))["en"]
        if probability < CONFIDENT or english * FAR_BEHIND >= probability:
            return None
    detail = f"{language}, probability {probability:.2f}: {_excerpt(caption)}"
    return "not English (--any-language keeps it)", detail


@lru_cache(maxsize=1)
def _detector() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def judge_side(width: int, height: int, image_size: int, upscale: bool) -> Verdict:
    """Refuse pictures that are smaller than what training crops."""
    side = min(width, height)
    detail = f"{width}x{height} pixels"
    if side < MIN_SIDE:
        return f"side below {MIN_SIDE}", detail
    if side < image_size and not upscale:
        return f"side below {image_size} (--upscale keeps it)", detail
    return None


def judge_aspect(width: int, height: int, max_aspect: float) -> Verdict:
    """Refuse pictures much longer than wide, or wider than long."""
    if max_aspect == 0 or max(width, height) <= max_aspect * min(width, height):
        return None
    reason = f"aspect ratio outside [1/{max_aspect:g}, {max_aspect:g}] (--max-aspect 0 keeps it)"
    return reason, f"{width}x{height} pixels"


def _excerpt(caption: str) -> str:
    return repr(caption if len(caption) <= 80 else caption[:79] + "…")


def _is_a_reason(reason: object) -> bool:
    """Whether it can be counted and printed: a few words, nothing that moves a terminal."""
    return (
        isinstance(reason, str)
        and bool(reason.strip())
        and reason.isprintable()
        and len(reason) <= MAX_REASON
    )


def load_score(spec: str) -> Score:
    """The user's own filter, ``FILE.py:FUNCTION``.

    The function takes a list of pictures uint8 [H, W, 3] of any sizes and a list of their captions,
    and gives a list as long: None for a pair to keep, else the reason to leave it out. Reasons are
    counted, so they are few. It should not depend on how pairs come together.

    Returns:
        The function, which raises an InputError where the user's code raises anything or gives
        something else.

    Raises:
        InputError: no such file or function, or the file cannot be run.
    """
    function = load_function(spec, "score")
    given: set[str | None] = set()

    def score(pictures: list[Pixels], captions: list[str]) -> list[str | None]:
        try:
            reasons = function(pictures, captions)
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # the code is the user's: it may raise anything
            raise InputError(f"score {spec!r} fails: {blame(error, spec)}") from error
        if not isinstance(reasons, list) or len(reasons) != len(pictures):
            got = f"a list of {len(reasons)}" if isinstance(reasons, list) else repr(reasons)[:80]
            raise InputError(
                f"score {spec!r} gives {got} for {len(pictures)} pictures; it gives a list as "
                "long, of reasons to leave a picture out and None"
            )
        for reason in reasons:
            if reason is not None and not _is_a_reason(reason):
                raise InputError(
                    f"score {spec!r} gives {repr(reason)[:80]}; it gives None to keep a picture, "
                    "else the reason to leave it out in a few words"
                )
            given.add(reason)
        if len(given) > MAX_REASONS:
            raise InputError(
                f"score {spec!r} gives more than {MAX_REASONS} different reasons, such as "
                f"{max(filter(None, given))!r}; they are counted: leave numbers out of them"
            )
        return reasons

    return score
