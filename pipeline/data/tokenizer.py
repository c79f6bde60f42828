"""Captions as tokens: byte-pair encoding with a fallback to bytes, so that no text is unknown.

Paper: 16,384 pieces of lower-cased captions, at most 256 tokens, 10% BPE dropout (section 2.2). The
lower-casing is inside the model (NFKC with case folding), so sampling cannot forget it. Pads are
learned per position by the transformer and have no id here: a position without a token holds
``NO_TOKEN``. Paper: words split at anything but a-z, a space is a piece of its own; here: the space
belongs to the word that follows, digits stand alone.
"""

import struct
from collections.abc import Sequence
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from pipeline.console import InputError
from pipeline.data.bpe_dropout import BpeDropout
from pipeline.data.schema import read_json
from pipeline.files import write_json

SCHEMA_VERSION = 1  # of tokenizer.json
NO_TOKEN = -1
_FIRST_BYTE = 1  # id of the byte 0x00; the others follow


class Tokenizer:
    """The tokenizer in ``folder``: ``spm.model``, and ``tokenizer.json`` that says what it must be.

    Attributes:
        n_vocab: number of pieces; ids are 0..n_vocab-1, 0 is ``<unk>``, 1..256 are the bytes.
        fingerprint: sha256 over pieces, scores and the normalizer's name. The file is not hashed:
            its bytes also hold settings of the trainer that change nothing.
        facts: the content of ``tokenizer.json``.

    Raises:
        InputError: a file is missing, damaged, of a newer schema, or not the one described.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.facts = read_json(self.folder / "tokenizer.json", SCHEMA_VERSION)
        path = self.folder / "spm.model"
        try:
            self._model = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): copy it again") from error
        self._processor = _load(self._model, path)
        self.n_vocab: int = self._processor.vocab_size()
        if self.n_vocab < _FIRST_BYTE + 256 or self._processor.id_to_piece(1) != "<0x00>":
            raise InputError(f"{path} has no bytes to fall back to: train it with train_tokenizer")
        # pieces that text can become, with id and score: not <unk>, not the names of the bytes
        pieces = {
            self._processor.id_to_piece(i): (i, self._processor.get_score(i))
            for i in range(_FIRST_BYTE + 256, self.n_vocab)
        }
        self._bpe = BpeDropout(pieces, _FIRST_BYTE)
        self.fingerprint = _fingerprint(self._processor, str(self.facts.get("normalizer")))
        for name, found in (("n_vocab", self.n_vocab), ("fingerprint", self.fingerprint)):
            if self.facts.get(name) != found:
                raise InputError(
                    f"{path} has {name} {found}, tokenizer.json says {self.facts.get(name)}: "
                    "the two files do not belong together, copy both again"
                )

    def encode(self, caption: str, *, dropout: float = 0.0, seed: int | None = None) -> list[int]:
        """Tokens of one caption: a batch of one, see ``encode_batch``."""
        return self.encode_batch([caption], dropout, None if seed is None else [seed])[0]

    def encode_batch(
        self, captions: Sequence[str], dropout: float = 0.0, seeds: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Tokens of captions of any length.

        Args:
            captions: any text; control characters vanish, line breaks count as spaces.
            dropout: share of the merges to leave out, in [0, 1]; the paper trains with 0.1.
            seeds: one a caption, in 0..2^64-1; the same caption and seed give the same tokens in
                every process, whatever was encoded before. Not read without dropout.

        Raises:
            InputError: dropout without seeds or outside [0, 1], a seed outside its range, or text
                that is not Unicode.
        """
        for caption in captions:
            try:
                caption.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"caption {caption[:80]!r} is not Unicode text: {error.reason} at character "
                    f"{error.start}"
                ) from error
        if dropout == 0.0:
            tokens: list[list[int]] = self._processor.encode(list(captions), num_threads=1)
            return tokens
        if not 0.0 < dropout <= 1.0:
            raise InputError(f"dropout {dropout} is outside [0, 1]: the paper's is 0.1")
        if seeds is None or len(seeds) != len(captions):
            n_seeds = 0 if seeds is None else len(seeds)
            raise InputError(
                f"dropout {dropout} takes a seed a caption: {len(captions)} captions, "
                f"{n_seeds} seeds"
            )
        seeds = [int(seed) for seed in seeds]
        for seed in seeds:
            if not 0 <= seed < 1 << 64:
                raise InputError(f"seed {seed} is outside 0..2^64-1: make it with sample_seed")
        return self._bpe.sample(self._processor.normalize(list(captions)), dropout, seeds)

    def pad(self, ids: Sequence[int], n_text: int) -> tuple[np.ndarray, bool]:
        """One row of ``pad_batch``: int64 [n_text] and whether the caption was cut."""
        tokens, is_cut = self.pad_batch([ids], n_text)
        return tokens[0], bool(is_cut[0])

    def pad_batch(self, ids: Sequence[Sequence[int]], n_text: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens as the model takes them: int64 [B, n_text], and which were cut, bool [B].

        ``NO_TOKEN`` stands where the caption has ended. At most ``n_text - 1`` tokens are kept: the
        start token takes an input position, so the last of ``n_text`` would never be read.
        """
        room = n_text - 1
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        tokens = np.full((len(ids), n_text), NO_TOKEN, np.int64)
        kept = np.minimum(lengths, room)
        tokens[np.arange(n_text) < kept[:, None]] = np.fromiter(
            chain.from_iterable(row[:room] for row in ids), np.int64, kept.sum()
        )
        return tokens, lengths > room

    def pieces(self, ids: list[int]) -> list[str]:
        """The piece of each token, for people; ``▁`` is a space, ``<0x41>`` a byte."""
        return [self._processor.id_to_piece(int(i)) for i in ids]

    def decode(self, ids: list[int]) -> str:
        """The caption behind tokens, lower-cased; ``NO_TOKEN`` is skipped."""
        text: str = self._processor.decode([int(i) for i in ids if i != NO_TOKEN])
        return text

    def copy_to(self, folder: str | Path) -> None:
        """Put the same two files into ``folder``, which is made when missing."""
        _write(Path(folder), self._model, self.facts)


def save_tokenizer(
    folder: str | Path, model: bytes, requested_vocab: int, normalizer: str, trainer: dict[str, Any]
) -> Tokenizer:
    """Write a trained sentencepiece model as a tokenizer folder and open it.

    Args:
        folder: made when missing.
        model: a serialized sentencepiece model.
        requested_vocab: what was asked for; the model may have fewer pieces.
        normalizer: sentencepiece's name of the normalization inside the model.
        trainer: settings to be kept for people; JSON values.
    """
    processor = _load(model, Path(folder) / "spm.model")
    facts = {
        "schema_version": SCHEMA_VERSION,
        "n_vocab": processor.vocab_size(),
        "requested_vocab": requested_vocab,
        "fingerprint": _fingerprint(processor, normalizer),
        "normalizer": normalizer,
        "trainer": trainer,
    }
    _write(Path(folder), model, facts)
    return Tokenizer(folder)


def _write(folder: Path, model: bytes, facts: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spm.model").write_bytes(model)
    write_json(folder / "tokenizer.json", facts)


def _load(model: bytes, path: Path) -> Any:
    try:
        # an empty model would load, with a complaint of the library's own
        if model:
            return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path} is no sentencepiece model: copy or train it again") from error
    raise InputError(f"{path} is empty: copy or train it again")


def _fingerprint(processor: Any, normalizer: str) -> str:
    digest = sha256(normalizer.encode())
    for i in range(processor.vocab_size()):
        piece = processor.id_to_piece(i).encode()
        digest.update(struct.pack("<If", len(piece), processor.get_score(i)) + piece)
    return digest.hexdigest()
