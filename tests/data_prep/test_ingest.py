import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import facts as facts_module
from data_prep import ingest as ingest_module
from data_prep.engines import Launch
from data_prep.facts import Job, identity_of, identity_of_score
from data_prep.filters import Filters
from data_prep.ingest import Team, ingest
from data_prep.plan import Settings, Where, make_plan
from pipeline.console import InputError
from pipeline.data.images import decode_image
from pipeline.data.schema import image_sha, split_of
from pipeline.data.shards import ShardReader

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
    "small": ("png", encoded(NOISE[:31]), b"c", "side below 32 (--upscale keeps it)"),
    "zero": ("png", b"", b"c", "empty file"),
    "caption0": ("png", PNG, b"", "caption empty"),
    "caption1": ("png", PNG, b" \n\t\xc2\xa0\x00", "caption blank"),
    "caption2": ("png", PNG, b"caf\xe9", "caption not UTF-8"),
    "caption3": ("png", PNG, b"word " * 2_100_000, "caption too long"),
    "caption4": ("png", PNG, b"a" * 10_001, "caption too long"),
    "caption5": ("png", PNG, None, "caption missing"),
    "image5": ("", None, b"c", "image missing"),
}


def make(sources, out, size=32, *, exclude=None, score=None, team=None, filters=(), **settings):
    """Ingest without filters but those of ``filters``; returns the ledger."""
    taken = {"min_words": 0, "english": False, "boilerplate": False, "max_aspect": 0}
    filters = Filters(image_size=size, **taken | dict(filters))
    where = [Where(str(source)) for source in sorted(sources)]
    named = {"excluded": identity_of(exclude), "score": identity_of_score(score)}
    plan = make_plan(where, Settings(filters=filters, **named, **settings), out)
    return ingest(Job(plan, exclude, score), team or Team(workers=1))


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
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read(out):
    reader = ShardReader(out, "pairs")
    return {row["key"]: row for row in (reader[i] for i in range(len(reader)))}


def small_set(root, n=6):
    for i in range(n):
        write_pair(root, f"{i:03d}", "png", encoded(np.roll(NOISE, i, 0)), b"number %d" % i)
    return root


def test_every_bad_row_is_rejected_by_name_and_every_good_one_is_kept(zoo, tmp_path):
    root, expected = zoo
    summary = make([root], tmp_path / "out", 32)
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
    make([zoo[0]], tmp_path / "out", 32)
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
    summary = make([tmp_path / "x.tar"], tmp_path / "tar", 32)
    _, rejects = ledger_of(tmp_path / "tar")
    assert rejects == {key: row[3] for key, row in BAD.items()} | {
        "soft": "not a regular file",
        "../../escape": "path escapes the archive",
    }
    assert summary["rows_in"] == len(GOOD) + len(rejects)
    make([root], tmp_path / "folder", 32)
    assert read(tmp_path / "tar") == read(tmp_path / "folder")


def test_a_key_that_comes_twice_is_kept_once(tmp_path):
    one, two = small_set(tmp_path / "one", 3), small_set(tmp_path / "two", 4)
    write_pair(one, "002", "png", b"", b"bad first, good later")
    summary = make([two, one], tmp_path / "out", rows_per_shard=3)
    # the third of the second source is the first that is whole
    assert summary["rejects"] == {"duplicate key": 2, "empty file": 1}
    assert (summary["rows_in"], summary["rows_out"]) == (7, 4)
    lines = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["detail"] for line in lines if "duplicate" in line] == [
        "the same as '000'",
        "the same as '001'",
    ]


def test_small_pictures_are_taken_as_they_are_and_enlarged_when_read(tmp_path):
    root = small_set(tmp_path / "in", 1)
    small = np.full((20, 10, 3), (10, 200, 90), np.uint8)
    write_pair(root, "small", "gif", encoded(small, "GIF"), b"green")
    write_pair(root, "speck", "png", encoded(NOISE[:7]), b"nothing")
    write_pair(root, "thread", "png", encoded(np.zeros((8, 30_000, 3), np.uint8)), b"long")
    summary = make([root], tmp_path / "out", 300, filters={"upscale": True})
    assert summary["rejects"] == {"side below 8": 1, "too long to be enlarged": 1}
    assert summary["notes"] == {"palette": 1, "smaller than 300: enlarged when read": 2}
    reader = ShardReader(tmp_path / "out", "pairs")
    row = read(tmp_path / "out")["small"]
    assert (row["width"], row["height"]) == (10, 20)
    assert row["image"] == (root / "small.gif").read_bytes()
    pixels = reader.decode(row["image"], 300)
    assert pixels.shape == (600, 300, 3)
    assert (pixels == (10, 200, 90)).all()
    # 8 x 30,000 is within bounds here: a strip of 40 x 150,000
    summary = make([root], tmp_path / "kept", 40, filters={"upscale": True})
    assert summary["notes"] == {"palette": 1, "smaller than 40: enlarged when read": 2}


def test_equal_pictures_and_captions_stay_once_and_an_evaluation_set_stays_out(tmp_path):
    root = small_set(tmp_path / "in", 6)
    write_pair(root, "again", "png", encoded(NOISE), b"number 0")
    write_pair(root, "other words", "png", encoded(NOISE), b"the first of all")
    summary = make([root], tmp_path / "pair", rows_per_shard=3)
    assert summary["rejects"] == {"duplicate picture and caption": 1}
    # "000" and "other words", of which the hash is the same to the last bit
    assert summary["near_duplicates"] == {"rows": 2, "pictures": 1}
    summary = make([root], tmp_path / "image", rows_per_shard=3, duplicates="image")
    assert summary["rejects"] == {"duplicate picture": 2}
    summary = make([root], tmp_path / "off", duplicates="off", near_duplicates="drop")
    assert summary["rejects"] == {"near-duplicate picture": 2}
    hashes = tmp_path / "evaluation.txt"
    hashes.write_text(f"{image_sha(encoded(np.roll(NOISE, 2, 0))).hex()}\n")
    summary = make([root], tmp_path / "out", exclude=hashes)
    assert summary["rejects"] == {
        "duplicate picture and caption": 1,
        "in the list of excluded pictures": 1,
    }
    assert "002" not in read(tmp_path / "out")


def test_a_score_of_the_users_own_sees_accepted_rows_only(tmp_path, monkeypatch):
    monkeypatch.setattr(facts_module, "SCORED", 4)
    root = small_set(tmp_path / "in", 11)
    write_pair(root, "bad", "png", b"", b"number 5")
    judge = tmp_path / "judge.py"
    judge.write_text(
        "def odd(pictures, captions):\n"
        "    assert len(pictures) == len(captions) <= 4\n"
        "    assert all(p.shape == (40, 48, 3) for p in pictures)\n"
        "    return ['odd' if int(c.split()[1]) % 2 else None for c in captions]\n"
    )
    summary = make([root], tmp_path / "out", score=f"{judge}:odd", rows_per_shard=5)
    assert summary["rejects"] == {"empty file": 1, "odd": 5}
    assert sorted(read(tmp_path / "out")) == [f"{i:03d}" for i in range(0, 11, 2)]


def test_validation_rows_are_chosen_by_key_and_stand_last(tmp_path):
    root = small_set(tmp_path / "in", 40)
    for rows in (7, 100):
        out = tmp_path / str(rows)
        make([root], out, rows_per_shard=rows, val_fraction=0.3)
        reader = ShardReader(out, "pairs")
        val = reader.split("val")
        keys = set(reader.keys(val.rows(np.arange(len(val)))))
        assert keys == {f"{i:03d}" for i in range(40) if split_of(f"{i:03d}", 0.3) == "val"}
        assert len(reader.split("train")) + len(val) == 40
        assert 4 < len(val) < 20


def test_references_point_at_the_bytes_of_the_users_own_files(zoo, tmp_path):
    root, _ = zoo
    with tarfile.open(tmp_path / "zoo" / "x.tar", "w") as tar:
        for i, suffix, data in ((0, "txt", b"in a tar"), (0, "png", encoded(NOISE[:, ::-1]))):
            member = tarfile.TarInfo(f"archived-{i}.{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    inline = make([root], tmp_path / "inline")
    summary = make([root], tmp_path / "out", bytes="reference")
    assert summary == inline
    held = sum(len(image) for image in (row["image"] for row in read(tmp_path / "inline").values()))
    sizes = [
        sum(p.stat().st_size for p in (tmp_path / n).glob("*.arrow")) for n in ("inline", "out")
    ]
    assert sizes[0] - sizes[1] > held // 2
    rows = read(tmp_path / "out")
    assert {key: row["image"] for key, row in rows.items()} == {
        key: row["image"] for key, row in read(tmp_path / "inline").items()
    }
    assert json.loads((tmp_path / "out" / "sources.json").read_text()) == [str(root)]


class Waiting(Exception):
    pass


def _no_wait(count, total):
    if count < total:
        raise Waiting


@pytest.mark.parametrize("kind", ["inline", "reference"])
def test_ranks_make_the_bytes_of_one_process(tmp_path, monkeypatch, kind):
    root = small_set(tmp_path / "in", 9)
    make([root], tmp_path / "one", rows_per_shard=2, bytes=kind)
    monkeypatch.setattr(ingest_module, "wait", lambda count, total, what: _no_wait(count(), total))
    for rank, is_early in ((1, True), (0, False), (1, False)):
        team = Team(Launch(rank, 2), workers=1)
        with pytest.raises(Waiting) if is_early else nullcontext():
            make([root], tmp_path / "two", rows_per_shard=2, bytes=kind, team=team)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_the_same_sources_give_the_same_bytes_wherever_they_lie(zoo, tmp_path):
    root, _ = zoo
    extra = small_set(tmp_path / "extra")
    make([root, extra], tmp_path / "one", 32)
    root.rename(tmp_path / "a")
    (tmp_path / "moved").mkdir()
    (tmp_path / "a").rename(tmp_path / "moved" / "zoo")
    extra.rename(tmp_path / "moved" / "extra")
    moved = tmp_path / "moved"
    make([moved / "extra", moved / "zoo"], tmp_path / "two", 32)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_a_second_run_changes_nothing_and_another_set_is_refused(tmp_path):
    root, out = small_set(tmp_path / "in"), tmp_path / "out"
    summary = make([root], out)
    before = bytes_of(out)
    assert make([root], out) == summary
    assert bytes_of(out) == before
    with pytest.raises(InputError, match=r"image_size 32 and not 16.*another folder"):
        make([root], out, 16)
    with pytest.raises(InputError, match="upscale false and not true"):
        make([root], out, filters={"upscale": True})
    write_pair(root, "new", "png", PNG, b"new")
    with pytest.raises(InputError, match="is finished, and in has changed since"):
        make([root], out)
    assert bytes_of(out) == before


def test_a_killed_run_leaves_no_manifest_and_can_be_repeated(tmp_path):
    root, out = small_set(tmp_path / "in"), tmp_path / "out"
    for at in ("inspect_shard", "process_shard"):
        code = f"""
import os, signal
from tests.data_prep import test_ingest
from data_prep import ingest
whole = ingest.{at}
def kill(job, k, advance=None):
    if k == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(job, k, advance)
ingest.{at} = kill
test_ingest.make([{str(root)!r}], test_ingest.Path({str(out)!r}), rows_per_shard=2)
"""
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
    names = {path.name for path in out.iterdir()}
    assert "shard-00000.arrow" in names
    assert not names & {"shard-00001.arrow", "manifest.json", "rejects.json", "rejects.jsonl"}
    make([root], out, rows_per_shard=2)
    make([root], tmp_path / "clean", rows_per_shard=2)
    assert bytes_of(tmp_path / "clean") == bytes_of(out)


def test_an_interrupted_run_leaves_nothing_half_done(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    root, out = small_set(tmp_path / "in"), tmp_path / "out"
    monkeypatch.setattr(ingest_module, "_columns", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make([root], out)
    assert not [name for name in bytes_of(out) if "tmp" in name or "shard" in name]


def test_sources_that_change_between_the_passes_are_noticed(tmp_path, monkeypatch):
    root, out = small_set(tmp_path / "in"), tmp_path / "out"
    merge = ingest_module.merge

    def change(plan):
        (root / "002.png").write_bytes(encoded(NOISE[::-1]).ljust(len(PNG)))
        return merge(plan)

    monkeypatch.setattr(ingest_module, "merge", change)
    with pytest.raises(InputError, match=r"have changed since row '002' was inspected: delete"):
        make([root], out)
    assert not list(out.glob("shard*"))


def test_a_source_that_is_gone_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        make([tmp_path / "nowhere"], tmp_path / "out")


def test_sources_come_in_the_same_order_however_they_are_spelled(tmp_path, monkeypatch):
    for name in ("b", "a"):
        write_pair(tmp_path / name, name, "png", encoded(NOISE), b"one picture of noise")
    monkeypatch.chdir(tmp_path)
    parse = ingest_module._parser().parse_args
    keys = []
    for i, spelled in enumerate((["b", "./a"], ["./b", "a"], [f"{tmp_path}/b/", "a"])):
        out = ["--out", str(tmp_path / f"out{i}"), "--image-size", "32"]
        ingest(ingest_module._job(parse([*spelled, *out])), Team(workers=1))
        keys.append(list(read(tmp_path / f"out{i}")))
    assert keys == [["a"]] * 3


def test_a_score_that_leaves_or_says_too_much_is_a_sentence(tmp_path):
    root = small_set(tmp_path / "in", 2)
    judge = tmp_path / "judge.py"
    judge.write_text(
        "import sys\n"
        "def leave(pictures, captions):\n    sys.exit(0)\n"
        "def shout(pictures, captions):\n    return ['\\x1b[2J'] * len(pictures)\n"
        "def talk(pictures, captions):\n    return ['a' * 101] * len(pictures)\n"
    )
    for name, said in (("leave", "SystemExit"), ("shout", "x1b"), ("talk", "in a few words")):
        with pytest.raises(InputError, match=rf"score .*judge\.py:{name}'.*{said}"):
            make([root], tmp_path / name, score=f"{judge}:{name}")
    with pytest.raises(InputError, match=r"FILE\.py:FUNCTION"):
        identity_of_score(str(judge))


@pytest.mark.parametrize("name", ["judge.py", "list.txt"])
def test_a_file_that_is_edited_between_two_shards_stops_the_job(tmp_path, monkeypatch, name):
    root = small_set(tmp_path / "in")
    judge, exclude = tmp_path / "judge.py", tmp_path / "list.txt"
    judge.write_text("def judge(pictures, captions):\n    return [None] * len(pictures)\n")
    exclude.write_text("0" * 32 + "\n")
    write_facts, old = facts_module.write_facts, (tmp_path / name).read_text()

    def edit(*args):
        write_facts(*args)
        (tmp_path / name).write_text(old + "# edited\n")

    settings = {"score": f"{judge}:judge", "exclude": exclude, "rows_per_shard": 2}
    with monkeypatch.context() as patch:
        patch.setattr(facts_module, "write_facts", edit)
        with pytest.raises(InputError, match=rf"{name}.* is not what this set was planned with"):
            make([root], tmp_path / "out", **settings)
    (tmp_path / name).write_text(old)
    make([root], tmp_path / "out", **settings)
    make([root], tmp_path / "undisturbed", **settings)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "undisturbed")


def test_files_of_others_in_the_folder_of_the_set_stay(tmp_path):
    root = small_set(tmp_path / "in")
    others = {
        path: path.relative_to(root).as_posix().encode()
        for path in (root / "facts/thesis.txt", root / ".notes.tmp", root / ".a.shard.12.tmp")
    }
    write_pair(root, "facts/cat", "png", PNG, b"a cat")
    for path, content in others.items():
        path.write_bytes(content)
    summary = make([root], root)
    assert summary["rows_out"] == 7
    assert {path: path.read_bytes() for path in others} == others
    assert (root / "facts/cat.png").read_bytes() == PNG
    assert not (root / "plan/facts").exists()


def test_facts_go_with_their_plan(tmp_path):
    root, out = small_set(tmp_path / "in"), tmp_path / "out"
    plan = make_plan([Where(str(root))], Settings(filters=Filters(image_size=999)), out)
    facts_module.inspect_shard(Job(plan), 0)
    facts_module.merge(plan)
    shutil.rmtree(out / "plan")
    assert make([root], out)["rows_out"] == 6


def test_an_empty_source_that_fills_up_is_read(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    with pytest.raises(InputError, match="no picture and no caption"):
        make([root], out)
    small_set(root)
    assert make([root], out)["rows_out"] == 6


@pytest.mark.parametrize(
    "change", [{"val_rows": 2}, {"rows": 3}, {"val_rows": "0"}, {"made_of": []}]
)
def test_a_record_that_is_changed_in_the_middle_of_a_job_stops_it(tmp_path, monkeypatch, change):
    root, out = small_set(tmp_path / "in"), tmp_path / "out"

    def stop(*args):
        raise InputError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(ingest_module, "finish", stop)
        with pytest.raises(InputError, match="stopped"):
            make([root], out, rows_per_shard=2)
    path = out / "shard-00000.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | change))
    words = "in its record, 0 were written|in its record, 2 were written|describes no shard: delete"
    with pytest.raises(InputError, match=words):
        make([root], out, rows_per_shard=2)
    path.unlink()
    make([root], out, rows_per_shard=2)
    make([root], tmp_path / "calm", rows_per_shard=2)
    assert bytes_of(out) == bytes_of(tmp_path / "calm")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *[("00001.ledger.json", damage) for damage in (b"", b"{}", b"[5]", b'{"crc32": 1}')],
        ("00001.ledger.jsonl", b"x"),
    ],
)
def test_a_damaged_ledger_of_a_shard_is_a_sentence(tmp_path, monkeypatch, name, damage):
    root, out = small_set(tmp_path / "in"), tmp_path / "out"
    write_pair(root, "bad", "png", b"", b"c")
    finish = ingest_module.finish

    def spoilt(plan):
        (out / "plan/facts" / name).write_bytes(damage)
        return finish(plan)

    monkeypatch.setattr(ingest_module, "finish", spoilt)
    with pytest.raises(InputError, match=rf"{name}.* is .*damaged.*: delete .*start again"):
        make([root], out, rows_per_shard=2)


def test_one_rank_tells_the_ledger(tmp_path):
    root, out = small_set(tmp_path / "in"), tmp_path / "out"
    assert make([root], out, rows_per_shard=2) is not None
    told = [make([root], out, rows_per_shard=2, team=Team(Launch(r, 2))) for r in range(2)]
    assert told[0] is not None
    assert told[1] is None


def test_a_finished_set_without_a_shard_is_not_finished(tmp_path):
    root = small_set(tmp_path / "in")
    make([root], tmp_path / "out", rows_per_shard=2)
    (tmp_path / "out" / "shard-00001.arrow").unlink()
    with pytest.raises(InputError, match=r"has a manifest and lacks shards: delete .*/out and"):
        make([root], tmp_path / "out", rows_per_shard=2)


def test_nothing_accepted_is_an_input_error_with_the_commonest_reason(tmp_path):
    root, out = small_set(tmp_path / "in"), tmp_path / "out"
    write_pair(root, "bad", "png", b"", b"c")
    with pytest.raises(InputError, match=r"none of the 7 rows .* 6 of them for: side below 64"):
        make([root], out, 64)
    assert not (out / "manifest.json").exists()
    assert len(ledger_of(out)[1]) == 7
    assert make([root], out)["rows_out"] == 6
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no picture and no caption in empty"):
        make([tmp_path / "empty"], tmp_path / "out2")
    with pytest.raises(InputError, match="image size 7 is below 8"):
        make([root], out, 7)


def test_a_shard_without_rows_is_a_shard(tmp_path):
    root = small_set(tmp_path / "in", 6)
    for i in (2, 3):
        (root / f"{i:03d}.png").write_bytes(b"")
    summary = make([root], tmp_path / "out", rows_per_shard=2)
    reader = ShardReader(tmp_path / "out", "pairs")
    assert [shard["rows"] for shard in reader.manifest["shards"]] == [2, 0, 2]
    assert sorted(read(tmp_path / "out")) == ["000", "001", "004", "005"]
    assert summary["rejects"] == {"empty file": 2}


def test_a_full_disk_stops_the_job_and_not_its_next_try(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    root = small_set(tmp_path / "in")
    with monkeypatch.context() as patch:
        patch.setattr(ingest_module, "write_shard", full)
        with pytest.raises(OSError, match="No space left"):
            make([root], tmp_path / "out")
    make([root], tmp_path / "out")
    make([root], tmp_path / "clean")
    assert bytes_of(tmp_path / "clean") == bytes_of(tmp_path / "out")


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
    make([tmp_path / "in"], tmp_path / "out", 8)
    for content in ("[]", "{}", '{"rows_in": 1', '{"rows_in": 1, "rows_out": 1, "rejects": 3}'):
        (tmp_path / "out" / "rejects.json").write_text(content)
        with pytest.raises(InputError, match=r"rejects\.json: .*; delete .* and ingest again"):
            make([tmp_path / "in"], tmp_path / "out", 8)


@pytest.mark.dist
def test_two_jobs_in_one_folder_at_once_make_one_set(tmp_path):
    root = small_set(tmp_path / "in", 12)
    arguments = ["--image-size", "32", "--any-language", "--rows-per-shard", "2", "--workers", "1"]
    command = [sys.executable, "-m", "data_prep.ingest", str(root), "--out"]
    jobs = [
        subprocess.Popen(
            [*command, str(tmp_path / "both"), *arguments],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    said = [job.communicate() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], said
    assert len({out for out, _ in said}) == 1
    subprocess.run([*command, str(tmp_path / "one"), *arguments], cwd=ROOT, check=True)
    assert bytes_of(tmp_path / "both") == bytes_of(tmp_path / "one")
    other = run(root, "--out", tmp_path / "both", "--image-size", "16")
    assert other.returncode == 2
    assert other.stderr.splitlines()[-1] == (
        f"error: {tmp_path}/both is planned with image_size 32 and not 16: name another folder, or "
        "delete that one"
    )


@pytest.mark.ray
def test_ray_makes_the_bytes_of_ranks_though_a_worker_is_killed(tmp_path):
    root = small_set(tmp_path / "in", 9)
    judge = tmp_path / "judge.py"
    judge.write_text(
        "import os, pathlib, signal\n"
        f"mark = pathlib.Path({str(tmp_path / 'killed')!r})\n"
        "def kill_once(pictures, captions):\n"
        "    if 'number 4' in captions and not mark.exists():\n"
        "        mark.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [None] * len(pictures)\n"
    )
    settings = {"rows_per_shard": 2, "score": f"{judge}:kill_once"}
    make([root], tmp_path / "ray", team=Team(engine="ray"), **settings)
    assert (tmp_path / "killed").exists()
    make([root], tmp_path / "ranks", **settings)
    assert bytes_of(tmp_path / "ray") == bytes_of(tmp_path / "ranks")
    assert len(read(tmp_path / "ray")) == 9
