import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import ingest as ingest_module
from data_prep.hashes import phash
from data_prep.ingest import Reject, clean_caption, ingest, table
from pipeline.console import InputError
from pipeline.data.images import decode_image
from pipeline.data.schema import image_sha, split_of
from pipeline.data.shards import ShardReader, ShardWriter

ROOT = Path(__file__).parents[2]
NOISE = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb():
    """A PNG of a few bytes whose header claims 30,000 x 30,000 pixels."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def turned():
    exif = Image.Exif()
    exif[274] = 6
    return encoded(NOISE, "JPEG", exif=exif)


def palette_with_transparency():
    image = Image.fromarray(NOISE).quantize(8)
    return encoded(image, transparency=bytes([0] * 4 + [255] * 4))


def animation():
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


PNG, JPEG = encoded(NOISE), encoded(NOISE, "JPEG")
HALF_DAMAGED = PNG[:60] + bytes(200) + PNG[260:]

# key: (suffix, image, caption, what the ledger must say)
GOOD = {
    "plain": ("jpg", JPEG, b"a dog\n", []),
    "cmyk": ("jpg", encoded(Image.new("CMYK", (40, 40)), "JPEG"), b"ink", ["cmyk"]),
    "palette": ("png", palette_with_transparency(), b"few", ["palette", "alpha on white"]),
    "deep": ("png", encoded(Image.new("I;16", (32, 32), 999)), b"xray", ["16-bit"]),
    "moving": ("gif", animation(), b"blink", ["animated (first frame kept)", "palette"]),
    "turned": ("jpeg", turned(), b"tower", ["exif rotated"]),
    "one/same": ("png", PNG, b"first", []),
    "two/same": ("png", PNG, b"second", []),
    "日本/犬 🐶": ("png", PNG, "子犬".encode(), []),
    "bell": ("png", PNG, b"\xef\xbb\xbfding\x07 dong\x00", ["control characters stripped"]),
}
BAD = {
    "bomb": ("png", bomb(), b"c", "decompression bomb"),
    "corrupt": ("png", HALF_DAMAGED, b"c", "corrupt image"),
    "cut": ("jpg", JPEG[: len(JPEG) // 2], b"c", "truncated image"),
    "cut2": ("png", PNG[: len(PNG) // 2], b"c", "truncated image"),
    "html": ("jpg", b"<html>404</html>", b"c", "not an image"),
    "pixel": ("png", encoded(NOISE[:1, :1]), b"c", "side below 8"),
    "small": ("png", encoded(NOISE[:31]), b"c", "side below 32 (--upscale would enlarge it)"),
    "zero": ("png", b"", b"c", "empty file"),
    "caption0": ("png", PNG, b"", "caption empty"),
    "caption1": ("png", PNG, b" \n\t\xc2\xa0\x00", "caption blank"),
    "caption2": ("png", PNG, b"caf\xe9", "caption not UTF-8"),
    "caption3": ("png", PNG, b"word " * 2_100_000, "caption too long"),
    "caption4": ("png", PNG, b"a" * 10_001, "caption too long"),
    "caption5": ("png", PNG, None, "caption missing"),
    "image5": ("", None, b"c", "image missing"),
}


def write_pair(root, key, suffix, image, caption):
    path = root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    if image is not None:
        path.with_name(f"{path.name}.{suffix}").write_bytes(image)
    if caption is not None:
        path.with_name(f"{path.name}.txt").write_bytes(caption)


@pytest.fixture
def zoo(tmp_path):
    """A folder with every good and bad pair, bad links and bad names; and what must be rejected."""
    root = tmp_path / "zoo"
    for key, row in (GOOD | BAD).items():
        write_pair(root, key, *row[:3])
    expected = {key: row[3] for key, row in BAD.items()}
    (root / "loop").symlink_to(".")
    (root / "circle.png").symlink_to("circle.png")
    (root / "gone.png").symlink_to("nowhere")
    os.mkfifo(root / "pipe.png")
    os.mkdir(os.path.join(os.fsencode(root), b"dir\xff"))
    with open(os.path.join(os.fsencode(root), b"dir\xff", b"a.png"), "wb") as file:
        file.write(PNG)
    expected |= {
        "loop": "link loop",
        "circle": "link loop",
        "gone": "broken link",
        "pipe": "not a regular file",
        "dir\\udcff/a": "file name not UTF-8",
    }
    return root, expected


def ledger_of(out):
    lines = (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    rejects = {}
    for line in map(json.loads, lines):
        assert set(line) == {"key", "reason", "detail"}
        assert line["detail"]
        assert line["key"] not in rejects
        rejects[line["key"]] = line["reason"]
    return json.loads((out / "rejects.json").read_text()), rejects


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(out):
    reader = ShardReader(out, "pairs")
    return {row["key"]: row for row in (reader[i] for i in range(len(reader)))}


def small_set(root, n=6):
    for i in range(n):
        write_pair(root, f"{i:03d}", "png", encoded(np.roll(NOISE, i, 0)), b"number %d" % i)
    return root


def test_every_bad_row_is_rejected_by_name_and_every_good_one_is_kept(zoo, tmp_path):
    root, expected = zoo
    summary = ingest([root], tmp_path / "out", 32, upscale=False)
    on_disk, rejects = ledger_of(tmp_path / "out")
    assert rejects == expected
    assert on_disk == summary
    assert summary["rows_in"] == len(GOOD) + len(expected)
    assert summary["rows_out"] == len(GOOD)
    assert summary["rows_in"] == summary["rows_out"] + sum(summary["rejects"].values())
    for reason in set(expected.values()):
        assert summary["rejects"][reason] == list(expected.values()).count(reason)
    notes = [note for row in GOOD.values() for note in row[3]]
    assert summary["notes"] == {note: notes.count(note) for note in set(notes)}
    assert read(tmp_path / "out").keys() == GOOD.keys()


def test_good_rows_keep_their_bytes_and_tell_their_upright_size(zoo, tmp_path):
    ingest([zoo[0]], tmp_path / "out", 32, upscale=False)
    rows = read(tmp_path / "out")
    for key, (_, image, _, _) in GOOD.items():
        row = rows[key]
        assert row["image"] == image
        assert row["image_sha"] == image_sha(image)
        assert (row["height"], row["width"]) == decode_image(image).shape[:2]
    assert (rows["turned"]["width"], rows["turned"]["height"]) == (40, 48)
    assert rows["plain"]["caption"] == "a dog"
    assert rows["bell"]["caption"] == "ding dong"
    assert rows["日本/犬 🐶"]["caption"] == "子犬"
    assert rows["one/same"]["caption"] == "first"
    assert list(rows) == sorted(rows)
    for key, (_, image, _, _) in GOOD.items():
        assert rows[key]["phash"] == phash(decode_image(image))


def test_validation_rows_come_last_and_are_those_of_the_split(zoo, tmp_path):
    ingest([zoo[0]], tmp_path / "out", 32, upscale=False, val_fraction=0.5)
    reader = ShardReader(tmp_path / "out", "pairs")
    assert reader.made_of["val_fraction"] == 0.5
    assert reader.made_of["bytes"] == "inline"
    for which in ("train", "val"):
        side = reader.split(which)
        keys = reader.keys(side.rows(np.arange(len(side))))
        assert keys == sorted(key for key in GOOD if split_of(key, 0.5) == which)
    with pytest.raises(InputError, match=r"val_fraction 0\.5 and not 0\.1"):
        ingest([zoo[0]], tmp_path / "out", 32, upscale=False, val_fraction=0.1)


def test_an_archive_gives_the_same_shards_as_the_folder(zoo, tmp_path):
    root, _ = zoo
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in sorted(root.rglob("*.*")):
            if (
                path.is_file()
                and not path.is_symlink()
                and "dir" not in str(path.relative_to(root))
            ):
                tar.add(path, path.relative_to(root).as_posix())
        soft = tarfile.TarInfo("soft.png")
        soft.type, soft.linkname = tarfile.SYMTYPE, "plain.jpg"
        tar.addfile(soft)
        escape = tarfile.TarInfo("../../escape.png")
        escape.size = len(PNG)
        tar.addfile(escape, io.BytesIO(PNG))
    summary = ingest([tmp_path / "x.tar"], tmp_path / "tar", 32, upscale=False)
    _, rejects = ledger_of(tmp_path / "tar")
    assert rejects == {key: row[3] for key, row in BAD.items()} | {
        "soft": "not a regular file",
        "../../escape": "path escapes the archive",
    }
    assert summary["rows_in"] == len(GOOD) + len(rejects)
    ingest([root], tmp_path / "folder", 32, upscale=False)
    assert read(tmp_path / "tar") == read(tmp_path / "folder")


def test_a_key_that_comes_twice_is_kept_once(tmp_path):
    one, two = small_set(tmp_path / "one", 3), small_set(tmp_path / "two", 4)
    write_pair(one, "002", "png", b"", b"bad first, good later")
    summary = ingest([two, one], tmp_path / "out", 32, upscale=False)
    assert summary["rejects"] == {"duplicate key": 3, "empty file": 1}
    assert (summary["rows_in"], summary["rows_out"]) == (7, 3)


def test_upscale_keeps_what_is_small_as_it_is_to_be_enlarged_by_readers(tmp_path):
    root = small_set(tmp_path / "in", 1)
    small = np.full((20, 10, 3), (10, 200, 90), np.uint8)
    write_pair(root, "small", "gif", encoded(small, "GIF"), b"green")
    write_pair(root, "speck", "png", encoded(NOISE[:7]), b"nothing")
    write_pair(root, "thread", "png", encoded(np.zeros((8, 30_000, 3), np.uint8)), b"long")
    summary = ingest([root], tmp_path / "out", 300, upscale=True)
    assert summary["rejects"] == {"side below 8": 1, "too long to be enlarged": 1}
    assert summary["notes"] == {"palette": 1, "upscaled": 2}
    row = read(tmp_path / "out")["small"]
    assert (row["width"], row["height"]) == (10, 20)
    assert row["image"] == (root / "small.gif").read_bytes()
    pixels = ShardReader(tmp_path / "out").decode(row["image"], 300)
    assert pixels.shape == (600, 300, 3)
    assert (pixels == (10, 200, 90)).all()
    summary = ingest([root], tmp_path / "kept", 40, upscale=True)
    # 8 x 30,000 is within bounds here: a strip of 40 x 150,000
    assert summary["notes"] == {"palette": 1, "upscaled": 2}
    assert read(tmp_path / "kept")["000"]["image"] == (root / "000.png").read_bytes()


def test_the_same_sources_give_the_same_bytes_wherever_they_lie(zoo, tmp_path):
    root, _ = zoo
    extra = small_set(tmp_path / "extra")
    ingest([root, extra], tmp_path / "one", 32, upscale=False)
    root.rename(tmp_path / "a")
    (tmp_path / "moved").mkdir()
    (tmp_path / "a").rename(tmp_path / "moved" / "zoo")
    extra.rename(tmp_path / "moved" / "extra")
    moved = tmp_path / "moved"
    ingest([moved / "extra", moved / "zoo"], tmp_path / "two", 32, upscale=False)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_a_second_run_changes_nothing_and_another_set_is_refused(tmp_path):
    root, out = small_set(tmp_path / "in"), tmp_path / "out"
    summary = ingest([root], out, 32, upscale=False)
    before = bytes_of(out)
    assert ingest([root], out, 32, upscale=False) == summary
    assert bytes_of(out) == before
    with pytest.raises(InputError, match=r"image_size 32 and not 16.*another folder"):
        ingest([root], out, 16, upscale=False)
    with pytest.raises(InputError, match="upscale false and not true"):
        ingest([root], out, 32, upscale=True)
    write_pair(root, "new", "png", PNG, b"new")
    with pytest.raises(InputError, match="another set, with sources"):
        ingest([root], out, 32, upscale=False)
    assert bytes_of(out) == before


def test_a_killed_run_leaves_no_manifest_and_can_be_repeated(tmp_path):
    root, out = small_set(tmp_path / "in"), tmp_path / "out"
    code = f"""
import os, signal
from pathlib import Path
from data_prep import ingest
from pipeline.data import schema
schema.ROWS_PER_SHARD["pairs"] = 2
take = ingest._take
def kill(pair, *rest):
    if pair.key == "003":
        os.kill(os.getpid(), signal.SIGKILL)
    take(pair, *rest)
ingest._take = kill
ingest.ingest([Path({str(root)!r})], Path({str(out)!r}), 32, False)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    names = set(bytes_of(out))
    assert "shard-00000.arrow" in names
    assert not names & {"manifest.json", "rejects.json", "rejects.jsonl"}
    ingest([root], out, 32, upscale=False)
    ingest([root], tmp_path / "clean", 32, upscale=False)
    assert bytes_of(tmp_path / "clean").items() <= bytes_of(out).items()


def test_an_interrupted_run_cleans_up_behind_itself(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    root, out = small_set(tmp_path / "in"), tmp_path / "out"
    monkeypatch.setattr(ingest_module, "_take", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ingest([root], out, 32, upscale=False)
    assert bytes_of(out) == {}


def test_a_row_that_gets_lost_is_noticed(tmp_path, monkeypatch):
    root = small_set(tmp_path / "in")
    monkeypatch.setattr(ingest_module.Ledger, "reject", lambda *args: None)
    write_pair(root, "bad", "png", b"", b"c")
    with pytest.raises(AssertionError, match="1 rows are neither"):
        ingest([root], tmp_path / "out", 32, upscale=False)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_nothing_accepted_is_an_input_error_with_the_commonest_reason(tmp_path):
    root, out = small_set(tmp_path / "in"), tmp_path / "out"
    write_pair(root, "bad", "png", b"", b"c")
    with pytest.raises(InputError, match=r"none of the 7 rows .* 6 of them for: side below 64"):
        ingest([root], out, 64, upscale=False)
    assert not (out / "manifest.json").exists()
    assert len(ledger_of(out)[1]) == 7
    assert ingest([root], out, 32, upscale=False)["rows_out"] == 6
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no picture and no \.txt in empty"):
        ingest([tmp_path / "empty"], tmp_path / "out2", 32, upscale=False)
    with pytest.raises(InputError, match="image size 7 is below 8"):
        ingest([root], out, 7, upscale=False)


def test_wide_errors_of_the_writer_do_stop_the_job(tmp_path, monkeypatch):
    def full(self, row, *, val):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", full)
    with pytest.raises(OSError, match="No space left"):
        ingest([small_set(tmp_path / "in")], tmp_path / "out", 32, upscale=False)


@pytest.mark.parametrize(
    ("data", "caption", "notes"),
    [
        (b"a\tb\r\nc", "a b c", ()),
        (b"  a  b ", "a b", ()),
        (b"\xef\xbb\xbfa", "a", ()),
        (b"a\x00\x1bb\xc2\x9b", "ab", ("control characters stripped",)),
        ("naïve 👩‍🚀".encode(), "naïve 👩‍🚀", ()),
        (b"x" * 10_000, "x" * 10_000, ()),
    ],
)
def test_captions_are_one_line_without_control_characters(data, caption, notes):
    assert clean_caption(data) == (caption, notes)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "caption empty"),
        (b"\xef\xbb\xbf", "caption blank"),
        (b"\x00\x01", "caption blank"),
        # the tokenizer reads none of these: a silent sample without a caption
        ("\u200b \ufeff\u200e\u061c".encode(), "caption blank"),
        ("\u2581\ufffd".encode(), "caption blank"),
        (b"\xff\xfea\x00", "caption not UTF-8"),
        (b"x" * 10_001, "caption too long"),
    ],
)
def test_captions_that_say_nothing_are_rejected(data, reason):
    with pytest.raises(Reject) as caught:
        clean_caption(data)
    assert caught.value.reason == reason


def test_the_table_has_a_line_for_each_count():
    summary = {"rows_in": 1200, "rows_out": 7, "rejects": {"empty file": 3}, "notes": {"cmyk": 1}}
    assert [line.split("  ")[0] for line in table(summary).splitlines()] == [
        "rows in",
        "rows out",
        "rejected: empty file",
        "noted: cmyk",
    ]
    assert "1,200" in table(summary)


def run(*arguments):
    command = [sys.executable, "-m", "data_prep.ingest", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_takes_its_size_from_a_preset_and_fails_in_a_sentence(tmp_path):
    root = small_set(tmp_path / "in")
    preset = tmp_path / "mine.py"
    preset.write_text(
        "from pipeline import presets\n"
        "from pipeline.config import DvaeConfig\n"
        "def small():\n"
        "    return presets.load('dvae_demo', model=DvaeConfig(image_size=40))\n"
    )
    done = run(root, "--out", tmp_path / "out", "--preset", f"{preset}:small")
    assert (done.returncode, done.stdout.splitlines()[1].split()) == (0, ["rows", "out", "6"])
    assert ShardReader(tmp_path / "out").made_of["image_size"] == 40
    for arguments in ((root, "--out", tmp_path / "out2"), ("nowhere", "--out", tmp_path / "out3")):
        done = run(*arguments)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in done.stderr


def test_a_damaged_ledger_of_a_finished_set_is_a_sentence(tmp_path):
    small_set(tmp_path / "in")
    ingest([tmp_path / "in"], tmp_path / "out", 8, False)
    for content in ("[]", "{}", '{"rows_in": 1', '{"rows_in": 1, "rows_out": 1, "rejects": 3}'):
        (tmp_path / "out" / "rejects.json").write_text(content)
        with pytest.raises(InputError, match=r"rejects\.json: .*; delete .* and ingest again"):
            ingest([tmp_path / "in"], tmp_path / "out", 8, False)
