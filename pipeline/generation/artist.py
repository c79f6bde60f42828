"""From the orders of a request to their files: models that belong together, draw, score, write."""

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import require
from pipeline.console import Bar, is_first_rank, logger
from pipeline.data.pictures import save_png, tile, to_uint8
from pipeline.data.tokenizer import Tokenizer
from pipeline.generation.draw import Settings
from pipeline.generation.folder import Folder
from pipeline.generation.prompt import ImagePrompt
from pipeline.generation.provenance import software
from pipeline.generation.request import Order
from pipeline.generation.rerank import ClipScorer, LikelihoodScorer
from pipeline.generation.sampling import Sampler, pictures, prepare
from pipeline.generation.terminal import strip
from pipeline.machine import device_name
from pipeline.models.dalle import Dalle, load_dalle
from pipeline.models.dvae import DiscreteVAE, load_dvae

log = logger("sample")


@dataclass(frozen=True)
class Models:
    """What turns a caption into a picture, checked to belong together."""

    dalle: Dalle
    dvae: DiscreteVAE
    tokenizer: Tokenizer
    fingerprints: dict[str, str]
    knows_empty_captions: bool


def load_models(model: Path, dvae: Path, device: torch.device, dtype: torch.dtype) -> Models:
    """Open a trained model with the tokenizer beside it and the dVAE that made its tokens.

    Args:
        model: folder of the transformer.
        dvae: folder of the dVAE.
        device: where both go.
        dtype: that the transformer computes in.

    Raises:
        InputError: a folder is missing or broken, or it was not this model's.
    """
    dalle, made_of, dalle_print = load_dalle(model)
    tokenizer = Tokenizer(model / "tokenizer")
    frozen, dvae_print = load_dvae(dvae, device)
    require(
        made_of.get("dvae") == dvae_print,
        f"{model} was trained on tokens of dVAE {made_of.get('dvae')}, and {dvae} is {dvae_print}: "
        "name the dVAE that made the tokens, or train on tokens of this one",
    )
    require(
        made_of.get("tokenizer") == tokenizer.fingerprint,
        f"{model} was trained with tokenizer {made_of.get('tokenizer')}, and {tokenizer.folder} is "
        f"{tokenizer.fingerprint}: put the tokenizer of the training there",
    )
    prepare(dalle, dtype)
    dalle.to(device)  # not before: in float32 it could be too large for a GPU
    fingerprints = {"model": dalle_print, "dvae": dvae_print, "tokenizer": tokenizer.fingerprint}
    knows = made_of.get("caption_dropout", 0) > 0
    return Models(dalle, frozen, tokenizer, fingerprints, knows)


def encode(models: Models, captions: list[str]) -> torch.Tensor:
    """Text tokens int64 [captions, n_text]; what does not fit is cut, and said."""
    n_text, rows = models.dalle.config.n_text, []
    for i, caption in enumerate(captions):
        tokens = models.tokenizer.encode(caption)
        require(len(tokens) > 0, f"caption {caption!r} has nothing to read in it; say what to draw")
        padded, was_cut = models.tokenizer.pad(tokens, n_text)
        if was_cut:
            log.warning(
                "caption %d has %d tokens and the model reads %d: its end is cut off",
                i, len(tokens), n_text - 1,
            )  # fmt: skip
        rows.append(torch.from_numpy(padded).long())
    return torch.stack(rows)


class Scores:
    """The score that pictures are ranked by, as facts about each of them; none where none is."""

    def __init__(self, clip: ClipScorer | None, likelihood: LikelihoodScorer | None) -> None:
        self.clip, self.likelihood = clip, likelihood

    def of(
        self, captions: list[str], text: torch.Tensor, codes: torch.Tensor, images: np.ndarray
    ) -> list[dict[str, float]]:
        """A dictionary a picture."""
        if self.clip is not None:
            values = self.clip.score(captions, images)
            return [{"clip_score": round(float(value), 6)} for value in values]
        if self.likelihood is not None:
            values = self.likelihood.score(text, codes)
            return [{"likelihood_score": round(float(value), 6)} for value in values]
        return [{}] * len(captions)


class Artist:
    """Draws the pictures of a request, a batch at a time, into a folder.

    Args:
        args: the request: width, jacobi, dtype, signature, mark, stream, out.
        models: to draw with.
        text: tokens int64 [captions, n_text].
        prompt: what pictures begin with.
        scores: of each picture.
        settings: of each draw.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        models: Models,
        text: torch.Tensor,
        prompt: ImagePrompt | None,
        scores: Scores,
        settings: Settings,
    ) -> None:
        self.args, self.models, self.text, self.prompt = args, models, text, prompt
        self.scores, self.settings = scores, settings
        self.sampler = Sampler(models.dalle, settings, args.width, jacobi=args.jacobi)
        # what every picture says of itself
        self.facts: dict[str, Any] = {
            **asdict(settings), "width": args.width, "jacobi": args.jacobi, "dtype": args.dtype,
            **models.fingerprints,
            **(prompt.facts if prompt else {}),
            **({"clip": scores.clip.fingerprint} if scores.clip else {}),
            "device": device_name(models.dalle.image_head.weight.device.type),
            "version": software()["daikon"], "torch": torch.__version__,
        }  # fmt: skip

    def draw(self, folder: Folder, batch: list[Order], bar: Bar) -> None:
        """One batch; its pictures are there when this returns."""
        seeds = [order.seed for order in batch]
        text = self.text[[order.caption_index for order in batch]]
        given = self.prompt.codes_1G.expand(len(batch), -1) if self.prompt else None
        shows = self._show if self.args.stream and is_first_rank() else None
        codes = self.sampler.draw(text, seeds, given, on_row=shows, advance=bar.advance)
        images = to_uint8(pictures(self.models.dvae, codes, seeds, self.args.width))
        scores = self.scores.of([order.caption for order in batch], text, codes, images)
        for order, image, score in zip(batch, images, scores, strict=True):
            folder.write(order, image, score, signature=self.args.signature, mark=self.args.mark)

    def _show(self, images: list[int], n_rows: int, codes_BYX: torch.Tensor) -> None:
        """The pictures so far in ``partial.png``; on a terminal the new row of the first one."""
        rows = list(range(len(images)))
        so_far = to_uint8(pictures(self.models.dvae, codes_BYX.flatten(1), rows, len(rows)))
        save_png(self.args.out / "partial.png", tile(so_far, round(len(images) ** 0.5)))
        if sys.stdout.isatty():
            side = so_far.shape[1] // n_rows
            sys.stdout.write(strip(so_far[0, -side:]) + "\n")
            sys.stdout.flush()
