"""Procedural pictures with exact captions, as a folder that ``data_prep.ingest`` reads.

    python -m data_prep.scenes --count 10000 --out DIR --image-size 64

Picture i depends on the seed and on i alone: a smaller count gives the beginning of a larger one.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.console import InputError, a_path, command, logger, track
from pipeline.evaluation.scenes import draw, random_scene

PER_FOLDER = 1000
SETTINGS = ".scenes.json"  # hidden, so that no reader of pairs takes it for one

log = logger("scenes")


def write_scenes(
    out: Path, count: int, image_size: int, seed: int, hold_out: bool, two_objects: float
) -> None:
    """Write ``count`` scenes as ``00000/00000000.png`` and ``.txt``, a thousand to a folder.

    Args:
        out: new, empty, or written with these very settings before.
        count: pictures.
        image_size: pixels a side.
        seed: not negative.
        hold_out: draw only the pairs of colour and shape that are otherwise never drawn.
        two_objects: share of pictures, 0 to 1, that show two objects in a relation.

    Raises:
        InputError: a value is outside its bounds, or ``out`` holds something else.
    """
    if count < 1:
        raise InputError(f"count {count} is below 1: name how many pictures to draw")
    if not 8 <= image_size <= 4096:
        raise InputError(f"image size {image_size} is outside 8..4096 pixels")
    if seed < 0:
        raise InputError(f"seed {seed} is negative: take 0 or more")
    if not 0.0 <= two_objects <= 1.0:
        raise InputError(
            f"two-objects {two_objects} is outside 0..1: it is a share of the pictures"
        )
    settings = {"count": count, "image_size": image_size, "seed": seed}
    _claim(out, settings | {"hold_out": hold_out, "two_objects": two_objects})
    for i in track(range(count), "scenes", count):
        folder = out / f"{i // PER_FOLDER:05d}"
        if i % PER_FOLDER == 0:
            folder.mkdir(exist_ok=True)
        rng = np.random.default_rng([seed, i])
        scene = random_scene(rng, held_out=hold_out, two_things=two_objects)
        Image.fromarray(draw(scene, image_size)).save(folder / f"{i:08d}.png")
        (folder / f"{i:08d}.txt").write_text(scene.caption + "\n", encoding="utf-8")
    log.info("%d pictures in %s", count, out)


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Make ``out`` and write down what it is for, unless it is for something else already."""
    found = None
    if (out / SETTINGS).is_file():
        found = (out / SETTINGS).read_text(encoding="utf-8")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and holds no scenes: name a new folder")
    text = json.dumps(settings, sort_keys=True) + "\n"
    if found is not None and found != text:
        raise InputError(f"{out} holds scenes of {found.strip()}: name a new folder or delete it")
    out.mkdir(parents=True, exist_ok=True)
    (out / SETTINGS).write_text(text, encoding="utf-8")


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(prog="data_prep.scenes", description=__doc__.splitlines()[0])
    parser.add_argument("--count", required=True, type=int, help="pictures")
    parser.add_argument(
        "--out", required=True, type=a_path, help="folder for pictures and captions"
    )
    parser.add_argument("--image-size", type=int, default=64, help="pixels a side (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument(
        "--hold-out", action="store_true", help="draw only what is otherwise never drawn"
    )
    parser.add_argument(
        "--two-objects", type=float, default=0.0, metavar="FRACTION", help="(default: 0)"
    )
    args = parser.parse_args()
    write_scenes(args.out, args.count, args.image_size, args.seed, args.hold_out, args.two_objects)


if __name__ == "__main__":
    command(main)
