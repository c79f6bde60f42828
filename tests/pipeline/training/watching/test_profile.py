import argparse
import dataclasses
import itertools
import json
import random
from dataclasses import dataclass

import pytest
import torch

from pipeline.console import InputError
from pipeline.train_dalle import DalleStage
from pipeline.training import loop, wishes
from pipeline.training.engines.engine import PlainEngine
from pipeline.training.watching import profile, watch
from pipeline.training.watching.profile import joined, length, take_apart, within, without
from pipeline.training.wishes import Wishes
from tests import tiny as runs
from tests.tiny import ROOT, arguments, curve, launched


def train(tiny, out, n, **changes):
    run = dataclasses.replace(runs.dalle(), **changes)
    stage = DalleStage(run, str(tiny.tokens), str(tiny.tokenizer))
    loop.train(stage, PlainEngine(stage.build, stage.run), out, Wishes(profile=n))


def read(out):
    return json.loads((out / "profile.json").read_text())


def assert_adds_up(found):
    assert sum(found["parts_s"].values()) == pytest.approx(found["update_s"], rel=0.1)
    assert all(found["parts_s"][name] > 0 for name in (*profile.PARTS, "other"))


def test_the_parts_add_up_and_the_run_goes_on_as_ever(tiny, tmp_path, one_cpu_thread):
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile.log, "info", lambda form, *values: lines.append(form % values))
        # a validation lies among the recorded updates
        train(tiny, tmp_path / "recorded", 3)
    train(tiny, tmp_path / "not", 0)
    found = read(tmp_path / "recorded")
    assert found["updates"] == [5, 6, 7]
    assert_adds_up(found)
    assert found["parts_s"]["communication"] == found["communication_overlapped_s"] == 0
    assert found["parts_s"]["forward"] + found["parts_s"]["backward"] > found["update_s"] / 3
    assert found["update_s_not_recorded"] > 0
    assert not (tmp_path / "not" / "profile.json").exists()
    assert curve(tmp_path / "recorded") == curve(tmp_path / "not")
    # keys of JSON are sorted
    assert set(profile.table(found)) <= set(lines)
    assert lines[0] == "an update's time on the first of 1 ranks, updates 5 to 7:"


@pytest.mark.dist
def test_ranks_that_talk_are_told_apart_from_ranks_that_compute(tiny, tmp_path):
    done = launched(
        "dalle", 2, ROOT / "ds_configs" / "zero3_cpu.json",
        *arguments("dalle", tiny, tmp_path, "dalle", profile=4),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = read(tmp_path)
    assert (found["ranks"], found["updates"]) == (2, [5, 6, 7, 8])
    assert_adds_up(found)
    # parameters are gathered, gradients scattered
    assert found["parts_s"]["communication"] > 1e-4
    assert found["communication_overlapped_s"] >= 0
    assert len(curve(tmp_path)) == runs.STEPS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_parts_add_up_too(tiny, tmp_path):
    train(tiny, tmp_path, 3)
    found = read(tmp_path)
    assert found["device"] == "cuda"
    assert_adds_up(found)


def test_a_run_that_ends_before_its_time_says_what_there_is(tiny, tmp_path, one_cpu_thread):
    train(tiny, tmp_path / "short", 50, steps=6, val_every=6, save_every=6)
    assert read(tmp_path / "short")["updates"] == [5, 6]
    warned = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile.log, "warning", lambda *words: warned.append(words))
        train(tiny, tmp_path / "shorter", 50, steps=4, val_every=4, save_every=4)
    assert "the run ended after %d updates" in warned[0][0]
    assert not (tmp_path / "shorter" / "profile.json").exists()


def test_a_run_that_is_asked_to_leave_leaves_in_good_order(tiny, tmp_path):
    done = runs.plain(
        "dalle", *arguments("dalle", tiny, tmp_path, "dalle_asked_to_leave", profile=50)
    )  # fmt: skip
    assert done.returncode == watch.LEFT, done.stderr
    assert read(tmp_path)["updates"] == [5, 6, 7]


@pytest.mark.parametrize("n", [-1, 101])
def test_a_number_of_updates_is_a_sentence(n):
    parser = argparse.ArgumentParser()
    wishes.add_arguments(parser)
    with pytest.raises(InputError, match=f"--profile is {n}; take 1 to 100"):
        wishes.of(parser.parse_args(["--profile", str(n)]))


@pytest.mark.parametrize("seed", range(20))
def test_spans_are_sets_of_moments(seed):
    rng = random.Random(seed)

    def some():
        starts = [rng.randrange(40) for _ in range(rng.randrange(6))]
        return joined((start, start + rng.randrange(8)) for start in starts)

    def moments(spans):
        return {t for start, end in spans for t in range(start, end)}

    a, b = some(), some()
    assert moments(within(a, b)) == moments(a) & moments(b)
    assert moments(without(a, b)) == moments(a) - moments(b)
    assert length(a) == len(moments(a))
    assert all(one[1] < other[0] for one, other in itertools.pairwise(a))


@dataclass
class Device:
    name: str


@dataclass
class Event:
    """As torch.profiler's, of which a test cannot make one."""

    what: str
    start: int
    end: int
    thread: int = 1
    device: str = "CPU"
    annotation: bool = False

    def name(self):
        return self.what

    def start_ns(self):
        return self.start

    def end_ns(self):
        return self.end

    def start_thread_id(self):
        return self.thread

    def device_type(self):
        return Device(self.device)

    def is_user_annotation(self):
        return self.annotation


MARKS = [
    Event("daikon::update", 0, 100),
    Event("daikon::data", 0, 10),
    Event("daikon::forward", 10, 40),
    Event("daikon::backward", 40, 80),
    Event("daikon::optimizer", 85, 95),
    # of an update that was not finished
    Event("daikon::update", 200, 220),
    Event("daikon::data", 200, 210),
]


def test_on_a_cpu_a_collective_counts_where_nothing_is_computed():
    shares = take_apart(
        [
            *MARKS,
            Event("aten::mm", 10, 30),
            # the call copies: part of the collective; its end is waited for
            Event("c10d::allreduce_", 30, 34),
            Event("aten::copy_", 31, 33),
            Event("gloo:all_reduce", 32, 38, thread=2),
            # the loader's
            Event("aten::stack", 30, 60, thread=3),
            # beside computing for 10
            Event("gloo:all_gather", 45, 65, thread=2),
            Event("aten::mm", 50, 60),
            Event("gloo:all_reduce", 81, 84, thread=2),
            # of a validation
            Event("gloo:all_reduce", 150, 160, thread=2),
        ],
        1,
        on_gpu=False,
    )
    assert shares.parts == {
        "data": 10, "forward": 22, "backward": 30, "optimizer": 10, "communication": 21, "other": 7,
    }  # fmt: skip
    assert (shares.overlapped, shares.updates) == (10, 100)


def test_on_a_gpu_kernels_count_and_not_their_launches():
    shares = take_apart(
        [
            *MARKS,
            Event("c10d::allreduce_", 10, 11),
            Event("aten::mm", 10, 40),
            Event("ncclDevKernel_AllGather", 10, 20, device="CUDA"),
            Event("sm90_gemm", 15, 40, device="CUDA"),
            # what torch draws around kernels of a part
            Event("daikon::forward", 10, 40, device="CUDA", annotation=True),
            Event("ncclDevKernel_ReduceScatter", 60, 75, device="CUDA"),
        ],
        1,
        on_gpu=True,
    )
    assert shares.parts == {
        "data": 10, "forward": 25, "backward": 25, "optimizer": 10, "communication": 20,
        "other": 10,
    }  # fmt: skip
    assert shares.overlapped == 5
