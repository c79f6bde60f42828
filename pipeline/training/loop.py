"""The training loop. A stage brings its model, its batches and its loss; the rest is here, once."""

import fcntl
import itertools
import math
import resource
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from pipeline import slices
from pipeline.config import DalleRun, DvaeRun, as_dict
from pipeline.console import InputError, OwnError, logger
from pipeline.data.loader import prefetch
from pipeline.export import export
from pipeline.training import checkpoint
from pipeline.training.engine import Engine
from pipeline.training.telemetry import Telemetry

Batch = TypeVar("Batch")

log = logger("train")


class Stage(ABC, Generic[Batch]):
    """What one kind of training brings."""

    name: str
    run: DvaeRun | DalleRun

    @abstractmethod
    def build(self) -> nn.Module:
        """A fresh model."""

    def accompany(self, out: Path) -> None:
        """Called on the first rank: put what a reader of checkpoints needs into ``out``."""

    @abstractmethod
    def prepare(self, engine: Engine) -> None:
        """Called once, when the engine stands and before the first batch."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The fingerprints of all inputs: with the preset, what a checkpoint belongs to."""

    @abstractmethod
    def micro_batches(self, position: int) -> list[Batch]:
        """This rank's samples of positions [position, position + batch); called in a thread."""

    @abstractmethod
    def counts(self, batch: Batch) -> Tensor:
        """What the loss is normalised by, in this micro-batch: float32 [n]."""

    @abstractmethod
    def loss(
        self, engine: Engine, batch: Batch, totals: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's shares of the loss and of the figures, given the batch's counts."""

    @abstractmethod
    def lr(self, step: int) -> float:
        """The step size of update ``step``, from 0."""

    @property
    def wants_losses(self) -> bool:
        """Whether ``observe`` is to be told of every update."""
        return False

    def observe(self, step: int, loss: float) -> None:
        """The training loss of update ``step``, the same on all ranks."""

    def state(self) -> dict[str, Any]:
        """JSON values that go into a checkpoint."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``."""

    @abstractmethod
    def figures(self, step: int) -> dict[str, float]:
        """Schedules worth a place in the log."""

    @abstractmethod
    def validate(self, engine: Engine, out: Path) -> dict[str, float]:
        """Figures on held-out samples; all ranks call it."""

    def finish(self, out: Path) -> None:
        """Called on the first rank when the averaged weights are in ``out``."""


def train(stage: Stage[Any], engine: Engine, out: Path) -> None:
    """Train to the preset's last update, from the newest checkpoint under ``out`` if there is one.

    Raises:
        InputError: a checkpoint of another run, another run at work in ``out``, or a loss that
            is no longer finite.
    """
    with ExitStack() as held:
        if engine.rank == 0:
            _make(out)
            held.enter_context(_alone_in(out))
        _train(stage, engine, out)


def _train(stage: Stage[Any], engine: Engine, out: Path) -> None:
    run = stage.run
    identity = {"preset": as_dict(run), **stage.identity()}
    if (state := checkpoint.resume(engine, out, identity)) is not None:
        engine.restore_state(state["engine"])
        stage.restore(state["stage"])
    stage.prepare(engine)
    if engine.rank == 0:
        stage.accompany(out)
    if engine.updates >= run.steps:
        log.info("all %d updates are done: nothing to train, exporting the model", run.steps)
        _finish(stage, engine, out)
        return
    telemetry = Telemetry(out, stage.name, run.steps, engine.updates, speaks=engine.rank == 0)
    positions = itertools.count(engine.updates * run.batch, run.batch)
    engine.model.train()
    try:
        with closing(prefetch(map(stage.micro_batches, positions))) as stream:
            while engine.updates < run.steps:
                is_looked_at = _is_validated(run, engine.updates + 1)
                if engine.scales is not None:
                    engine.scales.looks = is_looked_at
                figures = _update(stage, engine, _next(engine, stream))
                step = engine.updates
                telemetry.update(step, figures)
                if is_looked_at:
                    engine.model.eval()
                    with _said_by_this_rank():
                        held_out = stage.validate(engine, out)
                    telemetry.figures("val", step, held_out)
                    telemetry.figures("machine", step, {"peak_gib": _peak_gib(engine)})
                    if engine.scales is not None:
                        zeros = engine.sum(engine.scales.zeros.to(engine.device))
                        telemetry.figures("blocks", step, engine.scales.by_block(zeros))
                    engine.model.train()
                if step % run.save_every == 0 or step == run.steps:
                    state = {"engine": engine.state(), "stage": stage.state()}
                    checkpoint.save(engine, out, stage.name, identity, state)
    finally:
        telemetry.close()
    _finish(stage, engine, out)


def _finish(stage: Stage[Any], engine: Engine, out: Path) -> None:
    """Export the average from the last checkpoint, tensor by tensor; no rank holds it whole."""
    if engine.rank != 0:
        return
    folder = slices.folder_of(out, engine.updates)
    meta = slices.read_meta(folder)
    fingerprint = export(folder, meta, out, key="ema" if meta["applied"] else "weight")
    log.info("wrote %s, fingerprint %s", out, fingerprint)
    stage.finish(out)


def _is_validated(run: DvaeRun | DalleRun, step: int) -> bool:
    return step % run.val_every == 0 or step == run.steps


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {out} cannot be made a folder ({error.strerror}): name another"
        ) from error


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Hold ``out`` for this process; the system lets go of it however the process ends."""
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"--out {out} belongs to a run that is still at work: wait for it, end it, or "
                "name another folder"
            ) from error
        except OSError:
            log.warning("%s is on a file system without locks: start one run in it only", out)
        yield


def _next(engine: Engine, stream: Iterator[list[Any]]) -> list[Any]:
    """This rank's next micro-batches; all ranks stop together when one cannot read its own."""
    batches: list[Any] = []
    problem = None
    try:
        batches = next(stream)
    except InputError as error:
        problem = error
    n_stopped = engine.sum(torch.tensor([float(problem is not None)], device=engine.device))
    if problem is not None:
        raise OwnError(str(problem)) from problem
    if n_stopped.item():
        raise InputError("another rank cannot read its samples: its own line says why")
    return batches


def _peak_gib(engine: Engine) -> float:
    """The most host memory that the ranks held so far, added up; with a GPU, its memory instead."""
    if engine.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(engine.device) / 2**30
    else:
        # Linux counts in KiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return float(engine.sum(torch.tensor(peak, device=engine.device)))


@contextmanager
def _said_by_this_rank() -> Iterator[None]:
    """What is wrong with the samples of one rank, the others do not know."""
    try:
        yield
    except InputError as error:
        raise OwnError(str(error)) from error


def _update(stage: Stage[Any], engine: Engine, batches: list[Any]) -> dict[str, float] | None:
    """One update; returns the figures of the whole batch when they are due."""
    run, step = stage.run, engine.updates
    totals = engine.sum(torch.stack([stage.counts(b) for b in batches]).sum(0).to(engine.device))
    sums: dict[str, Tensor] = {}
    for batch in batches:
        share, figures = stage.loss(engine, batch, totals, step)
        engine.backward(share)
        for name, value in {"loss": share, **figures}.items():
            value = value.detach().float()
            sums[name] = sums[name] + value if name in sums else value
    norm = engine.update(stage.lr(step))
    is_due = (step + 1) % run.log_every == 0 or step == 0 or step + 1 == run.steps
    # a loss that is not finite shows in the norm, which is known anyway
    if not is_due and math.isfinite(norm) and not stage.wants_losses:
        return None
    lr = stage.lr(step)  # before the stage learns of the loss
    summed = engine.sum(torch.stack(list(sums.values()))).tolist()
    result = dict(zip(sums, summed, strict=True))
    if not math.isfinite(result["loss"]):
        raise InputError(
            f"the loss of update {step + 1} is {result['loss']}; the last checkpoint is kept: "
            "resume with a smaller step size or a longer warm-up in the preset"
        )
    stage.observe(step, result["loss"])
    if not is_due and math.isfinite(norm):
        return None
    scales = {} if engine.scales is None else engine.scales.figures()
    return result | {"lr": lr, "gradient_norm": norm, **scales, **stage.figures(step)}
