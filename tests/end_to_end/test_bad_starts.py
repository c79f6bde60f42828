"""What the user of a launcher got wrong, or what his machines lack: a sentence and an end."""

import json
import shutil
import socket

import pytest

from pipeline import slices
from tests import tiny as runs
from tests.end_to_end.launches import (
    LAUNCHER,
    has_made,
    launch,
    nothing_left,
    start_nodes,
    until,
)
from tests.end_to_end.test_training import CPU_CONFIG
from tests.tiny import arguments, free_port

pytestmark = pytest.mark.dist


def options(inputs, out, preset="dalle", config=CPU_CONFIG, **changes) -> list:
    return [*arguments("dalle", inputs, out, preset, **changes), "--deepspeed_config", config]


def launch_two(log, options, port=None, **environment):
    """Two ranks under a launcher of their own."""
    places = ["--num_gpus", 2, "--master_port", port or free_port(), "--module"]
    return launch(log, LAUNCHER, *places, "pipeline.train_dalle", *options, **environment)


def test_a_port_that_is_taken(tiny, tmp_path):
    out = tmp_path / "run-of-this-test"
    with nothing_left(out), socket.socket() as somebody:
        somebody.bind(("", 0))
        somebody.listen()
        port = somebody.getsockname()[1]
        started = launch_two(tmp_path / "log", options(tiny, out), port)
        assert started.wait() == 2
    assert started.errors == [
        f"error: port {port} of 127.0.0.1 is taken, by another run perhaps: give the launcher "
        "another one, --master_port N, the same on all nodes"
    ]
    assert "Traceback" not in started.said
    assert not out.exists()


def assert_they_differ(nodes, *parts):
    """Both end with code 2, and the first rank alone says what differs."""
    assert [node.wait() for node in nodes] == [2, 2]
    [error] = nodes[0].errors
    assert error.startswith("error: the ranks differ: ")
    for part in parts:
        assert part in error
    assert nodes[1].errors == []
    for node in nodes:
        assert "Traceback" not in node.said


def test_nodes_with_other_code_or_other_settings(tiny, tmp_path):
    """A checkout that differs by a comment, a ds_config by a number, a preset by its seed."""
    out, other = tmp_path / "run-of-this-test", tmp_path / "checkout"
    for folder in ("pipeline", "kernels"):
        shutil.copytree(runs.ROOT / folder, other / folder)
    with open(other / "pipeline/training/loop.py", "a") as file:
        file.write("# another version\n")
    ds = json.loads(CPU_CONFIG.read_text()) | {"train_micro_batch_size_per_gpu": 2}
    config = tmp_path / "other.json"
    config.write_text(json.dumps(ds))
    with nothing_left(out):
        nodes = start_nodes(
            tmp_path / "said",
            [options(tiny, out), options(tiny, out, "dalle_other_seed", config)],
            1,
            cwds=(runs.ROOT, other),
        )
        assert_they_differ(
            nodes,
            "code is ",
            "ds_config.train_micro_batch_size_per_gpu is ",
            "2 on rank 1; ",
            "preset.seed is 0 on rank 0, 1 on rank 1",
        )
    assert not out.exists()


def test_nodes_that_read_other_data(tiny, tmp_path):
    out = tmp_path / "run-of-this-test"
    with nothing_left(out):
        both = [options(tiny, out), [*options(tiny, out), "--block-order"]]
        nodes = start_nodes(tmp_path / "said", both, 1)
        assert_they_differ(nodes, ": block is 0 on rank 0, ")
    assert slices.complete(out) == []


def test_a_machine_without_a_compiler(tiny, tmp_path):
    out, tools, built = (tmp_path / name for name in ("run-of-this-test", "bin", "extensions"))
    tools.mkdir()
    built.mkdir()
    for compiler in ("c++", "g++", "gcc", "cc", "ninja", "nvcc", "clang"):
        assert shutil.which(compiler, path=str(tools)) is None
    with nothing_left(out):
        environment = {"PATH": str(tools), "TORCH_EXTENSIONS_DIR": str(built)}
        environment |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "CC": "", "CXX": ""}
        started = launch_two(tmp_path / "log", options(tiny, out), **environment)
        assert started.wait() == 0, started.said
    assert (out / "done.json").exists()
    assert list(built.iterdir()) == []


def test_a_shard_that_vanishes_while_the_run_is_under_way(tiny, tmp_path):
    out, tokens = tmp_path / "run-of-this-test", tmp_path / "tokens"
    shutil.copytree(tiny.tokens, tokens)
    shard = tokens / "shard-00000.arrow"
    with nothing_left(out):
        started = launch_two(tmp_path / "log", options(tiny, out, "dalle_slow", data=tokens))
        until(lambda: has_made(out, 7))
        shard.unlink()
        assert started.wait() == 2
    assert started.errors
    for error in started.errors:
        assert error.startswith(f"error: {shard} is missing: ")
    assert "Traceback" not in started.said
    # whose bytes are all as written
    assert slices.newest(out)[1]["updates"] == runs.SAVE_EVERY


def test_of_two_runs_that_start_in_one_folder_one_works(tiny, tmp_path):
    out = tmp_path / "run-of-this-test"
    with nothing_left(out):
        both = [launch_two(tmp_path / name, options(tiny, out)) for name in "ab"]
        codes = [started.wait() for started in both]
    assert sorted(codes) == [0, 2]
    winner, loser = sorted(both, key=lambda started: started.process.returncode)
    assert loser.errors == [
        f"error: --out {out} belongs to a run that is still at work: wait for it, end it, or "
        "name another folder"
    ]
    assert winner.errors == []
    assert "Traceback" not in loser.said + winner.said
    assert len(runs.losses(out)) == runs.STEPS
