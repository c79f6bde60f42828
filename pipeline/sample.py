"""Pictures from captions (section 2.6, without the ranking).

python -m pipeline.sample --model DIR --dvae DIR --caption "a red circle" --count 16 --out DIR

Writes one PNG an image (caption index and image index in its name; caption, seed and fingerprints
in its text chunks), ``grid.png`` of all and ``samples.jsonl``. Image number n of the command, over
all captions, has the seed ``--seed`` + n: the same seed, caption and settings give the same image
in any other command.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.config import require
from pipeline.console import Bar, InputError, a_path, command, logger
from pipeline.data.pictures import save_png, tile, to_uint8
from pipeline.data.tokenizer import Tokenizer
from pipeline.generation.draw import Settings
from pipeline.generation.sampling import MAX_WIDTH, WIDTH, Sampler, pictures, prepare
from pipeline.models.dalle import Dalle, load_dalle
from pipeline.models.dvae import DiscreteVAE, load_dvae

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

log = logger("sample")


@dataclass(frozen=True)
class Models:
    """What turns a caption into a picture, checked to belong together."""

    dalle: Dalle
    dvae: DiscreteVAE
    tokenizer: Tokenizer
    fingerprints: dict[str, str]


@dataclass(frozen=True)
class Order:
    """One image to be made."""

    caption: str
    caption_index: int
    image_index: int  # among the images of its caption
    index: int  # among all images
    seed: int

    @property
    def file(self) -> str:
        """Name of the PNG."""
        return f"{self.caption_index:05d}-{self.image_index:03d}.png"


def load_models(model: Path, dvae: Path, device: torch.device) -> Models:
    """Open a trained model with the tokenizer beside it and the dVAE that made its tokens.

    Raises:
        InputError: a folder is missing or broken, or it was not this model's.
    """
    dalle, made_of, dalle_print = load_dalle(model, device)
    tokenizer = Tokenizer(model / "tokenizer")
    frozen, dvae_print = load_dvae(dvae, device)
    require(
        made_of.get("dvae") == dvae_print,
        f"{model} was trained on tokens of dVAE {made_of.get('dvae')}, and {dvae} is {dvae_print}: "
        "name the dVAE that made the tokens, or train on tokens of this one",
    )
    require(
        made_of.get("tokenizer") == tokenizer.fingerprint,
        f"{model} was trained with tokenizer {made_of.get('tokenizer')}, and {tokenizer.folder} is "
        f"{tokenizer.fingerprint}: put the tokenizer of the training there",
    )
    fingerprints = {"model": dalle_print, "dvae": dvae_print, "tokenizer": tokenizer.fingerprint}
    return Models(dalle, frozen, tokenizer, fingerprints)


def read_captions(args: argparse.Namespace) -> list[str]:
    """The captions of the command line or of a UTF-8 file, one a line.

    Raises:
        InputError: an empty caption, or a file that is missing, empty or no text.
    """
    if args.caption is not None:
        require(args.caption.strip() != "", "the caption is empty; say what to draw")
        return [args.caption.strip()]
    try:
        # utf-8-sig: files from Windows may start with a byte order mark
        text = args.captions.read_text(encoding="utf-8-sig").rstrip()
    except OSError as error:
        raise InputError(f"{args.captions} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{args.captions} is not UTF-8 text: {error.reason}; convert it"
        ) from error
    require(text != "", f"{args.captions} is empty; write one caption a line")
    captions = [line.strip() for line in text.split("\n")]
    if "" in captions:
        raise InputError(
            f"{args.captions} has no caption in line {captions.index('') + 1}; delete the line"
        )
    return captions


def encode(models: Models, captions: list[str]) -> torch.Tensor:
    """Text tokens int64 [captions, n_text]; what does not fit is cut, and said."""
    n_text, rows = models.dalle.config.n_text, []
    for i, caption in enumerate(captions):
        tokens = models.tokenizer.encode(caption)
        require(len(tokens) > 0, f"caption {caption!r} has nothing to read in it; say what to draw")
        padded, was_cut = models.tokenizer.pad(tokens, n_text)
        if was_cut:
            log.warning(
                "caption %d has %d tokens and the model reads %d: its end is cut off",
                i, len(tokens), n_text - 1,
            )  # fmt: skip
        rows.append(torch.from_numpy(padded).long())
    return torch.stack(rows)


def order(captions: list[str], count: int, seed: int) -> list[Order]:
    """``count`` images of each caption, seeds counted on from ``seed`` over all of them."""
    return [
        Order(caption, c, i, index=c * count + i, seed=seed + c * count + i)
        for c, caption in enumerate(captions)
        for i in range(count)
    ]


def sample(
    models: Models, captions: list[str], text: torch.Tensor, args: argparse.Namespace
) -> None:
    """Make and write ``args.count`` images of each caption, one batch after another."""
    orders = order(captions, args.count, args.seed)
    settings = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
    sampler = Sampler(models.dalle, Settings(**settings), args.width)
    settings["width"] = args.width
    tiles: list[np.ndarray] = []
    out = args.out
    with (
        open(out / "samples.jsonl", "w", encoding="utf-8") as lines,
        Bar("image tokens", len(orders) * models.dalle.config.n_image) as bar,
    ):
        for start in range(0, len(orders), args.width):
            batch = orders[start : start + args.width]
            seeds = [wanted.seed for wanted in batch]
            codes_BI = sampler.draw(
                text[[wanted.caption_index for wanted in batch]], seeds, advance=bar.advance
            )
            images = to_uint8(pictures(models.dvae, codes_BI, seeds, args.width))
            for wanted, image in zip(batch, images, strict=True):
                line = {"file": wanted.file, "caption": wanted.caption, "seed": wanted.seed}
                line |= {"index": wanted.index, **settings, "dtype": args.dtype}
                write_png(out / wanted.file, image, line | models.fingerprints)
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            lines.flush()
            tiles.extend(images)
    # a caption a row; with one image a caption, or one caption, as square as it gets
    rows_are_captions = len(captions) > 1 and args.count > 1
    columns = args.count if rows_are_captions else math.ceil(math.sqrt(len(tiles)))
    save_png(out / "grid.png", tile(np.stack(tiles), columns))
    log.info("wrote %d images to %s, all of them in grid.png", len(orders), out)


def write_png(path: Path, image_YXC: np.ndarray, facts: dict[str, Any]) -> None:
    """A picture with ``facts`` as its text chunks; what was not given is left out."""
    info = PngInfo()
    for name, value in facts.items():
        if value is not None:
            info.add_itxt(name, str(value))
    Image.fromarray(image_YXC).save(path, pnginfo=info)


def make_folder(out: Path) -> None:
    """Make ``out`` and try to write into it, before an hour of sampling."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "samples.jsonl").touch()
    except OSError as error:
        raise InputError(
            f"{out} cannot be written ({error.strerror}); name another --out"
        ) from error


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="pipeline.sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("input")
    group.add_argument("--model", required=True, type=a_path, help="--out of pipeline.train_dalle")
    group.add_argument("--dvae", required=True, type=a_path, help="the dVAE that made its tokens")
    captions = group.add_mutually_exclusive_group(required=True)
    captions.add_argument("--caption", help="what to draw")
    captions.add_argument("--captions", type=a_path, help="UTF-8 file, one caption a line")
    group = parser.add_argument_group("sampling")
    group.add_argument("--count", type=int, default=1, help="images a caption")
    group.add_argument("--seed", type=int, default=0, help="of the first image; the next has + 1")
    group.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest")
    group.add_argument("--top_k", type=int, help="draw among this many likeliest tokens")
    group.add_argument("--top_p", type=float, help="draw among the likeliest with this much mass")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of the matrices")
    group.add_argument(
        "--width",
        type=int,
        default=WIDTH,
        help="images side by side; another width may round an image differently",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--out", required=True, type=a_path)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Draw pictures from the command line."""
    args = parse(argv)
    require(args.count >= 1, f"--count is {args.count}; take at least 1")
    require(1 <= args.width <= MAX_WIDTH, f"--width is {args.width}; take 1 to {MAX_WIDTH}")
    require(0 <= args.seed < 2**62, f"--seed is {args.seed}; take 0 to 2^62")
    captions = read_captions(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = load_models(args.model, args.dvae, device)
    Settings(args.temperature, args.top_k, args.top_p).check(models.dalle.config)
    prepare(models.dalle, DTYPES[args.dtype])
    text = encode(models, captions)
    make_folder(args.out)
    sample(models, captions, text, args)


if __name__ == "__main__":
    command(main)
