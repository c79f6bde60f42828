"""Times of a training step, a sampled image, a step of decoding: ``python -m pipeline.bench``.

The model has the paper's sequence (256 text and 32 x 32 image tokens), vocabularies (16,384 and
8,192) and schedule of row, column and convolutional layers; its width and depth are flags. A
training step is forward, loss (1/8 text, 7/8 image), backward and AdamW over full captions. A
sampled image is 1,024 tokens one after another and its pixels by a small dVAE. With ``--peer`` a
script for another system is run next, with the same shape and threads, and the ratio is given;
the script prints one JSON line with ``train_step_s`` and, if asked, ``sample_one_image_s``.

With ``--decode`` images a second are measured instead, for several batches, with their share of
what the device allows (``pipeline.speed.decoding``): on a GPU of dalle_1b and dalle_12b, on a CPU
of the model of the flags.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kernels.attention.op import BACKENDS
from pipeline import presets
from pipeline.config import DalleConfig, DvaeConfig, require
from pipeline.console import InputError, a_path, command, logger
from pipeline.files import write_bytes
from pipeline.generation.sampling import Sampler, pictures, prepare
from pipeline.machine import ceilings, commit, device_name, versions
from pipeline.models.dalle import Dalle, nll_sums
from pipeline.models.dvae import DiscreteVAE
from pipeline.speed import decoding
from pipeline.training.optimizer import AdamW, parameter_groups

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

log = logger("bench")


def seconds(
    work: Callable[[], object], runs: int, warm_up: int = 1, device: str = "cpu"
) -> list[float]:
    """How long each of ``runs`` calls takes, after ``warm_up`` that are not counted."""
    taken = []
    for run in range(-warm_up, runs):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if run >= 0:
            taken.append(round(time.perf_counter() - start, 4))
    return taken


def summary(taken: list[float]) -> dict[str, Any]:
    """Minimum and median, and what they are taken from."""
    return {"min": min(taken), "median": round(statistics.median(taken), 4), "runs": taken}


def model_config(args: argparse.Namespace) -> DalleConfig:
    """The paper's sequence at the width and depth of the flags; its vocabularies unless changed."""
    return DalleConfig(
        n_layer=args.layers,
        d_model=args.d_model,
        n_head=args.heads,
        n_text=args.n_text,
        grid=args.grid,
    )


def training_step(args: argparse.Namespace) -> Callable[[], None]:
    """One update of a fresh model on the default device."""
    config, recipe = model_config(args), presets.dalle_12b().optimizer
    model = Dalle(config)
    model.set_attention_backend(args.attention)
    model.set_compute_dtype(DTYPES[args.dtype])
    optimizer = AdamW(parameter_groups(model, recipe), recipe)
    optimizer.set_lr(4.5e-4)
    # the average of the weights is due every 25th update (B.2)
    optimizer.ema_is_due = False
    text = torch.randint(config.n_text_vocab, (args.batch, config.n_text))
    image = torch.randint(config.n_image_vocab, (args.batch, config.n_image))

    def step() -> None:
        text_logits, image_logits = model(text, image)
        text_nll, image_nll = nll_sums(text_logits, image_logits, text, image)
        (text_nll / text.numel() / 8 + image_nll / image.numel() * 7 / 8).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sampled_image(args: argparse.Namespace) -> Callable[[], None]:
    """One picture of a random model on the default device, alone in its batch."""
    config = model_config(args)
    model = Dalle(config).eval().requires_grad_(False)
    # a fresh head gives all tokens the same logits
    model.image_head.weight.normal_(std=0.02)
    prepare(model, DTYPES[args.dtype])
    dvae = DiscreteVAE(DvaeConfig(config.image_size, config.n_image_vocab, n_hid=16))
    dvae.eval().requires_grad_(False)
    text = torch.randint(config.n_text_vocab, (1, config.n_text))

    sampler = Sampler(model, width=1)

    def sample() -> None:
        pictures(dvae, sampler.draw(text, [0]), [0], width=1)

    return sample


def run_peer(args: argparse.Namespace) -> dict[str, Any]:
    """What the other system's script says of the same shape.

    Raises:
        InputError: its Python or script does not run, or says something else.
    """
    python, script = args.peer
    flags = {
        "dim": args.d_model,
        "depth": args.layers,
        "heads": args.heads,
        "batch": args.batch,
        "runs": args.runs,
        "threads": args.threads,
    }
    line = [python, script, *(str(x) for name, n in flags.items() for x in (f"--{name}", n))]
    line += ["--sample"] if args.sample else []
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"--peer: {python} does not run ({error.strerror})") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise InputError(f"--peer: {script} ended with code {done.returncode}: {last}")
    try:
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        result["train_step_s"][0]
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise InputError(
            f"--peer: {script} printed no JSON line with train_step_s: {error}"
        ) from error
    return result


def ratios(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
    """How many times longer the peer takes, minimum over minimum."""
    found = {"train_step": peer["train_step_s"][0] / ours["train_step_s"]["min"]}
    if "sample_one_image_s" in ours and "sample_one_image_s" in peer:
        found["sample_one_image"] = peer["sample_one_image_s"] / ours["sample_one_image_s"]["min"]
    return {name: round(value, 2) for name, value in found.items()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="pipeline.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("shape")
    group.add_argument("--d_model", type=int, default=256)
    group.add_argument("--layers", type=int, default=8)
    group.add_argument("--heads", type=int, default=4)
    group.add_argument("--batch", type=int, default=2, help="captioned images of a training step")
    group.add_argument("--n_text", type=int, default=256, help="text tokens")
    group.add_argument("--grid", type=int, default=32, help="image tokens a side")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of the matrices")
    group = parser.add_argument_group("measurement")
    group.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    group.add_argument("--attention", choices=list(BACKENDS), help="path; without: the fastest")
    group.add_argument("--runs", type=int, default=5)
    group.add_argument("--threads", type=int, default=2)
    group.add_argument("--sample", action="store_true", help="also sample one image a run")
    group.add_argument("--decode", action="store_true", help="images a second, by batch")
    group.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=list(decoding.BATCHES),
        metavar="N",
        help="pictures side by side, of --decode",
    )
    group.add_argument(
        "--peer",
        nargs=2,
        metavar=("PYTHON", "SCRIPT"),
        help="also run this script, of another system, at the paper's sequence",
    )
    group.add_argument("--commit", help="of the code; what git says when left out")
    group.add_argument("--out", type=a_path, help="also save the times as JSON")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise ``InputError`` for flags that cannot be measured."""
    for name in ("batch", "runs", "threads"):
        value = getattr(args, name)
        require(value >= 1, f"--{name} is {value}; take at least 1")
    least = min(args.batches)
    require(least >= 1, f"--batches has {least}; take at least 1")
    for name in ("sample", "peer"):
        require(
            not (args.decode and getattr(args, name)),
            f"--decode is measured alone; leave out --{name}",
        )
    if args.device == "cuda":
        require(torch.cuda.is_available(), "--device cuda: torch sees no CUDA device here")
    if args.peer:
        require(args.device == "cpu", "--peer: the other system is measured on the CPU only")
        require(
            (args.n_text, args.grid) == (256, 32),
            f"--n_text {args.n_text} --grid {args.grid}: a peer runs 256 text and 32 x 32 image "
            "tokens; leave both flags out",
        )
        require(Path(args.peer[1]).is_file(), f"--peer: there is no script {args.peer[1]}")


def timed(args: argparse.Namespace) -> dict[str, Any]:
    """A training step and, if asked, a sampled image."""
    makers = {"train_step_s": training_step}
    if args.sample:
        makers["sample_one_image_s"] = sampled_image
    ours: dict[str, Any] = {}
    for name, make in makers.items():
        with torch.device(args.device):
            work = make(args)
        ours[name] = summary(seconds(work, args.runs, device=args.device))
    for name, times in ours.items():
        log.info("%s: minimum %.3f, median %.3f", name, times["min"], times["median"])
    names = ("d_model", "layers", "heads", "batch", "n_text", "grid", "dtype")
    return {"shape": {name: getattr(args, name) for name in names}, "ours": ours}


def decoded(args: argparse.Namespace) -> dict[str, Any]:
    """Images a second by batch, and what the device reaches."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    config = model_config(args)
    flags: decoding.Models = {"flags": (config, (config.n_layer,))}
    chosen = decoding.models() if args.device == "cuda" else flags
    reached = ceilings(device, dtype)
    found = {}
    for name, (config, layers) in chosen.items():
        found[name] = decoding.measure(config, layers, args.batches, dtype, device, reached)
        for row in found[name]["rows"]:
            log.info(
                "%s, %d pictures of %s: %.2f ms a step, %.2f images/s, %.0f %% of the roofline",
                name,
                row["batch"],
                "one caption" if row["shared"] else "a caption each",
                row["step_ms"],
                row["images_per_s"],
                100 * row["share"],
            )
    return {"ceilings": reached, "dtype": args.dtype, "decode": found}


def main(argv: list[str] | None = None) -> None:
    """Measure, tell and, with ``--out``, save."""
    args = parse(argv)
    check(args)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "chip": device_name(args.device),
        "threads": args.threads,
        "versions": versions(),
        "commit": args.commit or commit(),
    }
    result |= decoded(args) if args.decode else timed(args)
    if args.peer:
        result["peer"] = run_peer(args)
        result["ratio"] = ratios(result["ours"], result["peer"])
        for name, value in result["ratio"].items():
            log.info("%s: the peer takes %.2f times as long", name, value)
    text = json.dumps(result, indent=1) + "\n"
    sys.stdout.write(text)
    if args.out:
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(args.out, text.encode())
        except OSError as error:
            raise InputError(f"{args.out} cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    command(main)
