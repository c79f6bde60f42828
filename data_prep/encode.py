"""Pictures of a pair shard set -> their codes under a frozen dVAE, as a token shard set.

    python -m data_prep.encode --data PAIRS --dvae DIR --out DIR
    deepspeed --module data_prep.encode ... (torchrun, srun)     ranks share the shards
    python -m data_prep.encode ... --engine ray                  tasks of a Ray cluster

Token shard k holds the rows of pair shard k, in order. Ranks and workers need not know of each
other; who finds every shard committed writes the manifest. A run that was stopped goes on where it
was, with any number of them. Crops hang on seed and key alone; codes also on the batch, whose shape
never changes, and on the number format: both belong to the set.

Legend: B pictures, K crops of a picture, Y X code grid; in image_BYXC Y X are pixels, C 3 colours.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.engines import ENGINES, Launch, cores, launch_of, run, workers_of
from pipeline.console import Bar, InputError, OwnError, a_path, command, logger
from pipeline.data.commit import is_committed, write_manifest, write_shard
from pipeline.data.images import Pixels, augment_dalle
from pipeline.data.loader import prefetch
from pipeline.data.schema import read_json
from pipeline.data.shards import ShardReader
from pipeline.models.dvae import DiscreteVAE, load_dvae

log = logger("encode")

MAX_BATCH = 4096  # 3 GB of 256-pixel pictures as float32
MAX_CROPS = 64
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DECODERS = 16  # threads, at most: some 250 JPEG files of 512 pixels a side a second each


def crop_rng(seed: int, key: str, crop: int) -> np.random.Generator:
    """The randomness of one crop of one picture, whatever shard, rank or order it comes in."""
    digest = blake2b(f"{seed}:{crop}:{key}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def crop_box(height: int, width: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """What ``augment_dalle`` cuts out with the same ``rng``: float32 [left, top, side, flip].

    In pixels of the upright picture; Listing 2 never flips.
    """
    short = min(height, width)
    top, left = (
        rng.integers(3 * slack // 8, max(3 * slack // 8 + 1, 5 * slack // 8))
        for slack in (height - short, width - short)
    )
    t = rng.integers(size, min(short, round(9 / 8 * size)) + 1)
    down, right = rng.integers(0, t - size + 1), rng.integers(0, t - size + 1)
    scale = short / t
    return np.array([left + right * scale, top + down * scale, size * scale, 0], np.float32)


@dataclass(frozen=True)
class Job:
    """What every rank of a run agrees on; picklable.

    Args:
        data, dvae, out: folders of the pairs, of the frozen dVAE and of the tokens.
        made_of: ``describe``.
        local_rank: which GPU of its machine a process takes.
    """

    data: Path
    dvae: Path
    out: Path
    made_of: dict[str, Any]
    local_rank: int = 0

    @property
    def is_on_gpu(self) -> bool:
        """Whether there is a GPU."""
        return torch.cuda.is_available()


@dataclass(frozen=True)
class _Tools:
    """What a process opens once."""

    pairs: ShardReader
    dvae: DiscreteVAE
    fingerprint: str
    device: torch.device


@lru_cache(maxsize=1)
def _tools(data: Path, dvae: Path, dtype: str, local_rank: int) -> _Tools:
    device = _device(local_rank)
    model, fingerprint = load_dvae(dvae, device)
    model.set_compute_dtype(DTYPES[dtype])
    return _Tools(ShardReader(data, kind="pairs"), model, fingerprint, device)


def _device(local_rank: int) -> torch.device:
    """A GPU when there is one, set so that the same picture gives the same codes."""
    if not torch.cuda.is_available():
        # sums that several threads share may end in another bit, and workers share the cores
        torch.set_num_threads(1)
        return torch.device("cpu")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def describe(
    pairs: ShardReader, dvae: DiscreteVAE, fingerprint: str, *, crops: int, seed: int, batch: int,
    dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """``made_of`` of the token set: the same description stands for the same codes.

    Raises:
        InputError: batch, crops or dtype will not do.
    """
    if not 1 <= batch <= MAX_BATCH:
        raise InputError(f"--batch {batch}: take 1 to {MAX_BATCH} pictures at once")
    if not 1 <= crops <= MAX_CROPS:
        raise InputError(f"--crops {crops}: take 1 to {MAX_CROPS} of a picture")
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: take one of {', '.join(DTYPES)}")
    return {
        "dvae": fingerprint,
        "pairs": pairs.fingerprint,
        "image_size": dvae.config.image_size,
        "grid": dvae.config.grid,
        "n_vocab": dvae.config.n_vocab,
        "crops": crops,
        "crop_seed": seed,
        "batch": batch,
        "dtype": dtype,
        "val_fraction": pairs.made_of.get("val_fraction"),
    }


# ---- pictures


def _crops(
    data: bytes, key: str, pairs: ShardReader, made_of: dict[str, Any]
) -> tuple[list[Pixels], np.ndarray]:
    """The crops of a picture, and their boxes float32 [K * 4]."""
    size, boxes = made_of["image_size"], []
    crops = []
    try:
        pixels = pairs.decode(data, size)
        for i in range(made_of["crops"]):
            crops.append(augment_dalle(pixels, size, crop_rng(made_of["crop_seed"], key, i)))
            rng = crop_rng(made_of["crop_seed"], key, i)
            boxes.append(crop_box(pixels.shape[0], pixels.shape[1], size, rng))
    except InputError as error:
        raise OwnError(f"picture {key!r}: {error}") from error  # other ranks read other pictures
    return crops, np.concatenate(boxes)


def _batches(
    job: Job, tools: _Tools, k: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[dict[str, list[Any]], np.ndarray]]:
    """Columns of some rows of shard ``k``, and all their crops: uint8 [B * K, Y, X, C]."""
    size, n_crops = job.made_of["image_size"], job.made_of["crops"]
    step = max(1, job.made_of["batch"] // n_crops)
    counts = [shard["rows"] for shard in tools.pairs.manifest["shards"][: k + 1]]
    rows = np.arange(sum(counts[:k]), sum(counts))
    for i in range(0, len(rows), step):
        ids = rows[i : i + step]
        keys, images = tools.pairs.keys(ids), tools.pairs.images(ids)
        made = partial(_crops, pairs=tools.pairs, made_of=job.made_of)
        cut = list(pool.map(made, images, keys))
        # the last batch has the shape of all others: a GPU picks its algorithm by the shape
        image_BYXC = np.zeros((step * n_crops, size, size, 3), np.uint8)
        image_BYXC[: len(ids) * n_crops] = [crop for crops, _ in cut for crop in crops]
        columns: dict[str, Any] = {
            "key": keys,
            "caption": tools.pairs.captions(ids),
            "crops": [boxes for _, boxes in cut],
            "image_sha": tools.pairs.column("image_sha", ids),
        }
        yield columns, image_BYXC


class _Encoder:
    """The dVAE, a batch ahead of who reads its codes, and the share of time that it works."""

    def __init__(self, tools: _Tools) -> None:
        self._tools = tools
        self._busy = 0.0
        self._pictures = 0
        self._start = time.perf_counter()

    def codes(
        self, batches: Iterator[tuple[dict[str, list[Any]], np.ndarray]]
    ) -> Iterator[tuple[dict[str, list[Any]], np.ndarray]]:
        """The same columns with codes int64 [B * K, Y, X]."""
        waiting = None
        for columns, image_BYXC in batches:
            begun = columns, *self._begin(image_BYXC)
            if waiting is not None:
                yield waiting[0], self._end(*waiting[1:])
            waiting = begun
        if waiting is not None:
            yield waiting[0], self._end(*waiting[1:])

    @torch.no_grad()
    def _begin(self, image_BYXC: np.ndarray) -> tuple[Tensor, Any]:
        dvae, device = self._tools.dvae, self._tools.device
        began = time.perf_counter()
        image = torch.from_numpy(image_BYXC)
        if device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            image = image.pin_memory().to(device, non_blocking=True)
            events[0].record()
        image_BCYX = image.permute(0, 3, 1, 2).float() / 255
        codes_BYX = dvae.encode(image_BCYX)
        if device.type == "cuda":
            events[1].record()
            return codes_BYX, events
        return codes_BYX, time.perf_counter() - began

    def _end(self, codes_BYX: Tensor, timing: Any) -> np.ndarray:
        codes: np.ndarray = codes_BYX.cpu().numpy()
        if isinstance(timing, float):
            self._busy += timing
        else:
            self._busy += timing[0].elapsed_time(timing[1]) / 1000
        return codes

    def pace(self, more: int = 0) -> str:
        """Pictures a second since the start, ``more`` of them new, and how busy the dVAE was."""
        self._pictures += more
        seconds = time.perf_counter() - self._start
        return f"{self._pictures / seconds:.1f} images/s, dVAE busy {self._busy / seconds:.0%}"


def process_shard(
    job: Job, k: int, advance: Callable[[int, str], None] | None = None
) -> tuple[int, str]:
    """Write token shard ``k``; returns its rows and the pace of it.

    ``advance`` is told of rows as they are done.

    Raises:
        InputError: a picture that cannot be decoded or is smaller than the dVAE's.
    """
    tools = _tools(job.data, job.dvae, job.made_of["dtype"], job.local_rank)
    for path, planned, found in (
        (job.dvae, job.made_of["dvae"], tools.fingerprint),
        (job.data, job.made_of["pairs"], tools.pairs.fingerprint),
    ):
        if planned != found:
            raise InputError(
                f"{path} has fingerprint {found}, this run began with {planned}: put the old one "
                "there again and go on, or begin a new --out"
            )
    encoder = _Encoder(tools)
    n_crops = job.made_of["crops"]

    def rows(pool: ThreadPoolExecutor) -> Generator[dict[str, Any], None, None]:
        # the next pictures are decoded while the dVAE works
        with closing(prefetch(_batches(job, tools, k, pool))) as batches:
            for columns, codes_BYX in encoder.codes(batches):
                n = len(columns["key"])
                codes = codes_BYX[: n * n_crops].reshape(n, -1)
                for i in range(n):
                    row = {name: values[i] for name, values in columns.items()}
                    yield row | {"image_tokens": codes[i]}
                if advance is not None:
                    advance(n, encoder.pace(n * n_crops))

    entry = tools.pairs.manifest["shards"][k]
    with ThreadPoolExecutor(min(cores(), DECODERS)) as pool, closing(rows(pool)) as made:
        n_train = entry["rows"] - entry["val_rows"]
        # those for validation are the last, here as there
        shard = write_shard(job.out, k, "tokens", islice(made, n_train), job.made_of, made)
    return int(shard["rows"]), encoder.pace()


# ---- the job


def encode(
    job: Job, launch: Launch, engine: str = "local", workers: int | None = None
) -> dict[str, Any] | None:
    """Encode this rank's shards; the manifest when the set is complete, None while others work.

    Raises:
        InputError: the folder holds tokens that were made of something else, or a picture that
            cannot be decoded or is smaller than the dVAE's.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    rows = [shard["rows"] for shard in read_json(job.data / "manifest.json")["shards"]]
    committed = {k for k, n in enumerate(rows) if is_committed(job.out, k, job.made_of, n)}
    mine = launch.share(range(len(rows)))
    todo = [k for k in mine if k not in committed]
    total, left = (sum(rows[k] for k in shards) for shards in (mine, todo))
    if left < total:
        log.info("%d of %d pictures are encoded already", total - left, total)
    # one process feeds a GPU
    n_workers = 1 if workers is None and job.is_on_gpu else workers_of(workers, len(todo))
    alone = engine == "local" and n_workers == 1
    with Bar("encode", total, total - left) as bar:
        task = (
            partial(process_shard, job, advance=bar.advance)
            if alone
            else (partial(process_shard, job))
        )
        try:
            for _, (n, pace) in run(task, todo, engine=engine, workers=n_workers, gpus=1):
                if not alone:
                    bar.advance(n, f"{pace}, of one worker")
        except OSError:
            # another job in this folder has finished the set, and tidied up
            if not (job.out / "manifest.json").exists():
                raise
    if not all(is_committed(job.out, k, job.made_of, n) for k, n in enumerate(rows)):
        log.info("done; other ranks are still at work, the last one writes the manifest")
        return None
    return write_manifest(job.out, "tokens", len(rows), job.made_of)


def main() -> None:
    """Encode a pair set from the command line, alone or as one rank of a launcher."""
    parser = argparse.ArgumentParser(description="pair shards + dVAE -> token shards")
    parser.add_argument("--data", type=a_path, required=True, help="pair shards")
    parser.add_argument("--dvae", type=a_path, required=True, help="folder of the frozen dVAE")
    parser.add_argument("--out", type=a_path, required=True, help="folder of the token shards")
    parser.add_argument(
        "--crops", type=int, default=1, help="of each picture; epochs take turns (default 1)"
    )
    parser.add_argument("--batch", type=int, default=32, help="pictures at once (default 32)")
    parser.add_argument("--seed", type=int, default=0, help="of the crops (default 0)")
    parser.add_argument(
        "--dtype", choices=list(DTYPES),
        help="of the convolutions (default: float16 on a GPU, as the released code; else float32)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, help="processes (default: one a core; with a GPU, one)"
    )
    parser.add_argument("--engine", choices=ENGINES, default="local", help="(default: local)")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    parser.add_argument("--local_rank", "--local-rank", type=int, default=local)
    args = parser.parse_args()
    pairs = ShardReader(args.data, kind="pairs")
    dvae, fingerprint = load_dvae(args.dvae)
    dtype = args.dtype or ("float16" if torch.cuda.is_available() else "float32")
    made_of = describe(
        pairs, dvae, fingerprint, crops=args.crops, seed=args.seed, batch=args.batch, dtype=dtype
    )
    job = Job(args.data, args.dvae, args.out, json.loads(json.dumps(made_of)), args.local_rank)
    manifest = encode(job, launch_of(dict(os.environ)), args.engine, args.workers)
    if manifest is not None:
        log.info(
            "%d pictures in %d shards in %s", manifest["rows"], len(manifest["shards"]), args.out
        )


if __name__ == "__main__":
    command(main)
