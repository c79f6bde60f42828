import dataclasses
import logging
import math
import warnings

import pytest
import torch
from torch import nn

from pipeline.console import InputError
from pipeline.training import processes
from pipeline.training.engines.engine import PlainEngine
from pipeline.training.engines.zero import chunk, make_engine
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


class Linear(nn.Module):
    """y = x w with whole numbers, whose float32 sums are exact."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(-6.0, 6.0).view(3, 4))

    def forward(self, x):
        return x @ self.weight.T


def plain_engine():
    return PlainEngine(Linear, tiny.dalle())


@pytest.mark.parametrize("cuts", [[8], [4, 4], [2, 2, 2, 2], [1, 6, 1]])
def test_gradients_of_the_shares_add_up_to_those_of_the_batch_bit_for_bit(cuts):
    x = torch.randint(-8, 9, (8, 4), generator=torch.Generator().manual_seed(0)).float()
    whole = Linear()
    whole(x).square().sum().backward()
    engine = plain_engine()
    for part in x.split(cuts):
        engine.backward(engine.model(part).square().sum())
    assert torch.equal(engine.module.weight.grad, whole.weight.grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_whose_norm_is_not_finite_is_counted_and_changes_nothing(bad):
    engine = plain_engine()
    engine.backward(engine.model(torch.ones(2, 4)).sum())
    engine.update(0.1)
    before = [{k: v.clone() for k, v in part.values.items()} for _, part in engine.slices()]
    engine.backward(engine.model(torch.ones(2, 4)).sum() * bad)
    assert not math.isfinite(engine.update(0.1))
    for old, (_, part) in zip(before, engine.slices(), strict=True):
        for key, value in part.values.items():
            assert torch.equal(value, old[key])
    assert (engine.updates, engine.applied) == (2, 1)
    # the gradient is gone: the next update is a clean one
    engine.backward(engine.model(torch.ones(2, 4)).sum())
    assert math.isfinite(engine.update(0.1))


def test_the_same_seed_builds_the_same_model():
    run = tiny.dalle()
    build = lambda: nn.Linear(3, 3)  # noqa: E731
    one, two = PlainEngine(build, run), PlainEngine(build, run)
    other = PlainEngine(build, dataclasses.replace(run, seed=1))
    assert torch.equal(one.module.weight, two.module.weight)
    assert not torch.equal(one.module.weight, other.module.weight)


def test_plain_pytorch_refuses_to_be_one_of_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"one of 2 processes without --deepspeed_config.*add"):
        plain_engine()


def test_a_ds_config_without_the_launcher_is_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="is for the deepspeed launcher: start this as"):
        make_engine(Linear, tiny.dalle(), str(tiny.ROOT / "ds_configs/zero3_cpu.json"))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("numel", [1, 2, 6, 7, 100])
def test_chunks_of_all_ranks_are_the_parameter(world, numel):
    covered = []
    for rank in range(world):
        start, length = chunk(numel, rank, world)
        covered += range(start, start + length)
    assert covered == list(range(numel))


def test_two_warnings_of_the_libraries_are_left_out_and_no_others(caplog):
    log = logging.getLogger("DeepSpeed")
    state = (log.level, list(log.filters), log.propagate)
    try:
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            log.propagate = True
            processes._quieten()
            deprecated = "`torch.distributed.{}_tensor` is deprecated. Please use another."
            for name in ("all_gather_into", "reduce_scatter", "broadcast"):
                warnings.warn(deprecated.format(name), FutureWarning, stacklevel=1)
            log.warning("**** You are using ZeRO with an untested optimizer, proceed")
            log.warning("gradient overflow")
    finally:
        log.setLevel(state[0])
        log.filters[:], log.propagate = state[1], state[2]
    assert [str(w.message) for w in shown] == [deprecated.format("broadcast")]
    assert set(caplog.messages) == {"gradient overflow"}
