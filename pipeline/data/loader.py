"""Batches of one rank, as a function of a position in an endless stream of samples (``stream``).

What is random about a sample hangs on (seed, epoch, row) alone, so a batch is the same whatever was
read before it, by how many ranks and threads.

Legend: B samples of this rank, Y X code grid; image_BCYX has C = 3 colours, Y X pixels.
"""

import contextlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.console import InputError
from pipeline.data.images import Pixels, augment_dvae, centre_crop
from pipeline.data.order import keyed, mix
from pipeline.data.sets import Sets
from pipeline.data.stream import Stream, seed_of
from pipeline.data.tokenizer import Tokenizer

T = TypeVar("T")

CACHE_BYTES = 1 << 30
# captions that are read and tokenised in one go: by 64 dropout takes three times as long for each
AHEAD = 1024
DECODERS = 8  # threads, at most


def sample_seed(seed: int, epoch: int, sample: int) -> int:
    """64 bits for everything random about a sample in one epoch."""
    digest = blake2b(f"{seed}:{epoch}:{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def crop_of(seed: int, epochs: np.ndarray, rows: np.ndarray, n_crops: int) -> np.ndarray:
    """Which of its crops each row shows in an epoch, int64 [n]: each once in ``n_crops`` epochs."""
    drawn = mix(rows.astype(np.uint64), keyed(seed, "crop")) % np.uint64(n_crops)
    return (epochs + drawn.astype(np.int64)) % n_crops


def is_dropped(seed: int, epochs: np.ndarray, rows: np.ndarray, share: float) -> np.ndarray:
    """Whether a row's caption is left out in an epoch, bool [n]: a ``share`` of them by chance."""
    drawn = mix(rows.astype(np.uint64), keyed(seed, "caption"))
    drawn = mix(drawn ^ epochs.astype(np.uint64), keyed(seed, "caption of epoch"))
    return (drawn >> np.uint64(11)).astype(np.float64) / 2**53 < share


class _Rows:
    """The rows of several sets that this rank takes at a position."""

    def __init__(self, sets: Sets, stream: dict[str, Any]) -> None:
        self.readers, self._sides = [reader for reader, _ in sets], [side for _, side in sets]
        self.stream = Stream([len(side) for side in self._sides], **stream)
        seed = self.stream.seed
        self.seeds = [None if seed is None else seed_of(seed, k) for k in range(len(sets))]

    def at(self, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sets, their rows and epochs, each int64 [batch // world]."""
        sets, samples, epochs = self.stream.at(position)
        rows = np.empty_like(samples)
        for k, here in self.by_set(sets):
            rows[here] = self._sides[k].rows(samples[here])
        return sets, rows, epochs

    @staticmethod
    def by_set(sets: np.ndarray) -> Iterator[tuple[int, np.ndarray | slice]]:
        """Each set that occurs, and where."""
        if not sets.any():
            yield 0, slice(None)
            return
        for k in np.unique(sets).tolist():
            yield k, np.flatnonzero(sets == k)


@dataclass(frozen=True)
class Batch:
    """Samples of one rank.

    ``text_tokens`` int64 [B, n_text], -1 where the caption has ended; ``image_tokens`` int64
    [B, n_image] in raster order; ``sets`` and ``ids``, number of the shard set and row in it, int64
    [B]; ``is_cut`` bool [B], captions that were longer than the text.
    """

    text_tokens: Tensor
    image_tokens: Tensor
    sets: np.ndarray
    ids: np.ndarray
    is_cut: Tensor

    def __getitem__(self, part: slice) -> "Batch":
        """Some of the samples."""
        return Batch(
            self.text_tokens[part],
            self.image_tokens[part],
            self.sets[part],
            self.ids[part],
            self.is_cut[part],
        )


class TokenLoader:
    """Captions and image tokens, for the transformer.

    Args:
        sets: one token set or several of one code grid, and the side of each that is read.
        tokenizer: captions are tokenised when they are loaded.
        n_text: text positions of the model; captions are cut at n_text - 1 tokens.
        dropout: of byte pairs, in [0, 1].
        caption_dropout: share of captions that are left empty, in [0, 1).
        stream: what else ``Stream`` takes: batch, rank, world, seed, and weights and block.
            The seed is that of order, dropout and choice of crops; without one the rows come in
            order and show their first crop, as validation does.

    Raises:
        InputError: no samples, a batch that does not divide, dropout without a seed, another
            kind of set, or (``batch_at``) an image token outside the vocabulary.
    """

    def __init__(
        self,
        sets: Sets,
        tokenizer: Tokenizer,
        *,
        n_text: int,
        dropout: float,
        caption_dropout: float = 0.0,
        **stream: Any,
    ) -> None:
        for reader, _ in sets:
            if reader.kind != "tokens":
                raise InputError(
                    f"{reader.folder} is a set of {reader.kind}, the transformer reads tokens: run "
                    "data_prep.encode"
                )
        if len({reader.made_of["grid"] for reader, _ in sets}) > 1:
            raise InputError(
                "sets of different code grids: "
                + ", ".join(f"{r.folder} has {r.made_of['grid']} a side" for r, _ in sets)
            )
        self._rows = _Rows(sets, stream)
        for name, share in (("dropout", dropout), ("caption_dropout", caption_dropout)):
            if share and self._rows.stream.seed is None:
                raise InputError(f"{name} {share} without a seed: validation takes 0")
        self.tokenizer = tokenizer
        self.n_text, self.dropout, self.caption_dropout = n_text, dropout, caption_dropout
        n_samples = self._rows.stream.batch // self._rows.stream.world
        self._n_ahead = max(1, AHEAD // n_samples)
        self._ahead: deque[tuple[int, Batch]] = deque()
        self._next = -1

    def batch_at(self, position: int) -> Batch:
        """This rank's part of the batch that begins at ``position``, a count of samples.

        Who asks for one batch after the other gets them out of some that are made together, and
        hears of what is damaged that much earlier. One thread at a time.
        """
        batch = self._rows.stream.batch
        if not self._ahead or self._ahead[0][0] != position:
            n = self._n_ahead if position == self._next else 1
            positions = range(position, position + n * batch, batch)
            self._ahead = deque(zip(positions, self._batches(positions), strict=True))
        self._next = position + batch
        return self._ahead.popleft()[1]

    def _batches(self, positions: Sequence[int]) -> list[Batch]:
        """This rank's part of the batches that begin at ``positions``, made together."""
        parts = zip(*map(self._rows.at, positions), strict=True)
        sets, ids, epochs = map(np.concatenate, parts)
        n_image = self._rows.readers[0].made_of["grid"] ** 2
        image_tokens = np.empty((len(ids), n_image), np.int64)
        captions = np.empty(len(ids), object)
        for k, here in self._rows.by_set(sets):
            image_tokens[here], captions[here] = self._read(k, ids[here], epochs[here])
        text_tokens, is_cut = self._text_tokens(captions.tolist(), sets, ids, epochs)
        for k, here in self._rows.by_set(sets) if self.caption_dropout else ():
            seed = self._rows.seeds[k]
            assert seed is not None
            dropped = is_dropped(seed, epochs[here], ids[here], self.caption_dropout)
            text_tokens[here] = np.where(dropped[:, None], -1, text_tokens[here])
            is_cut[here] &= ~dropped
        together = Batch(
            torch.from_numpy(text_tokens),
            torch.from_numpy(image_tokens),
            sets,
            ids,
            torch.from_numpy(is_cut),
        )
        n = len(ids) // len(positions)
        return [together[i : i + n] for i in range(0, len(ids), n)]

    def _read(self, k: int, ids: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Codes uint16 [n, n_image] of the crops that rows of set ``k`` show, and captions."""
        reader, seed = self._rows.readers[k], self._rows.seeds[k]
        n_crops, n_vocab = reader.made_of["crops"], reader.made_of["n_vocab"]
        crops = None
        if n_crops > 1:
            first = np.zeros(len(ids), np.int64)
            crops = first if seed is None else crop_of(seed, epochs, ids, n_crops)
        image_tokens, captions = reader.captioned_tokens(ids, crops)
        if (largest := int(image_tokens.max())) >= n_vocab:
            key = reader.keys(ids)[int(image_tokens.max(axis=1).argmax())]
            raise InputError(
                f"{reader.folder}: row {key!r} holds image token {largest}, the vocabulary is "
                f"0..{n_vocab - 1}: data_prep.verify finds the damaged shard"
            )
        return image_tokens, captions

    def _text_tokens(
        self, captions: list[str], sets: np.ndarray, ids: np.ndarray, epochs: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the captions of a batch, int64 [B, n_text], and which of them were cut."""
        drawn = None
        if self.dropout:
            numbers = zip(sets.tolist(), ids.tolist(), epochs.tolist(), strict=True)
            seeds = [seed for seed in self._rows.seeds if seed is not None]
            drawn = [sample_seed(seeds[k], epoch, sample) for k, sample, epoch in numbers]
        tokens = self.tokenizer.encode_batch(captions, self.dropout, drawn)
        return self.tokenizer.pad_batch(tokens, self.n_text)


class PairLoader:
    """Pictures, for the image tokenizer; and their captions, for CLIP.

    Args:
        sets: one pair set or several, and the side of each that is read.
        size: pixels a side of what is returned.
        cache_bytes: decoded pictures are kept in memory up to this size, first come first kept.
        augment: takes the training crop: a picture, ``size`` and its own chance.
        stream: as for ``TokenLoader``; the seed is that of order and crops; without one the rows
            come in order, and of each picture the middle, as validation does.

    Raises:
        InputError: no samples, a batch that does not divide, another kind of set, or (``batch_at``)
            a picture that cannot be read or is smaller than ``size``; it names the key.
    """

    def __init__(
        self,
        sets: Sets,
        *,
        size: int,
        cache_bytes: int = CACHE_BYTES,
        augment: Callable[[Pixels, int, np.random.Generator], Pixels] = augment_dvae,
        **stream: Any,
    ) -> None:
        for reader, _ in sets:
            if reader.kind != "pairs":
                raise InputError(
                    f"{reader.folder} is a set of {reader.kind}, pictures come from pairs"
                )
        self._rows, self.size, self._augment = _Rows(sets, stream), size, augment
        self._cache: dict[tuple[int, int], Pixels] = {}
        self._cache_left = cache_bytes
        self._cache_lock = threading.Lock()
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._pool = ThreadPoolExecutor(max(1, min(cores, DECODERS)), "decode")

    def batch_at(self, position: int) -> tuple[Tensor, np.ndarray]:
        """This rank's part of the batch at ``position``: image_BCYX in [0, 1], float32, and ids."""
        sets, ids, epochs = self._rows.at(position)
        image_BYXC = np.empty((len(ids), self.size, self.size, 3), np.uint8)
        samples = (sets.tolist(), ids.tolist(), epochs.tolist())
        for i, crop in enumerate(self._pool.map(self._crop, *samples)):
            image_BYXC[i] = crop
        image_BCYX = torch.from_numpy(image_BYXC).permute(0, 3, 1, 2)
        return image_BCYX.to(torch.float32, memory_format=torch.contiguous_format) / 255, ids

    def captions_at(self, position: int) -> list[str]:
        """The captions of ``batch_at``."""
        sets, ids, _ = self._rows.at(position)
        captions = np.empty(len(ids), object)
        for k, here in self._rows.by_set(sets):
            captions[here] = self._rows.readers[k].captions(ids[here])
        return captions.tolist()

    def _crop(self, k: int, sample: int, epoch: int) -> Pixels:
        """One crop, in a thread of the pool."""
        reader, seed = self._rows.readers[k], self._rows.seeds[k]
        try:
            pixels = self._decoded(k, sample)
            if seed is None:
                return centre_crop(pixels, self.size)
            rng = np.random.default_rng(sample_seed(seed, epoch, sample))
            return self._augment(pixels, self.size, rng)
        except InputError as error:
            key = reader.keys(np.array([sample]))[0]
            raise InputError(f"{reader.folder}: picture {key!r}: {error}") from error

    def _decoded(self, k: int, sample: int) -> Pixels:
        with self._cache_lock:
            if (k, sample) in self._cache:
                return self._cache[k, sample]
        reader = self._rows.readers[k]
        pixels = reader.decode(reader.images(np.array([sample]))[0], self.size)
        with self._cache_lock:
            if pixels.nbytes <= self._cache_left and (k, sample) not in self._cache:
                self._cache_left -= pixels.nbytes
                self._cache[k, sample] = pixels
        return pixels


def prefetch(iterator: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """The items of ``iterator``, taken up to ``depth`` ahead by one thread.

    What ``iterator`` raises is raised here, in its place. Closing the generator stops the thread.
    """
    # ("item", an item), ("error", an exception) or ("end", None)
    items: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(kind: str, content: Any) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                items.put((kind, content), timeout=0.1)
                return

    def work() -> None:
        try:
            for item in iterator:
                put("item", item)
                if stop.is_set():
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (got := items.get())[0] != "end":
            if got[0] == "error":
                raise got[1]
            yield got[1]
    finally:
        stop.set()
        thread.join()
