import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.hashes import HashList
from data_prep.ledger import BINS
from data_prep.stats import Codes, Stats
from data_prep.train_tokenizer import train_tokenizer
from pipeline.console import InputError
from pipeline.data.shards import ShardReader, ShardWriter, image_sha
from pipeline.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
PAIRS = {"bytes": "inline", "val_fraction": 0.2, "upscale": False, "image_size": 16}
TOKENS = {"grid": 3, "n_vocab": 50, "crops": 2, "dvae": "d" * 64, "image_size": 24}
WORDS = "a small red blue dog cat sits runs under over the old green tree in Málaga".split()  # noqa: SIM905


def write(folder, kind, made_of, rows, rows_per_shard=7, n_val=3):
    """Of all rows the first ``n_val`` are for validation."""
    with ShardWriter(folder, kind, made_of, rows_per_shard) as writer:
        for i, row in enumerate(rows):
            writer.add(row, val=i < n_val)
    return ShardReader(folder)


def caption(rng):
    return " ".join(rng.choice(WORDS, int(rng.integers(1, 12))))


def pair_rows(n, by_reference=False):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        data = rng.bytes(int(rng.integers(1, 30_000)))
        place = {"source": 0, "file": "f", "offset": 0, "size": len(data)}
        rows.append(
            {"key": f"k{i}", "caption": caption(rng), "width": 16 + 31 * i, "height": 300 - 5 * i}
            | (place if by_reference else {"image": data})
            | {"image_sha": image_sha(data), "phash": int(rng.integers(1 << 63)) * 2 + 1}
        )
    return rows


def token_rows(n):
    rng = np.random.default_rng(1)
    return [
        {
            "key": f"k{i}",
            "caption": caption(rng),
            "image_tokens": np.minimum(rng.geometric(0.2, 18), 40).astype(np.uint16),
            "crops": np.zeros(8, np.float32),
            "image_sha": bytes(16),
        }
        for i in range(n)
    ]


def binned(name, values):
    return dict(Counter(BINS[name].label(value) for value in values))


@pytest.mark.parametrize("by_reference", [False, True])
def test_a_pair_set_is_described(tmp_path, by_reference):
    rows = pair_rows(30, by_reference)
    made_of = PAIRS | {"bytes": "reference" if by_reference else "inline"}
    stats = Stats(write(tmp_path, "pairs", made_of, rows))
    assert stats.codes is None
    assert stats.hashes == {}
    sizes = [row["size"] if by_reference else len(row["image"]) for row in rows]
    expected = {
        "caption words": [len(row["caption"].split()) for row in rows],
        "caption characters": [len(row["caption"]) for row in rows],
        "shorter side, pixels": [min(row["width"], row["height"]) for row in rows],
        "width to height": [row["width"] / row["height"] for row in rows],
        "picture bytes": sizes,
    }
    assert set(stats.distributions) == set(expected)
    for name, values in expected.items():
        found = stats.distributions[name]
        assert found.counts == binned(name, values)
        assert (found.n, found.low, found.high) == (30, min(values), max(values))
        assert found.mean == pytest.approx(sum(values) / 30)


def test_codes_and_captions_of_a_token_set_are_counted(tmp_path):
    rows = token_rows(40)
    stats = Stats(write(tmp_path, "tokens", TOKENS, rows, n_val=5))
    counts = Counter(int(code) for row in rows for code in row["image_tokens"])
    total = sum(counts.values())
    assert total == 40 * 18
    assert stats.codes.counts.tolist() == [counts[i] for i in range(50)]
    assert stats.codes.n_used == len(counts)
    entropy = -sum(n / total * math.log2(n / total) for n in counts.values())
    assert stats.codes.perplexity == pytest.approx(2**entropy)
    assert stats.codes.top(3) == [(code, n / total) for code, n in counts.most_common(3)]
    assert set(stats.distributions) == {"caption words", "caption characters"}


def test_perplexity_is_the_number_of_codes_that_are_alike_frequent():
    assert Codes(np.array([5, 0, 5, 5, 5])).perplexity == pytest.approx(4)
    assert Codes(np.array([0, 9])).perplexity == pytest.approx(1)
    assert Codes(np.array([1, 3, 3, 0])).top(2) == [(1, 3 / 7), (2, 3 / 7)]
    many = np.array([1, 3] * 500)
    assert [code for code, _ in Codes(many).top(200)] == list(range(1, 400, 2))


def test_caption_tokens_are_counted_with_a_tokenizer(tmp_path):
    pairs = write(tmp_path / "pairs", "pairs", PAIRS, pair_rows(30))
    train_tokenizer(pairs, tmp_path / "tokenizer", 300)
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    found = Stats(pairs, tokenizer).distributions["caption tokens"]
    lengths = [len(tokenizer.encode(caption)) for caption in pairs.captions(np.arange(30))]
    assert (found.n, found.low, found.high) == (30, min(lengths), max(lengths))
    assert found.mean == pytest.approx(sum(lengths) / 30)


def test_a_damaged_shard_is_an_input_error(tmp_path):
    reader = write(tmp_path, "pairs", PAIRS, pair_rows(20))
    path = tmp_path / "shard-00001.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"shard-00001"):
        Stats(reader)


def run(*arguments):
    command = [sys.executable, "-m", "data_prep.stats", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_describes_and_writes_a_list_that_finds_each_picture(tmp_path):
    rows = pair_rows(20)
    rows[7] |= {name: rows[3][name] for name in ("image", "image_sha", "phash")}
    reader = write(tmp_path / "an\neval", "pairs", PAIRS, rows)
    done = run(tmp_path / "an\neval", "--hashes", tmp_path / "list.txt")
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0)
    lines = done.stdout.splitlines()
    assert lines[:2] == [
        "20 rows of pairs, 17 to train on and 3 for validation",
        f"3 shards, {sum(p.stat().st_size for p in reader.folder.glob('*.arrow')):,} bytes",
    ]
    assert lines[2] == f"fingerprint {reader.fingerprint}"
    assert "made of image_size: 16" in lines
    shorter = [min(row["width"], row["height"]) for row in rows]
    assert any(
        line == f"shorter side, pixels: mean {sum(shorter) / 20:.2f}, from 16 to {max(shorter)}"
        for line in lines
    )
    most = max(binned("shorter side, pixels", shorter).values())
    assert sum(line.endswith(f" {100 * most / 20:5.1f} %  {'#' * 40}") for line in lines) >= 1
    found = HashList.from_file(tmp_path / "list.txt")
    assert len(found) == 19 * 2
    for row in rows:
        assert found.matches(row["image_sha"], 0).startswith("the same bytes as line")
        assert found.matches(bytes(16), row["phash"] ^ 7).startswith("3 of 64 bits from line")


def test_the_command_fails_in_a_sentence(tmp_path):
    write(tmp_path / "tokens", "tokens", TOKENS, token_rows(9))
    for arguments, sentence in [
        (("nowhere",), "error: nowhere/manifest.json cannot be read"),
        (
            (tmp_path / "tokens", "--hashes", tmp_path / "list.txt"),
            f"error: {tmp_path}/tokens is a set of tokens, --hashes takes one of pairs\n",
        ),
        ((tmp_path / "tokens", "--tokenizer", tmp_path), f"error: {tmp_path}/tokenizer.json"),
    ]:
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines(keepends=True)[-1].startswith(sentence)
    assert not (tmp_path / "list.txt").exists()


def test_a_token_set_is_told_with_its_codes(tmp_path):
    write(tmp_path, "tokens", TOKENS, token_rows(9), n_val=0)
    lines = run(tmp_path).stdout.splitlines()
    assert lines[0] == "9 rows of tokens, 9 to train on and 0 for validation"
    (codes,) = (line for line in lines if line.startswith("codes: "))
    assert " of 50 used, perplexity " in codes
    assert lines[-1].startswith("most frequent: 1 (")
