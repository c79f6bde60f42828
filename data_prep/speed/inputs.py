"""Pictures, captions and codes that are as large and as uneven as real ones, made from a seed."""

import io
import tarfile
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.shards import ShardWriter, image_sha

QUALITY = 90  # of the JPEG files: 40 to 80 KB at 512 pixels a side
PER_TAR = 256  # pictures
OCTAVES = ((3, 60.0), (9, 35.0), (40, 16.0))  # cells a side of a smooth field, and its contrast
TEXTURE = (1.3, 4.5)  # gray levels of what is rough, from picture to picture

# those in front are frequent
NUMBERS = "a the one two three some several many"
ADJECTIVES = """
    small large red old wooden young bright dark blue green empty busy quiet tall narrow broken
    white black yellow smiling sleeping colorful snowy dusty modern ancient round golden wet open
"""
NOUNS = """
    man woman dog cat horse bird child boat train car bicycle chair table lamp bottle plate cake
    flower tree house bridge tower street window door clock shirt hat guitar phone book bus truck
    elephant sheep cow kite umbrella suitcase mountain river
"""
VERBS = """
    standing sitting lying walking waiting resting hanging parked playing running painted placed
    seen shown left lined
"""
PLACES = "beside near under behind above on in against across inside outside beneath"
SCENES = """
    park street kitchen garden field beach station market room forest harbor valley museum city
    village library desert snow lake crowd
"""
# share of captions with a name that hardly another has: after some 400,000 captions Heaps' law (44
# n^0.49 words in a text of n) still finds a new word in every tenth
NAMED = 0.1
CONSONANTS, VOWELS = "bcdfghklmnprstvw", "aeiou"


def captions(n: int, seed: int = 0) -> list[str]:
    """English captions of about twelve words; some have a name that is nowhere else."""
    rng = np.random.default_rng([seed, 1])

    def words(of: str) -> list[str]:
        known = of.split()
        return [known[i] for i in (len(known) * rng.random(n) ** 2).astype(int)]

    the, kinds = ["the"] * n, [NUMBERS, ADJECTIVES, NOUNS, VERBS, PLACES]
    columns = [*map(words, kinds), the, *map(words, [ADJECTIVES, NOUNS, PLACES]), the]
    made = zip(*columns, words(ADJECTIVES), words(SCENES), strict=True)
    named = rng.random(n) < NAMED
    return [
        " ".join((*row[:-2], _name(rng), row[-1]) if is_named else row)
        for row, is_named in zip(made, named.tolist(), strict=True)
    ]


def _name(rng: np.random.Generator) -> str:
    parts = [
        CONSONANTS[int(i * len(CONSONANTS))] + VOWELS[int(j * len(VOWELS))]
        for i, j in rng.random((3, 2))
    ]
    return "".join(parts).capitalize()


def pictures(n: int, side: int, seed: int = 0) -> Iterator[bytes]:
    """JPEG files of square pictures: smooth fields of three sizes, and some texture."""
    rng = np.random.default_rng([seed, 2])
    rough = rng.normal(size=(2 * side, 2 * side, 1)).astype(np.float32)
    for _ in range(n):
        image_HWC = np.full((side, side, 3), 128, np.float32)
        for cells, contrast in OCTAVES:
            coarse = rng.normal(128, contrast, (cells, cells, 3)).clip(0, 255).astype(np.uint8)
            fine = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
            image_HWC += np.asarray(fine, np.float32) - 128
        top, left = rng.integers(0, side + 1, 2)
        image_HWC += rough[top : top + side, left : left + side] * rng.uniform(*TEXTURE)
        file = io.BytesIO()
        pixels = image_HWC.clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
        yield file.getvalue()


def write_tars(folder: Path, n: int, side: int) -> list[Path]:
    """Archives of ``n`` captioned pictures, as img2dataset lays them out."""
    folder.mkdir(parents=True)
    paths: list[Path] = []
    made = zip(pictures(n, side), captions(n), strict=True)
    for first in range(0, n, PER_TAR):
        paths.append(folder / f"{first // PER_TAR:05d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for i in range(first, min(n, first + PER_TAR)):
                image, caption = next(made)
                for suffix, data in (("jpg", image), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return paths


def codes(n: int, n_image: int, n_vocab: int, seed: int = 0) -> np.ndarray:
    """Image tokens uint16 [n, n_image], some codes a hundred times as frequent as others."""
    rng = np.random.default_rng([seed, 3])
    weights = 1 / (np.arange(n_vocab) + n_vocab / 100)
    edges = np.cumsum(weights / weights.sum())
    code_of_rank = rng.permutation(n_vocab).astype(np.uint16)
    tokens = np.empty((n, n_image), np.uint16)
    for row in tokens:
        ranks = np.searchsorted(edges, rng.random(n_image, np.float32))
        row[:] = code_of_rank[np.minimum(ranks, n_vocab - 1)]
    return tokens


def write_tokens(
    folder: Path, tokens: np.ndarray, texts: list[str], grid: int, n_vocab: int
) -> None:
    """A token set of two shards."""
    made_of = {"grid": grid, "n_vocab": n_vocab, "crops": 1}
    crops = np.array([0, 0, 8 * grid, 0], np.float32)
    with ShardWriter(folder, "tokens", made_of, rows_per_shard=-(-len(texts) // 2)) as writer:
        for i, (caption, row) in enumerate(zip(texts, tokens, strict=True)):
            key = f"{i:08d}"
            sha = blake2b(key.encode(), digest_size=16).digest()
            columns = {"key": key, "caption": caption, "image_tokens": row, "crops": crops}
            writer.add(columns | {"image_sha": sha})


def write_pairs(
    folder: Path, images: list[bytes], texts: list[str], side: int, per_shard: int
) -> None:
    """A pair set that shows ``images`` again and again, one row for each caption."""
    made_of: dict[str, Any] = {
        "bytes": "inline", "val_fraction": 0.0, "image_size": side, "upscale": False
    }  # fmt: skip
    with ShardWriter(folder, "pairs", made_of, rows_per_shard=per_shard) as writer:
        for i, caption in enumerate(texts):
            image = images[i % len(images)]
            row = {"key": f"{i:08d}", "caption": caption, "image": image, "width": side}
            writer.add(row | {"height": side, "image_sha": image_sha(image), "phash": 0})
