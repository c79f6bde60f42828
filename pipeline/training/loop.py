"""The training loop. A stage brings its model, its batches and its loss; the rest is here, once."""

import fcntl
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from pipeline import slices
from pipeline.config import Run, as_dict
from pipeline.console import InputError, OwnError, logger
from pipeline.data.loader import prefetch
from pipeline.files import write_json
from pipeline.training import checkpoint, processes
from pipeline.training.checkpoint import Keeping
from pipeline.training.engines.engine import Engine
from pipeline.training.guard import BACK, GO, Guard, looking_for_bad_numbers
from pipeline.training.watching.pace import Pace, peak_gib
from pipeline.training.watching.profile import Profile
from pipeline.training.watching.telemetry import Telemetry
from pipeline.training.watching.wandb_board import WandbBoard
from pipeline.training.watching.watch import LEFT, Watch
from pipeline.training.wishes import Wishes
from pipeline.weights import export

Batch = TypeVar("Batch")

DONE = "done.json"  # there when a run has finished, whatever the launcher's exit code says

log = logger("train")


class Stage(ABC, Generic[Batch]):
    """What one kind of training brings."""

    name: str
    run: Run

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


def train(stage: Stage[Any], engine: Engine, out: Path, wishes: Wishes | None = None) -> int:
    """Train to the preset's last update, from the newest checkpoint under ``out`` if there is one.

    Returns:
        0, or ``watch.LEFT`` when a signal asked to leave: the run is saved and not finished.

    Raises:
        InputError: a checkpoint of another run, another run at work in ``out``, or a loss that
            is no longer finite.
    """
    with ExitStack() as held:
        if engine.rank == 0:
            _make(out)
            held.enter_context(_alone_in(out))
        engine.barrier()
        watch = held.enter_context(Watch(out, engine.rank, stage.run.patience_s))
        return _train(stage, engine, out, watch, wishes or Wishes())


def _train(stage: Stage[Any], engine: Engine, out: Path, watch: Watch, wishes: Wishes) -> int:
    run = stage.run
    session = _Session(stage, engine, out, watch, wishes.keeping)
    processes.agree(session.identity)
    wishes.keeping.check(out, has_resumed=session.resume())
    stage.prepare(engine)
    if engine.rank == 0:
        stage.accompany(out)
    if engine.updates >= run.steps:
        log.info("all %d updates are done: nothing to train, exporting the model", run.steps)
        _finish(stage, engine, out)
        return 0
    (out / DONE).unlink(missing_ok=True)
    pace = Pace(run, engine.world, engine.device, engine.compute_dtype, engine.updates)
    speaks = engine.rank == 0
    wandb = WandbBoard(wishes.wandb, out, as_dict(run)) if wishes.wandb and speaks else None
    session.telemetry = Telemetry(out, stage.name, run.steps, engine.updates, speaks, pace, wandb)
    n_profiled = wishes.profile if speaks else 0
    session.profile = Profile(n_profiled, out, engine.device, engine.world)
    try:
        while engine.updates < run.steps:
            if not session.run():
                return LEFT
        session.wait_for_save()
    finally:
        session.telemetry.close()
        session.profile.close()
    _finish(stage, engine, out)
    return 0


class _Session(Generic[Batch]):
    """A run from where it is: batches in, updates, and what is due after each."""

    telemetry: Telemetry
    profile: Profile

    def __init__(
        self,
        stage: Stage[Batch],
        engine: Engine,
        out: Path,
        watch: Watch,
        keeping: Keeping,
    ) -> None:
        self.stage, self.engine, self.out, self.watch = stage, engine, out, watch
        self.keeping = keeping
        self.guard = Guard(stage.run.spike)
        self.identity = {"preset": as_dict(stage.run), **stage.identity()}
        # batches that were left out by going back: updates are behind the data by so many
        self.skipped_batches = 0
        self._saved = -1
        self._save: checkpoint.Save | None = None
        self._sums: dict[str, Tensor] = {}

    def resume(self) -> bool:
        """Go on from the newest checkpoint; False when there is none."""
        self.wait_for_save()
        state = checkpoint.resume(self.engine, self.out, self.identity)
        if state is not None:
            self.engine.restore_state(state["engine"])
            self.stage.restore(state["stage"])
            self.guard.restore(state["guard"])
            self.skipped_batches = int(state["skipped_batches"])
            self._saved = self.engine.updates
        return state is not None

    def save(self) -> None:
        """Write a checkpoint, unless this update has one."""
        if self._saved == self.engine.updates:
            return
        state = {
            "engine": self.engine.state(),
            "stage": self.stage.state(),
            "guard": self.guard.state(),
            "skipped_batches": self.skipped_batches,
        }
        self.wait_for_save()
        described = {"kind": self.stage.name, "identity": self.identity, "state": state}
        self._save = checkpoint.Save(self.engine, self.out, described, self.keeping)
        self._saved = self.engine.updates

    def wait_for_save(self) -> None:
        """Until the last checkpoint is on the disk."""
        if self._save is not None:
            self._save.wait()
            self._save = None

    def run(self) -> bool:
        """Train until the end, or until it goes back; False when a signal asked to leave."""
        stage, engine, run = self.stage, self.engine, self.stage.run
        first = (engine.updates + self.skipped_batches) * run.batch
        engine.model.train()
        with closing(prefetch(map(stage.micro_batches, itertools.count(first, run.batch)))) as data:
            while engine.updates < run.steps:
                problem = self._save.problem if self._save else None
                self.profile.begin()
                with self.profile.part("data"):
                    batches, is_asked = _next(engine, data, self.watch.asked is not None, problem)
                if is_asked:
                    self.save()
                    self.wait_for_save()
                    log.info(
                        "%s: update %d of %d is saved; start again to go on",
                        self.watch.asked or "another rank was asked to leave",
                        engine.updates, run.steps,
                    )  # fmt: skip
                    return False
                if engine.scales is not None:
                    engine.scales.looks = _is_validated(run, engine.updates + 1)
                is_good = self._update(batches)
                self.profile.end(engine.updates)
                if not is_good:
                    self._go_back()
                    return True
                with self.telemetry.pace.away():
                    self._after_update()
                self.watch.beat()
        return True

    def _update(self, batches: list[Batch]) -> bool:
        """One update, made or left out; False when it is time to go back."""
        engine, guard = self.engine, self.guard
        figures = self._pass(batches, engine.updates)
        verdict = GO
        if guard.spike is not None:
            verdict = guard.judge(figures["loss"])
        if verdict == GO:
            lr = self.stage.lr(engine.updates)
            with self.profile.part("optimizer"):
                norm = engine.update(lr)
            told = self._told(figures, lr, norm)
            if (verdict := guard.judge_norm(norm)) != GO:
                self._leave_out(engine.updates, batches, f"its gradient's norm is {norm}")
            self.telemetry.update(engine.updates, told)
            return verdict != BACK
        engine.discard()
        self._leave_out(engine.updates + 1, batches, f"its loss is {figures['loss']:g}")
        engine.updates += 1
        self.telemetry.update(engine.updates, figures)
        return verdict != BACK

    def _leave_out(self, step: int, batches: list[Batch], why: str) -> None:
        log.warning("update %d is left out: %s; %d left out so far", step, why, self.guard.skips)
        self._tell_of_bad_numbers(step, batches)

    def _tell_of_bad_numbers(self, step: int, batches: list[Batch]) -> None:
        """Each rank says where its own pass first has a number that is none."""
        engine = self.engine
        with looking_for_bad_numbers(engine.module) as found:
            self._pass(batches, step - 1)
        engine.discard()
        for what in found:
            log.error(
                "rank %d, update %d: the first number that is not finite is in %s",
                engine.rank, step, what,
            )  # fmt: skip

    def _go_back(self) -> None:
        """To the last checkpoint, and on with the batches behind those of the spike."""
        here = self.engine.updates + self.skipped_batches
        returns = self.guard.returns
        if not self.resume():
            raise InputError(
                f"the loss has run away by update {self.engine.updates}, before the first "
                "checkpoint: begin with a smaller step size or a longer warm-up in the preset"
            )
        self.guard.returns = returns
        self.guard.went_back()
        self.skipped_batches = here - self.engine.updates
        self.telemetry.back_to(self.engine.updates)
        log.warning(
            "back to update %d, and on with the batches behind the spike: %d are left out",
            self.engine.updates, self.skipped_batches,
        )  # fmt: skip

    def _pass(self, batches: list[Batch], step: int) -> dict[str, float]:
        """Forward and backward; the figures of the whole batch when anybody wants them."""
        stage, engine = self.stage, self.engine
        counts = torch.stack([stage.counts(b) for b in batches]).sum(0)
        totals = engine.sum(counts.to(engine.device))
        self._sums = {}
        for batch in batches:
            with self.profile.part("forward"):
                share, figures = stage.loss(engine, batch, totals, step)
            with self.profile.part("backward"):
                engine.backward(share)
            for name, value in {"loss": share, **figures}.items():
                value = value.detach().float()
                self._sums[name] = self._sums[name] + value if name in self._sums else value
        if self.guard.spike is not None or stage.wants_losses:
            return self._summed()
        return {}

    def _summed(self) -> dict[str, float]:
        """Figures of all ranks together."""
        summed = self.engine.sum(torch.stack(list(self._sums.values()))).tolist()
        return dict(zip(self._sums, summed, strict=True))

    def _told(self, figures: dict[str, float], lr: float, norm: float) -> dict[str, float] | None:
        """What is told of an update that was made, where it is due."""
        stage, run, step = self.stage, self.stage.run, self.engine.updates
        # a loss that is not finite shows in the norm, which is known anyway
        is_due = step % run.log_every == 0 or step in (1, run.steps) or not math.isfinite(norm)
        if is_due and not figures:
            figures = self._summed()
        if figures and not math.isfinite(figures["loss"]):
            raise InputError(
                f"the loss of update {step} is {figures['loss']}; the last checkpoint is kept: "
                "resume with a smaller step size or a longer warm-up in the preset"
            )
        if figures:
            stage.observe(step - 1, figures["loss"])
        if not is_due:
            return None
        scales = {} if self.engine.scales is None else self.engine.scales.figures()
        told = {"lr": lr, "gradient_norm": norm, **scales, **stage.figures(step - 1)}
        return figures | told

    def _after_update(self) -> None:
        stage, engine, run = self.stage, self.engine, self.stage.run
        step = engine.updates
        if _is_validated(run, step):
            engine.model.eval()
            with _said_by_this_rank():
                held_out = stage.validate(engine, self.out)
            self.telemetry.figures("val", step, held_out)
            self.telemetry.pictures(step)
            # of all ranks together
            peak = engine.sum(torch.tensor(peak_gib(engine.device), device=engine.device))
            self.telemetry.figures("machine", step, {"peak_gib": float(peak)})
            if engine.scales is not None:
                zeros = engine.sum(engine.scales.zeros.to(engine.device))
                self.telemetry.figures("blocks", step, engine.scales.by_block(zeros))
            engine.model.train()
        if step % run.save_every == 0 or step == run.steps:
            self.save()


def _finish(stage: Stage[Any], engine: Engine, out: Path) -> None:
    """Export the average from the last checkpoint, tensor by tensor; no rank holds it whole."""
    if engine.rank != 0:
        return
    folder = slices.folder_of(out, engine.updates)
    meta = slices.read_meta(folder)
    fingerprint = export(folder, meta, out, key="ema" if meta["applied"] else "weight")
    log.info("wrote %s, fingerprint %s", out, fingerprint)
    stage.finish(out)
    write_json(out / DONE, {"updates": engine.updates, "fingerprint": fingerprint})


def _is_validated(run: Run, step: int) -> bool:
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


def _next(
    engine: Engine, stream: Iterator[list[Any]], is_asked: bool, problem: Exception | None
) -> tuple[list[Any], bool]:
    """This rank's next micro-batches, and whether any rank was asked to leave.

    All ranks stop together when one has a ``problem``, or cannot read its own.
    """
    batches: list[Any] = []
    try:
        batches = next(stream)
    except InputError as error:
        problem = error
    flags = [float(problem is not None), float(is_asked)]
    n_stopped, n_asked = engine.sum(torch.tensor(flags, device=engine.device)).tolist()
    if problem is not None:
        raise OwnError(str(problem)) if isinstance(problem, InputError) else problem
    if n_stopped:
        raise InputError(
            "another rank cannot read its samples, or write its checkpoint: its own line says why"
        )
    return batches, n_asked > 0


@contextmanager
def _said_by_this_rank() -> Iterator[None]:
    """What is wrong with the samples of one rank, the others do not know."""
    try:
        yield
    except InputError as error:
        raise OwnError(str(error)) from error
