"""Says how well pictures fit their captions, by CLIP or the model itself: best of N (section 2.6).

Letters: B pictures, Y X pixels, T text positions, I image positions, E features.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import require
from pipeline.data.clip_tokens import open_tokens
from pipeline.data.images import centre_crop, enlarge
from pipeline.models.clip import load_clip
from pipeline.models.dalle import NO_TOKEN, Dalle

LOGITS = 1 << 28  # that a pass of the model itself may have, which sets how many pictures it reads
BATCH = 32  # of every pass, filled up with what is not read, so that no score hangs on the others


class ClipScorer:
    """The CLIP of a folder, of ``pipeline.train_clip`` or ``pipeline.import_clip``.

    Attributes:
        fingerprint: of the weights.

    Raises:
        InputError: no CLIP there, or another vocabulary beside it than that of its training.
    """

    def __init__(self, folder: Path, device: str | torch.device = "cpu") -> None:
        self._clip, artifact = load_clip(folder, device)
        self._tokens = open_tokens(folder / "tokenizer", self._clip.config)
        require(
            artifact.made_of.get("tokenizer") == self._tokens.fingerprint,
            f"{folder} was trained with tokenizer {artifact.made_of.get('tokenizer')}, and "
            f"{folder / 'tokenizer'} is {self._tokens.fingerprint}: put the tokenizer of the "
            "training there",
        )
        self.fingerprint, self._device = artifact.fingerprint, device

    @torch.inference_mode()
    def score(self, captions: Sequence[str], images_uint8: np.ndarray) -> np.ndarray:
        """The cosine of each picture with its own caption, in [-1, 1]: float64 [B].

        Args:
            captions: one a picture.
            images_uint8: [B, Y, X, 3]; the middle is looked at, made as large as the model's
                pictures: smaller by the mean of what a pixel covers, larger bicubically.
        """
        if len(captions) != len(images_uint8):
            raise ValueError(f"{len(captions)} captions of {len(images_uint8)} pictures")
        if not len(captions):
            return np.empty(0)
        # pictures of one caption share its features
        rows = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        text_BE = self._in_batches(self._tokens.encode_batch(list(rows)), self._clip.encode_text)
        starts = range(0, len(captions), BATCH)
        parts = (self._pictures(images_uint8[i : i + BATCH]) for i in starts)
        image_BE = torch.cat([self._in_batches(part, self._clip.encode_image) for part in parts])
        own = torch.tensor([rows[caption] for caption in captions])
        cosines: np.ndarray = (image_BE * text_BE[own]).sum(1).numpy()
        return cosines

    def _pictures(self, images_uint8: np.ndarray) -> Tensor:
        """[B, Y, X, 3] as the model takes them, float32 [B, 3, S, S] in [0, 1]."""
        size = self._clip.config.image_size
        fitting = np.stack([centre_crop(enlarge(image, size), size) for image in images_uint8])
        return torch.from_numpy(fitting).permute(0, 3, 1, 2).float() / 255

    def _in_batches(self, inputs: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Features of all rows, float64 [B, E] on the CPU."""
        found = []
        for part in inputs.split(BATCH):
            whole = part.new_zeros(BATCH, *part.shape[1:])
            whole[: len(part)] = part
            found.append(encode(whole.to(self._device))[: len(part)].double().cpu())
        return torch.cat(found)


class LikelihoodScorer:
    """How much likelier a picture's tokens are with its caption than without any, per token.

    By Bayes' rule the sum over the tokens, log p(image | caption) - log p(image), is
    log p(caption | image) - log p(caption): among pictures of one caption, the order of how likely
    the caption is for the picture. p(image) is what the model says of an empty caption, which it
    must have learnt (``DalleRun.caption_dropout``).

    Args:
        model: the one that drew.
    """

    def __init__(self, model: Dalle) -> None:
        self._model = model
        config = model.config
        self._batch = max(1, min(BATCH, LOGITS // (config.n_image * config.n_image_vocab)))

    @torch.inference_mode()
    def score(self, text_BT: Tensor, codes_BI: Tensor) -> np.ndarray:
        """Nats a token, float64 [B], of captions and image tokens int64."""
        found = []
        device = self._model.image_head.weight.device
        for text, codes in zip(
            text_BT.split(self._batch), codes_BI.split(self._batch), strict=True
        ):
            # one size for all passes, so that no score hangs on the others
            n_more = self._batch - len(text)
            padded = (F.pad(x, (0, 0, 0, n_more)).to(device) for x in (text, codes))
            text_WT, codes_WI = padded
            gain_W = self._log_likelihood(text_WT, codes_WI)
            gain_W -= self._log_likelihood(torch.full_like(text_WT, NO_TOKEN), codes_WI)
            found.append(gain_W[: len(text)].cpu())
        scores: np.ndarray = torch.cat(found).numpy()
        return scores

    def _log_likelihood(self, text_WT: Tensor, codes_WI: Tensor) -> Tensor:
        """Mean over the image tokens, float64 [W]."""
        _, logits_WIV = self._model(text_WT, codes_WI)
        nll_WI = F.cross_entropy(logits_WIV.transpose(1, 2), codes_WI, reduction="none")
        return -nll_WI.double().mean(1)
