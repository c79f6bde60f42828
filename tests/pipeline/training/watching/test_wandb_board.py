"""Against the real package, without its server; skipped where it is not installed."""

import dataclasses
import importlib.util
import json
import struct
import sys

import numpy as np
import pytest

from pipeline.console import InputError
from pipeline.data.pictures import save_png
from pipeline.train_dalle import DalleStage
from pipeline.training import loop, wishes
from pipeline.training.engines.engine import PlainEngine
from pipeline.training.watching import wandb_board
from pipeline.training.watching.wandb_board import WandbBoard
from pipeline.training.wishes import Wishes
from tests import tiny as runs

needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed: pip install wandb"
)


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")


def records(out):
    """What W&B kept of each start, oldest first: LevelDB's log format, after seven bytes of its."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, head = 32768, struct.Struct("<IHB")
    for file in sorted(out.glob("wandb/offline-run-*/*.wandb")):
        data, place, payload, found = file.read_bytes(), 7, b"", []
        while place + head.size <= len(data):
            if block - place % block < head.size:
                place += block - place % block
                continue
            _, length, kind = head.unpack_from(data, place)
            place += head.size + length
            payload += data[place - length : place]
            if kind in (1, 4):  # whole, or the last part
                found.append(Record.FromString(payload))
                payload = b""
        yield found


def histories(out):
    for found in records(out):
        lines = [r.history for r in found if r.WhichOneof("record_type") == "history"]
        yield [
            {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in line.item}
            for line in lines
        ]


def train(tiny, out, steps=4):
    run = dataclasses.replace(runs.dalle(), steps=steps, val_every=2, save_every=2)
    stage = DalleStage(run, str(tiny.tokens), str(tiny.tokenizer))
    engine = PlainEngine(stage.build, stage.run)
    loop.train(stage, engine, out, Wishes(wandb="dalle-tests"))


@needs_wandb
def test_a_run_tells_what_metrics_jsonl_has(tiny, tmp_path, one_cpu_thread):
    out = tmp_path / "run"
    train(tiny, out)
    (lines,) = histories(out)
    losses = [(line["update"], line["train/loss"]) for line in lines if "train/loss" in line]
    wanted = [(line["step"], line["loss"]) for line in runs.curve(out)]
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    assert losses == [(step, pytest.approx(loss)) for step, loss in wanted]
    assert [line["update"] for line in lines if "val/text" in line] == [2, 4]
    assert any("speed/tokens_per_s" in line for line in lines)


@needs_wandb
def test_a_run_that_starts_again_is_the_same_run(tmp_path):
    for step in (1, 2):
        board = WandbBoard("p", tmp_path, {"batch": 8})
        board.figures("train", step, {"loss": 1.0})
        board.close()
    begun = [
        next(r.run for r in found if r.WhichOneof("record_type") == "run")
        for found in records(tmp_path)
    ]
    assert len(begun) == 2
    known = json.loads((tmp_path / "wandb.json").read_text())
    assert {run.run_id for run in begun} == {known["id"]}
    assert {run.project for run in begun} == {"p"}
    other = WandbBoard("another", tmp_path, {})
    other.close()
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] != known["id"]


@needs_wandb
def test_a_picture_is_kept_with_its_update(tmp_path):
    save_png(tmp_path / "x.png", np.full((6, 9, 3), 200, np.uint8))
    board = WandbBoard("p", tmp_path, {})
    board.picture("samples", 5, tmp_path / "x.png")
    board.close()
    ((shown,),) = histories(tmp_path)
    assert shown["update"] == 5
    assert (shown["samples.width"], shown["samples.height"]) == (9, 6)
    (kept,) = tmp_path.glob(f"wandb/offline-run-*/files/{shown['samples.path']}")
    assert kept.read_bytes() == (tmp_path / "x.png").read_bytes()


@needs_wandb
@pytest.mark.parametrize("key", ["", "a" * 40], ids=["no login", "no server"])
def test_without_a_server_the_run_is_recorded(tmp_path, monkeypatch, key):
    monkeypatch.setattr(wandb_board, "PATIENCE_S", 3.0)
    monkeypatch.setenv("WANDB_MODE", "online")
    # nothing listens on the port of "discard"
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    warned = []
    monkeypatch.setattr(wandb_board.log, "warning", lambda *words: warned.append(words))
    board = WandbBoard("p", tmp_path, {})
    board.figures("train", 1, {"loss": 1.5})
    board.close()
    assert len(warned) == 1
    assert "the run goes on without it" in warned[0][0]
    (lines,) = histories(tmp_path)
    assert lines[0]["train/loss"] == 1.5


@needs_wandb
def test_what_fails_later_is_said_once(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(wandb_board.log, "warning", lambda *words: warned.append(words))
    board = WandbBoard("p", tmp_path, {})
    # W&B refuses figures of a run that is over
    board.close()
    for step in (1, 2):
        board.figures("train", step, {"loss": 1.0})
    assert len(warned) == 1
    assert "records nothing more" in warned[0][0]


def test_a_broken_id_is_named(tmp_path):
    (tmp_path / "wandb.json").write_text('{"project": "p"')
    with pytest.raises(InputError, match=r"wandb\.json is broken .*; delete it"):
        wandb_board._run_id(tmp_path / "wandb.json", "p")


# the package hidden from a process of its own
HIDDEN = """
import sys
sys.modules["wandb"] = None
from pipeline.console import command
from pipeline.train_{stage} import main
sys.argv = ["train", "--preset", "x.py:x", "--data", "x", "--out", "x", "--wandb", "p", {more}]
command(main)
"""


@pytest.mark.parametrize(("stage", "more"), [("dalle", '"--tokenizer", "x"'), ("dvae", "")])
def test_without_the_package_it_is_a_sentence_before_any_work(stage, more):
    done = runs.start([sys.executable, "-c", HIDDEN.format(stage=stage, more=more)])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert (
        "--wandb needs the package wandb, which is not installed: pip install wandb" in done.stderr
    )


def test_ranks_that_do_not_tell_need_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("RANK", "1")
    wandb_board.check_installed()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="pip install wandb"):
        wandb_board.check_installed()


def test_an_empty_project_is_refused():
    import argparse

    parser = argparse.ArgumentParser()
    wishes.add_arguments(parser)
    with pytest.raises(InputError, match="--wandb is empty"):
        wishes.of(parser.parse_args(["--wandb", " "]))
