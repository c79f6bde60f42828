"""The contrastive model that says how well a picture fits a caption: CLIP (arXiv 2103.00020).

A vision transformer and a causal text transformer end in features of one width; their cosine says
how well they belong together. Parameters have the names of OpenAI's code and of open_clip, so their
weights load as they are (``load_foreign``).

Letters: B batch, C channels, Y X pixels, N positions (a class token and patches, or text), W width,
E features.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import require

# of the pictures that CLIP was trained on (OpenAI's code); ours are normalised alike
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
START_SCALE = math.log(1 / 0.07)  # section 2.5 of the paper; so is the bound
MOST_SCALE = math.log(100)


@dataclass(frozen=True)
class TowerConfig:
    """One of the two transformers; heads are ``width / n_head`` wide, MLPs four times ``width``."""

    width: int
    n_layer: int
    n_head: int

    def __post_init__(self) -> None:
        for name in ("width", "n_layer", "n_head"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; take at least 1")
        require(
            self.width % self.n_head == 0,
            f"width {self.width} does not divide into {self.n_head} heads; take a multiple",
        )


@dataclass(frozen=True)
class ClipConfig:
    """The defaults are ViT-B/32: 151,277,313 parameters."""

    image_size: int = 224  # pixels a side
    patch_size: int = 32
    vision: TowerConfig = TowerConfig(768, 12, 12)
    n_text: int = 77  # text positions; the last token of a caption is the end of text
    n_vocab: int = 49408  # the largest token is the end of text
    text: TowerConfig = TowerConfig(512, 12, 8)
    n_embed: int = 512  # features
    quick_gelu: bool = True  # x sigmoid(1.702 x) for GELU, as in OpenAI's weights

    def __post_init__(self) -> None:
        require(
            1 <= self.patch_size <= self.image_size and self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} does not divide into patches of {self.patch_size}",
        )
        for name in ("n_text", "n_embed"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; take at least 1")
        require(self.n_vocab >= 2, f"n_vocab is {self.n_vocab}; take at least 2")

    @property
    def end_of_text(self) -> int:
        """The token that ends a caption."""
        return self.n_vocab - 1


class _Activation(nn.Module):
    def __init__(self, quick: bool) -> None:
        super().__init__()
        self.quick = quick

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x)


class ResidualBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm."""

    def __init__(self, config: TowerConfig, quick_gelu: bool) -> None:
        super().__init__()
        width = config.width
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, config.n_head, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        c_fc, c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=c_fc, gelu=_Activation(quick_gelu), c_proj=c_proj)
        )
        # OpenAI's code: the deeper, the smaller what is added to the stream
        std = width**-0.5
        nn.init.normal_(self.attn.in_proj_weight, std=std)
        nn.init.normal_(self.attn.out_proj.weight, std=std * (2 * config.n_layer) ** -0.5)
        nn.init.normal_(c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(c_proj.weight, std=std * (2 * config.n_layer) ** -0.5)

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
        self.token_embedding = nn.Embedding(config.n_vocab, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.n_text, width))
        self.transformer = Transformer(config.text, config.quick_gelu)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, config.n_embed))
        self.logit_scale = nn.Parameter(torch.tensor(START_SCALE))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, image_BCYX: Tensor) -> Tensor:
        """Features of unit length, [B, E], of pictures float32 in [0, 1]."""
        mean, std = (image_BCYX.new_tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        return F.normalize(self.visual((image_BCYX - mean) / std), dim=-1)

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
        return F.normalize(at_end_BW @ self.text_projection, dim=-1)

    def forward(self, image_BCYX: Tensor, text_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of pictures and of captions, and what their cosines are multiplied by."""
        scale = self.logit_scale.clamp(max=MOST_SCALE).exp()
        return self.encode_image(image_BCYX), self.encode_text(text_BN), scale
