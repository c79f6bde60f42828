"""One page about a run from pictures to pictures: report.html, and report.json beside it.

python -m pipeline.report --dvae DIR --dalle DIR --pairs DIR --samples NAME=DIR ... --out runs/demo

The first set of samples gives the caption accuracy that report.json leads with. With ``--clip DIR``
the page shows how the model that ranks was trained, too.

The page holds all its pictures. Where captions describe scenes (pipeline.evaluation.scenes), the
checker reads every sample back and the page says how often it shows what its caption asks for.
"""

import argparse
import html
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.console import InputError, a_path, command, logger
from pipeline.data.images import centre_crop
from pipeline.data.pictures import to_uint8
from pipeline.data.shards import ShardReader
from pipeline.evaluation import page, scenes
from pipeline.evaluation.curves import HeatMap, Panel, draw, line
from pipeline.evaluation.metrics import Events, last, read_metrics
from pipeline.files import write_bytes, write_json
from pipeline.models.dvae import DiscreteVAE, load_dvae

log = logger("report")

RENDERS, RECONSTRUCTIONS = "true renders", "dVAE reconstructions"
WORDS = ("colour", "shape", "place")  # what caption accuracy means in the demo
CHECKED = 512  # pictures that the checker reads for the accuracy of renders and reconstructions
SHOWN = 24  # samples on the page, of each set
# of each stage, what the curves show
FIGURES = {
    "dvae": ("loss", "hard_elbo", "relaxed_elbo"),
    "dalle": ("text", "image"),
    "clip": ("loss",),
}


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder of pipeline.sample, each with its ``image`` uint8 [Y, X, 3]."""
    path = folder / "samples.jsonl"
    try:
        # other line ends than \n may stand in captions
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        for row in rows:
            with Image.open(folder / row["file"]) as image:
                row["image"] = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); run pipeline.sample") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} has a line that describes no picture: {error}; run pipeline.sample again"
        ) from error
    if not rows:
        raise InputError(f"{path} is empty; run pipeline.sample to its end")
    return rows


def read_seconds(path: Path) -> dict[str, float]:
    """Seconds of each stage, from lines of a name and a number; those of one name are added up."""
    seconds: dict[str, float] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            stage, _, value = line.rpartition(" ")
            seconds[stage] = seconds.get(stage, 0.0) + float(value)
    except OSError as error:
        raise InputError(f"--seconds {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"--seconds {path}: {error}; a line is a stage and its seconds") from error
    return seconds


def caption_accuracy(rows: list[tuple[str, np.ndarray]]) -> dict[str, float] | None:
    """Share of pictures that show what their caption says, word by word; None without any scene.

    Args:
        rows: captions and pictures uint8 [Y, X, 3]; captions of other than one object are left out.
    """
    counts: dict[str, int] = {}
    n = 0
    for caption, image in rows:
        try:
            scene = scenes.parse(caption)
        except InputError:
            continue
        if len(scene.things) != 1:
            continue
        n += 1
        for word, holds in scenes.describes(scene, image).items():
            counts[word] = counts.get(word, 0) + holds
    return {"n": n, **{word: count / n for word, count in counts.items()}} if n else None


def reconstruct(dvae: DiscreteVAE, pairs: ShardReader) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(caption, picture, its reconstruction) of the first pictures of a set."""
    side, rows = dvae.config.image_size, []
    for start in range(0, min(CHECKED, len(pairs)), 32):
        some = [pairs[i] for i in range(start, min(start + 32, CHECKED, len(pairs)))]
        images = np.stack([centre_crop(pairs.decode(row["image"], side), side) for row in some])
        batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            made = to_uint8(dvae.decode(dvae.encode(batch)))
        rows += [(row["caption"], a, b) for row, a, b in zip(some, images, made, strict=True)]
    return rows


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _samples_section(name: str, rows: list[dict[str, Any]]) -> str:
    figures = "".join(
        f"<figure>{page.img(_png(row['image']), row['caption'], 'pixel')}"
        f"<figcaption>{html.escape(row['caption'])}</figcaption></figure>"
        for row in rows[:SHOWN]
    )
    title = html.escape(name.replace("_", " "))
    return f"<h2>Samples: {title}</h2><div class='grid'>{figures}</div>"


def _accuracy_section(accuracy: dict[str, dict[str, float] | None]) -> str:
    known = {name: value for name, value in accuracy.items() if value}
    if not known:
        return ""
    words = [w for w in next(iter(known.values())) if w != "n"]
    rows = [
        [name.replace("_", " "), f"{value['n']:.0f}", *(f"{100 * value[w]:.1f} %" for w in words)]
        for name, value in known.items()
    ]
    return (
        "<h2>Caption accuracy</h2><p>A checker without any learning reads each picture back; "
        "a word counts when it reads what the caption says. By chance: colour 17 %, shape 25 %, "
        "place 20 %.</p>" + page.table(["pictures", "n", *words], rows)
    )


@dataclass
class Story:
    """All that the page tells."""

    metrics: dict[str, Events]
    samples: dict[str, list[dict[str, Any]]]
    accuracy: dict[str, dict[str, float] | None]
    reconstructions: bytes  # PNG
    n_vocab: int
    seconds: dict[str, float]

    @property
    def vals(self) -> dict[str, dict[str, float]]:
        """The last validation of each stage."""
        return {name: last(events, "val") for name, events in self.metrics.items()}

    @property
    def peak_gib(self) -> float:
        """The most memory that the ranks of a stage held together."""
        return max(last(events, "machine").get("peak_gib", 0.0) for events in self.metrics.values())

    def figures(self) -> dict[str, Any]:
        """report.json."""
        first = self.accuracy[next(iter(self.samples))]
        return {
            "caption_accuracy": {word: first[word] for word in WORDS} if first else None,
            "render_accuracy": self.accuracy[RENDERS],
            "reconstruction_accuracy": self.accuracy[RECONSTRUCTIONS],
            "accuracy_by_set": {name: self.accuracy[name] for name in self.samples},
            "seconds": self.seconds,
            "peak_gib": self.peak_gib,
            "losses": {
                name: {"train": last(events, "train"), "val": self.vals[name]}
                for name, events in self.metrics.items()
            },
        }

    def page(self) -> str:
        """report.html."""
        curves: list[Panel | HeatMap] = [
            Panel(name, tuple(line(events, n, n, i) for i, n in enumerate(FIGURES[name])))
            for name, events in self.metrics.items()
        ]
        use = {"codes_used": 0.0, "perplexity": 0.0, "psnr_db": 0.0, **self.vals["dvae"]}
        parts = [
            "<h1>From captioned pictures to new pictures</h1>",
            f"<p>{sum(len(rows) for rows in self.samples.values())} pictures drawn, "
            f"{sum(self.seconds.values()) / 60:.1f} minutes in all, at most "
            f"{self.peak_gib:.2f} GiB in the training processes.</p>",
            *(_samples_section(name, rows) for name, rows in self.samples.items()),
            _accuracy_section(self.accuracy),
            "<h2>Stage 1: pictures and their reconstructions</h2>",
            "<p>Rows of held-out pictures, each above what the decoder makes of their codes. "
            f"{use['codes_used']:.0f} of {self.n_vocab} codes used, perplexity "
            f"{use['perplexity']:.1f}, {use['psnr_db']:.1f} dB.</p>",
            page.img(self.reconstructions, "originals above reconstructions", "sheet"),
            "<h2>Curves</h2>",
            page.img(draw(curves), "losses of all stages", "wide"),
            "<h2>Time by stage</h2>",
            page.table(["stage", "seconds"], [[n, f"{s:.0f}"] for n, s in self.seconds.items()]),
        ]
        return page.page("Daikon", *parts)


def read_story(
    dvae_folder: Path,
    dalle_folder: Path,
    pairs_folder: Path,
    samples: dict[str, Path],
    seconds: dict[str, float],
    clip_folder: Path | None = None,
) -> Story:
    """Read what the stages left behind, and let the checker look at it."""
    dvae, _ = load_dvae(dvae_folder)
    made = reconstruct(dvae, ShardReader(pairs_folder, "pairs"))
    sampled = {name: read_samples(folder) for name, folder in samples.items()}
    accuracy = {
        name: caption_accuracy([(row["caption"], row["image"]) for row in rows])
        for name, rows in sampled.items()
    }
    accuracy[RENDERS] = caption_accuracy([(caption, image) for caption, image, _ in made])
    accuracy[RECONSTRUCTIONS] = caption_accuracy([(caption, image) for caption, _, image in made])
    sheet = dvae_folder / "reconstructions" / "final.png"
    if not sheet.is_file():
        raise InputError(f"{sheet} is missing: {dvae_folder} was not trained to its end")
    metrics = {"dvae": read_metrics(dvae_folder), "dalle": read_metrics(dalle_folder)}
    if clip_folder is not None:
        metrics["clip"] = read_metrics(clip_folder)
    return Story(metrics, sampled, accuracy, sheet.read_bytes(), dvae.config.n_vocab, seconds)


def main() -> None:
    """Write the report from the command line."""
    parser = argparse.ArgumentParser(prog="pipeline.report", description=__doc__)
    parser.add_argument("--dvae", required=True, type=a_path, help="--out of pipeline.train_dvae")
    parser.add_argument("--dalle", required=True, type=a_path, help="--out of pipeline.train_dalle")
    parser.add_argument("--pairs", required=True, type=a_path, help="pictures to reconstruct")
    parser.add_argument("--samples", required=True, nargs="+", metavar="NAME=DIR")
    parser.add_argument("--clip", type=a_path, help="--out of pipeline.train_clip")
    parser.add_argument("--seconds", type=a_path, help="lines of: stage seconds")
    parser.add_argument("--out", required=True, type=a_path)
    args = parser.parse_args()
    samples = {}
    for item in args.samples:
        name, sign, folder = item.partition("=")
        if not sign or not name or not folder:
            raise InputError(f"--samples takes NAME=DIR, not {item!r}")
        if name in samples or name in (RENDERS, RECONSTRUCTIONS):
            raise InputError(f"--samples names {name!r} twice or as the page does: take another")
        samples[name] = Path(folder)
    seconds = read_seconds(args.seconds) if args.seconds else {}
    story = read_story(args.dvae, args.dalle, args.pairs, samples, seconds, args.clip)
    figures = story.figures()
    args.out.mkdir(parents=True, exist_ok=True)
    write_bytes(args.out / "report.html", story.page().encode())
    write_json(args.out / "report.json", figures)
    accuracy = figures["caption_accuracy"]
    if accuracy:
        log.info("caption accuracy %s", {w: round(a, 3) for w, a in accuracy.items()})
    log.info("wrote %s", args.out / "report.html")


if __name__ == "__main__":
    command(main)
