import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import scenes
from data_prep.scenes import write_scenes
from pipeline.console import InputError
from pipeline.evaluation.scenes import COLOURS, HELD_OUT, RELATIONS, SHAPES, read
from tests import tiny
from tests.data_prep.sources.helpers import rows as rows_of

ROOT = Path(__file__).parents[2]


def pairs_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


def captions(folder):
    return [row.caption.decode().strip() for row in rows_of(folder)]


def named(caption):
    """The (colour, shape) pairs that a caption speaks of."""
    words = caption.split()
    return {(a, b) for a, b in itertools.pairwise(words) if a in COLOURS and b in SHAPES}


def test_pictures_show_what_their_captions_say(tmp_path):
    write_scenes(tmp_path / "s", 12, 48, seed=3, hold_out=False, two_objects=0.0)
    rows = rows_of(tmp_path / "s")
    assert [row.key for row in rows] == [f"00000/{i:08d}" for i in range(12)]
    for i, row in enumerate(rows):
        pixels = np.asarray(Image.open(tmp_path / "s" / "00000" / f"{i:08d}.png"))
        assert (pixels.shape, pixels.dtype) == ((48, 48, 3), np.uint8)
        seen = read(pixels)
        assert row.caption.decode() == (
            f"a {seen.size} {seen.colour} {seen.shape} {seen.place} "
            f"on a {seen.background} background\n"
        )


def test_a_thousand_to_a_folder_and_ready_for_ingest(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "PER_FOLDER", 5)
    write_scenes(tmp_path / "s", 12, 32, seed=0, hold_out=False, two_objects=0.0)
    folders = sorted(path.name for path in (tmp_path / "s").iterdir() if path.is_dir())
    assert folders == ["00000", "00001", "00002"]
    assert len(list((tmp_path / "s" / "00002").iterdir())) == 4
    summary = tiny.ingest([tmp_path / "s"], tmp_path / "out", 32)
    counts = {name: summary[name] for name in ("rows_in", "rows_out", "rejects", "notes")}
    assert counts == {"rows_in": 12, "rows_out": 12, "rejects": {}, "notes": {}}


def test_a_smaller_count_is_the_beginning_of_a_larger_one(tmp_path):
    for name, count, seed in (("few", 4, 1), ("many", 9, 1), ("other", 4, 2)):
        write_scenes(tmp_path / name, count, 32, seed, hold_out=False, two_objects=0.5)
    few, many, other = (pairs_of(tmp_path / name) for name in ("few", "many", "other"))
    few.pop(".scenes.json")
    assert few.items() < many.items()
    assert few.items().isdisjoint(other.items())


def test_held_out_pairs_are_drawn_on_demand_only(tmp_path):
    for name, hold_out in (("seen", False), ("new", True)):
        write_scenes(tmp_path / name, 60, 16, 0, hold_out=hold_out, two_objects=0.3)
    seen = set().union(*map(named, captions(tmp_path / "seen")))
    new = set().union(*map(named, captions(tmp_path / "new")))
    assert seen
    assert not seen & set(HELD_OUT)
    assert new == set(HELD_OUT)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.5, 20, 40), (1.0, 60, 60)])
def test_two_objects_come_as_often_as_asked(tmp_path, share, low, high):
    write_scenes(tmp_path / "s", 60, 16, 0, hold_out=False, two_objects=share)
    related = [any(relation in c for relation in RELATIONS) for c in captions(tmp_path / "s")]
    assert low <= sum(related) <= high


def test_a_folder_keeps_one_set_of_scenes(tmp_path):
    out = tmp_path / "s"
    write_scenes(out, 4, 16, 0, hold_out=False, two_objects=0.0)
    before = pairs_of(out)
    (out / "00000" / "00000002.png").unlink()
    write_scenes(out, 4, 16, 0, hold_out=False, two_objects=0.0)
    assert pairs_of(out) == before
    with pytest.raises(InputError, match="name a new folder"):
        write_scenes(out, 4, 16, 1, hold_out=False, two_objects=0.0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.png").write_bytes(b"")
    with pytest.raises(InputError, match="holds no scenes"):
        write_scenes(tmp_path / "mine", 4, 16, 0, hold_out=False, two_objects=0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 16, 0, False, 0.0), "count 0 is below 1"),
        ((1, 7, 0, False, 0.0), r"image size 7 is outside 8\.\.4096"),
        ((1, 16, -1, False, 0.0), "seed -1 is negative"),
        ((1, 16, 0, False, 1.5), r"two-objects 1\.5 is outside 0\.\.1"),
    ],
)
def test_values_out_of_bounds_are_refused(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        write_scenes(tmp_path / "s", *arguments)
    assert not (tmp_path / "s").exists()


def test_the_command_hands_every_flag_on(tmp_path):
    command = [sys.executable, "-m", "data_prep.scenes", "--count", "5", "--out", tmp_path / "a"]
    flags = ["--image-size", "24", "--seed", "7", "--hold-out", "--two-objects", "0.5"]
    subprocess.run([*command, *flags], cwd=ROOT, check=True, capture_output=True)
    write_scenes(tmp_path / "b", 5, 24, 7, hold_out=True, two_objects=0.5)
    assert pairs_of(tmp_path / "a") == pairs_of(tmp_path / "b")
