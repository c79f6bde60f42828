"""Pictures of held-out captions while a run trains, by the sampler of ``pipeline.sample``."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.console import InputError, logger
from pipeline.data.pictures import save_comparison, to_uint8
from pipeline.generation.sampling import generate, pictures
from pipeline.machine import free_bytes
from pipeline.models.dalle import Dalle
from pipeline.models.dvae import DiscreteVAE
from pipeline.training.engines.engine import Engine

MOST = 64  # pictures of a sheet
# the copy in float32, and half as much again for caches and what the steps hold
ROOM = 1.5 * 4

log = logger("dalle")


class Sheet:
    """Draws the same captions with the same seeds again and again.

    The weights are those of the update, not their average. The first rank holds a copy of them in
    float32 and draws; under ZeRO-3 all ranks gather one parameter after another for it. Where the
    copy has no room, nothing is drawn, and that is said once. Nothing of the training changes, no
    generator of random numbers either.

    Args:
        dvae: that made the image tokens.
        text_BT: a caption a row, int64, ``NO_TOKEN`` after its end.
        image_BI: the image tokens that belong to them: their pictures stand above the samples.
    """

    def __init__(self, dvae: DiscreteVAE, text_BT: Tensor, image_BI: Tensor) -> None:
        self._dvae, self._text_BT, self._image_BI = dvae, text_BT, image_BI
        self._is_too_large = False

    def draw(self, engine: Engine, path: Path) -> None:
        """Write a PNG; all ranks call it."""
        if self._is_too_large or not self._has_room(engine):
            return
        model = _copy(engine)
        if model is None:
            return
        try:
            self._draw(model, path)
        except (InputError, torch.OutOfMemoryError, OSError) as error:
            # whether a run goes on is for its guard to say
            log.warning("update %d: no samples: %s", engine.updates, error)

    def _draw(self, model: Dalle, path: Path) -> None:
        n = len(self._text_BT)
        seeds = list(range(n))
        codes_BI = generate(model, self._text_BT, seeds, width=n)
        dvae = self._dvae.to(model.image_head.weight.device)
        true, made = (pictures(dvae, codes, seeds, n) for codes in (self._image_BI, codes_BI))
        save_comparison(path, to_uint8(true), to_uint8(made))

    def _has_room(self, engine: Engine) -> bool:
        """Whether the first rank can hold a copy; the same on all ranks."""
        wanted = ROOM * sum(_numel(p) for p in engine.module.parameters())
        free = free_bytes(engine.device)
        has_none = torch.tensor(float(engine.rank == 0 and free < wanted), device=engine.device)
        self._is_too_large = bool(engine.sum(has_none))
        if self._is_too_large:
            log.warning(
                "--sample-dvae: a copy of the model takes %.1f GiB and %.1f are free on the first "
                "rank, so no samples are drawn while it trains; pipeline.sample draws them from "
                "checkpoints", wanted / 2**30, free / 2**30,
            )  # fmt: skip
        return not self._is_too_large


def _copy(engine: Engine) -> Dalle | None:
    """A model of its own for the first rank, for sampling only; None on the others."""
    model = None
    if engine.rank == 0:
        module = engine.module
        assert isinstance(module, Dalle)
        # without memory there is nothing to initialise, so nothing random is drawn
        with torch.device("meta"):
            model = Dalle(module.config)
        model.to_empty(device=engine.device).eval().requires_grad_(False)
    into = dict(model.named_parameters()) if model is not None else {}
    for name, parameter in engine.module.named_parameters():
        with _whole(parameter):
            if name in into:
                into[name].copy_(parameter.detach())
    return model


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@contextmanager
def _whole(parameter: nn.Parameter) -> Iterator[None]:
    """``parameter`` is whole in here; under ZeRO-3 all ranks come here together."""
    status = getattr(parameter, "ds_status", None)
    # what is there stays there: small ones are kept whole, and giving them up is for DeepSpeed
    if status is None or status.name == "AVAILABLE":
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        yield
