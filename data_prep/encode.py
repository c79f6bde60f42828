"""Pictures of a pair shard set -> their codes under a frozen dVAE, as a token shard set.

    python -m data_prep.encode --data PAIRS --dvae DIR --out DIR
    deepspeed --module data_prep.encode --data PAIRS --dvae DIR --out DIR

Token shard k holds the rows of pair shard k, in order. Ranks take shards k = rank, rank + world,
... and need not know of each other; who finds every shard committed writes the manifest. A run that
was stopped goes on where it was, also with another number of ranks.

Legend: B pictures, Y X code grid; in image_BYXC Y X are pixels and C = 3 colours.
"""

import argparse
import os
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.console import Bar, InputError, OwnError, command, logger
from pipeline.data.images import Pixels, augment_dalle
from pipeline.data.loader import prefetch
from pipeline.data.schema import read_json, shard_name
from pipeline.data.shards import ShardReader, write_manifest, write_shard
from pipeline.models.dvae import DiscreteVAE, load_dvae

log = logger("encode")

MAX_BATCH = 4096  # 3 GB of 256-pixel pictures as float32


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
    """What every rank of a run agrees on."""

    pairs: ShardReader
    dvae: DiscreteVAE
    out: Path
    made_of: dict[str, Any]
    batch: int

    @property
    def n_shards(self) -> int:
        """Shards of the pair set, and of the token set."""
        return len(self.pairs.manifest["shards"])

    def rows(self, k: int) -> np.ndarray:
        """Row numbers of pair shard ``k``."""
        counts = [shard["rows"] for shard in self.pairs.manifest["shards"]]
        return np.arange(sum(counts[:k]), sum(counts[: k + 1]))


def describe(pairs: ShardReader, dvae: DiscreteVAE, fingerprint: str, seed: int) -> dict[str, Any]:
    """``made_of`` of the token set: the same description stands for the same codes."""
    return {
        "dvae": fingerprint,
        "pairs": pairs.fingerprint,
        "image_size": dvae.config.image_size,
        "grid": dvae.config.grid,
        "n_vocab": dvae.config.n_vocab,
        "crops": 1,
        "crop_seed": seed,
    }


def is_committed(job: Job, k: int) -> bool:
    """Whether token shard ``k`` is finished.

    Raises:
        InputError: it is, but was made of something else.
    """
    path = job.out / shard_name(k)
    sidecar_path = path.with_suffix(".json")
    if not sidecar_path.exists():
        return False
    sidecar = read_json(sidecar_path)
    if not {"made_of", "rows", "val_rows", "bytes"} <= set(sidecar):
        raise InputError(
            f"{sidecar_path} describes no shard: delete it, and this run makes it again"
        )
    for name, wanted in job.made_of.items():
        if (found := sidecar["made_of"].get(name)) != wanted:
            raise InputError(
                f"{job.out} holds tokens with {name} {found}, this run makes them with {name} "
                f"{wanted}: name another --out, or delete that folder"
            )
    is_whole = path.is_file() and path.stat().st_size == sidecar["bytes"]
    pairs = job.pairs.manifest["shards"][k]
    return bool(is_whole and all(sidecar[name] == pairs[name] for name in ("rows", "val_rows")))


def _crop(
    data: bytes, key: str, pairs: ShardReader, size: int, seed: int
) -> tuple[Pixels, np.ndarray]:
    try:
        pixels = pairs.decode(data, size)
        crop = augment_dalle(pixels, size, crop_rng(seed, key, 0))
    except InputError as error:
        raise OwnError(f"picture {key!r}: {error}") from error  # other ranks read other pictures
    height, width = pixels.shape[:2]
    return crop, crop_box(height, width, size, crop_rng(seed, key, 0))


def _batches(job: Job, k: int, pool: ThreadPoolExecutor) -> Iterator[tuple[dict, np.ndarray]]:
    """Columns of up to ``batch`` rows, and their crops uint8 image_BYXC with B = batch always."""
    size, seed = job.made_of["image_size"], job.made_of["crop_seed"]
    rows = job.rows(k)
    for start in range(0, len(rows), job.batch):
        ids = rows[start : start + job.batch]
        columns: dict[str, Any] = {
            name: job.pairs.column(name, ids) for name in ("key", "caption", "image_sha")
        }
        # one shape for all batches: a convolution may round otherwise for another
        image_BYXC = np.zeros((job.batch, size, size, 3), np.uint8)
        columns["crops"] = []
        crop = partial(_crop, pairs=job.pairs, size=size, seed=seed)
        crops = pool.map(crop, job.pairs.images(ids), columns["key"])
        for i, (pixels, box) in enumerate(crops):
            image_BYXC[i] = pixels
            columns["crops"].append(box)
        yield columns, image_BYXC


@torch.inference_mode()
def _token_rows(
    job: Job, k: int, pool: ThreadPoolExecutor, device: torch.device, bar: Bar
) -> Generator[dict[str, Any], None, None]:
    """Rows of token shard ``k``; the next pictures are decoded while the dVAE works."""
    with closing(prefetch(_batches(job, k, pool))) as batches:
        for columns, image_BYXC in batches:
            image_BCYX = torch.from_numpy(image_BYXC).to(device).permute(0, 3, 1, 2).float() / 255
            codes_BYX = job.dvae.encode(image_BCYX).cpu().numpy()
            n = len(columns["key"])
            for i in range(n):
                row = {name: values[i] for name, values in columns.items()}
                yield row | {"image_tokens": codes_BYX[i].ravel()}
            bar.advance(n)


def encode(job: Job, rank: int, world: int, device: torch.device) -> dict[str, Any] | None:
    """Encode this rank's shards; the manifest when the set is complete, None while others work.

    Raises:
        InputError: the folder holds tokens that were made of something else, or a picture that
            cannot be decoded or is smaller than the dVAE's.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    committed = {k for k in range(job.n_shards) if is_committed(job, k)}
    mine = list(range(rank, job.n_shards, world))
    total, done = (
        sum(len(job.rows(k)) for k in shards) for shards in (mine, committed & set(mine))
    )
    if done:
        log.info("%d of %d pictures are encoded already", done, total)
    workers = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with ThreadPoolExecutor(min(workers, 16)) as pool, Bar("encode", total, done) as bar:
        for k in mine:
            if k not in committed:
                pairs = job.pairs.manifest["shards"][k]
                with closing(_token_rows(job, k, pool, device, bar)) as rows:
                    # the same rows train and validate as in the pair shard, and in its order
                    train = islice(rows, pairs["rows"] - pairs["val_rows"])
                    made = write_shard(job.out, k, "tokens", train, job.made_of, val_rows=rows)
                assert all(made[name] == pairs[name] for name in ("rows", "val_rows"))
    if not all(is_committed(job, k) for k in range(job.n_shards)):
        log.info("done; other ranks are still at work, the last one writes the manifest")
        return None
    manifest = write_manifest(job.out, "tokens", job.n_shards, job.made_of)
    assert manifest["rows"] == len(job.pairs)
    return manifest


def _device(local_rank: int) -> torch.device:
    """A GPU when there is one, set so that the same picture gives the same codes."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def main() -> None:
    """Encode a pair set from the command line, alone or as one rank of a launcher."""
    parser = argparse.ArgumentParser(description="pair shards + dVAE -> token shards")
    parser.add_argument("--data", type=Path, required=True, help="pair shards")
    parser.add_argument("--dvae", type=Path, required=True, help="folder of the frozen dVAE")
    parser.add_argument("--out", type=Path, required=True, help="folder of the token shards")
    parser.add_argument("--batch", type=int, default=32, help="pictures at once (default 32)")
    parser.add_argument("--seed", type=int, default=0, help="of the crops (default 0)")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    parser.add_argument("--local_rank", "--local-rank", type=int, default=local)
    args = parser.parse_args()
    if not 1 <= args.batch <= MAX_BATCH:
        raise InputError(f"--batch {args.batch}: take 1 to {MAX_BATCH} pictures at once")
    rank, world = (int(os.environ.get(name, n)) for name, n in (("RANK", "0"), ("WORLD_SIZE", "1")))
    device = _device(args.local_rank)
    pairs = ShardReader(args.data, kind="pairs")
    dvae, fingerprint = load_dvae(args.dvae, device)
    made_of = describe(pairs, dvae, fingerprint, args.seed)
    manifest = encode(Job(pairs, dvae, args.out, made_of, args.batch), rank, world, device)
    if manifest is not None:
        log.info(
            "%d pictures in %d shards in %s", manifest["rows"], len(manifest["shards"]), args.out
        )


if __name__ == "__main__":
    command(main)
