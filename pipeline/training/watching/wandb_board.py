"""A run on Weights & Biases, for those who have it installed; training never waits for it."""

import importlib.util
import json
import os
import threading
import uuid
from pathlib import Path
from typing import Any

from pipeline.console import InputError, is_first_rank, logger
from pipeline.files import write_json

PATIENCE_S = 60.0  # that the server gets at the start and at the end

log = logger("wandb")


def check_installed() -> None:
    """Refuse ``--wandb`` before any work, where the first rank would not find the package.

    Raises:
        InputError: there is no such package.
    """
    if is_first_rank() and importlib.util.find_spec("wandb") is None:
        raise InputError(
            "--wandb needs the package wandb, which is not installed: pip install wandb, or "
            "leave the flag out; metrics.jsonl and TensorBoard have the same figures"
        )


class WandbBoard:
    """The same run of a project after every restart; its id lies in ``wandb.json`` of ``out``.

    Every figure stands over "update". W&B takes no line back: updates that a restart makes again
    are there twice. Where there is no server, or no login, the run is recorded below ``out`` for
    ``wandb sync``.

    Args:
        project: of W&B.
        out: folder of the run.
        config: JSON values that W&B shows beside it.
    """

    def __init__(self, project: str, out: Path, config: dict[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        self._is_lost = False
        settings = wandb.Settings(silent=True, console="off", init_timeout=PATIENCE_S)
        wanted: dict[str, Any] = {
            "project": project, "id": _run_id(out / "wandb.json", project), "name": out.name,
            "resume": "allow", "dir": str(out), "config": config, "settings": settings,
        }  # fmt: skip
        try:
            if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False):
                raise InputError("nobody is logged in (wandb login)")  # init would ask, and wait
            self._run = wandb.init(**wanted)
        except Exception as error:  # training does not end for want of a server, whatever it says
            log.warning("W&B cannot be reached, the run goes on without it: %s", error)
            # its process keeps the id of a run that was refused
            wandb.teardown()
            self._run = wandb.init(**wanted, mode="offline")
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")
        here = f"recorded only; send it with `wandb sync {Path(self._run.dir).parent}`"
        where = here if self._run.offline else self._run.url
        log.info("project %s, run %s: %s", project, self._run.id, where)

    def figures(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Record ``values`` of update ``step``."""
        named = {f"{kind}/{name}": value for name, value in values.items()}
        self._log(named | {"update": step})

    def picture(self, name: str, step: int, path: Path) -> None:
        """Record a PNG of update ``step``."""
        self._log({name: self._wandb.Image(str(path)), "update": step})

    def _log(self, values: dict[str, Any]) -> None:
        if self._is_lost:
            return
        try:
            self._run.log(values)
        except Exception as error:  # as above
            self._is_lost = True
            log.warning("W&B records nothing more: %s", error)

    def close(self) -> None:
        """Send what is left, for at most ``PATIENCE_S``."""
        sending = threading.Thread(target=self._finish, name="wandb", daemon=True)
        sending.start()
        sending.join(PATIENCE_S)
        if sending.is_alive():
            folder = Path(self._run.dir).parent
            log.warning("W&B has not taken all: send the rest with `wandb sync %s`", folder)

    def _finish(self) -> None:
        try:
            self._run.finish()
            # a process of its own writes the files, and may not outlive the launcher's ranks
            self._wandb.teardown()
        except Exception as error:  # as above
            log.warning("W&B has not taken all: %s", error)


def _run_id(path: Path, project: str) -> str:
    """That of the run which was begun in this folder, else a new one."""
    try:
        known = json.loads(path.read_text())
        if known["project"] == project:
            return str(known["id"])
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is broken ({error}); delete it to begin a run of W&B") from error
    made = uuid.uuid4().hex[:8]
    write_json(path, {"project": project, "id": made})
    return made
