r"""Turn CLIP's weights, OpenAI's or open_clip's, into a folder that ranks pictures by captions.

python -m pipeline.import_clip --weights open_clip_model.safetensors \
    --vocabulary bpe_simple_vocab_16e6.txt.gz --out clip

Vision transformers only. Nothing in the files is run. The folder remembers their hashes.
"""

import argparse

from pipeline.config import as_dict, require
from pipeline.console import InputError, a_path, command, logger
from pipeline.data.clip_tokens import BytePairs, read_vocabulary
from pipeline.models.clip_import import load_foreign
from pipeline.slices import sha256
from pipeline.weights import save_weights

log = logger("import_clip")


def main() -> None:
    """Import from the command line."""
    parser = argparse.ArgumentParser(
        prog="pipeline.import_clip",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--weights", required=True, type=a_path, help=".safetensors, or a state dict of torch.save"
    )
    parser.add_argument(
        "--vocabulary", required=True, type=a_path, help="bpe_simple_vocab_16e6.txt or .txt.gz"
    )
    parser.add_argument(
        "--quick-gelu", action=argparse.BooleanOptionalAction, default=True,
        help="as the weights were trained: OpenAI's with it, LAION's without (no shape tells)",
    )  # fmt: skip
    parser.add_argument(
        "--vision-head-width", type=int, metavar="N",
        help="without: 80, 88 and 104 for towers as wide as open_clip's ViT-H, g and bigG, else 64",
    )  # fmt: skip
    parser.add_argument("--text-head-width", type=int, default=64, metavar="N", help="64")
    parser.add_argument("--out", required=True, type=a_path)
    args = parser.parse_args()
    for name in ("vision_head_width", "text_head_width"):
        width = getattr(args, name)
        require(
            width is None or width >= 1,
            f"--{name.replace('_', '-')} is {width}; take 64, or the model's own",
        )
    if (args.out / "model.json").exists():
        raise InputError(f"{args.out} holds a model; name a new folder")
    clip = load_foreign(
        args.weights,
        quick_gelu=args.quick_gelu,
        vision_head_width=args.vision_head_width,
        text_head_width=args.text_head_width,
    )
    config = clip.config
    tokens = BytePairs(read_vocabulary(args.vocabulary, config.n_vocab), config)
    tokens.copy_to(args.out / "tokenizer")
    made_of = {"weights_sha256": sha256(args.weights), "tokenizer": tokens.fingerprint}
    fingerprint = save_weights(args.out, "clip", as_dict(config), clip.state_dict(), made_of)
    log.info(
        "wrote %s: pictures of %d pixels in patches of %d, %d features; fingerprint %s",
        args.out, config.image_size, config.patch_size, config.n_embed, fingerprint,
    )  # fmt: skip


if __name__ == "__main__":
    command(main)
