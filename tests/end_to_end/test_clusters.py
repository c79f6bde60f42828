"""Two launchers on one machine, each as the launcher of a node is started without ssh."""

import pytest

from pipeline import slices
from pipeline.training.processes import LOST
from tests import tiny as runs
from tests.end_to_end.launches import has_made, nothing_left, start_nodes, until
from tests.end_to_end.test_training import CPU_CONFIG, assert_same_bits
from tests.tiny import arguments, launched

pytestmark = pytest.mark.dist


def options(inputs, out, preset="dalle", config=CPU_CONFIG, **changes) -> list:
    return [*arguments("dalle", inputs, out, preset, **changes), "--deepspeed_config", config]


def train(inputs, out, folder, slots=1):
    """A run of two nodes, to its end."""
    nodes = start_nodes(folder, [options(inputs, out)] * 2, slots)
    for node in nodes:
        assert node.wait() == 0, node.said
        assert "Traceback" not in node.said
    assert (out / "done.json").exists()


@pytest.fixture(scope="module")
def one_launch(tiny, tmp_path_factory):
    """Ranks -> the finished run of one launcher."""
    folder = tmp_path_factory.mktemp("one_launch")

    def make(ranks):
        out = folder / f"ranks-{ranks}"
        if not out.exists():
            done = launched("dalle", ranks, CPU_CONFIG, *arguments("dalle", tiny, out, "dalle"))
            assert done.returncode == 0, done.stderr
        return out

    return make


@pytest.mark.parametrize("slots", [1, 2])
def test_two_nodes_are_one_launch_of_as_many_ranks_bit_for_bit(tiny, tmp_path, one_launch, slots):
    out = tmp_path / "nodes-of-this-test"
    with nothing_left(out):
        train(tiny, out, tmp_path / "said", slots)
    assert_same_bits(out, one_launch(2 * slots))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_node_that_dies_ends_the_other_with_a_sentence_and_both_go_on(
    tiny, tmp_path, one_launch, victim
):
    out = tmp_path / "nodes-of-this-test"
    with nothing_left(out):
        nodes = start_nodes(tmp_path / "said", [options(tiny, out, "dalle_slow")] * 2, 1)
        until(lambda: has_made(out, 7))
        nodes[victim].kill()
        survivor = nodes[1 - victim]
        assert survivor.wait() == LOST
    nodes[victim].wait()
    [error] = survivor.errors
    assert error.startswith(f"error: rank {1 - victim} has lost another rank (")
    assert error.endswith("the last checkpoint is kept, start all nodes again")
    for noise in ("Traceback", "terminate called"):
        assert noise not in survivor.said
    assert slices.newest(out)[1]["updates"] == runs.SAVE_EVERY
    with nothing_left(out):
        train(tiny, out, tmp_path / "again")
    assert_same_bits(out, one_launch(2))
