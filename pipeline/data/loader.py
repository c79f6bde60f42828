"""Batches of one rank, as a function of a position in an endless stream of samples.

The only state of a loader is the position, which counts samples that all ranks have consumed
together: a batch at position p holds the samples at p..p+batch-1, rank r of w takes p+r, p+r+w, ...
So a run may stop anywhere and go on with any number of ranks and any batch; every epoch shows each
sample once. What is random about a sample hangs on (seed, epoch, id) alone.

Legend: B samples of this rank, Y X code grid; image_BCYX has C = 3 colours, Y X pixels.
"""

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.console import InputError
from pipeline.data.images import Pixels, augment_dvae, centre_crop
from pipeline.data.order import Order
from pipeline.data.shards import ShardReader, Side
from pipeline.data.tokenizer import Tokenizer

T = TypeVar("T")

CACHE_BYTES = 1 << 30


def sample_seed(seed: int, epoch: int, sample: int) -> int:
    """64 bits for everything random about a sample in one epoch."""
    digest = blake2b(f"{seed}:{epoch}:{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class Batch:
    """Samples of one rank.

    ``text_tokens`` int64 [B, n_text], -1 where the caption has ended; ``image_tokens`` int64
    [B, n_image] in raster order; ``ids`` rows of the shard set, int64 [B]; ``is_cut`` bool
    [B], captions that were longer than the text.
    """

    text_tokens: Tensor
    image_tokens: Tensor
    ids: np.ndarray
    is_cut: Tensor

    def __getitem__(self, part: slice) -> "Batch":
        """Some of the samples."""
        return Batch(
            self.text_tokens[part], self.image_tokens[part], self.ids[part], self.is_cut[part]
        )


class _Positions:
    """Which rows this rank takes at a position, and in which epoch each of them is.

    Without a seed the rows come in the order of the side, epoch after epoch.
    """

    def __init__(self, side: Side, batch: int, rank: int, world: int, seed: int | None) -> None:
        if not (0 <= rank < world):
            raise InputError(f"rank {rank} is outside 0..{world - 1}")
        if batch < 1 or batch % world:
            raise InputError(
                f"a batch of {batch} does not divide over {world} ranks: take a multiple of {world}"
            )
        self.side = side
        self.batch, self.rank, self.world, self.seed = batch, rank, world, seed
        self._order = None if seed is None else Order(len(side), seed)

    def at(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Row ids and epochs, both int64 [batch // world]."""
        if position < 0:
            raise InputError(f"position {position} is negative")
        places = np.arange(position, position + self.batch)
        if self._order is None:
            samples = places % len(self.side)
        else:
            samples = self._order.samples(position, position + self.batch)
        mine = slice(self.rank, None, self.world)
        return self.side.rows(samples[mine]), places[mine] // len(self.side)


class TokenLoader:
    """Captions and image tokens, for the transformer.

    Args:
        reader: a token set with one crop an image.
        tokenizer: captions are tokenised when they are loaded.
        side: of the set.
        batch: samples of all ranks together, a multiple of ``world``.
        rank, world: which of how many processes this is.
        n_text: text positions of the model; captions are cut at n_text - 1 tokens.
        seed: of the order and of the dropout; None takes the rows in order, as validation does.
        dropout: of byte pairs, in [0, 1].

    Raises:
        InputError: no samples, a batch that does not divide, dropout without a seed, another
            kind of set, or (``batch_at``) an image token outside the vocabulary.
    """

    def __init__(
        self,
        reader: ShardReader,
        tokenizer: Tokenizer,
        side: Side,
        *,
        batch: int,
        rank: int,
        world: int,
        n_text: int,
        seed: int | None,
        dropout: float,
    ) -> None:
        if reader.kind != "tokens" or reader.made_of["crops"] != 1:
            raise InputError(
                f"{reader.folder} is a set of {reader.kind} with {reader.made_of.get('crops', 0)} "
                "crops an image; the transformer reads tokens with 1: run data_prep.encode"
            )
        if dropout and seed is None:
            raise InputError(f"dropout {dropout} without a seed: validation takes 0")
        self.reader, self.tokenizer = reader, tokenizer
        self.n_text, self.dropout = n_text, dropout
        self._positions = _Positions(side, batch, rank, world, seed)

    def batch_at(self, position: int) -> Batch:
        """This rank's part of the batch that begins at ``position``, a count of samples."""
        ids, epochs = self._positions.at(position)
        image_tokens = self.reader.image_tokens(ids)
        n_vocab = self.reader.made_of["n_vocab"]
        if (largest := int(image_tokens.max())) >= n_vocab:
            key = self.reader.keys(ids)[int(image_tokens.max(axis=1).argmax())]
            raise InputError(
                f"{self.reader.folder}: row {key!r} holds image token {largest}, the vocabulary is "
                f"0..{n_vocab - 1}: data_prep.verify finds the damaged shard"
            )
        text_tokens = np.empty((len(ids), self.n_text), np.int64)
        is_cut = np.empty(len(ids), np.bool_)
        for i, caption in enumerate(self.reader.captions(ids)):
            text_tokens[i], is_cut[i] = self.tokenizer.pad(
                self._encode(caption, int(epochs[i]), int(ids[i])), self.n_text
            )
        return Batch(
            torch.from_numpy(text_tokens),
            torch.from_numpy(image_tokens.astype(np.int64)),
            ids,
            torch.from_numpy(is_cut),
        )

    def _encode(self, caption: str, epoch: int, sample: int) -> list[int]:
        seed = self._positions.seed
        if not self.dropout or seed is None:
            return self.tokenizer.encode(caption)
        return self.tokenizer.encode(
            caption, dropout=self.dropout, seed=sample_seed(seed, epoch, sample)
        )


class PairLoader:
    """Pictures, for the image tokenizer.

    Args:
        reader: a pair set.
        side, batch, rank, world: as for ``TokenLoader``.
        size: pixels a side of what is returned.
        seed: of the order and of the crops (``augment_dvae``); None takes the rows in order and the
            middle of each picture, as validation does.
        cache_bytes: decoded pictures are kept in memory up to this size, first come first kept.

    Raises:
        InputError: no samples, a batch that does not divide, another kind of set, or (``batch_at``)
            a picture that cannot be decoded or is smaller than ``size``; it names the key.
    """

    def __init__(
        self,
        reader: ShardReader,
        side: Side,
        *,
        batch: int,
        rank: int,
        world: int,
        size: int,
        seed: int | None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if reader.kind != "pairs":
            raise InputError(f"{reader.folder} is a set of {reader.kind}, pictures come from pairs")
        self.reader, self.size = reader, size
        self._positions = _Positions(side, batch, rank, world, seed)
        self._cache: dict[int, Pixels] = {}
        self._cache_left = cache_bytes

    def batch_at(self, position: int) -> tuple[Tensor, np.ndarray]:
        """This rank's part of the batch at ``position``: image_BCYX in [0, 1], float32, and ids."""
        ids, epochs = self._positions.at(position)
        image_BYXC = np.empty((len(ids), self.size, self.size, 3), np.uint8)
        for i, (sample, epoch) in enumerate(zip(ids.tolist(), epochs.tolist(), strict=True)):
            try:
                image_BYXC[i] = self._crop(self._decoded(sample), epoch, sample)
            except InputError as error:
                key = self.reader.keys(np.array([sample]))[0]
                raise InputError(f"{self.reader.folder}: picture {key!r}: {error}") from error
        image_BCYX = torch.from_numpy(image_BYXC).permute(0, 3, 1, 2)
        return image_BCYX.to(torch.float32, memory_format=torch.contiguous_format) / 255, ids

    def _decoded(self, sample: int) -> Pixels:
        if sample in self._cache:
            return self._cache[sample]
        pixels = self.reader.decode(self.reader.images(np.array([sample]))[0], self.size)
        if pixels.nbytes <= self._cache_left:
            self._cache_left -= pixels.nbytes
            self._cache[sample] = pixels
        return pixels

    def _crop(self, pixels: Pixels, epoch: int, sample: int) -> Pixels:
        seed = self._positions.seed
        if seed is None:
            return centre_crop(pixels, self.size)
        rng = np.random.default_rng(sample_seed(seed, epoch, sample))
        return augment_dvae(pixels, self.size, rng)


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
