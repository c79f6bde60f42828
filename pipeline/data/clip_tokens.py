"""Captions as CLIP reads them: tokens, the end of text behind them, and zeros.

Two vocabularies lie beside CLIP's weights, and are one to who reads captions: the transformer's
own tokenizer with a token more, or the byte pairs of OpenAI's CLIP, which open_clip took over.
"""

import gzip
import html
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Library
from torch import Tensor

from pipeline.config import ClipConfig
from pipeline.console import InputError
from pipeline.data.tokenizer import Tokenizer
from pipeline.files import write_bytes

BYTE_PAIRS = "byte_pairs.json"  # the library's own format
N_BYTES = 2 * 256  # each byte inside a word, and as its end
WORD_END = "</w>"
# github.com/openai/CLIP, simple_tokenizer.py; text is lower-cased before
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# what ftfy makes plain there: curled quotes, ligatures, letters of other widths
QUOTES = str.maketrans("\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "''''\"\"\"\"")
FORMS = re.compile("[\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb06\u3000\uff01-\uffef]")


class ClipTokens(ABC):
    """Captions to the tokens of a model.

    Attributes:
        fingerprint: of the vocabulary.
    """

    fingerprint: str

    def __init__(self, config: ClipConfig) -> None:
        self.n_text, self.end = config.n_text, config.end_of_text

    def encode_batch(self, captions: Sequence[str]) -> Tensor:
        """int64 [B, n_text]: tokens, at most ``n_text - 1``; the end of text; zeros."""
        tokens = np.zeros((len(captions), self.n_text), np.int64)
        for row, ids in zip(tokens, self._ids(captions), strict=True):
            kept = ids[: self.n_text - 1]
            row[: len(kept)], row[len(kept)] = kept, self.end
        return torch.from_numpy(tokens)

    @abstractmethod
    def _ids(self, captions: Sequence[str]) -> list[list[int]]:
        """All tokens of captions of any length, below the end of text."""

    @abstractmethod
    def copy_to(self, folder: Path) -> None:
        """Put the vocabulary into ``folder``, which is made when missing."""


class OwnTokens(ClipTokens):
    """Those of ``data_prep.train_tokenizer``.

    Raises:
        InputError: more pieces than the model has tokens, its end of text not counted.
    """

    def __init__(self, folder: str | Path, config: ClipConfig) -> None:
        super().__init__(config)
        self._tokenizer = Tokenizer(folder)
        self.fingerprint = self._tokenizer.fingerprint
        if self._tokenizer.n_vocab > self.end:
            raise InputError(
                f"the tokenizer has {self._tokenizer.n_vocab} pieces, the model has room for "
                f"{self.end} and the end of text; train the tokenizer with --vocab {self.end}"
            )

    def _ids(self, captions: Sequence[str]) -> list[list[int]]:
        return self._tokenizer.encode_batch(captions)

    def copy_to(self, folder: Path) -> None:
        """Both files."""
        self._tokenizer.copy_to(folder)


class BytePairs(ClipTokens):
    """Those of OpenAI's CLIP and of open_clip.

    Text is cleaned as theirs is (``cleaned``), but for what their library (ftfy) guesses of bytes
    that were decoded wrongly: they stay as they are. A caption that holds the name of a special
    token is text like others.

    Args:
        content: what ``read_vocabulary`` gives, or ``copy_to`` has written.
        config: of the model.
    """

    def __init__(self, content: str, config: ClipConfig) -> None:
        super().__init__(config)
        self._content = content
        self._library = Library.from_str(content)
        self.start = self.end - 1
        self.fingerprint = sha256(content.encode()).hexdigest()
        if self._library.get_vocab_size() != self.start:
            raise InputError(
                f"the vocabulary has {self._library.get_vocab_size()} pieces, the model "
                f"{self.start} and two that mark start and end; take the vocabulary that the "
                "weights were trained with"
            )

    def _ids(self, captions: Sequence[str]) -> list[list[int]]:
        made = self._library.encode_batch([cleaned(caption) for caption in captions])
        # cut before the end of text is put behind
        return [[self.start, *one.ids] for one in made]

    def copy_to(self, folder: Path) -> None:
        """One file."""
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / BYTE_PAIRS, self._content.encode())


def cleaned(caption: str) -> str:
    """A caption as CLIP's byte pairs take it: plain, one line, lower-cased."""
    text = html.unescape(html.unescape(caption)).translate(QUOTES)
    text = FORMS.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    return " ".join(unicodedata.normalize("NFC", text).split()).lower()


def read_vocabulary(path: Path, n_vocab: int) -> str:
    """Byte pairs as ``BytePairs`` takes them, of a file that CLIP's authors gave away.

    Args:
        path: bpe_simple_vocab_16e6.txt, or packed by gzip: a line of its version, and two pieces a
            line, the commonest pair first.
        n_vocab: of the model; what is left beside bytes, start and end is how many pairs are read.

    Raises:
        InputError: no such file, too few pairs in it, or a line that is no pair of known pieces.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except (OSError, EOFError, ValueError) as error:
        raise InputError(
            f"--vocabulary {path} cannot be read ({error}); take open_clip's "
            "bpe_simple_vocab_16e6.txt.gz"
        ) from error
    n_pairs = n_vocab - N_BYTES - 2
    lines = text.split("\n")[1 : 1 + max(n_pairs, 0)]
    if n_pairs < 0 or len(lines) < n_pairs:
        raise InputError(
            f"--vocabulary {path} has {len(lines)} pairs, the weights have {n_vocab} tokens: bytes "
            f"({N_BYTES}), start, end and {n_pairs} pairs; take the vocabulary that the weights "
            "were trained with"
        )
    letters = _letters()
    pieces = {piece: i for i, piece in enumerate([*letters, *(x + WORD_END for x in letters)])}
    pairs = []
    for i, line in enumerate(lines):
        pair = tuple(line.split())
        if len(pair) != 2 or not all(piece in pieces for piece in pair):
            raise InputError(
                f"--vocabulary {path}, line {i + 2}: {line[:80]!r} is no pair of pieces that stand "
                "above it; take open_clip's bpe_simple_vocab_16e6.txt.gz"
            )
        pairs.append((pair[0], pair[1]))
        pieces["".join(pair)] = len(pieces)
    library = Library(models.BPE(vocab=pieces, merges=pairs, end_of_word_suffix=WORD_END))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return str(library.to_str())


def _letters() -> list[str]:
    """A letter that can be seen for each byte, in the order of CLIP's vocabulary."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    n_others = 256 - len(seen)
    return [chr(byte) for byte in seen] + [chr(256 + i) for i in range(n_others)]


def open_tokens(folder: Path, config: ClipConfig) -> ClipTokens:
    """The vocabulary that lies in ``folder``, of either kind.

    Raises:
        InputError: none there, a damaged one, or one of another model.
    """
    path = folder / BYTE_PAIRS
    if not path.exists():
        return OwnTokens(folder, config)
    try:
        return BytePairs(path.read_text(encoding="utf-8"), config)
    except InputError:
        raise
    except Exception as error:  # the library raises nothing more special
        raise InputError(f"{path} cannot be read ({error}): copy it again") from error
