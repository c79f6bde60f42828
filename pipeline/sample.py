"""Pictures from captions, the best of many, and what is missing of a picture (section 2.6).

python -m pipeline.sample --model DIR --dvae DIR --caption "a red circle" --count 16 --out DIR
deepspeed --module pipeline.sample ...          the same pictures, by several GPUs or processes
python -m pipeline.sample verify FILE ...       where pictures come from

Writes one PNG an image (caption index and image index in its name; how it was made in its text
chunks), ``grid.png``, ``samples.jsonl`` and ``provenance.json``. Image number n of the command,
over all captions, has the seed ``--seed`` + n: the same seed, caption and settings give the same
image in any other command. Stopped and started again, the command goes on with what is missing.
"""

import argparse
import os
import sys
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import fingerprint, require
from pipeline.console import Bar, InputError, a_path, command, is_first_rank, logger
from pipeline.generation import mark, signature
from pipeline.generation.artist import Artist, Models, Scores, encode, load_models
from pipeline.generation.draw import Settings
from pipeline.generation.folder import Folder, read_request
from pipeline.generation.prompt import ImagePrompt, read_prompt
from pipeline.generation.request import orders_of, read_captions
from pipeline.generation.rerank import ClipScorer, LikelihoodScorer
from pipeline.generation.sampling import (
    MAX_WIDTH,
    WIDTH,
    fitting_width,
    waves,
)
from pipeline.generation.verification import verify_main
from pipeline.machine import free_bytes
from pipeline.models.dalle import Dalle
from pipeline.training import processes

MOST_IMAGES = 1_000_000  # of a request, all of whose orders are held in memory
LONGEST_CAPTION = 200_000  # bytes, twice in a PNG's text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

log = logger("sample")


def request_of(args: argparse.Namespace, captions: list[str], artist: Artist) -> dict[str, Any]:
    """What makes a request another one; ``provenance.json`` keeps it."""
    return {
        "captions": fingerprint(captions), "n_captions": len(captions), "count": args.count,
        "seed": args.seed, "rerank": args.rerank, "scorer": args.scorer,
        "signature": args.signature, "mark": args.mark, **artist.facts,
    }  # fmt: skip


def choose_width(args: argparse.Namespace, model: Dalle, settings: Settings) -> int:
    """That of the command line, of a request that goes on, or what fits into memory."""
    if args.width is not None or args.jacobi:
        return int(args.width or 1)
    before = read_request(args.out)
    width = None if before is None else before["facts"].get("width")
    if not isinstance(width, int):
        device = model.image_head.weight.device
        width = fitting_width(model, settings, free_bytes(device))
        if device.type == "cpu":
            width = min(width, WIDTH)
        log.info("%d images side by side (--width)", width)
    if dist.is_initialized():
        widths: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(widths, width)
        width = min(widths)
    return width


def load(
    args: argparse.Namespace, captions: list[str], device: torch.device
) -> tuple[Models, Settings, torch.Tensor, ImagePrompt | None, Scores]:
    """All that is drawn with: models, settings, tokens of the captions, prompt and scorer.

    ``args.scorer`` is then that which is used, or None.

    Raises:
        InputError: one of them is not there, damaged, or does not fit the others.
    """
    models = load_models(args.model, args.dvae, device, DTYPES[args.dtype])
    settings = Settings(args.temperature, args.top_k, args.top_p, args.guidance)
    settings.check(models.dalle.config)
    args.scorer = args.scorer or ("clip" if args.clip else "likelihood" if args.rerank else None)
    require(args.scorer != "clip" or args.clip is not None, "--scorer clip: name a --clip DIR too")
    for what, wants_empty in (
        (f"--guidance {args.guidance}", args.guidance != 1),
        ("ranking by likelihood (a --clip DIR ranks without)", args.scorer == "likelihood"),
    ):
        require(
            not wants_empty or models.knows_empty_captions,
            f"{what} needs a model that has learnt empty captions, and {args.model} has not: train "
            "it from a preset with caption_dropout above 0",
        )
    side = models.dvae.config.image_size
    for name, smallest in (("mark", mark.SMALLEST), ("signature", signature.SMALLEST)):
        require(
            not getattr(args, name) or side >= smallest,
            f"--{name}: pictures of {side} pixels have no room for it; leave it out",
        )
    prompt = None
    if args.image is not None:
        prompt = read_prompt(
            args.image, models.dvae, keep_rows=args.keep_rows, mask=args.mask_image, fit=args.fit
        )
    text = encode(models, captions)
    scores = Scores(
        ClipScorer(args.clip, device) if args.scorer == "clip" else None,
        LikelihoodScorer(models.dalle) if args.scorer == "likelihood" else None,
    )
    return models, settings, text, prompt, scores


def sample(args: argparse.Namespace, captions: list[str], device: torch.device) -> None:
    """Draw what is missing of the request; this rank's share of it."""
    with processes.together():
        models, settings, text, prompt, scores = load(args, captions, device)
    args.width = choose_width(args, models.dalle, settings)
    artist = Artist(args, models, text, prompt, scores, settings)
    orders = orders_of(captions, args.count, args.seed)
    folder = Folder(args.out, orders, artist.facts)
    request = request_of(args, captions, artist)
    processes.agree(request)  # each rank has read the models and the captions for itself
    if is_first_rank():
        folder.begin(request)
    _wait()
    left = folder.left()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if len(left) < len(folder.orders):
        n_there = len(folder.orders) - len(left)
        log.info("%d of %d images are there already", n_there, len(folder.orders))
    _wait()  # before anybody adds a file
    batches = [
        [left[i] for i in wave if i is not None]
        for wave in (waves([order.seed for order in left], args.width) if left else ())
    ][rank::world]
    n_tokens = sum(map(len, batches)) * models.dalle.config.n_image
    try:
        with Bar("image tokens", n_tokens) as bar:
            for batch in batches:
                artist.draw(folder, batch, bar)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"{args.width} images side by side do not fit into the GPU's memory beside the model: "
            "take a smaller --width and another --out"
        ) from error
    except KeyboardInterrupt:
        log.info("what is finished stays in %s: the same command goes on", args.out)
        raise
    _wait()
    if is_first_rank():
        (args.out / "partial.png").unlink(missing_ok=True)
        folder.finish(args.rerank)
        log.info("wrote %d images to %s; see grid.png", len(folder.orders), args.out)


def _wait() -> None:
    """For the other ranks."""
    if dist.is_initialized():
        dist.barrier()


def parse(argv: list[str]) -> argparse.Namespace:
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
    group = parser.add_argument_group("a picture to go on with")
    group.add_argument("--image", type=a_path, help="of which the top is kept")
    kept = group.add_mutually_exclusive_group()
    kept.add_argument("--keep-rows", type=int, metavar="N", help="of the code grid (8 pixels each)")
    kept.add_argument(
        "--mask", dest="mask_image", type=a_path, metavar="FILE",
        help="picture of the same size: black (below 128) is kept, which only a beginning can be",
    )  # fmt: skip
    group.add_argument("--fit", action="store_true", help="take the middle of an image, scaled")
    group = parser.add_argument_group("sampling")
    group.add_argument("--count", type=int, default=1, help="images a caption")
    group.add_argument("--seed", type=int, default=0, help="of the first image; the next has + 1")
    group.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest")
    group.add_argument("--top_k", type=int, help="draw among this many likeliest tokens")
    group.add_argument("--top_p", type=float, help="draw among the likeliest with this much mass")
    group.add_argument(
        "--guidance", type=float, default=1.0, metavar="G",
        help="1: none; above 1: further to the caption (classifier-free guidance)",
    )  # fmt: skip
    group.add_argument("--dtype", choices=DTYPES, help="of the matrices; without: float32 on a CPU")
    group.add_argument(
        "--width", type=int,
        help=f"images side by side; without: {WIDTH} on a CPU, what fits on a GPU; another width "
        "may round an image differently",
    )  # fmt: skip
    group.add_argument(
        "--jacobi", action="store_true",
        help="several tokens at a time: one image sooner, many images later; the width is 1",
    )  # fmt: skip
    group = parser.add_argument_group("ranking")
    group.add_argument("--rerank", type=int, metavar="K", help="keep the best K of --count")
    group.add_argument("--clip", type=a_path, help="--out of pipeline.train_clip or import_clip")
    group.add_argument(
        "--scorer", choices=["clip", "likelihood"],
        help="likelihood: how much likelier the model itself finds the picture with its caption",
    )  # fmt: skip
    group = parser.add_argument_group("output")
    group.add_argument("--out", required=True, type=a_path)
    group.add_argument("--stream", action="store_true", help="show rows as they come: partial.png")
    group.add_argument("--signature", action="store_true", help="five squares in the corner")
    group.add_argument("--mark", action="store_true", help="an invisible mark in the pixels")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise ``InputError`` for flags that cannot be served, before anything is loaded."""
    require(args.count >= 1, f"--count is {args.count}; take at least 1")
    require(
        args.width is None or 1 <= args.width <= MAX_WIDTH,
        f"--width is {args.width}; take 1 to {MAX_WIDTH}",
    )
    require(
        not args.jacobi or args.width in (None, 1),
        f"--width is {args.width}; --jacobi draws one image at a time, leave --width out",
    )
    require(0 <= args.seed < 2**62, f"--seed is {args.seed}; take 0 to 2^62 - 1")
    require(
        args.rerank is None or 1 <= args.rerank <= args.count,
        f"--rerank is {args.rerank}; take 1 to --count, which is {args.count}",
    )
    require(
        args.scorer != "likelihood" or args.clip is None,
        "--clip is for --scorer clip; leave one of them out",
    )
    is_given = args.image is not None
    keeps = args.keep_rows is not None or args.mask_image is not None
    require(
        is_given == keeps,
        "--image says what to go on with, and --keep-rows or --mask how much of it is kept: "
        "give both or neither",
    )
    require(is_given or not args.fit, "--fit is for an --image; name one or leave it out")


def main(argv: list[str] | None = None) -> None:
    """Draw pictures from the command line, or say where pictures come from."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["verify"]:
        sys.exit(verify_main(argv[1:]))
    args = parse(argv)
    check(args)
    if args.caption is not None:
        require(args.caption.strip() != "", "the caption is empty; say what to draw")
    captions = [args.caption.strip()] if args.caption is not None else read_captions(args.captions)
    n_images = args.count * len(captions)
    require(
        n_images <= MOST_IMAGES,
        f"{n_images:,} images are asked for; a request has at most {MOST_IMAGES:,}, take several "
        "with other seeds and folders",
    )
    for i, caption in enumerate(captions):
        n_bytes = len(caption.encode("utf-8", "surrogatepass"))
        require(
            n_bytes <= LONGEST_CAPTION,
            f"caption {i} has {n_bytes:,} bytes; every picture carries its own, at most "
            f"{LONGEST_CAPTION:,}: shorten it",
        )
    has_ranks = int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if has_ranks else 0)
    args.dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    with processes.others():
        if has_ranks:
            processes.join(
                {"command": {k: str(v) for k, v in vars(args).items() if k != "local_rank"}}
            )
        sample(args, captions, device)
        processes.leave()


if __name__ == "__main__":
    command(main)
