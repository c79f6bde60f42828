"""The contrastive model that says how well a picture fits a caption: CLIP (arXiv 2103.00020).

A vision transformer and a causal text transformer end in features of one width; their cosine says
how well they belong together. Parameters have the names of OpenAI's code and of open_clip, so their
weights load as they are (``pipeline.models.clip_import``).

Letters: B batch, C channels, Y X pixels, N positions (a class token and patches, or text), W width,
E features.
"""

import math
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import ClipConfig, TowerConfig
from pipeline.weights import Artifact, load_weights

# of the pictures that CLIP was trained on (OpenAI's code); ours are normalised alike
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
START_SCALE = math.log(1 / 0.07)  # section 2.5 of the paper; so is the bound
MOST_SCALE = math.log(100)

_NO_DECAY = re.compile(r"(^|\.)ln_\w+\.|bias$|(^|\.)(logit_scale|class_embedding)$")


class _Bounded(torch.autograd.Function):
    """At most ``most``; from above it, gradients lead back down, where those of clamp are 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: float) -> Tensor:
        ctx.is_above = x > most
        return x.clamp(max=most)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.masked_fill(ctx.is_above & (grad < 0), 0.0), None


class _Activation(nn.Module):
    def __init__(self, quick: bool) -> None:
        super().__init__()
        self.quick = quick

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x)


# A module draws its own parameters and no other's: under ZeRO-3 those are gone when it is made.


class _Linear(nn.Linear):
    def __init__(self, n_in: int, n_out: int, std: float) -> None:
        super().__init__(n_in, n_out)
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)


class _Attention(nn.MultiheadAttention):
    def __init__(self, width: int, n_head: int, std: float, std_out: float) -> None:
        super().__init__(width, n_head, batch_first=True)
        nn.init.normal_(self.in_proj_weight, std=std)
        self.out_proj = _Linear(width, width, std_out)  # type: ignore[assignment]


class _Embedding(nn.Embedding):
    def __init__(self, n: int, width: int) -> None:
        super().__init__(n, width)
        nn.init.normal_(self.weight, std=0.02)


class ResidualBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm."""

    def __init__(self, config: TowerConfig, quick_gelu: bool) -> None:
        super().__init__()
        width = config.width
        # OpenAI's code: the deeper, the smaller what is added to the stream
        std = width**-0.5
        std_out = std * (2 * config.n_layer) ** -0.5
        self.ln_1 = nn.LayerNorm(width)
        self.attn = _Attention(width, config.n_head, std, std_out)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=_Linear(width, 4 * width, (2 * width) ** -0.5),
                gelu=_Activation(quick_gelu),
                c_proj=_Linear(4 * width, width, std_out),
            )
        )

    def forward(self, x_BNW: Tensor, hidden_NN: Tensor | None) -> Tensor:
        """Of all positions; ``hidden_NN`` bool, True where a row must not see a column."""
        y = self.ln_1(x_BNW)
        x_BNW = x_BNW + self.attn(y, y, y, need_weights=False, attn_mask=hidden_NN)[0]
        return x_BNW + self.mlp(self.ln_2(x_BNW))


class Transformer(nn.Module):
    """A tower's blocks."""

    def __init__(self, config: TowerConfig, quick_gelu: bool) -> None:
        super().__init__()
        blocks = [ResidualBlock(config, quick_gelu) for _ in range(config.n_layer)]
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x_BNW: Tensor, hidden_NN: Tensor | None = None) -> Tensor:
        """[B, N, W] to the same."""
        for block in self.resblocks:
            x_BNW = block(x_BNW, hidden_NN)
        return x_BNW


class Vision(nn.Module):
    """Pictures to features, by the class token."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width, patch = config.vision.width, config.patch_size
        n = (config.image_size // patch) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(n, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(config.vision, config.quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, config.n_embed))

    def forward(self, image_BCYX: Tensor) -> Tensor:
        """Normalised pictures to [B, E]."""
        x_BNW = self.conv1(image_BCYX).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(x_BNW), 1, -1)
        x_BNW = torch.cat([first, x_BNW], dim=1) + self.positional_embedding
        x_BNW = self.transformer(self.ln_pre(x_BNW))
        features: Tensor = self.ln_post(x_BNW[:, 0]) @ self.proj
        return features


class Clip(nn.Module):
    """Both towers, and the scale of their cosines."""

    ZERO_LEAVES = (ResidualBlock,)  # gathered whole under ZeRO-3

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        width = config.text.width
        self.visual = Vision(config)
        self.token_embedding = _Embedding(config.n_vocab, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.n_text, width))
        self.transformer = Transformer(config.text, config.quick_gelu)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, config.n_embed))
        # one element and not none, which DeepSpeed's stage 2 cannot send
        self.logit_scale = nn.Parameter(torch.tensor([START_SCALE]))
        self._compute_dtype = torch.float32

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Compute the matrices of ``forward`` in ``dtype``."""
        self._compute_dtype = dtype

    @staticmethod
    def decays(name: str) -> bool:
        """Whether weight decay is for a parameter: not for gains, biases and single vectors."""
        return _NO_DECAY.search(name) is None

    def encode_image(self, image_BCYX: Tensor) -> Tensor:
        """Features of unit length, [B, E], of pictures float32 in [0, 1]."""
        mean, std = (image_BCYX.new_tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        return F.normalize(self.visual((image_BCYX - mean) / std).float(), dim=-1)

    def encode_text(self, text_BN: Tensor) -> Tensor:
        """Features of unit length, [B, E], of captions int64 [B, n_text].

        A caption is read at its end-of-text token, the largest; what stands behind is not seen.
        """
        x_BNW = self.token_embedding(text_BN) + self.positional_embedding
        n = x_BNW.shape[1]
        hidden_NN = torch.ones(n, n, dtype=torch.bool, device=x_BNW.device).triu(1)
        x_BNW = self.ln_final(self.transformer(x_BNW, hidden_NN))
        ends_B = text_BN.argmax(-1)
        at_end_BW = x_BNW[torch.arange(len(x_BNW), device=x_BNW.device), ends_B]
        return F.normalize((at_end_BW @ self.text_projection).float(), dim=-1)

    def forward(self, image_BCYX: Tensor, text_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of pictures and of captions, and what their cosines are multiplied by."""
        scale = _Bounded.apply(self.logit_scale[0].float(), MOST_SCALE).exp()
        # in here, for DeepSpeed's engine ends what is around it
        is_low, device = self._compute_dtype != torch.float32, image_BCYX.device.type
        with torch.autocast(device, self._compute_dtype, enabled=is_low):
            return self.encode_image(image_BCYX), self.encode_text(text_BN), scale


def load_clip(folder: str | Path, device: str | torch.device = "cpu") -> tuple[Clip, Artifact]:
    """The model of a folder in evaluation mode, and what its ``model.json`` says.

    Raises:
        InputError: no such folder, another kind of model, weights that do not fit their config.
    """
    artifact = load_weights(folder, "clip")
    clip = Clip(artifact.config_as(ClipConfig))
    artifact.fill(clip)
    return clip.to(device).eval().requires_grad_(False), artifact
