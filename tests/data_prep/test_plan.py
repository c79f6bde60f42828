"""A plan fixes what is read into which shard, whoever asks and however often."""

import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

from data_prep import plan as plans
from data_prep.filters import Filters
from data_prep.plan import Settings, Where, is_up_to_date, make_plan
from pipeline.console import InputError


def picture(i=0):
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (i % 256, 0, 0)).save(file, "PNG")
    return file.getvalue()


def folder_of(root, n, first=0):
    root.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + n):
        (root / f"{i:03d}.png").write_bytes(picture(i))
        (root / f"{i:03d}.txt").write_text(f"number {i}")
    return root


def archive_of(path, n, first):
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + n):
            for suffix, data in (("png", picture(i)), ("txt", b"number %d" % i)):
                member = tarfile.TarInfo(f"{i:03d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def keys_of(plan, k):
    return [
        pair.key
        for number, piece in plan.pieces(k)
        for pair in plan.where[number].open().rows(piece)
    ]


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_shards_hold_every_row_once_and_in_order(tmp_path, rows):
    source = Where(str(folder_of(tmp_path / "in", 20)))
    plan = make_plan([source], Settings(rows_per_shard=rows), tmp_path / "out")
    found = [keys_of(plan, k) for k in range(len(plan.shards))]
    assert [key for keys in found for key in keys] == [f"{i:03d}" for i in range(20)]
    assert [len(keys) for keys in found[:-1]] == [rows] * (len(found) - 1)
    assert sum(plan.n_bytes) == sum(path.stat().st_size for path in (tmp_path / "in").iterdir())


def test_an_archive_is_not_divided_and_large_ones_are_shards_of_their_own(tmp_path, monkeypatch):
    root = folder_of(tmp_path / "in", 4)
    for i in range(3):
        archive_of(root / f"z{i}.tar", 5, 100 + 10 * i)
    monkeypatch.setattr(plans, "SHARD_BYTES", (root / "z0.tar").stat().st_size)
    plan = make_plan([Where(str(root))], Settings(rows_per_shard=10), tmp_path / "out")
    found = [keys_of(plan, k) for k in range(len(plan.shards))]
    assert [len(keys) for keys in found] == [4, 5, 5, 5]
    monkeypatch.setattr(plans, "SHARD_BYTES", 1 << 30)
    plan = make_plan([Where(str(root))], Settings(rows_per_shard=10), tmp_path / "one")
    assert [len(keys_of(plan, k)) for k in range(len(plan.shards))] == [19]


def test_a_plan_is_the_same_wherever_the_sources_lie(tmp_path):
    settings = Settings(rows_per_shard=4)
    root = folder_of(tmp_path / "in", 10)
    one = make_plan([Where(str(root))], settings, tmp_path / "one")
    (tmp_path / "far").mkdir()
    root.rename(tmp_path / "far" / "in")
    two = make_plan([Where(str(tmp_path / "far" / "in"))], settings, tmp_path / "two")
    assert (one.hash, one.shards) == (two.hash, two.shards)
    assert replace(one, out=two.out, where=two.where) == two


def test_a_plan_that_is_there_is_taken_without_a_look_at_the_files(tmp_path):
    root = folder_of(tmp_path / "in", 5)
    first = make_plan([Where(str(root))], Settings(), tmp_path / "out")
    assert is_up_to_date(first)
    folder_of(root, 1, first=5)
    second = make_plan([Where(str(root))], Settings(), tmp_path / "out")
    assert second == first
    assert not is_up_to_date(second)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["plan"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"val_fraction": 0.5}, "val_fraction 0.01 and not 0.5"),
        ({"bytes": "reference"}, 'bytes "inline" and not "reference"'),
        ({"filters": Filters(image_size=64)}, "image_size 256 and not 64"),
        ({"filters": Filters(words=("boo",))}, r'words \[\] and not \["boo"\]'),
    ],
)
def test_a_folder_that_is_planned_otherwise_is_refused(tmp_path, changes, said):
    source = Where(str(folder_of(tmp_path / "in", 2)))
    make_plan([source], Settings(), tmp_path / "out")
    with pytest.raises(InputError, match=said + ": name another folder, or delete that one"):
        make_plan([source], replace(Settings(), **changes), tmp_path / "out")


def test_other_sources_are_refused(tmp_path):
    make_plan([Where(str(folder_of(tmp_path / "in", 2)))], Settings(), tmp_path / "out")
    other = Where(str(folder_of(tmp_path / "other", 2)))
    with pytest.raises(InputError, match="planned for the sources in and not other"):
        make_plan([other], Settings(), tmp_path / "out")


def test_a_job_that_was_faster_has_its_plan_taken(tmp_path, monkeypatch):
    source = Where(str(folder_of(tmp_path / "in", 5)))
    slow_write = plans._write

    def overtaken(folder, sources, settings):
        monkeypatch.setattr(plans, "_write", slow_write)
        make_plan([source], Settings(val_fraction=0.5), tmp_path / "out")
        return slow_write(folder, sources, settings)

    monkeypatch.setattr(plans, "_write", overtaken)
    with pytest.raises(InputError, match=r"val_fraction 0\.5 and not 0\.01"):
        make_plan([source], Settings(), tmp_path / "out")
    assert make_plan([source], Settings(val_fraction=0.5), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["plan"]


def test_damage_to_a_plan_is_a_sentence(tmp_path):
    source = Where(str(folder_of(tmp_path / "in", 2)))
    plan = make_plan([source], Settings(), tmp_path / "out")
    pieces = tmp_path / "out" / "plan" / "00000.json"
    pieces.write_bytes(pieces.read_bytes().replace(b"000", b"001"))
    with pytest.raises(InputError, match="is not the one that was planned"):
        list(plan.pieces(0))
    pieces.unlink()
    with pytest.raises(InputError, match=r"cannot be read .*delete .* and ingest again"):
        list(plan.pieces(0))
    path = tmp_path / "out" / "plan" / "plan.json"
    content = json.loads(path.read_text())
    del content["hash"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="lacks or garbles 'hash'"):
        make_plan([source], Settings(), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"val_fraction": 1.5}, r"--val-fraction 1\.5 is outside \[0, 1\]"),
        ({"rows_per_shard": 0}, r"--rows-per-shard 0 is outside 1"),
        ({"bytes": "both"}, "take inline, reference"),
        ({"duplicates": "all"}, "take pair, image, off"),
        ({"near_duplicates": "pair"}, "take report, drop, off"),
    ],
)
def test_settings_that_will_not_do(changes, said):
    with pytest.raises(InputError, match=said):
        Settings(**changes)


def test_pictures_in_a_column_cannot_be_referred_to(tmp_path):
    table = pa.table({"image": [picture()], "caption": ["a red square"]})
    pq.write_table(table, tmp_path / "one.parquet")
    settings = Settings(bytes="reference")
    with pytest.raises(InputError, match=r"one\.parquet holds its pictures in a column"):
        make_plan([Where(str(tmp_path / "one.parquet"))], settings, tmp_path / "out")
    assert make_plan([Where(str(tmp_path / "one.parquet"))], Settings(), tmp_path / "out")


def test_names_that_nobody_can_write_down(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/b\xff")
    with pytest.raises(InputError, match="is not UTF-8: rename it"):
        make_plan([Where(name)], Settings(), tmp_path / "out")
    source = Where(str(folder_of(tmp_path / "in", 1)))
    with pytest.raises(InputError, match="is not UTF-8: rename it"):
        make_plan([source], Settings(), Path(name))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file: name a folder"):
        make_plan([source], Settings(), tmp_path / "file")
    (tmp_path / "out" / "plan").mkdir(parents=True)
    with pytest.raises(InputError, match=r"out/plan holds no plan\.json: delete it"):
        make_plan([source], Settings(), tmp_path / "out")
    with pytest.raises(InputError, match="a source without a name"):
        Where(str(tmp_path / "in"), "").open()


def test_two_archives_of_one_folder_are_two_sources(tmp_path):
    for name in ("a.tar", "b.tar"):
        archive_of(tmp_path / name, 2, 0)
    where = [Where(str(tmp_path / name)) for name in ("a.tar", "b.tar")]
    assert make_plan(where[:1], Settings(), tmp_path / "out").names == ("a.tar",)
    with pytest.raises(InputError, match=r"sources a\.tar and not b\.tar"):
        make_plan(where[1:], Settings(), tmp_path / "out")
