"""The paper's topology on one machine: four ranks as two nodes of two."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file

from pipeline import slices
from pipeline.models.dalle import Dalle
from tests import tiny as runs
from tests.end_to_end.test_training import CPU_CONFIG, assert_finished, assert_same_losses
from tests.tiny import arguments, launched, losses

pytestmark = [pytest.mark.dist, pytest.mark.usefixtures("one_cpu_thread")]


def launch(inputs, out, ranks, section, preset="dalle"):
    """Train on ``ranks`` processes with this ``hybrid_sharding``, or without."""
    ds = json.loads(CPU_CONFIG.read_text())
    if section is not None:
        ds["hybrid_sharding"] = section
    config = out.with_suffix(".json")
    config.write_text(json.dumps(ds))
    return launched("dalle", ranks, config, *arguments("dalle", inputs, out, preset))


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """(name, hybrid_sharding or None) -> (folder, what it said) of four ranks, each made once."""
    folder, said = tmp_path_factory.mktemp("nodes"), {}

    def make(name, section=None):
        out = folder / name
        if name not in said:
            done = launch(tiny, out, 4, section)
            assert_finished(done, out)
            said[name] = done.stderr
        return out, said[name]

    return make


def from_the_middle_of(run, out):
    """A copy of a run as it was after the save of update 15."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoints/step-0000020")
    (out / "model.json").unlink()
    return out


DENSE = {"gpus_per_node": 2}
COMPRESSED = {"gpus_per_node": 2, "powersgd_rank": 8}


def test_dense_between_the_nodes_is_zero_3_over_all_of_them(run):
    flat, _ = run("flat")
    dense, said = run("dense", DENSE)
    assert_same_losses(dense, flat)
    assert losses(dense) == pytest.approx(losses(flat), rel=1e-6)
    assert re.search(r"2 nodes: each GPU sums (\S+) of \1 MB .* 100.0 %", said)
    # a node's ranks are half of all, and one node speaks for both
    files = sorted((dense / "checkpoints/step-0000020").glob("rank-*"))
    assert [file.name for file in files] == [f"rank-{i:05d}.safetensors" for i in range(2)]


def test_compressed_between_the_nodes_learns(run):
    dense, _ = run("dense", DENSE)
    compressed, said = run("compressed", COMPRESSED)
    one, other = losses(dense), losses(compressed)
    assert other[0] == pytest.approx(one[0], rel=1e-6)
    assert other[-1] != pytest.approx(one[-1], rel=1e-4)
    # as far down as the exact sum, but for a tenth of the way
    assert one[0] - other[-1] > 0.9 * (one[0] - one[-1])
    share = float(re.search(r"MB of gradients with its peers, (\S+) %", said)[1])
    assert share == pytest.approx(100 * sent_share(), abs=0.1)


def test_what_was_not_sent_yet_survives_in_a_checkpoint(run, tiny, tmp_path):
    whole, _ = run("compressed", COMPRESSED)
    kept = load_file(whole / "checkpoints/step-0000015/rank-00000.safetensors")
    errors = {name: value for name, value in kept.items() if name.startswith("error/")}
    assert len(errors) == 3 * 4
    assert all(value.any() for value in errors.values())
    out = from_the_middle_of(whole, tmp_path / "again")
    done = launch(tiny, out, 4, COMPRESSED)
    assert_finished(done, out)
    assert "step-0000015, written by 4 ranks" in done.stderr
    assert losses(out)[15] == losses(whole)[15]
    # each node has the mean of what the two had: the sums agree but for rounding (4e-5 without)
    assert losses(out) == pytest.approx(losses(whole), rel=1e-6)


def test_a_checkpoint_of_two_nodes_goes_on_on_one(run, tiny, tmp_path):
    whole, _ = run("dense", DENSE)
    out = from_the_middle_of(whole, tmp_path / "one")
    assert_finished(launch(tiny, out, 2, None), out)
    assert_same_losses(out, whole)


def test_nodes_that_drift_apart_are_not_saved(tiny, tmp_path):
    done = launch(tiny, tmp_path / "out", 4, DENSE, "dalle_drifting")
    assert done.returncode == 2
    assert "the nodes no longer hold the same weights, so one of them" in done.stderr
    assert [p.name for p in slices.complete(tmp_path / "out")] == ["step-0000005"]


def sent_share() -> float:
    """By hand: rank 4 a GPU, matrices of the blocks cut by two ranks in rows."""
    model = runs.dalle().model
    d, rank = model.d_model, 4
    whole = sum(p.numel() for p in Dalle(model).parameters())
    parts = [(3 * d // 2, d), (d // 2, d), (4 * d // 2, d), (d // 2, 4 * d)]
    paying = [(m, n) for m, n in parts if rank * (m + n) < m * n]
    saved = model.n_layer * sum(m * n - rank * (m + n) for m, n in paying)
    return 1 - saved / (whole / 2)
