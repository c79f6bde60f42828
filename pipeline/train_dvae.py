"""Stage 1: train the image tokenizer on pair shards (section 2.1, appendix A.2).

deepspeed --module pipeline.train_dvae --preset NAME --data PAIRS --out DIR --deepspeed_config FILE
python -m pipeline.train_dvae --preset NAME --data PAIRS --out DIR

The second is one process, without DeepSpeed.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import presets
from pipeline.config import DvaeRun, Ramp
from pipeline.console import command, logger
from pipeline.data.loader import PairLoader, sample_seed
from pipeline.data.pictures import save_comparison, to_uint8
from pipeline.data.sets import Data
from pipeline.models.dvae import DiscreteVAE, load_dvae
from pipeline.training import loop, wishes
from pipeline.training.engines.engine import Engine
from pipeline.training.launch import launch, parser_of
from pipeline.training.schedules import at

log = logger("dvae")

SHOWN = 32  # pictures of a reconstruction grid
# shares of all codes: a codebook that is used less has collapsed, or is about to
LEAST_USED = 0.1
LEAST_PERPLEXITY = 0.05


class DvaeStage(loop.Stage[tuple[Tensor, list[int]]]):
    """The relaxed ELBO of pictures; a batch is pictures [B, 3, S, S] and their positions."""

    name = "dvae"

    def __init__(
        self,
        run: DvaeRun,
        data: str | Sequence[str],
        *,
        mix: Sequence[int] | None = None,
        block_order: bool = False,
    ) -> None:
        self.run: DvaeRun = run
        self.data = Data("pairs", data, mix, block_order)

    def build(self) -> DiscreteVAE:
        """A fresh model."""
        return DiscreteVAE(self.run.model)

    def identity(self) -> dict[str, Any]:
        """The pictures and their order."""
        return self.data.identity()

    def prepare(self, engine: Engine) -> None:
        """Loaders of this rank."""
        module = engine.module
        assert isinstance(module, DiscreteVAE)
        module.set_compute_dtype(engine.compute_dtype)
        self._micro, self._rank, self._world = engine.micro_batch, engine.rank, engine.world
        run, size = self.run, self.run.model.image_size
        share: dict[str, Any] = {"rank": engine.rank, "world": engine.world, "size": size}
        self._train = PairLoader(
            self.data.train, batch=run.batch, seed=run.seed, **self.data.order, **share
        )
        n = min(run.val_images, sum(len(side) for _, side in self.data.val))
        self._val_batch = max(min(run.batch, n) // engine.world, 1) * engine.world
        self._val_images = max(n // self._val_batch, 1) * self._val_batch
        self._val = PairLoader(
            self.data.val, batch=self._val_batch, seed=None, weights=self.data.val_weights, **share
        )

    def micro_batches(self, position: int) -> list[tuple[Tensor, list[int]]]:
        """This rank's pictures."""
        images, _ = self._train.batch_at(position)
        positions = list(range(position + self._rank, position + self.run.batch, self._world))
        cuts = range(0, len(positions), self._micro)
        return [(images[i : i + self._micro], positions[i : i + self._micro]) for i in cuts]

    def counts(self, batch: tuple[Tensor, list[int]]) -> Tensor:
        """Pictures."""
        return torch.tensor([float(len(batch[1]))])

    def loss(
        self, engine: Engine, batch: tuple[Tensor, list[int]], totals: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Shares of (nll + beta KL) / values of a picture, averaged over the batch (A.2)."""
        images, positions = batch
        noise = self.noise(positions, engine.device)
        images = self.with_pixel_noise(images.to(engine.device), positions)
        out = engine.model(images, noise, _at(self.run.tau, step))
        scale = 1 / (totals[0] * self._values)
        nll, kl = out["nll_B"].sum() * scale, out["kl_B"].sum() * scale
        return nll + _at(self.run.beta, step) * kl, {"nll": nll, "kl": kl}

    @property
    def _values(self) -> int:
        """Pixel values of a picture."""
        return 3 * self.run.model.image_size**2

    def noise(self, positions: list[int], device: torch.device) -> Tensor | None:
        """Standard Gumbel noise [B, V, Y, X], a function of seed and position alone.

        None with FSQ, which has nothing to relax.
        """
        if self.run.tau is None:
            return None
        grid = self.run.model.grid
        noise = torch.empty(len(positions), self.run.model.n_vocab, grid, grid, device=device)
        for row, position in zip(noise, positions, strict=True):
            generator = torch.Generator(device)
            generator.manual_seed(sample_seed(self.run.seed, 0, position))
            row.exponential_(generator=generator)
        return -noise.log()

    def with_pixel_noise(self, images: Tensor, positions: list[int]) -> Tensor:
        """Pictures in [0, 1] with the preset's noise, a function of seed and position alone."""
        if not self.run.pixel_noise:
            return images
        noise = torch.empty_like(images)
        for row, position in zip(noise, positions, strict=True):
            generator = torch.Generator(images.device)
            generator.manual_seed(sample_seed(self.run.seed, 1, position))
            row.normal_(std=self.run.pixel_noise, generator=generator)
        return (images + noise).clamp(0, 1)

    def lr(self, step: int) -> float:
        """Half a cosine (A.2)."""
        return at(self.run.lr, step)

    def figures(self, step: int) -> dict[str, float]:
        """KL weight and temperature; FSQ has none."""
        ramps = {"beta": self.run.beta, "tau": self.run.tau}
        return {name: at(ramp, step) for name, ramp in ramps.items() if ramp is not None}

    @torch.no_grad()
    def validate(self, engine: Engine, out: Path) -> dict[str, float]:
        """Relaxed and hard ELBO side by side, PSNR and codebook use, on held-out pictures.

        The hard one is the ELBO itself: its codes are samples of q, by the noise of the relaxed
        one, so that the two meet as the temperature falls. PSNR and use are those of the codes
        that stage 2 reads, which are made without noise. With FSQ all three are the same.
        """
        run, n_vocab = self.run, self.run.model.n_vocab
        step = engine.updates
        sums = torch.zeros(4, device=engine.device)
        used = torch.zeros(n_vocab, device=engine.device)
        for position in range(0, self._val_images, self._val_batch):
            images, _ = self._val.batch_at(position)
            images = images.to(engine.device)
            positions = range(position + engine.rank, position + self._val_batch, engine.world)
            noise = self.noise(list(positions), engine.device)
            relaxed = sampled = plain = engine.model(images)
            if noise is not None:
                relaxed = engine.model(images, noise, _at(run.tau, step))
                sampled = engine.model(images, noise, 0.0)
            terms = (relaxed["nll_B"], sampled["nll_B"], plain["kl_B"], plain["error_B"])
            sums += torch.stack([t.sum() for t in terms])
            used += torch.bincount(plain["codes_BYX"].flatten(), minlength=n_vocab)
            if position == 0 and engine.rank == 0:
                name = out / "reconstructions" / f"step-{step:07d}.png"
                write_reconstructions(name, images, plain["picture_BCYX"])
        relaxed_nll, hard_nll, kl, error = (engine.sum(sums) / self._val_images).tolist()
        share = engine.sum(used) / used.sum()
        entropy = -(share * torch.log(share.clamp(min=1e-12))).sum().item()
        figures = {
            # in nats a value, as the loss is
            "relaxed_elbo": -(relaxed_nll + kl) / self._values,
            "hard_elbo": -(hard_nll + kl) / self._values,
            "kl_per_code": kl / run.model.grid**2,
            "psnr_db": -10 * math.log10(max(error, 1e-12)),
            "codes_used": float((share > 0).sum()),
            "perplexity": math.exp(entropy),
        }
        is_wrong = engine.rank == 0 and self._warn_of_collapse(step, figures, out)
        return figures | {"collapse": float(is_wrong)}

    def _warn_of_collapse(self, step: int, figures: dict[str, float], out: Path) -> bool:
        """Whether the codebook falls out of use; says so in the log, with the way out."""
        run = self.run
        # the KL weight pulls the codes apart: before it has its last value their use says little
        warmup = run.beta.steps if run.beta is not None else min(5_000, run.steps // 10)
        if step < warmup:
            return False
        n_positions = self._val_images * run.model.grid**2
        before = last_validation(out / "metrics.jsonl", warmup, step)
        problems = too_little_use(figures, before, min(run.model.n_vocab, n_positions))
        if not problems:
            return False
        ways = {"raise the KL weight": "beta", "let the temperature fall later": "tau"}
        schedules = self.figures(step)
        advice = [f"{way} ({n} is {schedules[n]:.3g})" for way, n in ways.items() if n in schedules]
        advice.append(f"lower the step size (lr is {self.lr(step):.3g})")
        log.warning(
            "the codebook collapses at update %d: %s; stop and change the preset: %s",
            step, ", ".join(problems), ", or ".join(advice),
        )  # fmt: skip
        return True

    def finish(self, out: Path) -> None:
        """Look at what the averaged weights make of held-out pictures."""
        dvae, _ = load_dvae(out)
        n = min(SHOWN, sum(len(side) for _, side in self.data.val))
        loader = PairLoader(
            self.data.val, batch=n, rank=0, world=1, seed=None, weights=self.data.val_weights,
            size=self.run.model.image_size,
        )  # fmt: skip
        images, _ = loader.batch_at(0)
        with torch.no_grad():
            pictures = dvae(images)["picture_BCYX"]
        write_reconstructions(out / "reconstructions" / "final.png", images, pictures)


def _at(ramp: Ramp | None, step: int) -> float:
    """``at``; 0 for what FSQ has not."""
    return 0.0 if ramp is None else at(ramp, step)


def last_validation(metrics: Path, start: int, stop: int) -> dict[str, float]:
    """The newest validation of updates [start, stop) in metrics.jsonl; empty when none was made."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    for event in map(json.loads, reversed(lines)):
        if event["kind"] == "val" and start <= event["step"] < stop:
            return dict(event)
    return {}


def too_little_use(figures: dict[str, float], before: dict[str, float], n_codes: int) -> list[str]:
    """What is wrong with the use of the codebook.

    Args:
        figures: of this validation: codes_used, perplexity.
        before: of the validation before; may be empty.
        n_codes: that can be used.
    """
    problems = []
    for name, share in (("codes_used", LEAST_USED), ("perplexity", LEAST_PERPLEXITY)):
        now, least = figures[name], share * n_codes
        if now < least:
            problems.append(f"{name} is {now:.4g} of {n_codes}, below {least:.4g}")
        elif name in before and now <= before[name] / 2:
            problems.append(f"{name} fell from {before[name]:.4g} to {now:.4g} of {n_codes}")
    return problems


def write_reconstructions(path: Path, images: Tensor, pictures: Tensor) -> None:
    """A grid: rows of originals, each above the row of their reconstructions."""
    save_comparison(path, to_uint8(images[:SHOWN]), to_uint8(pictures[:SHOWN]))


def main() -> None:
    """Train stage 1 from the command line."""
    parser = parser_of(
        "pipeline.train_dvae",
        __doc__,
        presets="dvae_demo, dvae_paper, fsq_paper",
        data="pair sets (data_prep.ingest)",
    )
    args = parser.parse_args()
    wished = wishes.of(args)
    run = presets.load_kind(args.preset, DvaeRun)
    stage = DvaeStage(run, args.data, mix=args.mix, block_order=args.block_order)
    launch(stage, args, wished)


if __name__ == "__main__":
    command(main)
