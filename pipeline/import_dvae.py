"""Turn the image tokenizer that OpenAI released into a folder that ``data_prep.encode`` takes.

python -m pipeline.import_dvae --encoder encoder.pkl --decoder decoder.pkl --out dvae

Nothing in the two files is run. The folder remembers their hashes.
"""

import argparse
import hashlib
from pathlib import Path

from pipeline.config import DOWNSAMPLING, require
from pipeline.console import InputError, a_path, command, logger
from pipeline.models.dvae import load_openai, save_dvae

log = logger("import_dvae")


def sha256(path: Path) -> str:
    """Of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Import from the command line."""
    parser = argparse.ArgumentParser(
        prog="pipeline.import_dvae",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--encoder", required=True, type=a_path, help="encoder.pkl")
    parser.add_argument("--decoder", required=True, type=a_path, help="decoder.pkl")
    parser.add_argument("--image-size", type=int, default=256, help="pixels a side of its pictures")
    parser.add_argument("--out", required=True, type=a_path)
    args = parser.parse_args()
    require(
        args.image_size >= DOWNSAMPLING,
        f"--image-size is {args.image_size}; take a multiple of {DOWNSAMPLING}; the paper's is 256",
    )
    if (args.out / "model.json").exists():
        raise InputError(f"{args.out} holds a model; name a new folder")
    dvae = load_openai(args.encoder, args.decoder, args.image_size)
    made_of = {"encoder_sha256": sha256(args.encoder), "decoder_sha256": sha256(args.decoder)}
    fingerprint = save_dvae(args.out, dvae, made_of)
    log.info(
        "wrote %s: %d codes, pictures of %d pixels; fingerprint %s",
        args.out, dvae.config.n_vocab, dvae.config.image_size, fingerprint,
    )  # fmt: skip


if __name__ == "__main__":
    command(main)
