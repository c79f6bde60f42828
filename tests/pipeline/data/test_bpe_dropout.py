import functools
import itertools
import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data_prep.train_tokenizer import NORMALIZER, TRAINER, train
from pipeline.data import bpe_dropout
from pipeline.data.tokenizer import Tokenizer, save_tokenizer
from tests.pipeline.data.test_tokenizer import ODD, captions

SPACE = "▁"


def uniform(seed, word, merge):
    """In 0..2^53-1, from the definition of SplitMix64."""

    def mixed(state):
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    golden = 0x9E3779B97F4A7C15
    stream = mixed((seed + (word + 1) * golden) % 2**64)
    return mixed((stream + (merge + 1) * golden) % 2**64) // 2**11


def merges(symbols, pieces, blocked):
    """Pairs that may be merged: score, place. The best is the first of them sorted."""
    return sorted(
        (-pieces[left + right][1], i)
        for i, (left, right) in enumerate(itertools.pairwise(symbols))
        if left + right in pieces and (i, left, right) not in blocked
    )


def merged(symbols, i):
    return (*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :])


def slow(tokenizer, caption, left_out):
    """Pieces of a whole caption: all pairs are looked at for each merge.

    ``left_out(begin)`` says whether to leave out a merge at that character.
    """
    pieces = tokenizer._bpe._pieces
    symbols = tuple(tokenizer._processor.normalize(caption))
    blocked = set()  # character at which the left symbol begins, and both symbols
    while True:
        begins = [0, *itertools.accumulate(map(len, symbols))]
        here = {(begins.index(b), x, y) for b, x, y in blocked if b in begins}
        if not (found := merges(symbols, pieces, here)):
            return list(symbols)
        i = found[0][1]
        if left_out(begins[i]):
            blocked.add((begins[i], symbols[i], symbols[i + 1]))
        else:
            symbols = merged(symbols, i)


def slow_ids(tokenizer, caption, dropout, seed, by_word=True):
    text = tokenizer._processor.normalize(caption)
    tried = {}

    def left_out(begin):
        word = text[: begin + 1].count(SPACE) - 1 if by_word else 0
        tried[word] = tried.get(word, -1) + 1
        return uniform(seed, word, tried[word]) < dropout * 2**53

    ids = []
    for symbol in slow(tokenizer, caption, left_out):
        known = tokenizer._bpe._pieces.get(symbol)
        ids += [known[0]] if known else [1 + byte for byte in symbol.encode()]
    return ids


def exact(pieces, word, dropout):
    """Segmentation -> probability, from all that may be left out."""
    shares = {}
    states = {(tuple(word), frozenset()): 1.0}
    while states:
        (symbols, blocked), share = states.popitem()
        found = merges(symbols, pieces, blocked)
        if not found:
            shares[symbols] = shares.get(symbols, 0.0) + share
            continue
        i = found[0][1]
        # a pair keeps its place when one behind it is merged, and moves up for one ahead of it
        moved = {(j - (j > i), x, y) for j, x, y in blocked}
        for state, part in (
            ((symbols, blocked | {(i, symbols[i], symbols[i + 1])}), dropout),
            ((merged(symbols, i), frozenset(moved)), 1 - dropout),
        ):
            states[state] = states.get(state, 0.0) + part * share
    return shares


def assert_drawn_from(drawn, shares):
    """Counts of draws against probabilities: chi2, five standard deviations."""
    n = sum(drawn.values())
    assert set(drawn) <= set(shares)
    assert sum(shares.values()) == pytest.approx(1)
    common = [key for key in shares if shares[key] * n >= 5]
    assert len(common) > 2
    expected = np.array([shares[key] * n for key in common])
    found = np.array([drawn.get(key, 0) for key in common])
    rest = n - expected.sum()
    if rest >= 5:
        expected, found = np.append(expected, rest), np.append(found, n - found.sum())
    chi2 = ((found - expected) ** 2 / expected).sum()
    free = len(expected) - 1
    assert chi2 < free + 5 * np.sqrt(2 * free)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    model = train(iter(captions(400)), 400)
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), model, 400, NORMALIZER, {})


@pytest.fixture
def fresh(tokenizer):
    """With no word kept."""
    return Tokenizer(tokenizer.folder)


LONG = [
    "circlesquare" * 5,
    "x" * 40,
    "purple" * 3 + "dog 漢字漢字漢字漢字 and words behind",
    "",
    "star " * 60,
    # about the length up to which words are merged beside others
    " ".join("x" * k + "dog" * 7 for k in range(4)),
]


@pytest.mark.parametrize("dropout", [1e-15, 0.1, 0.5, 0.9, 1.0])
def test_tokens_are_those_of_the_slow_algorithm(fresh, dropout):
    texts = captions(40, seed=5) + ODD + LONG
    seeds = [2**64 - 1 - i for i in range(len(texts))]
    expected = [
        slow_ids(fresh, text, dropout, seed) for text, seed in zip(texts, seeds, strict=True)
    ]
    assert fresh.encode_batch(texts, dropout, seeds) == expected
    # now with the words kept, and one by one
    assert fresh.encode_batch(texts, dropout, np.array(seeds, np.uint64)) == expected
    one_by_one = zip(texts, seeds, expected, strict=True)
    assert all(fresh.encode(t, dropout=dropout, seed=s) == ids for t, s, ids in one_by_one)


def test_words_are_drawn_from_the_distribution_of_bpe_dropout(tokenizer):
    n = 20_000
    for word, dropout in [("triangle", 0.1), ("squares", 0.5), ("bridge", 0.3), ("beside", 0.1)]:
        pieces = tokenizer._bpe._pieces
        shares = exact(pieces, SPACE + word, dropout)
        draws = tokenizer.encode_batch([word] * n, dropout, range(n))
        assert_drawn_from(Counter(tuple(tokenizer.pieces(ids)) for ids in draws), shares)
        # and so is what the slow algorithm makes of other random numbers
        rng = random.Random(0)
        coin = functools.partial(lambda rng, p, _: rng.random() < p, rng, dropout)
        by_slow = Counter(tuple(slow(tokenizer, word, coin)) for _ in range(2000))
        assert_drawn_from(by_slow, shares)


def test_words_of_a_caption_and_captions_of_a_set_are_drawn_for_themselves(tokenizer):
    n, dropout = 20_000, 0.2
    one = exact(tokenizer._bpe._pieces, SPACE + "star", dropout)
    both = {a + b: one[a] * one[b] for a in one for b in one}
    draws = tokenizer.encode_batch(["star"] * 2 * n, dropout, range(2 * n))
    pairs = {
        "twice in a caption": tokenizer.encode_batch(["star star"] * n, dropout, range(n)),
        "a seed and the next": [a + b for a, b in zip(draws[::2], draws[1::2], strict=True)],
    }
    for ids_of in pairs.values():
        assert_drawn_from(Counter(tuple(tokenizer.pieces(ids)) for ids in ids_of), both)


def test_what_is_kept_has_a_bound_and_changes_nothing(fresh, monkeypatch):
    texts = [f"{text} {i}th" for i, text in enumerate(captions(300, seed=6))]
    expected = fresh.encode_batch(texts, 0.2, range(300))
    # room for less than the words of a slice, of all slices; captions longer than a slice
    for max_words, n_chars in [(3, 1 << 16), (20, 200), (1 << 16, 500), (64, 40)]:
        monkeypatch.setattr(bpe_dropout, "MAX_WORDS", max_words)
        monkeypatch.setattr(bpe_dropout, "_SLICE", n_chars)
        other = Tokenizer(fresh.folder)
        for _ in range(2):
            assert other.encode_batch(texts, 0.2, range(300)) == expected
        (table,) = other._bpe._tables
        assert len(table._rows) <= max_words
        # words of today and not of the day when there was room
        other.encode_batch(["quagga"] * 9, 0.2, range(9))
        assert "quagga" in table._rows


def test_threads_do_not_meet(fresh, monkeypatch):
    monkeypatch.setattr(bpe_dropout, "MAX_WORDS", 100)
    rng, seeds = random.Random(0), range(20)
    texts = [
        [" ".join("".join(rng.choices("aeilnort", k=5)) for _ in range(9)) for _ in seeds]
        for _ in range(80)
    ]
    expected = [fresh.encode_batch(part, 0.3, seeds) for part in texts]
    shared = Tokenizer(fresh.folder)
    shared.encode_batch(texts[0], 0.3, seeds)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda part: shared.encode_batch(part, 0.3, seeds), texts)
            assert list(found) == expected
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize(
    ("settings", "inner"),
    [
        ({"split_by_whitespace": False}, True),
        ({"treat_whitespace_as_suffix": True}, True),
        ({"add_dummy_prefix": False}, False),
    ],
    ids=["pieces of several words", "spaces behind", "no space ahead"],
)
def test_models_of_other_settings_are_merged_right(tmp_path, monkeypatch, settings, inner):
    for key, value in settings.items():
        monkeypatch.setitem(TRAINER, key, value)
    texts = captions(60, seed=8) + ODD + LONG[:4]
    model = train(iter(captions(400)), 500)
    other = save_tokenizer(tmp_path, model, 500, NORMALIZER, {})
    # what makes such a model other
    assert any(SPACE in piece[1:] for piece in other._bpe._pieces) == inner
    assert other.encode_batch(texts, 1e-15, range(len(texts))) == other.encode_batch(texts)
    expected = [slow_ids(other, text, 0.3, i, by_word=False) for i, text in enumerate(texts)]
    assert other.encode_batch(texts, 0.3, range(len(texts))) == expected


def test_pieces_that_no_table_holds():
    # equal scores: the leftmost of all, whichever piece comes first in the vocabulary
    equals = {"ba": (3, -1.0), "ab": (4, -1.0), SPACE: (5, -2.0), "a": (6, -3.0), "b": (7, -4.0)}
    found = bpe_dropout.BpeDropout(equals, 300).sample([SPACE + "abab"] * 20, 1e-15, range(20))
    assert found == [[5, 4, 4]] * 20
    # characters that are no pieces but for the piece they make
    pieces = {"ab": (3, -1.0), SPACE: (4, -2.0)}
    found = bpe_dropout.BpeDropout(pieces, 300).sample([SPACE + "aab"] * 20, 1e-15, range(20))
    assert found == [[4, 300 + ord("a"), 3]] * 20


def test_a_caption_of_ten_thousand_characters(tokenizer):
    texts = ["dog" * 3333, "".join(captions(200, seed=9))[:10_000], "漢字 😀" * 2500]
    seeds = range(3)
    assert tokenizer.encode_batch(texts * 4, 1e-15, [*seeds] * 4) == [
        tokenizer.encode(text) for text in texts * 4
    ]
    drawn = tokenizer.encode_batch(texts * 4, 0.1, [*seeds] * 4)
    assert (
        drawn == [tokenizer.encode(text, dropout=0.1, seed=i) for i, text in enumerate(texts)] * 4
    )
    assert [tokenizer.decode(ids) for ids in drawn[:3]] == [text.lower() for text in texts]
    assert all(
        len(ids) > len(tokenizer.encode(text))
        for ids, text in zip(drawn[:2], texts[:2], strict=True)
    )
