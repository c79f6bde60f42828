"""The training commands under the real ``deepspeed`` launcher. A launch takes about ten seconds."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.console import InputError
from pipeline.models.dalle import load_dalle
from pipeline.models.dvae import DiscreteVAE, load_dvae
from pipeline.train_dalle import DalleStage
from pipeline.train_dvae import DvaeStage
from tests import tiny as runs
from tests.tiny import STEPS, arguments, curve, launched, losses, train

pytestmark = [pytest.mark.dist, pytest.mark.usefixtures("one_cpu_thread")]

CPU_CONFIG = runs.ROOT / "ds_configs/zero3_cpu.json"
TOLERANCE = 1e-4


class Runs:
    """Finished runs by name, each made when a test first asks for it."""

    def __init__(self, inputs, folder):
        self.inputs, self.folder = inputs, folder
        # micro-batches of 2, and small parameters kept whole on every rank
        ds = json.loads(CPU_CONFIG.read_text()) | {"train_micro_batch_size_per_gpu": 2}
        ds["zero_optimization"]["stage3_param_persistence_threshold"] = 5000
        self.accumulating = folder / "accumulating.json"
        self.accumulating.write_text(json.dumps(ds))

    def launch(self, out, stage="dalle", ranks=2, config=CPU_CONFIG, preset=None, **changes):
        options = arguments(stage, self.inputs, out, preset or stage, **changes)
        return launched(stage, ranks, config, *options)

    def finished(self, name, **launch) -> Path:
        out = self.folder / name
        if not out.exists():
            done = self.launch(out, **launch)
            assert_finished(done, out)
        return out

    def plain(self, stage="dalle", preset=None) -> Path:
        out = self.folder / f"plain-{preset or stage}"
        if not out.exists():
            train(self.stage(stage, preset), out)
        return out

    def stage(self, stage="dalle", preset=None):
        if stage == "dvae":
            return DvaeStage(getattr(runs, preset or stage)(), str(self.inputs.pairs))
        return DalleStage(runs.dalle(), str(self.inputs.tokens), str(self.inputs.tokenizer))

    def two(self) -> Path:
        return self.finished("two")

    def from_the_middle_of(self, run: Path, name: str) -> Path:
        """A copy of a run as it was after the save of update 15."""
        out = self.folder / name
        shutil.copytree(run, out)
        shutil.rmtree(out / f"checkpoints/step-{STEPS:07d}")
        (out / "model.json").unlink()
        return out


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    return Runs(tiny, tmp_path_factory.mktemp("runs"))


def assert_finished(done, out):
    """The exit code alone does not say it: the launcher's may be 0 after a kill."""
    assert done.returncode == 0, done.stderr
    assert (out / "model.json").exists(), done.stderr
    assert len(losses(out)) == STEPS, done.stderr


def assert_same_losses(out, other):
    got, wanted = losses(out), losses(other)
    assert len(got) == len(wanted) == STEPS
    assert wanted[-1] < wanted[0] - 0.1
    assert got == pytest.approx(wanted, rel=TOLERANCE)
    # Adam forgives a wrong scale of the gradient: its norm does not
    norms = [[line["gradient_norm"] for line in curve(run)] for run in (out, other)]
    assert norms[0] == pytest.approx(norms[1], rel=10 * TOLERANCE)
    for one, two in zip(curve(out, "val"), curve(other, "val"), strict=True):
        assert one.pop("kind") == two.pop("kind") == "val"
        assert one == pytest.approx(two, rel=10 * TOLERANCE)


def assert_same_bits(out, other):
    assert curve(out) == curve(other)
    assert curve(out, "val") == curve(other, "val")
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    for rank in range(2):
        name = f"checkpoints/step-{STEPS:07d}/rank-{rank:05d}.safetensors"
        got, wanted = load_file(out / name), load_file(other / name)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_two_ranks_of_zero_3_train_as_plain_pytorch_does(made):
    assert_same_losses(made.two(), made.plain())


def test_one_rank_of_zero_3_trains_as_plain_pytorch_does(made):
    assert_same_losses(made.finished("one", ranks=1), made.plain())


def test_accumulation_on_two_ranks_trains_as_plain_pytorch_does(made):
    out = made.finished("accumulating", config=made.accumulating)
    assert_same_losses(out, made.plain())


def test_triton_attention_trains_under_zero_3_and_recomputation(made):
    ds = json.loads(CPU_CONFIG.read_text()) | {"activation_checkpointing": {"enabled": True}}
    config = made.folder / "recompute.json"
    config.write_text(json.dumps(ds))
    curves = {}
    for attention in ("triton", "naive"):
        out = made.folder / attention
        preset = "dalle_short_with_one_head"
        done = made.launch(out, config=config, preset=preset, attention=attention)
        assert done.returncode == 0, done.stderr
        assert f"attention backend {attention}: the caller asked for it" in done.stderr
        curves[attention] = losses(out)
    assert len(curves["triton"]) == 8
    assert curves["triton"] == pytest.approx(curves["naive"], rel=1e-5)


def test_weights_and_averages_agree_too(made):
    plain, two = load_dalle(made.plain())[0], load_dalle(made.two())[0]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("preset", "ranks"), [("dvae", 1), ("dvae", 2), ("fsq", 2)])
def test_the_dvae_trains_on_zero_3_as_on_plain_pytorch(made, preset, ranks):
    config = made.accumulating if ranks == 2 else CPU_CONFIG
    out = made.finished(
        f"{preset}-{ranks}", stage="dvae", preset=preset, ranks=ranks, config=config
    )
    assert_same_losses(out, made.plain("dvae", preset))
    plain, zero = (load_dvae(run)[0].state_dict() for run in (made.plain("dvae", preset), out))
    run = getattr(runs, preset)()
    torch.manual_seed(run.seed)
    start = DiscreteVAE(run.model).state_dict()
    for name, value in plain.items():
        # AdamW turns the rounding of a gradient that is nearly 0 into steps of a few elements
        assert (zero[name] - value).norm() < 0.01 * (value - start[name]).norm(), name


def test_stage_1_killed_twice_and_resumed_is_never_stopped_bit_for_bit(made):
    config = made.accumulating
    whole = made.finished("dvae-2", stage="dvae", config=config)
    out = made.folder / "dvae-killed"
    for place in ("between_saves", "inside_save"):
        done = made.launch(out, stage="dvae", preset=f"dvae_{place}_killed", config=config)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert (out / "checkpoints/step-0000010.partial").exists()
    assert not (out / "checkpoints/step-0000010").exists()
    done = made.launch(out, stage="dvae", config=config)
    assert_finished(done, out)
    assert "step-0000005, written by 2 ranks" in done.stderr
    assert_same_bits(out, whole)


def test_two_ranks_with_accumulation_resume_bit_for_bit(made):
    whole = made.finished("accumulating", config=made.accumulating)
    out = made.from_the_middle_of(whole, "accumulating-again")
    assert_finished(made.launch(out, config=made.accumulating), out)
    assert_same_bits(out, whole)


def test_a_checkpoint_of_two_ranks_goes_on_in_plain_pytorch(made):
    out = made.from_the_middle_of(made.two(), "two-to-plain")
    train(made.stage(), out)
    assert_same_losses(out, made.two())


def test_a_checkpoint_of_plain_pytorch_goes_on_on_two_ranks(made):
    out = made.from_the_middle_of(made.plain(), "plain-to-two")
    done = made.launch(out, config=made.accumulating)
    assert_finished(done, out)
    assert "step-0000015, written by 1 ranks" in done.stderr
    assert_same_losses(out, made.plain())


def test_a_torn_checkpoint_of_two_ranks_is_passed_over(made):
    out = made.folder / "torn"
    shutil.copytree(made.two(), out)
    (out / f"checkpoints/step-{STEPS:07d}/rank-00001.safetensors").unlink()
    train(made.stage(), out)
    assert_same_losses(out, made.two())


def test_a_launch_says_nothing_that_its_user_cannot_use(made):
    out = made.folder / "quiet"
    shutil.copytree(made.two(), out)
    done = made.launch(out)
    assert_finished(done, out)
    assert "all 20 updates are done: nothing to train" in done.stderr
    for noise in ("Warning", "untested optimizer", "Traceback", "terminate called"):
        assert noise not in done.stdout + done.stderr
    assert_same_bits(out, made.two())


def test_under_the_launcher_a_mistake_is_said_once_and_fails(made, tmp_path):
    done = made.launch(tmp_path / "out", preset="huge")
    assert done.returncode != 0
    assert done.stderr.count("has no function huge") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_a_mistake_behind_the_start_of_the_ranks_is_said_once_and_fails(made):
    out = made.folder / "other-seed"
    shutil.copytree(made.two(), out)
    done = made.launch(out, preset="dalle_other_seed")
    assert done.returncode != 0
    assert done.stderr.count("was trained with preset.seed 0, this run has 1") == 1
    for noise in ("Traceback", "terminate called"):
        assert noise not in done.stdout + done.stderr


def test_a_damaged_sample_of_the_second_rank_is_named(made, tmp_path):
    done = made.launch(tmp_path / "out", preset="dalle_damaged_on_rank_1")
    assert done.returncode != 0
    assert done.stderr.count("error: row 'x' of rank 1 is damaged") == 1
    assert done.stderr.count("error: another rank cannot read its samples") <= 1
    for noise in ("Traceback", "terminate called"):
        assert noise not in done.stdout + done.stderr
    with pytest.raises(InputError, match="holds no trained dalle"):
        load_dalle(tmp_path / "out")
