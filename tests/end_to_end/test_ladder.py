"""A run that is moved between numbers of ranks is the run that was never moved."""

from collections import Counter

import pytest

from pipeline import slices
from pipeline.data.shards import ShardReader
from pipeline.training.watching.watch import LEFT
from tests.end_to_end.soak import config_of
from tests.tiny import arguments, curve, launched, losses, plain

pytestmark = [pytest.mark.dist, pytest.mark.usefixtures("one_cpu_thread")]

RANKS = (2, 1, 4, 2)
STEPS, BATCH = 120, 8


@pytest.fixture(scope="module")
def stayed(tiny, tmp_path_factory):
    """(out, seen) of the run in plain PyTorch, which leaves and comes back too."""
    return climb(tiny, tmp_path_factory.mktemp("stayed"), (None,) * 4, None)


def climb(tiny, folder, ranks, config):
    out, seen = folder / "out", folder / "seen"
    seen.mkdir()
    options = arguments("dalle", tiny, out, "dalle_ladder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEEN", str(seen))
        for rung, n in enumerate(ranks, start=1):
            run = plain("dalle", *options) if n is None else launched("dalle", n, config, *options)
            assert run.returncode == (0 if rung == len(ranks) else LEFT), run.stderr
            assert slices.complete(out)[-1].name == f"step-{30 * rung:07d}"
    return out, seen


def samples(seen) -> dict[int, Counter]:
    """Update -> samples that were trained on in it, whoever did it."""
    found = {step: Counter() for step in range(STEPS)}
    for path in seen.iterdir():
        for line in path.read_text().splitlines():
            step, _, name = line.partition(" ")
            found[int(step)][name] += 1
    return found


@pytest.mark.parametrize("stage", [3, 2])
def test_two_one_four_two_ranks_train_as_one_that_stayed(tiny, tmp_path, stayed, stage):
    out, seen = climb(tiny, tmp_path, RANKS, config_of(stage, tmp_path))
    assert len(losses(out)) == STEPS
    assert losses(out) == pytest.approx(losses(stayed[0]), rel=1e-4)
    assert losses(out)[-1] < losses(out)[0] / 2
    norms = [[line["gradient_norm"] for line in curve(run)] for run in (out, stayed[0])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    taken = samples(seen)
    assert taken == samples(stayed[1])
    assert all(sum(update.values()) == BATCH for update in taken.values())
    # and each pass over the set takes every sample once
    rows = len(ShardReader(tiny.tokens, "tokens").split("train"))
    whole = sum((taken[step] for step in range(STEPS)), Counter())
    passes = STEPS * BATCH / rows
    assert len(whole) == rows
    assert set(whole.values()) <= {int(passes), int(passes) + 1}
