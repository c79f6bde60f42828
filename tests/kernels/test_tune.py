"""How tiles are chosen: on a made-up layer and clock, for there is no GPU to time."""

import json
import os
import time

import pytest
import torch

from kernels import packed_attention, tiles, tune
from kernels.attention.backward import backward
from kernels.attention.block_sparse import INTERPRETED
from kernels.patterns import Pattern
from kernels.speed import compiled
from kernels.speed.clock import first_line
from kernels.speed.shapes import Shape
from kernels.tiles import PASSES, SUPPORTED, Tile

OLD, FAST, WRONG, NOISY, SLOW = (Tile(rows, 16, 16, 4, 1) for rows in (16, 32, 64, 128, 256))


class MadeUpLayer:
    """Every pass gives ones, with the tile WRONG one row that differs or is NaN."""

    width, itemsize = 64, 2

    def __init__(self, present):
        self.present, self.ran = present, []

    def tile(self, kind, which):
        return self.present

    def run(self, kind, which, tile):
        self.ran.append((kind, which, tile))
        x = torch.ones(1, 8, 2, 4, dtype=torch.bfloat16)
        if tile == WRONG:
            x[0, 5, 1] += float("nan") if which == "dq" else 0.1
        return (x,) if which == "forward" else (torch.ones(1, 8, 2, 4, dtype=torch.bfloat16), x)


def clock_of(layer, ms):
    """Reads the time of each tile off a list, and its runs up and down by a hundredth."""
    calls = []

    def clock(work):
        work()
        calls.append(layer.ran[-1])
        tile = layer.ran[-1][2]
        jitter = 1 + (0.5 if tile == NOISY else 0.01) * (calls.count(calls[-1]) % 3 - 1)
        return ms[tile] / 1e3 * jitter

    return clock


@pytest.mark.skipif(not INTERPRETED, reason="with a GPU the kernels do not run on the CPU")
def test_a_layer_runs_each_pass_with_any_tile(monkeypatch):
    small = Shape(n_text=16, grid=4, kernel=11, heads=1, width=32)
    monkeypatch.setattr(tune, "LAYER", small)
    layer = tune.Layer(32, torch.float32, "cpu")
    leaf = layer.qkv_BN3HD.clone().requires_grad_()
    o = packed_attention(leaf, Pattern("column", 16, 4), backend="naive")
    (grad,) = torch.autograd.grad(o, leaf, layer.do_BNHD)
    used = []

    def spy(*args):
        used.append(args[-1])
        backward(*args)

    monkeypatch.setattr(tune, "backward", spy)
    for tile in (Tile(16, 16, 16, 4, 1), Tile(32, 16, 16, 4, 1)):
        (got,) = layer.run("column", "forward", tile)
        assert tune.distance(got, o.detach()) < 1e-5
        for which in ("dq", "dkdv"):
            for x, expected in zip(layer.run("column", which, tile), grad.unbind(2), strict=True):
                assert tune.distance(x, expected) < 1e-5
        assert used[-2:] == [
            (tile, layer.tile("column", "dkdv")),
            (layer.tile("column", "dq"), tile),
        ]
    assert layer.tile("column", "dq") == tiles.tile_for(
        "sm_80", 32, 4, small.pattern("column"), "dq"
    )


def test_the_layer_that_is_tuned_reads_the_table_as_it_is():
    # a step that were shrunk to the text would be measured in place of the one in the table
    for name, tile in tiles.table().items():
        chip, width, bits, kind, which = name.split()
        itemsize, pattern = int(bits.removesuffix("-bit")) // 8, tune.LAYER.pattern(kind)
        assert tiles.tile_for(chip, int(width.removeprefix("D")), itemsize, pattern, which) == tile


# the fixture takes its place
OBJECTIONS = tune.objections
MS = {OLD: 1.0, FAST: 0.9, WRONG: 0.5, NOISY: 0.8, SLOW: 2.0}


@pytest.fixture(autouse=True)
def all_fit(monkeypatch):
    monkeypatch.setattr(tune, "objections", lambda *_: [])


def test_a_tile_that_the_budget_refuses_is_not_taken(monkeypatch, capsys):
    layer = MadeUpLayer(OLD)
    ms = {**MS, SLOW: 0.5}

    def refuse(layer, chip, kind, which, tile):
        assert (chip, kind, which) == ("sm_90", "row", "forward")
        return ["3 spills, at most 0"] if tile == SLOW else []

    monkeypatch.setattr(tune, "objections", refuse)
    ready = [("row", "forward", tile) for tile in (SLOW, FAST)]
    changes = tune.tuned(layer, "sm_90", ready, clock_of(layer, ms))
    assert changes == {"sm_90 D64 16-bit row forward": FAST}
    said = capsys.readouterr().out
    assert f"{SLOW} is faster, and not taken: 3 spills, at most 0" in said
    assert "3 timed" in said


def test_what_the_budget_says_is_asked_of_the_tile_at_this_shape(monkeypatch):
    asked = []
    monkeypatch.setattr(compiled, "measure", lambda job: asked.append(job) or "code")
    monkeypatch.setattr(compiled, "unfit", lambda job, code: [f"{code} of {job.tile.rows}"])
    assert OBJECTIONS(MadeUpLayer(OLD), "sm_90", "conv", "dq", FAST) == ["code of 32"]
    job = asked[0]
    assert (job.chip, job.width, job.itemsize, job.which) == ("sm_90", 64, 2, "dq")
    assert job.pattern == Pattern("conv", 256, 32)


def test_the_fastest_that_agrees_is_chosen(capsys):
    layer = MadeUpLayer(OLD)
    ready = [("row", which, tile) for which in PASSES for tile in (WRONG, FAST, SLOW, OLD)]
    changes = tune.tuned(layer, "sm_90", ready, clock_of(layer, MS))
    assert changes == {f"sm_90 D64 16-bit row {which}": FAST for which in PASSES}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0] == (
        f"sm_90 D64 16-bit row forward: {OLD} -> {FAST}: 1.0000 -> 0.9000 ms; 3 timed, "
        "1 gave another result"
    )


def test_a_gain_within_the_spread_changes_nothing(capsys):
    layer = MadeUpLayer(OLD)
    # 5 % faster, runs 50 % apart; and a hundredth faster, runs two hundredths apart
    ready = [("row", "forward", NOISY), ("conv", "forward", FAST)]
    ms = {**MS, NOISY: 0.95, FAST: 0.99}
    assert tune.tuned(layer, "sm_90", ready, clock_of(layer, ms)) == {}
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(
        f"sm_90 D64 16-bit conv forward: kept {OLD}: 1.0000 ms, the fastest 0.9900 ms; 2 timed"
    )


def test_the_spread_of_either_side_counts():
    steady, wild = [1.0] * 8, [0.5, 0.5, 0.5, 0.9, 0.9, 1.5, 1.5, 1.5]
    assert tune.choose({OLD: steady, FAST: wild}, OLD) == OLD
    assert tune.choose({OLD: [x + 0.2 for x in wild], FAST: steady}, OLD) == OLD
    assert tune.choose({OLD: steady, FAST: [0.99] * 8}, OLD) == FAST
    assert tune.choose({OLD: steady, FAST: [1.01] * 8}, OLD) == OLD


def test_turns_alternate_and_warm_ups_are_not_counted():
    layer = MadeUpLayer(OLD)
    runs, wrong = tune.measured(layer, "row", "dq", [FAST, OLD, WRONG], clock_of(layer, MS))
    assert {tile: len(taken) for tile, taken in runs.items()} == {OLD: tune.RUNS, FAST: tune.RUNS}
    assert wrong == 1
    # the expected result, two candidates, then turns
    assert [tile for *_, tile in layer.ran[:7]] == [OLD, FAST, WRONG, OLD, FAST, OLD, FAST]


@pytest.mark.parametrize(
    ("change", "far"),
    [
        (lambda x: x, False),
        (lambda x: (x.double() * (1 + 2**-8)).bfloat16(), False),
        # one row of 40 loses a tenth of itself
        (lambda x: torch.cat([x[:, :1] * 0.9, x[:, 1:]], 1), True),
        (lambda x: x.index_fill(1, torch.tensor(3), float("nan")), True),
        (torch.zeros_like, True),
    ],
    ids=["same", "rounded", "a row", "nan", "zeros"],
)
def test_only_rounding_is_near(change, far):
    x = torch.randn(1, 40, 1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert (not tune.distance(change(x), x) <= tune.tolerance(x.dtype)) == far


def test_rows_that_are_nearly_zero_are_not_compared_with_themselves():
    x = torch.ones(1, 40, 1, 64)
    x[0, 0] = 1e-9
    assert tune.distance(x.index_fill(1, torch.tensor(0), -1e-9), x) < 1e-6


def attempt(job):
    if job[0] == "conv":
        try:
            raise RuntimeError("out of resource: shared memory\nRequired: 3")
        except RuntimeError as error:
            return job, first_line(error)
    if job[0] == "dense":
        time.sleep(60)
    return job, None


def test_candidates_run_in_other_processes_and_failures_say_why():
    jobs = [(kind, "forward", tile) for kind in ("row", "conv") for tile in (OLD, FAST)]
    until_s = time.monotonic() + 60
    ready, failed = tune.that_run(jobs, attempt, until_s, start="fork")
    assert ready == jobs[:2]
    assert failed == dict.fromkeys(jobs[2:], "RuntimeError: out of resource: shared memory")


def test_what_is_not_compiled_in_time_is_left_out(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    jobs = [("row", "dq", OLD), ("dense", "dq", OLD), ("row", "dq", FAST)]
    until_s = time.monotonic() + 0.5
    ready, failed = tune.that_run(jobs, attempt, until_s, start="fork")
    assert ready == jobs[:1]
    assert failed == dict.fromkeys(jobs[1:], "not compiled in time")


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_candidates_are_a_dozen_different_tiles(which, itemsize):
    found = tune.candidates(which, itemsize)
    assert len(set(found)) == len(found)
    assert 12 <= len(found) <= 17


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """A made-up GPU of sm_90, and a table of its own."""
    file = tmp_path / "tiles.json"
    file.write_text(tiles.TABLE.read_text())
    monkeypatch.setattr(tiles, "TABLE", file)
    tiles.table.cache_clear()
    tiles.tile_for.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tiles, "chip_of", lambda device: "sm_90")
    monkeypatch.setattr(tune, "Clock", lambda device: None)
    yield file
    tiles.table.cache_clear()
    tiles.tile_for.cache_clear()


def test_only_the_lines_of_this_chip_width_and_dtype_change(on_a_gpu, monkeypatch, capsys):
    before = json.loads(on_a_gpu.read_text())
    layers = {}

    def make(width, dtype):
        layer = MadeUpLayer(OLD)
        layer.width = width
        return layers.setdefault(width, layer)

    monkeypatch.setattr(tune, "Layer", make)
    monkeypatch.setattr(tune, "Clock", lambda device: clock_of(layers[32], MS))

    def all_run(jobs, *_):
        return [job for job in jobs if job[2] == FAST], {jobs[0]: "x", jobs[1]: "x", jobs[2]: "y"}

    monkeypatch.setattr(tune, "that_run", all_run)
    monkeypatch.setattr(tune, "candidates", lambda *_: [FAST, SLOW, NOISY])
    tune.main(["--kinds", "row", "conv", "--widths", "32"])
    after = json.loads(on_a_gpu.read_text())
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"sm_90 D32 16-bit {k} {w}" for k in ("row", "conv") for w in PASSES}
    assert list(after) == list(before)
    assert tiles.table()["sm_90 D32 16-bit conv dq"] == FAST
    said = capsys.readouterr().out
    assert "18 candidates" in said
    assert "2 left out: x\n1 left out: y\n" in said
    assert "python -m kernels.budget --write" in said


def test_without_a_gain_the_table_is_not_written(on_a_gpu, monkeypatch, capsys):
    monkeypatch.setattr(tune, "Layer", lambda *_: MadeUpLayer(OLD))
    monkeypatch.setattr(tune, "that_run", lambda *_: ([], {}))
    before = on_a_gpu.read_text() + "\n"
    on_a_gpu.write_text(before)
    tune.main(["--widths", "64", "128"])
    assert on_a_gpu.read_text() == before
    assert "no line of the table changes" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_ends_with_2(capsys):
    with pytest.raises(SystemExit) as end:
        tune.main([])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: torch does not see {SUPPORTED} here")
    assert said.count("\n") == 1


def test_no_time_is_refused(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--seconds", "0"])
    assert "--seconds is 0.0; it must be more than 0" in capsys.readouterr().err


def test_a_table_without_a_line_of_this_chip_is_said_before_anything_is_measured(on_a_gpu, capsys):
    lines = json.loads(on_a_gpu.read_text())
    del lines["sm_90 D64 32-bit conv dq"]
    on_a_gpu.write_text(json.dumps(lines))
    with pytest.raises(SystemExit) as end:
        tune.main(["--dtypes", "bfloat16", "float32"])
    assert end.value.code == 2
    assert 'has no line "sm_90 D64 32-bit conv dq"; restore it' in capsys.readouterr().err


def test_float16_is_not_tuned_apart(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--dtypes", "float16"])
    assert "invalid choice: 'float16'" in capsys.readouterr().err
