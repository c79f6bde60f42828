import errno
import json
import logging
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline import slices
from pipeline.console import InputError, OwnError
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Keeping
from pipeline.training.engines.engine import STATE_KEYS, Slice

IDENTITY = {"preset": {"lr": {"start": 0.1}}, "tokens": "abc"}
STATE = {"engine": {}, "stage": {"losses": [1.5, 0.1]}}
SIZES = {"matrix": 101, "bias": 7, "scale": 1}


def state_at(updates):
    """All of a model and its optimizer: key -> name -> flat float32."""
    generator = torch.Generator().manual_seed(updates)
    return {
        key: {name: torch.randn(n, generator=generator) for name, n in SIZES.items()}
        for key in ("weight", *STATE_KEYS)
    }


class Sharded:
    """A rank that holds its chunks of ``state_at(updates)``, cut as ZeRO-3 cuts them."""

    device = torch.device("cpu")

    def __init__(self, updates, rank=0, world=1, between=None):
        self.updates = self.applied = updates
        self.rank, self.world, self.between = rank, world, between or Ranks(1)
        self.steps = dict.fromkeys(SIZES, updates)

    def check(self):
        pass

    def barrier(self):
        self.between.barrier.wait()

    def sum(self, value):
        return self.between.sum(self.rank, value)

    def shapes(self):
        return {name: [n] for name, n in SIZES.items()}

    def chunk(self, n):
        size = -(-n // self.world)
        return self.rank * size, min(n, (self.rank + 1) * size)

    def slices(self):
        state = state_at(self.updates)
        for name, n in SIZES.items():
            start, stop = self.chunk(n)
            if start < stop:
                values = {key: state[key][name][start:stop] for key in state}
                yield name, Slice(start, values, self.steps[name])

    def restore(self, saved, updates, applied):
        self.updates, self.applied, self.steps = updates, applied, saved.steps
        self.got = {}
        for name, n in SIZES.items():
            start, stop = self.chunk(n)
            if start < stop:
                for key in ("weight", *STATE_KEYS):
                    self.got[key, name] = (start, saved.read(name, key, start, stop))


class Ranks:
    """What ranks have between them, in threads."""

    def __init__(self, world):
        self.barrier, self.values = threading.Barrier(world), [None] * world

    def sum(self, rank, value):
        self.values[rank] = value.clone()
        self.barrier.wait()
        total = torch.stack(self.values).sum(0)
        self.barrier.wait()
        return total


def together(ranks, act):
    """``act`` on all ranks at once; raises what one of them raised."""
    problems = []

    def work(rank):
        try:
            act(rank)
        except BaseException as error:
            problems.append(error)
            rank.between.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own = [error for error in problems if not isinstance(error, threading.BrokenBarrierError)]
    for error in own:
        raise error


def save(out, updates, world=1, identity=IDENTITY):
    """Save as ``world`` ranks at once."""
    between = Ranks(world)
    ranks = [Sharded(updates, rank, world, between) for rank in range(world)]
    together(ranks, lambda rank: save_one(rank, out, identity))


def save_one(engine, out, identity=IDENTITY, **keeping):
    described = {"kind": "toy", "identity": identity, "state": STATE}
    checkpoint.Save(engine, out, described, Keeping(**keeping)).wait()


def resume(out, world=1, identity=IDENTITY):
    between = Ranks(world)
    ranks = [Sharded(0, rank, world, between) for rank in range(world)]
    found = []
    together(ranks, lambda rank: found.append(checkpoint.resume(rank, out, identity)))
    assert found == [STATE] * world
    return ranks


def folders(out):
    return sorted(p.name for p in (out / "checkpoints").iterdir())


@pytest.mark.parametrize(("wrote", "reads"), [(1, 1), (1, 3), (3, 1), (2, 4), (4, 2), (8, 3)])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path, wrote, reads):
    save(tmp_path, 5, world=wrote)
    state, seen = state_at(5), dict.fromkeys(SIZES, 0)
    for rank in resume(tmp_path, world=reads):
        assert (rank.updates, rank.applied) == (5, 5)
        for (key, name), (start, values) in rank.got.items():
            assert torch.equal(values, state[key][name][start : start + len(values)])
            seen[name] += len(values) * (key == "weight")
    assert seen == SIZES


def test_skipped_updates_are_remembered(tmp_path):
    engine = Sharded(5)
    engine.applied, engine.steps = 3, {"matrix": 3, "bias": 1, "scale": 0}
    save_one(engine, tmp_path)
    assert [(r.updates, r.applied, r.steps) for r in resume(tmp_path)] == [(5, 3, engine.steps)]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


TORN = {
    "a rank's file is missing": lambda folder: (folder / "rank-00001.safetensors").unlink(),
    "a rank's file is cut": lambda folder: cut(folder / "rank-00000.safetensors"),
    "meta.json is missing": lambda folder: (folder / "meta.json").unlink(),
    "meta.json is cut": lambda folder: cut(folder / "meta.json"),
    "meta.json is empty": lambda folder: (folder / "meta.json").write_text("{}"),
    "never renamed": lambda folder: folder.rename(folder.with_name(folder.name + ".partial")),
}


@pytest.mark.parametrize("tear", TORN.values(), ids=TORN.keys())
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(tmp_path, tear):
    save(tmp_path, 5, world=2)
    save(tmp_path, 10, world=2)
    tear(tmp_path / "checkpoints/step-0000010")
    (rank,) = resume(tmp_path)
    assert rank.updates == 5
    # saved again where it was torn
    save(tmp_path, 10, world=1)
    assert resume(tmp_path)[0].updates == 10


def test_passing_over_is_said(tmp_path, monkeypatch):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    save(tmp_path, 5)
    save(tmp_path, 10)
    cut(tmp_path / "checkpoints/step-0000010/rank-00000.safetensors")
    checkpoint.log.addHandler(handler)
    try:
        resume(tmp_path)
    finally:
        checkpoint.log.removeHandler(handler)
    assert "step-0000010 has a file of another size than was written: passed over" in lines[0]
    assert "resumed from" in lines[1]
    assert "step-0000005" in lines[1]


def test_without_a_checkpoint_nothing_is_restored(tmp_path):
    assert checkpoint.resume(Sharded(0), tmp_path, IDENTITY) is None
    # nor a killed save, which never had the name
    (tmp_path / "checkpoints/step-0000005.partial").mkdir(parents=True)
    assert checkpoint.resume(Sharded(0), tmp_path, IDENTITY) is None


@pytest.mark.parametrize("lost", ["meta.json", "rank-00000.safetensors"])
def test_a_run_whose_checkpoints_are_all_half_gone_does_not_begin_anew(tmp_path, lost):
    for updates in (5, 10):
        save(tmp_path, updates)
        (tmp_path / f"checkpoints/step-{updates:07d}" / lost).unlink()
    with pytest.raises(InputError, match=f"every checkpoint under {tmp_path} is damaged"):
        resume(tmp_path)


def test_no_flipped_bit_of_the_description_is_believed(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 10)
    path = tmp_path / "checkpoints/step-0000010/meta.json"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 37):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert [f.name for f in slices.complete(tmp_path)] == ["step-0000005"], bit
    path.write_bytes(whole)
    assert len(slices.complete(tmp_path)) == 2


def test_a_damaged_newest_one_costs_no_good_one(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 10)
    cut(tmp_path / "checkpoints/step-0000010/rank-00000.safetensors")
    (tmp_path / "checkpoints/step-0000020").mkdir()
    save(tmp_path, 15)
    save_one(Sharded(7), tmp_path, newest=1)
    assert slices.complete(tmp_path)[0].name == "step-0000007"
    save_one(Sharded(8), tmp_path, newest=1)
    assert [f.name for f in slices.complete(tmp_path)] == ["step-0000008", "step-0000015"]


def test_what_cannot_be_deleted_ends_no_run(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    save(tmp_path / "elsewhere", 5)
    (tmp_path / "checkpoints").mkdir()
    link = tmp_path / "checkpoints/step-0000005"
    link.symlink_to(tmp_path / "elsewhere/checkpoints/step-0000005")
    for updates in (10, 15):
        save(tmp_path, updates)
    assert folders(tmp_path) == ["step-0000010", "step-0000015"]
    assert folders(tmp_path / "elsewhere") == ["step-0000005"]
    (tmp_path / "checkpoints/step-0000017.partial").mkdir()
    (tmp_path / "checkpoints/step-0000003.deleted").mkdir()
    save(tmp_path, 20)
    assert folders(tmp_path) == ["step-0000015", "step-0000020"]


def test_only_the_newest_two_are_kept(tmp_path):
    for updates in (5, 10, 15, 20):
        save(tmp_path, updates)
    assert folders(tmp_path) == ["step-0000015", "step-0000020"]


def test_a_torn_one_does_not_count_among_the_two(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 10)
    (tmp_path / "checkpoints/step-0000010/meta.json").unlink()
    save(tmp_path, 15)
    assert resume(tmp_path)[0].updates == 15
    assert "step-0000005" in folders(tmp_path)


def test_what_a_killed_save_left_does_not_reach_the_next(tmp_path):
    left = tmp_path / "checkpoints/step-0000005.partial"
    left.mkdir(parents=True)
    (left / "rank-00007.safetensors").write_bytes(b"half")
    save(tmp_path, 5, world=2)
    assert folders(tmp_path) == ["step-0000005"]
    assert resume(tmp_path)[0].updates == 5


@pytest.mark.parametrize(
    ("identity", "sentence"),
    [
        ({"preset": {"lr": {"start": 0.2}}, "tokens": "abc"},
         "was trained with preset.lr.start 0.1, this run has 0.2; start it as before, or give "
         "another --out"),
        (IDENTITY | {"tokens": "xyz"}, "was trained with tokens abc, this run has xyz"),
        (IDENTITY | {"tokenizer": "t"}, "was trained with tokenizer None, this run has t"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(tmp_path, identity, sentence):
    save(tmp_path, 5)
    with pytest.raises(InputError, match=sentence):
        resume(tmp_path, identity=identity)


@pytest.mark.parametrize(
    ("version", "way_out"),
    [(1, "give another --out"), (2, "give another --out"), (4, "update the")],
)
def test_another_schema_is_refused(tmp_path, version, way_out):
    save(tmp_path, 5)
    folder = tmp_path / "checkpoints/step-0000005"
    meta = json.loads((folder / "meta.json").read_text()) | {"schema_version": version}
    del meta["crc32"]
    if version == 2:  # which had none
        (folder / "meta.json").write_text(json.dumps(meta))
    else:
        del meta["state"]
        slices.write_meta(folder, meta)
    with pytest.raises(InputError, match=f"schema version {version}, this code reads 3; {way_out}"):
        resume(tmp_path)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("place", [0, 20, -1])
def test_a_flipped_bit_sends_all_ranks_to_the_one_before(tmp_path, world, place):
    save(tmp_path, 5, world=2)
    save(tmp_path, 10, world=2)
    path = tmp_path / "checkpoints/step-0000010/rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert [rank.updates for rank in resume(tmp_path, world)] == [5] * world
    (tmp_path / "checkpoints/step-0000005/rank-00000.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=f"every checkpoint under {tmp_path} is damaged: copy one"):
        resume(tmp_path, world)
    # and a save goes on from there
    save(tmp_path, 10, world=2)
    assert [rank.updates for rank in resume(tmp_path, world)] == [10] * world


@pytest.mark.parametrize("world", [1, 2])
def test_no_room_is_known_before_anything_is_written(tmp_path, monkeypatch, world):
    save(tmp_path, 5)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=3 << 23))
    save(tmp_path, 10, world)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 23))
    with pytest.raises(InputError, match=r"takes 16\.\d MiB and .* has room for 8\.0 MiB: make"):
        save(tmp_path, 15, world)
    assert folders(tmp_path) == ["step-0000005", "step-0000010"]


def test_a_disk_that_fills_up_under_a_save_leaves_the_others(tmp_path, monkeypatch):
    save(tmp_path, 5)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OwnError, match=r"rank-00000.*cannot be written .*No space left"):
        save(tmp_path, 10)
    assert folders(tmp_path) == ["step-0000005", "step-0000010.partial"]
    monkeypatch.undo()
    save(tmp_path, 10)
    assert folders(tmp_path) == ["step-0000005", "step-0000010"]


def test_before_the_first_applied_update_there_are_weights_alone(tmp_path):
    part = Slice(0, {"weight": torch.ones(3)})
    engine = SimpleNamespace(
        rank=0,
        world=1,
        updates=1,
        applied=0,
        barrier=lambda: None,
        check=lambda: None,
        slices=lambda: [("w", part)],
        sum=lambda value: value,
        device="cpu",
        shapes=lambda: {"w": [3]},
    )
    save_one(engine, tmp_path)
    got = []
    engine.restore = lambda saved, updates, applied: got.extend(
        [saved.read("w", "weight", 0, 3), updates, applied]
    )
    assert checkpoint.resume(engine, tmp_path, IDENTITY) == STATE
    assert torch.equal(got[0], torch.ones(3))
    assert got[1:] == [1, 0]


@pytest.mark.parametrize("meta", ["[]", "3", '{"files": {}}', '{"files": 3}', "{"])
def test_a_damaged_description_is_no_checkpoint(tmp_path, meta):
    folder = tmp_path / "checkpoints" / "step-0000004"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(meta)
    assert slices.complete(tmp_path) == []


@pytest.mark.parametrize(
    ("keeping", "kept"),
    [({}, [5, 6]), ({"newest": 1}, [6]), ({"newest": 4}, [3, 4, 5, 6]),
     ({"newest": 1, "every": 2}, [2, 4, 6]), ({"every": 3}, [3, 5, 6])],
)  # fmt: skip
def test_the_newest_stay_and_multiples_for_good(tmp_path, keeping, kept):
    for updates in range(1, 7):
        save_one(Sharded(updates), tmp_path, **keeping)
    assert folders(tmp_path) == [f"step-{n:07d}" for n in kept]


@pytest.mark.parametrize(
    ("keeping", "sentence"),
    [({"newest": 0}, "--keep is 0; keep at least the newest"), ({"every": -1}, "--keep-every is")],
)
def test_keeping_nothing_is_refused(keeping, sentence):
    with pytest.raises(InputError, match=sentence):
        Keeping(**keeping)


@pytest.mark.parametrize(
    ("resume", "has_resumed", "sentence"),
    [("must", False, "--resume must, and out has no checkpoint: name the folder of the run"),
     ("never", True, "--resume never, and out has a checkpoint: name another folder")],
)  # fmt: skip
def test_a_wish_that_the_folder_does_not_grant_stops_the_run(resume, has_resumed, sentence):
    with pytest.raises(InputError, match=sentence):
        Keeping(resume).check(Path("out"), has_resumed)
    Keeping(resume).check(Path("out"), not has_resumed)
    Keeping().check(Path("out"), has_resumed)


def test_what_changes_after_a_save_began_is_not_in_it(tmp_path, monkeypatch):
    go_on, write = threading.Event(), checkpoint.save_file
    monkeypatch.setattr(
        checkpoint, "save_file", lambda *a, **kw: (go_on.wait(10), write(*a, **kw))[1]
    )
    own = {"w": torch.ones(3)}
    engine = Sharded(5)
    engine.slices = lambda: [("w", Slice(0, {"weight": own["w"]}, 1))]
    described = {"kind": "toy", "identity": IDENTITY, "state": STATE}
    saving = checkpoint.Save(engine, tmp_path, described, Keeping())
    own["w"].zero_()
    engine.updates = 6
    assert not slices.complete(tmp_path)
    go_on.set()
    saving.wait()
    folder = slices.folder_of(tmp_path, 5)
    meta = slices.read_meta(folder)
    assert meta["updates"] == 5
    assert torch.equal(slices.open_slices(folder, meta).read("w", "weight", 0, 3), torch.ones(3))


def test_a_rank_that_cannot_write_stops_all_and_leaves_no_checkpoint(tmp_path, monkeypatch):
    write = checkpoint.save_file

    def full(tensors, path, **kw):
        if path.name == "rank-00001.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path, **kw)

    save(tmp_path, 5, world=3)
    monkeypatch.setattr(checkpoint, "save_file", full)
    between, said = Ranks(3), {}

    def act(rank):
        with pytest.raises(InputError) as caught:
            save_one(rank, tmp_path)
        said[rank.rank] = caught.value

    together([Sharded(6, rank, 3, between) for rank in range(3)], act)
    assert isinstance(said[1], OwnError)
    assert re.search(r"rank-00001.safetensors cannot be written \(.*No space left", str(said[1]))
    for rank in (0, 2):
        assert "another rank cannot write its part" in str(said[rank])
    assert [folder.name for folder in slices.complete(tmp_path)] == ["step-0000005"]
