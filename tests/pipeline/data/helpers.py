"""Small shard sets."""

import json

import numpy as np

from pipeline.data.shards import ShardWriter, image_sha

PAIRS = {"bytes": "inline", "val_fraction": 0.2, "upscale": False, "image_size": 16}
TOKENS = {"dvae": "d" * 64, "grid": 3, "n_vocab": 500, "crops": 2, "image_size": 24}


def token_rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "key": f"k{i:05d}",
            "caption": f"caption {i} ½ 😀",
            "image_tokens": rng.integers(0, 500, 18).astype(np.uint16),
            "crops": rng.random(8).astype(np.float32),
            "image_sha": image_sha(bytes([i % 256])),
        }
        for i in range(n)
    ]


def pair_row(key, image, **changes):
    row = {"key": key, "caption": "a", "image": image, "width": 20, "height": 30, "phash": 7}
    return row | {"image_sha": image_sha(image)} | changes


def pair_rows(n):
    rng = np.random.default_rng(1)
    return [
        pair_row(f"p{i}", rng.bytes(int(rng.integers(1, 300))), width=20 + i, phash=2**64 - 1 - i)
        for i in range(n)
    ]


def write(folder, kind, rows, rows_per_shard=None, made_of=None, val=()):
    """A whole set; the rows whose numbers are in ``val`` are for validation."""
    made_of = made_of or (TOKENS if kind == "tokens" else PAIRS)
    with ShardWriter(folder, kind, made_of, rows_per_shard) as writer:
        for i, row in enumerate(rows):
            writer.add(row, val=i in val)
    return writer.manifest


def refer(folder, images, row_of=pair_row):
    """Rows by reference to one file, ``images`` one behind the other, and ``made_of`` of theirs.

    The file is ``all.bin`` in ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "all.bin").write_bytes(b"".join(images))
    rows, offset = [], 0
    for i, image in enumerate(images):
        row = row_of(f"p{i}", image)
        del row["image"]
        rows.append(row | {"source": 0, "file": "all.bin", "offset": offset, "size": len(image)})
        offset += len(image)
    return rows, PAIRS | {"bytes": "reference"}


def edit(path, **changes):
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path, place, bit=0):
    """Change one bit of a file in place."""
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))
