import dataclasses
import errno
import json
import logging
import math
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from pipeline import slices
from pipeline.config import Spike
from pipeline.console import InputError, OwnError
from pipeline.data.loader import TokenLoader
from pipeline.models.dalle import MLP
from pipeline.train_dalle import DalleStage
from pipeline.training import checkpoint, loop
from pipeline.training.checkpoint import Keeping
from pipeline.training.engines.engine import PlainEngine
from pipeline.training.watching import watch
from pipeline.training.watching.telemetry import Telemetry
from pipeline.training.wishes import Wishes
from tests import tiny as runs
from tests.tiny import arguments, curve, losses, plain, train, whole

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


def stage_of(tiny, **changes):
    run = dataclasses.replace(runs.dalle(), **changes)
    return DalleStage(run, str(tiny.tokens), str(tiny.tokenizer))


@pytest.fixture(scope="module")
def never_stopped(tiny, tmp_path_factory):
    """A run from the first update to the last in one go."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "dalle"
    train(stage_of(tiny), out)
    torch.set_num_threads(threads)
    return out


def assert_same_run(out, other):
    """Curves, validation, weights and description agree to the last bit."""
    assert curve(out) == curve(other)
    assert curve(out, "val") == curve(other, "val")
    for name in ("model.safetensors", "model.json", "tokenizer/spm.model"):
        assert (out / name).read_bytes() == (other / name).read_bytes()
    # tensor by tensor: safetensors puts the metadata of a file into any order
    last = f"checkpoints/step-{runs.STEPS:07d}/rank-00000.safetensors"
    moments, wanted = load_file(out / last), load_file(other / last)
    assert moments.keys() == wanted.keys()
    assert all(torch.equal(moments[name], wanted[name]) for name in wanted)


def test_every_update_and_every_validation_has_its_line(never_stopped):
    assert [line["step"] for line in curve(never_stopped)] == list(range(1, 21))
    assert [line["step"] for line in curve(never_stopped, "val")] == [5, 10, 15, 20]
    assert losses(never_stopped)[-1] < losses(never_stopped)[0] - 0.5
    assert set(curve(never_stopped)[0]) == {
        "kind", "step", "loss", "text", "image", "captions_cut", "lr", "gradient_norm",
    }  # fmt: skip


class Stopped(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("at", [[3], [5], [6, 7, 14], [19]], ids=str)
def test_stopped_and_resumed_is_never_stopped_bit_for_bit(
    tiny, tmp_path, never_stopped, monkeypatch, at
):
    write, left = Telemetry.update, list(at)

    def update(self, step, values):
        write(self, step, values)
        if step in left:
            left.remove(step)
            raise Stopped

    monkeypatch.setattr(Telemetry, "update", update)
    for _ in at:
        with pytest.raises(Stopped):
            train(stage_of(tiny), tmp_path)
    train(stage_of(tiny), tmp_path)
    assert_same_run(tmp_path, never_stopped)


@pytest.mark.parametrize("preset", ["dalle_between_saves_killed", "dalle_inside_save_killed"])
def test_killed_for_real_and_resumed_is_never_stopped_bit_for_bit(
    tiny, tmp_path, never_stopped, preset
):
    killed = plain("dalle", *arguments("dalle", tiny, tmp_path, preset))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 7 <= len(curve(tmp_path)) < runs.STEPS
    assert not (tmp_path / "model.json").exists()
    partial = tmp_path / "checkpoints/step-0000010.partial"
    assert partial.exists() == (preset == "dalle_inside_save_killed")
    train(stage_of(tiny), tmp_path)
    assert_same_run(tmp_path, never_stopped)
    assert not partial.exists()


def test_micro_batches_give_the_losses_of_the_whole_batch(tiny, tmp_path, never_stopped):
    train(stage_of(tiny), tmp_path, micro_batch=2)
    assert losses(tmp_path) == pytest.approx(losses(never_stopped), rel=1e-5)


def copy_of(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def spoken(monkeypatch):
    """The lines of the training log, as they come."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(loop.log, "handlers", [handler])
    return lines


def test_a_finished_run_says_so_and_does_not_train(tiny, tmp_path, never_stopped, monkeypatch):
    out, lines = copy_of(never_stopped, tmp_path), spoken(monkeypatch)
    for name in ("micro_batches", "validate"):
        monkeypatch.setattr(DalleStage, name, None)
    train(stage_of(tiny), out)
    assert any("all 20 updates are done: nothing to train" in line for line in lines)
    assert (out / "metrics.jsonl").read_bytes() == (never_stopped / "metrics.jsonl").read_bytes()
    assert_same_run(out, never_stopped)


def test_a_run_killed_before_its_export_exports(tiny, tmp_path, never_stopped):
    out = copy_of(never_stopped, tmp_path)
    for name in ("model.json", "model.safetensors"):
        (out / name).unlink()
    train(stage_of(tiny), out)
    assert_same_run(out, never_stopped)


def poison(monkeypatch, step, change):
    """Change the share of the loss of one update."""
    loss = DalleStage.loss

    def poisoned(self, engine, batch, totals, at):
        share, figures = loss(self, engine, batch, totals, at)
        return (change(share) if at == step else share), figures

    monkeypatch.setattr(DalleStage, "loss", poisoned)


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_loss_that_is_no_number_ends_the_run_at_once_and_keeps_the_last_checkpoint(
    tiny, tmp_path, monkeypatch, log_every
):
    poison(monkeypatch, 13, lambda share: share * math.nan)
    with pytest.raises(InputError, match="loss of update 14 is nan; the last checkpoint is kept"):
        train(stage_of(tiny, log_every=log_every), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-0000005",
        "step-0000010",
    ]
    assert not (tmp_path / "model.json").exists()
    # and it is a good one
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train(stage_of(tiny, log_every=log_every), tmp_path)
    assert all(map(math.isfinite, losses(tmp_path)))


class Overflow(torch.autograd.Function):
    """The identity whose gradient is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * math.inf


@pytest.mark.parametrize("overflows_at", [0, 2, 12])
def test_a_skipped_update_resumes_bit_for_bit(tiny, tmp_path, monkeypatch, overflows_at):
    poison(monkeypatch, overflows_at, Overflow.apply)
    changes = {"log_every": 1000, "save_every": 1, "steps": 15, "val_every": 1000}
    train(stage_of(tiny, **changes), tmp_path / "whole")
    write = Telemetry.update

    def update(self, step, values):
        write(self, step, values)
        if step == overflows_at + 2:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Telemetry, "update", update)
        with pytest.raises(Stopped):
            train(stage_of(tiny, **changes), tmp_path / "again")
    engine = train(stage_of(tiny, **changes), tmp_path / "again")
    assert (engine.updates, engine.applied) == (15, 14)
    assert curve(tmp_path / "again") == curve(tmp_path / "whole")
    # the skipped update is in the log although it was not due
    assert [line["step"] for line in curve(tmp_path / "whole")] == sorted({1, overflows_at + 1, 15})
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("side", ["train", "val"])
def test_what_is_wrong_with_one_ranks_samples_is_said_by_that_rank(
    tiny, tmp_path, monkeypatch, side
):
    batch_at = TokenLoader.batch_at

    def damaged(self, position):
        if (self.dropout == 0) == (side == "val"):
            raise InputError("row 'x' is damaged")
        return batch_at(self, position)

    monkeypatch.setattr(TokenLoader, "batch_at", damaged)
    with pytest.raises(OwnError, match="row 'x' is damaged"):
        train(stage_of(tiny), tmp_path)


def test_a_rank_stops_with_the_one_that_cannot_read_its_samples(tiny, tmp_path, monkeypatch):
    # one more than this rank says, as if another had said it
    monkeypatch.setattr(PlainEngine, "sum", lambda self, value: value + value.ndim)
    with pytest.raises(InputError, match="another rank cannot read its samples") as stopped:
        train(stage_of(tiny), tmp_path)
    assert not isinstance(stopped.value, OwnError)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 1}, "trained with preset.seed 0, this run has 1; start it as before, or give"),
        ({"batch": 4}, "trained with preset.batch 8, this run has 4"),
    ],
)
def test_another_preset_does_not_continue_a_run(tiny, tmp_path, never_stopped, changes, sentence):
    out = copy_of(never_stopped, tmp_path)
    with pytest.raises(InputError, match=sentence):
        train(stage_of(tiny, **changes), out)


def test_another_tokenizer_does_not_continue_a_run(tiny, tmp_path, never_stopped, monkeypatch):
    out, stage = copy_of(never_stopped, tmp_path), stage_of(tiny)
    stage.tokenizer.fingerprint = "another"
    with pytest.raises(InputError, match=r"trained with tokenizer \w+, this run has another;"):
        train(stage, out)


def test_other_tokens_do_not_continue_a_run(tiny, tmp_path, never_stopped):
    out, stage = copy_of(never_stopped, tmp_path), stage_of(tiny)
    stage.data.readers[0].fingerprint = "another"
    with pytest.raises(InputError, match=r"trained with tokens .*, this run has \['another'\]"):
        train(stage, out)


def test_checkpoints_of_a_run_are_its_newest_two(never_stopped):
    folders = slices.complete(never_stopped)
    assert [folder.name for folder in folders] == ["step-0000015", "step-0000020"]


def test_two_runs_do_not_share_a_folder(tiny, tmp_path):
    with (
        loop._alone_in(tmp_path),
        pytest.raises(InputError, match="belongs to a run that is still at work: wait for it"),
    ):
        train(stage_of(tiny), tmp_path)
    with loop._alone_in(tmp_path):
        pass


# ---- runs that look after themselves


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_and_the_run_goes_on_bit_for_bit(
    tiny, tmp_path, never_stopped, monkeypatch, number
):
    write, lines = Telemetry.update, spoken(monkeypatch)

    def update(self, step, values):
        write(self, step, values)
        if step == 7:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Telemetry, "update", update)
        engine = PlainEngine(stage_of(tiny).build, runs.dalle())
        assert loop.train(stage_of(tiny), engine, tmp_path) == watch.LEFT
    assert f"{signal.Signals(number).name}: update 7 of 20 is saved; start again" in lines[-1]
    assert [folder.name for folder in slices.complete(tmp_path)] == ["step-0000005", "step-0000007"]
    assert not (tmp_path / loop.DONE).exists()
    train(stage_of(tiny), tmp_path)
    assert_same_run(tmp_path, never_stopped)
    assert json.loads((tmp_path / loop.DONE).read_text())["updates"] == runs.STEPS


def test_a_save_that_fails_behind_the_back_of_training_stops_it(tiny, tmp_path, monkeypatch):
    write, failed = checkpoint.save_file, []

    def full(tensors, path, **kw):
        if path.parent.name == "step-0000010.partial":
            failed.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path, **kw)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match=r"rank-00000.safetensors cannot be written .*make room"):
        train(stage_of(tiny), tmp_path)
    assert failed
    assert [folder.name for folder in slices.complete(tmp_path)] == ["step-0000005"]
    # before the next save
    assert curve(tmp_path)[-1]["step"] < 15


@pytest.mark.parametrize(
    ("resume", "is_begun", "sentence"),
    [("must", False, "has no checkpoint: name the folder"), ("never", True, "has a checkpoint")],
)
def test_a_run_begins_or_goes_on_only_as_it_was_wished(
    tiny, tmp_path, never_stopped, resume, is_begun, sentence
):
    if is_begun:
        shutil.copytree(never_stopped, tmp_path, dirs_exist_ok=True)
    stage = stage_of(tiny)
    wished = Wishes(keeping=Keeping(resume))
    with pytest.raises(InputError, match=f"--resume {resume}, and .* {sentence}"):
        loop.train(stage, PlainEngine(stage.build, stage.run), tmp_path, wished)
    assert (tmp_path / loop.DONE).exists() == is_begun


SPIKE = Spike(deviations=50.0, window=4, skips=3, returns=1)


@pytest.mark.parametrize("change", [lambda x: x * 1000, lambda x: x * math.nan])
def test_a_spike_is_left_out_and_the_run_goes_on(tiny, tmp_path, monkeypatch, change):
    lines = spoken(monkeypatch)
    poison(monkeypatch, 12, change)
    before = {}

    def kept(self):
        before.update(whole(self, "weight"))
        return discard(self)

    discard = PlainEngine.discard
    monkeypatch.setattr(PlainEngine, "discard", kept)
    engine = train(stage_of(tiny, spike=SPIKE), tmp_path)
    assert (engine.updates, engine.applied) == (20, 19)
    assert any("update 13 is left out: its loss is" in line for line in lines)
    assert all(math.isfinite(line["loss"]) for line in curve(tmp_path) if line["step"] != 13)
    assert (tmp_path / loop.DONE).exists()


def test_a_loss_that_runs_away_before_the_first_checkpoint_ends_the_run(
    tiny, tmp_path, monkeypatch
):
    poison_data(monkeypatch, range(2, 20))
    spike = dataclasses.replace(SPIKE, skips=2)
    with pytest.raises(InputError, match="run away by update 4, before the first checkpoint: beg"):
        train(stage_of(tiny, spike=spike), tmp_path)
    assert not slices.named(tmp_path)


def poison_data(monkeypatch, batches):
    """Make the loss of some batches, counted from the beginning of the data, no number."""
    micro_batches, loss = DalleStage.micro_batches, DalleStage.loss
    bad = []

    def marked(self, position):
        found = micro_batches(self, position)
        if position // self.run.batch in batches:
            bad.extend(found)
        return found

    def poisoned(self, engine, batch, totals, at):
        share, figures = loss(self, engine, batch, totals, at)
        return (share * math.nan if any(batch is b for b in bad) else share), figures

    monkeypatch.setattr(DalleStage, "micro_batches", marked)
    monkeypatch.setattr(DalleStage, "loss", poisoned)


def test_after_spikes_in_a_row_the_run_goes_back_and_on_behind_them(tiny, tmp_path, monkeypatch):
    lines = spoken(monkeypatch)
    poison_data(monkeypatch, {11, 12, 13})
    engine = train(stage_of(tiny, spike=SPIKE), tmp_path)
    assert (engine.updates, engine.applied) == (20, 20)
    assert any("back to update 10, and on with the batches behind the spike: 4 are" in line
               for line in lines)  # fmt: skip
    # one curve, all of numbers
    assert [line["step"] for line in curve(tmp_path)] == list(range(1, 21))
    assert all(map(math.isfinite, losses(tmp_path)))
    meta = slices.read_meta(slices.complete(tmp_path)[-1])
    assert meta["state"]["skipped_batches"] == 4


def test_a_run_that_keeps_running_away_ends_with_a_sentence(tiny, tmp_path, monkeypatch):
    poison_data(monkeypatch, set(range(11, 100)))
    with pytest.raises(InputError, match=r"the loss has run away 2 times, 3 updates in a row"):
        train(stage_of(tiny, spike=SPIKE), tmp_path)
    assert slices.newest(tmp_path)[1]["updates"] == 10


def test_the_first_number_that_is_none_is_named_by_rank_and_layer(tiny, tmp_path, monkeypatch):
    lines, forward = spoken(monkeypatch), MLP.forward

    def spoilt(self, x):
        y = forward(self, x)
        return y * math.nan if self is bad[0] and engine.updates == 12 else y

    monkeypatch.setattr(MLP, "forward", spoilt)
    stage = stage_of(tiny, spike=SPIKE)
    engine = PlainEngine(stage.build, stage.run)
    bad = [engine.module.blocks[1].mlp]
    loop.train(stage, engine, tmp_path)
    assert (
        "rank 0, update 13: the first number that is not finite is in the output of "
        "blocks.2.attention_norm"
    ) in lines
