import pytest
import torch

from kernels.patterns import Pattern
from kernels.speed import contest
from kernels.speed.contest import Contest
from kernels.speed.rivals import Rival

CPU = torch.device("cpu")
SMALL = {"batch": 2, "heads": 3, "width": 4, "dtype": "float32"}
PATTERN = Pattern("row", 3, 4)
NEVER = float("inf")


def test_a_rival_that_fails_is_named_and_stops_nobody(monkeypatch):
    real = contest.rivals

    def refuse(*_):
        raise RuntimeError("no engine\nfor this")

    def with_failures(pattern, device):
        calls = iter(range(5))

        def tire(qkv):
            # the comparison and four warm-up calls pass
            if next(calls, None) is None:
                raise RuntimeError("tired")
            return found["naive"].attend(qkv)

        found = real(pattern, device)
        found["refuses"] = Rival(refuse, "apart", pattern)
        found["tires"] = Rival(tire, "packed", pattern)
        return found

    monkeypatch.setattr(contest, "rivals", with_failures)
    held = Contest(PATTERN, SMALL, CPU)
    held.invite(NEVER)
    assert "tires" in held.taking_part
    held.take_turns(2, NEVER)
    assert held.left_out["refuses"] == "RuntimeError: no engine"
    assert held.left_out["tires"] == "RuntimeError: tired"
    assert set(held.taking_part) == {"windowed", "naive", "sdpa mask", "sdpa causal"}
    assert all(len(runs) == 2 for name in held.taking_part for runs in held.times[name])


def test_a_rival_that_is_too_large_does_not_enter(monkeypatch):
    monkeypatch.setattr(
        contest, "too_large", lambda name, *_: "no room" if name == "naive" else None
    )
    held = Contest(PATTERN, SMALL, CPU)
    held.invite(NEVER)
    assert held.left_out["naive"] == "no room"
    assert "naive" not in held.taking_part
    assert "windowed" in held.taking_part


def on_a_gpu(monkeypatch, flex_rivals):
    """A contest that takes itself to be on a GPU, with no rivals but these."""
    monkeypatch.setattr(contest, "rivals", lambda *_: {})
    monkeypatch.setattr(contest, "flex_rivals", flex_rivals)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    held = Contest(PATTERN, SMALL, CPU)
    held.device = torch.device("cuda")
    return held


def test_flex_enters_while_there_is_time_to_compile_it(monkeypatch):
    attend = contest.rivals(PATTERN, CPU)["sdpa mask"].attend
    made = {"flex 64": Rival(attend, "apart", PATTERN)}
    held = on_a_gpu(monkeypatch, lambda *_: made)
    held.invite(0.0)
    assert held.left_out["flex 64"].startswith("no time was left to compile it")
    assert not held.taking_part
    held.invite(NEVER)
    assert list(held.taking_part) == ["flex 64"]
    assert held.errors["flex 64"]["dq"] < 1e-6


def test_flex_that_cannot_be_made_is_named(monkeypatch):
    def fail(*_):
        raise ImportError("no flex here")

    held = on_a_gpu(monkeypatch, fail)
    held.invite(NEVER)
    assert held.left_out == {"flex": "ImportError: no flex here"}


@pytest.mark.parametrize(("repeats", "until_s", "turns"), [(9, 0.0, 3), (2, 0.0, 2), (9, NEVER, 9)])
def test_turns_end_with_the_time_but_not_before_the_least(repeats, until_s, turns):
    assert contest.LEAST_TURNS["cpu"] == 3
    held = Contest(PATTERN, SMALL, CPU)
    held.invite(until_s)
    held.take_turns(repeats, until_s)
    assert [len(runs) for runs in held.times["naive"]] == [turns, turns]
