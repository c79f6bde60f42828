"""The rivals against each other, in turns: who takes part, who does not and why, what they take."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kernels.patterns import Pattern
from kernels.speed.clock import WARM_UP, Clock, first_line
from kernels.speed.figures import FLEX
from kernels.speed.rivals import Inputs, Rival, distances, flex_rivals, rivals, too_large

# turns that are made whatever the clock says
LEAST_TURNS = {"cuda": 50, "cpu": 3}


class Contest:
    """All rivals under one pattern: the times and errors of those that run, and why others do not.

    Args:
        pattern: the pattern.
        shape: batch, heads, width and dtype, by name.
        device: where they run.
    """

    def __init__(self, pattern: Pattern, shape: dict[str, Any], device: torch.device) -> None:
        self.pattern, self.shape, self.device = pattern, shape, device
        self.inputs, self.clock = Inputs(pattern, shape, device), Clock(device)
        self.truth = self.inputs.truth(pattern)
        self.taking_part: dict[str, Rival] = {}
        self.left_out: dict[str, str] = {}
        self.errors: dict[str, dict[str, float]] = {}
        self.times: dict[str, tuple[list[float], list[float]]] = {}

    def forward(self, rival: Rival) -> None:
        """As in training."""
        rival.attend(*self.inputs.of(rival.form)[0])

    def both(self, rival: Rival) -> None:
        """Forward, and all gradients."""
        leaves, do = self.inputs.of(rival.form)
        torch.autograd.grad(rival.attend(*leaves), leaves, do)

    def attempt(self, name: str, work: Callable[[], None]) -> None:
        """Whatever happens to a rival, the others are still to be measured."""
        try:
            work()
        except Exception as error:
            self.left_out[name] = first_line(error)
            self.taking_part.pop(name, None)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def enter(self, name: str, rival: Rival) -> None:
        """Compile, compare and warm up."""
        if rival.pattern == self.pattern:
            self.errors[name] = distances(self.inputs.outputs(rival), self.truth)
        for _ in range(WARM_UP):
            self.both(rival)
        self.clock(partial(self.both, rival))
        self.taking_part[name], self.times[name] = rival, ([], [])

    def invite(self, until_s: float) -> None:
        """Let every rival enter; FlexAttention, which takes long to compile, until the time."""
        for name, rival in rivals(self.pattern, self.device).items():
            reason = too_large(name, self.shape, self.pattern)
            if reason:
                self.left_out[name] = reason
            else:
                self.attempt(name, partial(self.enter, name, rival))
        if self.device.type != "cuda":
            return
        # each pattern and block is one more compilation of one function, and eight are allowed
        torch.compiler.reset()
        flex: dict[str, Rival] = {}
        self.attempt(FLEX, lambda: flex.update(flex_rivals(self.pattern, self.device)))
        for name, rival in flex.items():
            if time.monotonic() < until_s:
                self.attempt(name, partial(self.enter, name, rival))
            else:
                self.left_out[name] = "no time was left to compile it; give more --seconds"

    def turn(self, name: str, rival: Rival) -> None:
        """Time a rival once."""
        taken_s = [self.clock(partial(work, rival)) for work in (self.forward, self.both)]
        for times, took_s in zip(self.times[name], taken_s, strict=True):
            times.append(took_s)

    def take_turns(self, repeats: int, until_s: float) -> None:
        """All that entered, in turns: ``repeats``, or fewer if the time is over before."""
        for i in range(repeats):
            if i >= LEAST_TURNS[self.device.type] and time.monotonic() > until_s:
                break
            for name, rival in list(self.taking_part.items()):
                self.attempt(name, partial(self.turn, name, rival))
