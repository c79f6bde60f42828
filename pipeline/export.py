"""A checkpoint of any number of ranks -> weights for everybody: ``python -m pipeline.export``.

    python -m pipeline.export --run runs/dalle --out dalle_600000 [--step 600000] [--raw]

Writes ``model.json`` and safetensors files of at most ``--file-gib``, with the index that other
libraries look for. Tensors go from the slices to the files one by one, so the memory of one is all
that it takes, whatever the model.
"""

import argparse
import resource
import shutil
from pathlib import Path
from typing import Any

import torch

from pipeline import slices, weights
from pipeline.console import InputError, a_path, command, logger

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

log = logger("export")


def chosen(run: Path, step: int | None) -> tuple[Path, dict[str, Any]]:
    """A whole checkpoint of a run, the newest one when ``step`` is None.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if step is None:
        found = slices.newest(run)
        if found is None:
            raise InputError(f"{run} holds no checkpoint that is whole: name the --out of a run")
        return found
    folder = slices.folder_of(run, step)
    if folder not in slices.complete(run):
        there = ", ".join(str(int(f.name[5:])) for f in slices.complete(run)) or "none"
        raise InputError(f"{run} has no checkpoint of update {step}: there are those of {there}")
    meta = slices.read_meta(folder)
    if bad := slices.damaged(folder, meta):
        raise InputError(f"{folder}: {', '.join(bad)} is damaged (sha256 differs): copy it again")
    return folder, meta


def main() -> None:
    """Export from the command line."""
    parser = argparse.ArgumentParser(prog="pipeline.export", description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=a_path, help="--out of a training")
    parser.add_argument("--out", required=True, type=a_path, help="folder of the weights")
    parser.add_argument("--step", type=int, help="update of the checkpoint (default: the newest)")
    parser.add_argument(
        "--raw", action="store_true", help="the weights themselves (default: their average)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    parser.add_argument(
        "--file-gib", type=float, default=weights.FILE_BYTES / 2**30, help="at most (default: 5)"
    )
    args = parser.parse_args()
    if not 0 < args.file_gib < 1e6:
        raise InputError(f"--file-gib {args.file_gib}: take a number above 0, below a million")
    folder, meta = chosen(args.run, args.step)
    key = "weight" if args.raw else "ema"
    if key == "ema" and not meta["applied"]:
        raise InputError(
            f"{folder} was saved before the first update, without an average: add --raw"
        )
    fingerprint = weights.export(
        folder, meta, args.out, key=key, dtype=DTYPES[args.dtype],
        file_bytes=int(args.file_gib * 2**30),
    )  # fmt: skip
    if (tokenizer := args.run / "tokenizer").is_dir() and args.out.resolve() != args.run.resolve():
        shutil.copytree(tokenizer, args.out / "tokenizer", dirs_exist_ok=True)
    # Linux counts in KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    log.info("%s -> %s, fingerprint %s, peak memory %.2f GiB", folder, args.out, fingerprint, peak)


if __name__ == "__main__":
    command(main)
