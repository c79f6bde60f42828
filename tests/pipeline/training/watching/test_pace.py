import dataclasses

import pytest
import torch

from pipeline.training.planning import peaks
from pipeline.training.planning.forecast import model_flops
from pipeline.training.watching import pace as paces
from pipeline.training.watching.pace import Pace, said
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A list with the time in it."""
    now = [1000.0]
    monkeypatch.setattr(paces.time, "monotonic", lambda: now[0])
    return now


def pace(run=None, updates=0):
    return Pace(run or tiny.dalle(), 2, CPU, torch.float32, updates)


def test_seconds_are_a_mean_without_validations_and_saves(clock):
    timed = pace()
    clock[0] += 6.0
    assert timed.lap(2)["seconds_an_update"] == 3.0
    with timed.away():
        clock[0] += 100.0
    clock[0] += 2.0
    assert timed.lap(3)["seconds_an_update"] == 2.0
    clock[0] += 8.0
    # what was left out of one lap is not left out of the next
    assert timed.lap(5)["seconds_an_update"] == 4.0


def test_throughput_counts_the_whole_batch(clock):
    text_and_image = tiny.N_TEXT + tiny.GRID**2
    for run, name, n in (
        (tiny.dalle(), "tokens_per_s", 8 * text_and_image),
        (tiny.dvae(), "pictures_per_s", 8),
    ):
        timed = pace(run)
        clock[0] += 4.0
        figures = timed.lap(1)
        assert figures[name] == n / 4
        assert set(figures) == {"seconds_an_update", name, "peak_gib"}
        assert 0.05 < figures["peak_gib"] < 100


def test_time_left_is_told_with_validations_and_saves(clock):
    run = dataclasses.replace(tiny.dalle(), steps=110, val_every=10, save_every=5)
    timed = pace(run)
    assert timed.left_s is None
    for step in range(1, 41):
        clock[0] += 50.0 if step <= 20 else 1.0
        timed.lap(step)
        if step % 10 == 0:
            with timed.away():
                clock[0] += 10.0
    # of the last ten updates, a second each, and one validation; the slow ones are forgotten
    assert timed.left_s == pytest.approx(70 * (10 + 10) / 10)


def test_going_back_counts_anew(clock):
    timed = pace()
    clock[0] += 5.0
    timed.lap(5)
    clock[0] += 50.0
    timed.restart(2)
    assert timed.left_s is None
    clock[0] += 1.0
    assert timed.lap(3)["seconds_an_update"] == 1.0


def test_the_share_of_the_peak_is_that_of_the_products_of_the_model(clock, monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    run = tiny.dalle()
    timed = Pace(run, 2, cuda, torch.bfloat16, 0)
    clock[0] += 1e-3
    figures = timed.lap(1)
    assert figures["mfu"] == pytest.approx(model_flops(run) / 2 / (989e12 * 1e-3))
    assert figures["peak_gib"] == 3
    for changed in (
        Pace(run, 2, cuda, torch.float32, 0),
        Pace(tiny.dvae(), 2, cuda, torch.bfloat16, 0),
        Pace(run, 2, CPU, torch.bfloat16, 0),
    ):
        clock[0] += 1.0
        assert "mfu" not in changed.lap(1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Other Chip")
    timed = Pace(run, 2, cuda, torch.bfloat16, 0)
    clock[0] += 1.0
    assert "mfu" not in timed.lap(1)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GB200", 2500),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_device_has_its_own_peak(name, tflops):
    assert peaks.tflops(name) == tflops


def test_the_words_beside_the_bar_fit_a_hundred_columns():
    values = {"loss": 6.41234, "text": 10.5, "image": 6.0, "z": 12.0, "lr": 1.234e-4}
    speed = {"seconds_an_update": 3.0, "tokens_per_s": 411_234.0, "mfu": 0.4321, "peak_gib": 61.23}
    line = said(values, speed)
    assert line == "loss 6.412 text 10.500 image 6.000 lr 1.2e-4 411k tok/s MFU 43% 61.2 GiB"
    assert len(f"dalle 123456/430000 12h59m {line}") <= 100
    of_pictures = said({"loss": 1, "lr": 1e-12}, {"pictures_per_s": 3.14159})
    assert of_pictures == "loss 1.000 lr 1.0e-12 3.14 pictures/s"
