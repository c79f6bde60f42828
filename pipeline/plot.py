"""The curves of one run or several: curves.png, and curves.html with a table of last values.

python -m pipeline.plot runs/demo/dvae runs/demo/dalle --out plots
python -m pipeline.plot base=runs/1/dalle wide=runs/2/dalle --out plots

Reads each run's metrics.jsonl, also while it trains. A panel a figure, a colour a run; training as
a line (of many points their running mean, the points faint behind it), held-out samples as dots,
crosses at the top where a value was no number. Runs of stage 1, stage 2 and CLIP have panels of
their own.
"""

import argparse
from pathlib import Path

import numpy as np

from pipeline.console import InputError, a_path, command, logger
from pipeline.evaluation import page
from pipeline.evaluation.curves import HeatMap, Line, Panel, draw, line
from pipeline.evaluation.metrics import Events, last, names, read_metrics, series
from pipeline.files import write_bytes

log = logger("plot")

KINDS = ("train", "val", "speed", "machine")
OF_ALL_RANKS = "peak_gib, all ranks"
# figures in the order in which a reader asks; what has no place here comes after them
FIRST = (
    "loss", "top_1", "text", "image", "z", "nll", "kl", "kl_per_code", "hard_elbo", "relaxed_elbo",
    "psnr_db", "codes_used", "perplexity", "lr", "gradient_norm", "scale", "beta", "tau",
    "scale_log2_min", "scale_log2_max", "skipped_share", "captions_cut",
    "tokens_per_s", "pictures_per_s", "mfu", "seconds_an_update", "peak_gib",
    OF_ALL_RANKS,
)  # fmt: skip
LOGARITHMIC = ("gradient_norm",)
SAME_IN_BOTH_STAGES = ("mfu", "seconds_an_update", "peak_gib", OF_ALL_RANKS)
BLOCKS = {"scale_log2": "log2 of the scale", "skipped_share": "skipped", "zero_share": "zeros"}


def read_runs(words: list[str]) -> dict[str, Events]:
    """The events of runs, by name: FOLDER has the name of the folder, NAME=FOLDER its own.

    Raises:
        InputError: two runs of one name, no run there, a broken file, or nothing to draw.
    """
    runs: dict[str, Events] = {}
    for word in words:
        name, sign, folder = word.rpartition("=")
        if not folder or (sign and not name):
            raise InputError(f"a run is FOLDER or NAME=FOLDER, not {word!r}")
        path = Path(folder)
        name = name or path.resolve().name
        if name in runs:
            raise InputError(
                f"two runs are called {name!r}, the second is {path}: write NAME={path} with "
                "another name"
            )
        if not path.is_dir():
            raise InputError(f"{path} is no folder; name the --out of a training")
        events = read_metrics(path)
        if not names(events, "train", "val"):
            raise InputError(
                f"{path} / metrics.jsonl has no update yet; wait for the first, or leave it out"
            )
        runs[name] = [_of_all_ranks(event) for event in events]
    return runs


def _of_all_ranks(event: dict) -> dict:
    """Memory in "machine" lines is that of all ranks: another figure than that of "speed"."""
    if event["kind"] != "machine":
        return event
    return {OF_ALL_RANKS if name == "peak_gib" else name: v for name, v in event.items()}


def stage(events: Events) -> str:
    """Of the training that wrote them."""
    found = names(events, "train", "val")
    if "top_1" in found:
        return "CLIP"
    return "stage 2" if "image" in found else "stage 1"


def panels(runs: dict[str, Events]) -> list[Panel | HeatMap]:
    """What there is to draw, in the order of ``FIRST``."""
    stages = {name: stage(events) for name, events in runs.items()}
    lines: dict[tuple[int, str, str], list[Line]] = {}
    for colour, (run, events) in enumerate(runs.items()):
        for name in names(events, *KINDS):
            place = FIRST.index(name) if name in FIRST else len(FIRST)
            is_split = len(set(stages.values())) > 1 and name not in SAME_IN_BOTH_STAGES
            key = (place, name, f", {stages[run]}" if is_split else "")
            lines.setdefault(key, []).append(line(events, name, run, colour))
    drawn: list[Panel | HeatMap] = [
        Panel(name + suffix, tuple(lines[place, name, suffix]), log=name in LOGARITHMIC)
        for place, name, suffix in sorted(lines)
    ]
    return drawn + [found for run, events in runs.items() for found in heat_maps(run, events)]


def heat_maps(run: str, events: Events) -> list[HeatMap]:
    """What float16 tells of the residual blocks: lines BLOCK/NAME of kind "blocks"."""
    found = []
    for suffix, title in BLOCKS.items():
        of_blocks = [n for n in names(events, "blocks") if n.endswith(f"/{suffix}")]
        if not of_blocks:
            continue
        # a model has the same blocks all the time; what another one left behind is not drawn
        last_of = last(events, "blocks")
        rows = [series(events, name, "blocks") for name in of_blocks if name in last_of]
        of_blocks = [name for name in of_blocks if name in last_of]
        n = min(len(values) for _, values in rows)
        rows = [(steps[-n:], values[-n:]) for steps, values in rows]
        values = np.stack([row_values for _, row_values in rows])
        blocks = [name.removesuffix(f"/{suffix}") for name in of_blocks]
        found.append(HeatMap(f"{run}: {title}", rows[0][0], blocks, values))
    return found


def last_values(runs: dict[str, Events]) -> str:
    """A table: a row a figure, a column a run."""
    rows = [["update", *(f"{max(e['step'] for e in events)}" for events in runs.values())]]
    for kind, suffix in (("train", ""), ("speed", ""), ("val", ", held out"), ("machine", "")):
        told = {run: last(events, kind) for run, events in runs.items()}
        figures = dict.fromkeys(name for events in runs.values() for name in names(events, kind))
        for name in figures:
            cells = [f"{told[run][name]:.4g}" if name in told[run] else "" for run in runs]
            rows.append([name + suffix, *cells])
    return page.table(["last value", *runs], rows)


def main() -> None:
    """Draw curves from the command line."""
    parser = argparse.ArgumentParser(
        prog="pipeline.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="--out of a training, or NAME=FOLDER"
    )
    parser.add_argument("--out", required=True, type=a_path, help="folder of the two files")
    args = parser.parse_args()
    runs = read_runs(args.runs)
    args.out.mkdir(parents=True, exist_ok=True)
    png = draw(panels(runs))
    told = page.page(
        "Curves",
        "<h1>Curves</h1>",
        page.img(png, "figures over the updates", "wide"),
        "<h2>Last values</h2>",
        last_values(runs),
    )
    write_bytes(args.out / "curves.png", png)
    write_bytes(args.out / "curves.html", told.encode())
    log.info("wrote curves.png and curves.html of %s to %s", ", ".join(runs), args.out)


if __name__ == "__main__":
    command(main)
