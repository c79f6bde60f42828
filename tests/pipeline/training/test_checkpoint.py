import json
import logging
import threading
from types import SimpleNamespace

import pytest
import torch

from pipeline.console import InputError
from pipeline.training import checkpoint
from pipeline.training.engine import STATE_KEYS, Slice

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

    def __init__(self, updates, rank=0, world=1, barrier=lambda: None):
        self.updates = self.applied = updates
        self.rank, self.world, self.barrier = rank, world, barrier
        self.steps = dict.fromkeys(SIZES, updates)

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

    def restore(self, read, steps, updates, applied):
        self.updates, self.applied, self.steps = updates, applied, steps
        self.got = {}
        for name, n in SIZES.items():
            start, stop = self.chunk(n)
            if start < stop:
                for key in ("weight", *STATE_KEYS):
                    self.got[key, name] = (start, read(name, key, start, stop))


def save(out, updates, world=1, identity=IDENTITY):
    """Save as ``world`` ranks at once."""
    barrier = threading.Barrier(world).wait
    ranks = [Sharded(updates, rank, world, barrier) for rank in range(world)]
    threads = [
        threading.Thread(target=checkpoint.save, args=(rank, out, identity, STATE))
        for rank in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def resume(out, world=1, identity=IDENTITY):
    ranks = [Sharded(0, rank, world) for rank in range(world)]
    assert all(checkpoint.resume(rank, out, identity) == STATE for rank in ranks)
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
    checkpoint.save(engine, tmp_path, IDENTITY, STATE)
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
    save(tmp_path, 5)
    (tmp_path / "checkpoints/step-0000005/meta.json").unlink()
    assert checkpoint.resume(Sharded(0), tmp_path, IDENTITY) is None


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


@pytest.mark.parametrize(("version", "way_out"), [(1, "give another --out"), (3, "update the")])
def test_another_schema_is_refused(tmp_path, version, way_out):
    save(tmp_path, 5)
    path = tmp_path / "checkpoints/step-0000005/meta.json"
    meta = json.loads(path.read_text()) | {"schema_version": version}
    if version == 1:
        del meta["state"]
    path.write_text(json.dumps(meta))
    with pytest.raises(InputError, match=f"schema version {version}, this code reads 2; {way_out}"):
        resume(tmp_path)


def test_a_damaged_file_of_the_right_size_is_named_with_the_way_out(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 10)
    path = tmp_path / "checkpoints/step-0000010/rank-00000.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    sentence = "cannot be read .* delete .*step-0000010 to go on from the one before"
    with pytest.raises(InputError, match=sentence):
        resume(tmp_path)


def test_before_the_first_applied_update_there_are_weights_alone(tmp_path):
    part = Slice(0, {"weight": torch.ones(3)})
    engine = SimpleNamespace(
        rank=0, world=1, updates=1, applied=0, barrier=lambda: None, slices=lambda: [("w", part)]
    )
    checkpoint.save(engine, tmp_path, IDENTITY, STATE)
    got = []
    engine.restore = lambda read, steps, updates, applied: got.extend(
        [read("w", "weight", 0, 3), updates, applied]
    )
    assert checkpoint.resume(engine, tmp_path, IDENTITY) == STATE
    assert torch.equal(got[0], torch.ones(3))
    assert got[1:] == [1, 0]


@pytest.mark.parametrize("meta", ["[]", "3", '{"files": {}}', '{"files": 3}', "{"])
def test_a_damaged_description_is_no_checkpoint(tmp_path, meta):
    folder = tmp_path / "checkpoints" / "step-0000004"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(meta)
    assert checkpoint._complete(tmp_path) == []
