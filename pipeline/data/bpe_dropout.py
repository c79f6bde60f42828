"""BPE with dropout (Provilkov et al., 2020), the words of a batch side by side.

The best pair of neighbours is merged again and again; each merge that comes up is left out with the
same probability, and a pair that was left out is not tried again. The merges are those of
sentencepiece. Its sampler gives other tokens in every process whatever the seed (0.2.3), so a run
that resumes would not repeat itself; here what is left out hangs on (seed, word, merge) alone.

No piece goes across a space, so merges of different words touch nothing in common, and merge t of
every word is made in one step. What a word becomes with all its merges is kept: only the words that
lose a merge are merged again.

Legend: T texts, N words in hand, W words kept, P places of a word: its symbols, then ``_NONE``, and
one empty place before them. A symbol is the id of a piece or of a byte.
"""

from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from itertools import count, pairwise, repeat
from typing import Any

import numpy as np

SPACE = "\u2581"  # ▁ stands for a space in pieces
MAX_WORDS = 1 << 16  # kept, in 30 MB
_FEW = 8  # texts that are sooner done one by one
_SLICE = 1 << 16  # characters in hand; a longer text is done by itself
_PLACES = 24  # so words of 22 symbols; longer ones are done one by one
_NONE = (1 << 31) - 1  # a place without a symbol, a pair that makes no piece
_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15

Pieces = dict[str, tuple[int, float]]


def _mix(bits: Any) -> Any:
    """SplitMix64 (Steele et al., 2014) of an int or, to the same bits, of an array of uint64."""
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    return bits ^ (bits >> 31)


def _stream(seed: Any, word: Any) -> Any:
    """Where the draws of a text's word begin."""
    return _mix((seed + (word + 1) * _STEP) & _MASK)


def _is_left_out(stream: Any, merge: Any, limit: int) -> Any:
    """Whether a merge of a word, counted from 0, is left out: a share ``limit / 2^53`` is."""
    return _mix((stream + ((merge + 1) * _STEP & _MASK)) & _MASK) >> 11 < limit


class BpeDropout:
    """Draws tokens of normalized text.

    Args:
        pieces: what text can become: id and score of each. The highest score is merged first, the
            leftmost of equals.
        first_byte: id of the byte 0x00, the others follow; a character without a piece becomes
            bytes.
    """

    def __init__(self, pieces: Pieces, first_byte: int) -> None:
        self._pieces, self._first_byte = pieces, first_byte
        # models of other settings have pieces of several words, or the space behind its word
        self._by_word = not any(SPACE in piece[1:] for piece in pieces)
        # or what a table cannot hold: equal scores, characters that are known in pieces only
        scores = [score for piece, (_, score) in pieces.items() if len(piece) > 1]
        self._has_table = (
            self._by_word
            and len(set(scores)) == len(scores)
            and set().union(*pieces) <= pieces.keys()
        )
        self._tables: list[_Table] = []

    def sample(self, texts: Sequence[str], dropout: float, seeds: Sequence[int]) -> list[list[int]]:
        """Tokens of each text, as sentencepiece normalizes it.

        Args:
            texts: ``SPACE`` for each space.
            dropout: share of the merges to leave out, in (0, 1].
            seeds: one a text, in 0..2^64-1.
        """
        limit = int(dropout * (1 << 53))
        if len(texts) < _FEW or not self._has_table:
            return [self._sample_one(*job, limit) for job in zip(texts, seeds, strict=True)]
        # a table serves one thread at a time; one that an error broke off is not used again
        table = self._tables.pop() if self._tables else _Table(self._pieces, self._symbols)
        tokens: list[list[int]] = []
        start = n_chars = 0
        for end, text in enumerate(texts, 1):
            n_chars += len(text)
            if n_chars >= _SLICE or end == len(texts):
                part = slice(start, end)
                tokens += self._sample_slice(table, texts[part], seeds[part], limit)
                start, n_chars = end, 0
        self._tables.append(table)
        return tokens

    def _sample_slice(
        self, table: "_Table", texts: Sequence[str], seeds: Sequence[int], limit: int
    ) -> list[list[int]]:
        in_words = [
            text if text.startswith(SPACE) and len(text) <= _SLICE else "" for text in texts
        ]
        words = "".join(in_words).split(SPACE)[1:]
        n_words_T = np.array([text.count(SPACE) for text in in_words])
        ends_T = n_words_T.cumsum()
        order_N = np.arange(len(words)) - np.repeat(ends_T - n_words_T, n_words_T)
        seeds_N = np.repeat(np.array(seeds, np.uint64), n_words_T)
        streams_N = _stream(seeds_N, order_N.astype(np.uint64))

        symbols_NP, absent = table.sample(words, streams_N, limit)
        is_symbol_NP = symbols_NP != _NONE
        flat = symbols_NP[is_symbol_NP].tolist()
        starts_N = np.concatenate([[0], is_symbol_NP.sum(axis=1).cumsum()])
        starts_T = starts_N[np.concatenate([[0], ends_T])]
        tokens = [flat[start:end] for start, end in pairwise(starts_T.tolist())]
        # from the last to the first, so that the places of the others stay
        for i in reversed(absent.tolist()):
            k = int(ends_T.searchsorted(i, side="right"))
            at = int(starts_N[i] - starts_T[k])
            tokens[k][at:at] = self._merge(SPACE + words[i], int(streams_N[i]), limit)
        for k, text in enumerate(texts):
            if text and not in_words[k]:
                tokens[k] = self._sample_one(text, seeds[k], limit)
        return tokens

    def _sample_one(self, text: str, seed: int, limit: int) -> list[int]:
        if self._by_word and text.startswith(SPACE):
            words = [SPACE + word for word in text.split(SPACE)[1:]]
        else:
            words = [text]
        return [
            token
            for i, word in enumerate(words)
            for token in self._merge(word, _stream(seed, i), limit)
        ]

    def _merge(self, text: str, stream: int, limit: int) -> list[int]:
        """Merge text of any length."""
        symbols = list(text)
        n = len(symbols)
        # neighbours of each symbol that is left; n is behind the last, -1 before the first
        before, behind = list(range(-1, n - 1)), list(range(1, n + 1))
        agenda: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right < n:
                piece = symbols[left] + symbols[right]
                if piece in self._pieces:
                    heappush(agenda, (-self._pieces[piece][1], left, right, piece))

        for i in range(n - 1):
            offer(i, i + 1)
        merge = -1
        while agenda:
            _, left, right, piece = heappop(agenda)
            # one of the two has been merged with another since
            if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != piece:
                continue
            merge += 1
            if _is_left_out(stream, merge, limit):
                continue
            symbols[left], symbols[right] = piece, ""
            behind[left] = behind[right]
            if behind[left] < n:
                before[behind[left]] = left
            offer(before[left], left)
            offer(left, behind[left])
        return [token for symbol in symbols if symbol for token in self._symbols(symbol)]

    def _symbols(self, piece: str) -> Sequence[int]:
        """The id of a piece, or the bytes of a character without one."""
        known = self._pieces.get(piece)
        return (known[0],) if known else [self._first_byte + byte for byte in piece.encode()]


class _Table:
    """Words before their first merge and, when nothing is left out, after their last.

    Args:
        pieces: no two of their scores are equal.
        symbols_of: the ids of a character.
    """

    def __init__(self, pieces: Pieces, symbols_of: Callable[[str], Sequence[int]]) -> None:
        self._symbols_of = symbols_of
        by_rank = sorted((p for p in pieces if len(p) > 1), key=lambda p: -pieces[p][1])
        self._id_of_rank = np.array([pieces[piece][0] for piece in by_rank], np.int32)
        pairs = sorted(
            (pieces[piece[:k]][0] << 32 | pieces[piece[k:]][0], rank)
            for rank, piece in enumerate(by_rank)
            for k in range(1, len(piece))
            if piece[:k] in pieces and piece[k:] in pieces
        )
        # the last is greater than any pair
        self._pairs = np.array([*(pair for pair, _ in pairs), _MASK >> 1])
        self._rank_of_pair = np.array([*(rank for _, rank in pairs), _NONE])
        self._rows: dict[str, int] = {}
        self._first_WP = np.empty((MAX_WORDS, _PLACES), np.int32)
        self._ranks_WP = np.empty((MAX_WORDS, _PLACES), np.int32)
        self._last_WP = np.empty((MAX_WORDS, _PLACES), np.int32)
        self._n_merges_W = np.empty(MAX_WORDS, np.int64)

    def sample(
        self, words: list[str], streams_N: np.ndarray, limit: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Symbols [N, P] of words without the space before them, and which do not fit."""
        rows_N = self._rows_of(words)
        is_absent = rows_N < 0
        symbols_NP = self._last_WP[rows_N]
        symbols_NP[is_absent] = _NONE
        n_merges_N = np.where(is_absent, 0, self._n_merges_W[rows_N])
        merges = np.arange(n_merges_N.max(initial=0), dtype=np.uint64)
        loses_NM = _is_left_out(streams_N[:, None], merges, limit) & (merges < n_merges_N[:, None])
        losing = np.flatnonzero(loses_NM.any(axis=1))
        rows = rows_N[losing]
        symbols_NP[losing] = self._merge(
            self._first_WP[rows], self._ranks_WP[rows], streams_N[losing], limit
        )
        return symbols_NP, np.flatnonzero(is_absent)

    def _rows_of(self, words: list[str]) -> np.ndarray:
        """Rows int64 [N] of words, -1 for those that do not fit; new words are taken in."""
        rows_N = self._find(words)
        missing = np.flatnonzero(rows_N < 0)
        if len(missing):
            if len(self._rows) + len({words[i] for i in missing}) > MAX_WORDS:
                self._rows.clear()
                missing = np.arange(len(words))
            new = [words[i] for i in missing]
            self._take_in(set(new))
            rows_N[missing] = self._find(new)
        return rows_N

    def _find(self, words: list[str]) -> np.ndarray:
        return np.fromiter(map(self._rows.get, words, repeat(-1)), np.int64, len(words))

    def _take_in(self, words: Iterable[str]) -> None:
        begin = len(self._rows)
        first: list[list[int]] = []
        for word in words:
            if len(word) < _PLACES and begin + len(first) < MAX_WORDS:
                symbols = [i for char in SPACE + word for i in self._symbols_of(char)]
                if len(symbols) <= _PLACES - 2:
                    self._rows[word] = begin + len(first)
                    first.append(symbols)
        first_NP = np.full((len(first), _PLACES), _NONE, np.int32)
        for symbols_P, symbols in zip(first_NP, first, strict=True):
            symbols_P[1 : 1 + len(symbols)] = symbols
        ranks_NP = np.full_like(first_NP, _NONE)
        ranks_NP[:, :-1] = self._rank(first_NP[:, :-1], first_NP[:, 1:])
        last_NP = self._merge(first_NP, ranks_NP, np.zeros(len(first), np.uint64), 0)
        part = slice(begin, begin + len(first))
        self._first_WP[part] = first_NP
        self._ranks_WP[part] = ranks_NP
        self._last_WP[part] = last_NP
        # each merge takes a symbol
        self._n_merges_W[part] = (last_NP == _NONE).sum(axis=1) - (first_NP == _NONE).sum(axis=1)

    def _rank(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Rank of the piece that two symbols make, ``_NONE`` for no piece."""
        pair = (left.astype(np.int64) << 32) | right
        at = self._pairs.searchsorted(pair)
        return np.where(self._pairs[at] == pair, self._rank_of_pair[at], _NONE)

    def _merge(
        self, symbols_NP: np.ndarray, ranks_NP: np.ndarray, streams_N: np.ndarray, limit: int
    ) -> np.ndarray:
        """Symbols [N, P] after the last merge of each word."""
        n = len(symbols_NP)
        symbols_PN = symbols_NP.T.copy()
        symbols = symbols_PN.reshape(-1)
        # indices are into the flat arrays from here on; neighbours are those that are left
        places = np.arange(symbols.size)
        before, behind = places - n, places + n
        # the least is the next merge of a word, and says where
        keys_PN = (ranks_NP.T.astype(np.int64, order="C") << 32) | places.reshape(_PLACES, n)
        keys = keys_PN.reshape(-1)
        words = np.arange(n)
        for merge in count():
            key = keys_PN.min(axis=0)[words]
            comes_up = key < _NONE << 32
            words, key = words[comes_up], key[comes_up]
            if not len(words):
                break
            left = key & _NONE
            keys[left] = _NONE << 32
            is_made = ~_is_left_out(streams_N[words], merge, limit)
            left, piece = left[is_made], self._id_of_rank[key[is_made] >> 32]
            right = behind[left]
            after, ahead = behind[right], before[left]
            symbols[left], symbols[right], keys[right] = piece, _NONE, _NONE << 32
            behind[left], before[after] = after, left
            rank = self._rank(
                np.concatenate([symbols[ahead], piece]), np.concatenate([piece, symbols[after]])
            )
            changed = np.concatenate([ahead, left])
            keys[changed] = (rank << 32) | changed
        return symbols_PN.T
