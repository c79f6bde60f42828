r"""CLIP: train the model that ranks pictures by their captions, on pair shards (arXiv 2103.00020).

deepspeed --module pipeline.train_clip --preset clip_demo --data PAIRS --tokenizer DIR --out DIR \
    --deepspeed_config ds_configs/zero3_cpu.json
python -m pipeline.train_clip ...      without --deepspeed_config: one process, plain PyTorch
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import presets
from pipeline.config import ClipRun
from pipeline.console import InputError, command
from pipeline.data.clip_tokens import OwnTokens
from pipeline.data.images import augment_clip
from pipeline.data.loader import PairLoader
from pipeline.data.sets import Data
from pipeline.models.clip import Clip
from pipeline.training import loop, wishes
from pipeline.training.contrastive import contrastive_share
from pipeline.training.engines.engine import Engine
from pipeline.training.launch import launch, parser_of
from pipeline.training.schedules import LearningRate

Batch = tuple[Tensor, Tensor]  # pictures float32 [B, 3, S, S] in [0, 1], captions int64 [B, n_text]


class ClipStage(loop.Stage[Batch]):
    """The contrastive loss of pictures and captions."""

    name = "clip"

    def __init__(
        self,
        run: ClipRun,
        data: str | Sequence[str],
        tokenizer: str,
        *,
        mix: Sequence[int] | None = None,
        block_order: bool = False,
    ) -> None:
        self.run: ClipRun = run
        self.data = Data("pairs", data, mix, block_order)
        self.tokens = OwnTokens(tokenizer, run.model)
        self._lr = LearningRate(run.lr, run.warmup)

    def build(self) -> Clip:
        """A fresh model."""
        return Clip(self.run.model)

    def identity(self) -> dict[str, Any]:
        """Captioned pictures, their order, and what cuts the captions."""
        return {**self.data.identity(), "tokenizer": self.tokens.fingerprint}

    def accompany(self, out: Path) -> None:
        """Put the tokenizer beside the checkpoints."""
        self.tokens.copy_to(out / "tokenizer")

    def prepare(self, engine: Engine) -> None:
        """Loaders of this rank.

        Raises:
            InputError: gradient accumulation, or too little to validate with.
        """
        if engine.accumulation != 1:
            raise InputError(
                f"the ds_config cuts the batch into {engine.accumulation} parts a rank, and CLIP "
                "tells each picture apart from all others of the batch at once: write "
                '"gradient_accumulation_steps": 1 and "train_micro_batch_size_per_gpu": "auto", '
                "and take more GPUs or a preset with a smaller batch if memory does not suffice"
            )
        module = engine.module
        assert isinstance(module, Clip)
        module.set_compute_dtype(engine.compute_dtype)
        run = self.run
        share: dict[str, Any] = {"rank": engine.rank, "world": engine.world}
        share["size"] = run.model.image_size
        self._train = PairLoader(
            self.data.train, augment=augment_clip, batch=run.batch, seed=run.seed,
            **self.data.order, **share,
        )  # fmt: skip
        n = min(run.val_images, sum(len(side) for _, side in self.data.val))
        # whatever ranks divide it: how often a picture is found hangs on how many there are
        self._val_batch = min(run.val_batch, n) // engine.world * engine.world
        if self._val_batch < 2:
            raise InputError(
                f"{n} pictures are held out, and {engine.world} ranks validate with at least 2 and "
                "one each: ingest with another --val-fraction"
            )
        self._val_images = n // self._val_batch * self._val_batch
        self._val = PairLoader(
            self.data.val, batch=self._val_batch, seed=None, weights=self.data.val_weights, **share
        )

    def _batch(self, loader: PairLoader, position: int) -> Batch:
        return loader.batch_at(position)[0], self.tokens.encode_batch(loader.captions_at(position))

    def micro_batches(self, position: int) -> list[Batch]:
        """This rank's captioned pictures, all at once."""
        return [self._batch(self._train, position)]

    def counts(self, batch: Batch) -> Tensor:
        """Pictures."""
        return torch.tensor([float(len(batch[0]))])

    def loss(
        self, engine: Engine, batch: Batch, totals: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's share of the loss over the pictures of all ranks (section 2.3).

        ``top_1`` is the share of pictures whose own caption is nearest in the batch, ``scale`` what
        cosines are multiplied by.
        """
        image_BE, text_BE, scale = engine.model(*(part.to(engine.device) for part in batch))
        share, n_right = contrastive_share(image_BE, text_BE, scale)
        # all ranks have the same scale, and figures are added up
        return share, {"top_1": n_right / totals[0], "scale": scale / engine.world}

    def lr(self, step: int) -> float:
        """Linear warm-up, then half a cosine."""
        return self._lr.at(step)

    def figures(self, step: int) -> dict[str, float]:
        """No schedule but the step size."""
        return {}

    @torch.no_grad()
    def validate(self, engine: Engine, out: Path) -> dict[str, float]:
        """Loss of held-out pictures, and the share whose own caption is nearest in its batch."""
        sums = torch.zeros(2, device=engine.device)
        for position in range(0, self._val_images, self._val_batch):
            batch = self._batch(self._val, position)
            features = engine.model(*(part.to(engine.device) for part in batch))
            share, n_right = contrastive_share(*features)
            sums += torch.stack([share, n_right])
        loss, n_right = engine.sum(sums).tolist()
        n_batches = self._val_images // self._val_batch
        return {"loss": loss / n_batches, "top_1": n_right / self._val_images}


def main() -> None:
    """Train CLIP from the command line."""
    parser = parser_of(
        "pipeline.train_clip",
        __doc__,
        presets="clip_demo, clip_b32",
        data="pair sets (data_prep.ingest)",
    )
    parser.add_argument("--tokenizer", required=True, help="folder of data_prep.train_tokenizer")
    args = parser.parse_args()
    wished = wishes.of(args)
    run = presets.load_kind(args.preset, ClipRun)
    stage = ClipStage(run, args.data, args.tokenizer, mix=args.mix, block_order=args.block_order)
    launch(stage, args, wished)


if __name__ == "__main__":
    command(main)
