r"""Stage 2: train the transformer on token shards (sections 2.2 and 2.4, appendix B).

deepspeed --module pipeline.train_dalle --preset dalle_demo --data TOKENS --tokenizer DIR \
    --out DIR --deepspeed_config ds_configs/zero3_cpu.json
python -m pipeline.train_dalle ...      without --deepspeed_config: one process, plain PyTorch
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.attention.op import BACKENDS, choose_backend
from pipeline import presets
from pipeline.config import DalleRun
from pipeline.console import InputError, command, logger
from pipeline.data.loader import Batch, TokenLoader
from pipeline.data.sets import Data
from pipeline.data.shards import ShardReader
from pipeline.data.tokenizer import Tokenizer
from pipeline.models.dalle import NO_TOKEN, Dalle, nll_sums, z_sums
from pipeline.models.dvae import load_dvae
from pipeline.training import loop, wishes
from pipeline.training.engines import ds_config
from pipeline.training.engines.engine import Engine
from pipeline.training.launch import launch, parser_of
from pipeline.training.schedules import LearningRate
from pipeline.training.watching.samples import MOST, Sheet

log = logger("dalle")


class DalleStage(loop.Stage[Batch]):
    """Cross-entropy of captions and their image tokens."""

    name = "dalle"

    def __init__(
        self,
        run: DalleRun,
        data: str | Sequence[str],
        tokenizer: str,
        *,
        mix: Sequence[int] | None = None,
        block_order: bool = False,
        recompute_activations: bool = False,
        attention: str | None = None,
        sample_dvae: str | None = None,
        sample_count: int = 8,
    ) -> None:
        self.run: DalleRun = run
        self.sample_dvae, self.sample_count = sample_dvae, sample_count
        self._sheet: Sheet | None = None
        self.recompute_activations = recompute_activations
        self.attention = attention
        self.data = Data("tokens", data, mix, block_order)
        self.tokenizer = Tokenizer(tokenizer)
        self._lr = LearningRate(run.lr, run.warmup)
        self._check()

    def _check(self) -> None:
        """The tokens and the tokenizer are those that the model is built for."""
        model, first = self.run.model, self.data.readers[0]
        for reader in self.data.readers:
            for what, there, here in (
                ("a code grid of side", reader.made_of["grid"], model.grid),
                ("an image vocabulary of", reader.made_of["n_vocab"], model.n_image_vocab),
            ):
                if there != here:
                    raise InputError(
                        f"{reader.folder} has {what} {there}, the preset's model {here}; "
                        "encode with the dVAE that belongs to the preset, or take another preset"
                    )
            if reader.made_of["dvae"] != first.made_of["dvae"]:
                raise InputError(
                    f"{first.folder} was made by dVAE {first.made_of['dvae']}, {reader.folder} by "
                    f"{reader.made_of['dvae']}: their codes mean different things; encode all "
                    "pictures with one dVAE"
                )
        if self.tokenizer.n_vocab > model.n_text_vocab:
            raise InputError(
                f"the tokenizer has {self.tokenizer.n_vocab} pieces, the preset's model "
                f"{model.n_text_vocab}; train the tokenizer with --vocab {model.n_text_vocab}"
            )

    def build(self) -> Dalle:
        """A fresh model."""
        return Dalle(self.run.model)

    def identity(self) -> dict[str, Any]:
        """Captions and tokens, their order, and what cut them."""
        return {
            **self.data.identity(),
            "dvae": self.data.readers[0].made_of["dvae"],
            "tokenizer": self.tokenizer.fingerprint,
        }

    def accompany(self, out: Path) -> None:
        """Put the tokenizer beside the checkpoints."""
        self.tokenizer.copy_to(out / "tokenizer")

    def prepare(self, engine: Engine) -> None:
        """Loaders of this rank."""
        module = engine.module
        assert isinstance(module, Dalle)
        module.set_compute_dtype(engine.compute_dtype)
        self._check_attention(engine)
        module.set_attention_backend(self.attention)
        module.checkpoint_activations = self.recompute_activations
        run = self.run
        self._micro = engine.micro_batch
        share = {"rank": engine.rank, "world": engine.world, "n_text": run.model.n_text}
        self._train = TokenLoader(
            self.data.train, self.tokenizer,
            batch=run.batch, seed=run.seed, dropout=run.bpe_dropout,
            caption_dropout=run.caption_dropout, **self.data.order, **share,
        )  # fmt: skip
        n = min(run.val_images, sum(len(side) for _, side in self.data.val))
        self._val_batch = max(min(run.batch, n) // engine.world, 1) * engine.world
        self._val_images = max(n // self._val_batch, 1) * self._val_batch
        self._val = TokenLoader(
            self.data.val, self.tokenizer,
            batch=self._val_batch, seed=None, dropout=0.0, weights=self.data.val_weights, **share,
        )  # fmt: skip

        if self.sample_dvae is not None:
            self._sheet = self._make_sheet(self.sample_dvae)

    def _make_sheet(self, dvae: str) -> Sheet:
        """Of the first held-out captions."""
        n = min(self.sample_count, sum(len(side) for _, side in self.data.val))
        loader = TokenLoader(
            self.data.val, self.tokenizer, batch=n, rank=0, world=1, seed=None, dropout=0.0,
            weights=self.data.val_weights, n_text=self.run.model.n_text,
        )  # fmt: skip
        batch = loader.batch_at(0)
        # to build a model is to draw its weights, which a run without samples does not
        with torch.random.fork_rng(devices=()):
            model, _ = load_dvae(dvae)
        return Sheet(model, batch.text_tokens, batch.image_tokens)

    def _check_attention(self, engine: Engine) -> None:
        """A path that cannot run is known before the first batch, and in the log which one does."""
        width = self.run.model.d_model // self.run.model.n_head
        try:
            choose_backend(self.attention, engine.compute_dtype, engine.device, width)
        except ValueError as error:
            raise InputError(f"--attention {self.attention}: {error}") from None

    def micro_batches(self, position: int) -> list[Batch]:
        """This rank's captioned pictures."""
        whole = self._train.batch_at(position)
        cuts = range(0, len(whole.ids), self._micro)
        return [whole[i : i + self._micro] for i in cuts]

    def counts(self, batch: Batch) -> Tensor:
        """Text tokens and image tokens to predict."""
        n_text = (batch.text_tokens != NO_TOKEN).sum()
        return torch.stack([n_text, torch.tensor(batch.image_tokens.numel())]).float()

    def loss(
        self, engine: Engine, batch: Batch, totals: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Shares of 1/8 text + 7/8 image, each a mean over its tokens of the whole batch (2.2).

        ``captions_cut`` is the share of captions that were longer than the text.
        """
        text_logits, image_logits, text_tokens, image_tokens = self._logits(engine, batch)
        nll = nll_sums(text_logits, image_logits, text_tokens, image_tokens)
        # a small batch may have no caption at all
        text, image = nll[0] / totals[0].clamp(min=1), nll[1] / totals[1]
        n_samples = totals[1] / self.run.model.n_image
        cut = batch.is_cut.sum().to(engine.device) / n_samples
        figures = {"text": text, "image": image, "captions_cut": cut}
        loss = self._weighted(text, image)
        if self.run.z_loss:
            z = z_sums(text_logits, image_logits, text_tokens)
            figures["z"] = self._weighted(z[0] / totals[0].clamp(min=1), z[1] / totals[1])
            loss = loss + self.run.z_loss * figures["z"]
        return loss, figures

    def _weighted(self, text: Any, image: Any) -> Any:
        """1/8 of the text's, 7/8 of the image's (section 2.2)."""
        return self.run.text_weight * text + (1 - self.run.text_weight) * image

    @staticmethod
    def _logits(engine: Engine, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of text and image; and the tokens, on the engine's device."""
        text = batch.text_tokens.to(engine.device, non_blocking=True)
        image = batch.image_tokens.to(engine.device, non_blocking=True)
        return *engine.model(text, image), text, image

    def lr(self, step: int) -> float:
        """Linear warm-up, then the preset's schedule."""
        return self._lr.at(step)

    @property
    def wants_losses(self) -> bool:
        """Whether the schedule hangs on the training loss."""
        return self._lr.wants_losses

    def observe(self, step: int, loss: float) -> None:
        """Halve the step size at a plateau."""
        if self._lr.observe(step, loss):
            log.info(
                "update %d: the loss has stopped falling, lr is now %g", step + 1, self.lr(step)
            )

    def state(self) -> dict[str, Any]:
        """What the schedule remembers."""
        return {"lr": self._lr.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``."""
        self._lr.restore(state.get("lr", {}))

    def figures(self, step: int) -> dict[str, float]:
        """No schedule but the step size."""
        return {}

    @torch.no_grad()
    def validate(self, engine: Engine, out: Path) -> dict[str, float]:
        """Text and image loss of held-out captioned pictures, without BPE dropout."""
        sums = torch.zeros(4, device=engine.device)
        for position in range(0, self._val_images, self._val_batch):
            batch = self._val.batch_at(position)
            nll = torch.stack(nll_sums(*self._logits(engine, batch)))
            sums += torch.cat([nll, self.counts(batch).to(engine.device)])
        text_nll, image_nll, n_text, n_image = engine.sum(sums).tolist()
        text, image = text_nll / n_text, image_nll / n_image
        if self._sheet is not None:
            self._sheet.draw(engine, out / "samples" / f"step-{engine.updates:07d}.png")
        return {"loss": self._weighted(text, image), "text": text, "image": image}


def check_dvae(tokens: ShardReader, dvae: str) -> None:
    """Refuse token shards that another dVAE made."""
    _, fingerprint = load_dvae(dvae)
    if tokens.made_of["dvae"] != fingerprint:
        raise InputError(
            f"{tokens.folder} was made by dVAE {tokens.made_of['dvae']}, and {dvae} is "
            f"{fingerprint}: encode the pictures again, or name the dVAE that made the tokens"
        )


def main() -> None:
    """Train stage 2 from the command line."""
    parser = parser_of(
        "pipeline.train_dalle",
        __doc__,
        presets="dalle_demo .. dalle_12b",
        data="token sets (data_prep.encode)",
    )
    parser.add_argument("--tokenizer", required=True, help="folder of data_prep.train_tokenizer")
    parser.add_argument("--dvae", help="refuse to start unless this dVAE made the tokens")
    parser.add_argument(
        "--sample-dvae", help="the dVAE of the tokens: draw held-out captions at each validation"
    )
    parser.add_argument("--sample-count", type=int, default=8, metavar="N", help="captions drawn")
    parser.add_argument(
        "--attention",
        choices=list(BACKENDS),
        help="path of the attention patterns; without: the fastest that can run, said in the log",
    )
    args = parser.parse_args()
    wished = wishes.of(args)
    if not 1 <= args.sample_count <= MOST:
        raise InputError(f"--sample-count is {args.sample_count}; take 1 to {MOST}")
    run = presets.load_kind(args.preset, DalleRun)
    recompute = args.deepspeed_config is not None and ds_config.uses_activation_checkpointing(
        ds_config.read(args.deepspeed_config)
    )
    stage = DalleStage(
        run,
        args.data,
        args.tokenizer,
        mix=args.mix,
        block_order=args.block_order,
        recompute_activations=recompute,
        attention=args.attention,
        sample_dvae=args.sample_dvae,
        sample_count=args.sample_count,
    )
    for dvae in filter(None, (args.dvae, args.sample_dvae)):
        check_dvae(stage.data.readers[0], dvae)
    launch(stage, args, wished)


if __name__ == "__main__":
    command(main)
