"""Says how well pictures fit their captions, by CLIP: best of N (section 2.6)."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.config import require
from pipeline.data.clip_tokens import open_tokens
from pipeline.data.images import centre_crop, enlarge
from pipeline.models.clip import load_clip

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
