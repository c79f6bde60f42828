"""Captions of a pair shard set -> a tokenizer folder.

python -m data_prep.train_tokenizer --data PAIRS --out DIR [--vocab 16384 | --preset NAME]
"""

import argparse
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from pipeline import presets
from pipeline.config import ClipRun, DalleRun
from pipeline.console import InputError, a_path, command, logger, track
from pipeline.data.order import Order
from pipeline.data.shards import ShardReader
from pipeline.data.tokenizer import Tokenizer, save_tokenizer

PAPER_VOCAB = 16_384  # section 2.2
MAX_CAPTIONS = 10_000_000  # more change hardly a piece; one million take four seconds
CHUNK = 8192
NORMALIZER = "nmt_nfkc_cf"  # NFKC, white space joined, case folded
TRAINER: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "character_coverage": 1.0,
    "normalization_rule_name": NORMALIZER,
    "split_digits": True,
    "unk_id": 0,
    "pad_id": -1,
    "bos_id": -1,
    "eos_id": -1,
    # longer lines would be left out without a word
    "max_sentence_length": 1 << 30,
    "shuffle_input_sentence": False,
    # it is written into the model, so a fixed number keeps the bytes the same everywhere
    "num_threads": 2,
    # the text may support fewer pieces: counted and told afterwards
    "hard_vocab_limit": False,
}
_RESERVED = "\u2585"  # ▅ marks what is unknown: the trainer leaves out every caption that holds it

log = logger("train_tokenizer")


def train(captions: Iterator[str], vocab: int) -> bytes:
    """A serialized sentencepiece model with at most ``vocab`` pieces.

    Raises:
        InputError: no text, or a vocabulary without room for the bytes and characters.
    """
    model = io.BytesIO()
    problems: list[BaseException] = []

    def read() -> Iterator[str]:
        # the library makes another error of what is raised here
        try:
            for caption in captions:
                yield caption.replace(_RESERVED, " ")
        except BaseException as error:
            problems.append(error)
            raise

    lines = read()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, vocab_size=vocab, minloglevel=2, **TRAINER
        )
    except RuntimeError as error:
        if problems:
            raise problems[0] from error
        if match := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise InputError(
                f"a vocabulary of {vocab} is too small: 256 bytes, <unk> and the characters of "
                f"these captions need at least --vocab {match[1]}"
            ) from error
        if "sentences_.empty()" in str(error) or "all_chars_count" in str(error):
            raise InputError("the captions hold no text: is --data the right set?") from error
        raise
    return model.getvalue()


def train_tokenizer(reader: ShardReader, out: Path, vocab: int) -> Tokenizer:
    """Train on the captions of a pair set, on a keyed sample of them beyond ``MAX_CAPTIONS``."""
    n = min(len(reader), MAX_CAPTIONS)
    ids = np.arange(n) if n == len(reader) else np.sort(Order(len(reader), 0).samples(0, n))
    chunks = (ids[i : i + CHUNK] for i in range(0, n, CHUNK))
    shown = track(chunks, "captions", -(-n // CHUNK))
    model = train((caption for chunk in shown for caption in reader.captions(chunk)), vocab)
    facts = TRAINER | {"captions": n, "pairs": reader.fingerprint}
    tokenizer = save_tokenizer(out, model, vocab, NORMALIZER, facts)
    if tokenizer.n_vocab < vocab:
        log.warning(
            "the text supports %d pieces, %d were asked for: the vocabulary has %d",
            tokenizer.n_vocab,
            vocab,
            tokenizer.n_vocab,
        )
    log.info("%d captions -> %d pieces in %s", n, tokenizer.n_vocab, out)
    return tokenizer


def vocab_of(preset: str) -> int:
    """The text vocabulary of a named run."""
    run = presets.load(preset)
    if isinstance(run, ClipRun):
        return run.model.end_of_text  # the token behind the tokenizer's
    if not isinstance(run, DalleRun):
        raise InputError(f"preset {preset} reads no text: name one of the transformer's or CLIP's")
    return run.model.n_text_vocab


def main() -> None:
    """Train a tokenizer from the command line."""
    parser = argparse.ArgumentParser(description="captions of a pair set -> tokenizer")
    parser.add_argument("--data", type=a_path, required=True, help="pair shards")
    parser.add_argument("--out", type=a_path, required=True, help="folder of the tokenizer")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--vocab", type=int, help=f"pieces at most (default {PAPER_VOCAB})")
    size.add_argument("--preset", help="take the number of pieces from this run")
    args = parser.parse_args()
    vocab = vocab_of(args.preset) if args.preset else args.vocab
    vocab = PAPER_VOCAB if vocab is None else vocab
    if not 1 <= vocab <= 1 << 20:
        raise InputError(f"--vocab {vocab} is outside 1..{1 << 20}")
    train_tokenizer(ShardReader(args.data, kind="pairs"), args.out, vocab)


if __name__ == "__main__":
    command(main)
