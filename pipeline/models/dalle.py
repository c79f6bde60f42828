"""The transformer that models a caption and its picture as one stream of tokens (section 2.2, B.1).

Positions: ``n_text`` of text, then ``n_image`` of the picture in raster order. The stream is
shifted right by one: position p reads the token before it and predicts its own,

    reads     start  t0  t1 .. t[n_text-2]   start  z0  z1 .. z[n_image-2]
    predicts  t0     t1  t2 .. t[n_text-1]   z0     z1  z2 .. z[n_image-1]

and carries the embedding of the place it predicts. Where a caption has no token, a pad learned for
that position is read (and attended to) and nothing is predicted.

Letters: B batch, T text positions, I image positions, N all positions, C model width, H heads, D
head width, V vocabulary. The residual stream, LayerNorms, embeddings and heads are float32
whatever the ``compute_dtype`` of the matrices (section 2.4, appendix D).
"""

import math
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import Pattern, packed_attention
from kernels.patterns import Kind
from pipeline.config import DalleConfig, as_dict
from pipeline.models.scaling import Scale, enter, leave
from pipeline.weights import load_weights, save_weights

NO_TOKEN = -1  # in text tokens: the caption is over; in image inputs: start of image

# standard deviations of Sparse Transformers (1904.10509), section 6, which the paper builds on
# (B.1)
INIT_GAIN = 0.125


class KeyValueCache(Protocol):
    """What ``Attention`` asks of a sampler's cache (pipeline.generation.cache)."""

    def attend(self, q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor) -> Tensor:
        """Keep keys and values of these positions and attend to all that the pattern shows them."""


class Dense(nn.Module):
    """``x @ weight.T + bias`` computed in ``compute_dtype``."""

    def __init__(self, n_in: int, n_out: int, gain: float = 1.0) -> None:
        super().__init__()
        self.compute_dtype = torch.float32
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_out))
        nn.init.normal_(self.weight, std=gain * INIT_GAIN / math.sqrt(n_in))

    def forward(self, x: Tensor) -> Tensor:
        """[..., n_in] of any type to [..., n_out] of ``compute_dtype``."""
        dtype = self.compute_dtype
        return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class LayerNorm(nn.Module):
    """LayerNorm with gain and bias, in float32 whatever the parameters are stored in."""

    def __init__(self, width: int, *, has_bias: bool = True) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] float32 to the same."""
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x, x.shape[-1:], self.gain.float(), bias)


class Head(nn.Module):
    """Logits over one vocabulary, in float32, from weights that start at zero."""

    def __init__(self, config: DalleConfig, n_vocab: int) -> None:
        super().__init__()
        self.multiplier = 1 / config.width_multiplier
        self.weight = nn.Parameter(torch.zeros(n_vocab, config.d_model))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., V] float32."""
        logits = F.linear(x.float(), self.weight.float())
        return logits if self.multiplier == 1 else logits * self.multiplier


class TextEmbedding(nn.Module):
    """What text positions read: a start, then the caption, then a learned pad a position."""

    def __init__(self, config: DalleConfig) -> None:
        super().__init__()
        c = config.d_model
        base = config.mup_width or c
        std = INIT_GAIN / math.sqrt(base)
        self.token = nn.Parameter(torch.empty(config.n_text_vocab, c).normal_(std=std))
        self.pad = nn.Parameter(torch.empty(config.n_text, c).normal_(std=std))
        self.start = nn.Parameter(torch.empty(c).normal_(std=std))
        # two embeddings are added up here
        std = INIT_GAIN / math.sqrt(2 * base)
        self.position = nn.Parameter(torch.empty(config.n_text, c).normal_(std=std))

    def forward(self, text_BT: Tensor) -> Tensor:
        """Caption tokens int64, ``NO_TOKEN`` after their end, to x_BTC float32."""
        read = text_BT[:, :-1]
        token = F.embedding(read.clamp(min=0), self.token)
        token = torch.where((read == NO_TOKEN)[..., None], self.pad[1:], token)
        start = self.start.expand(len(text_BT), 1, -1)
        return torch.cat([start, token], dim=1).float() + self.position.float()


class ImageEmbedding(nn.Module):
    """What image positions read: the token before; the row and column of the one to come."""

    def __init__(self, config: DalleConfig) -> None:
        super().__init__()
        c = config.d_model
        self.grid = config.grid
        base = config.mup_width or c
        std = INIT_GAIN / math.sqrt(base)
        self.token = nn.Parameter(torch.empty(config.n_image_vocab, c).normal_(std=std))
        self.start = nn.Parameter(torch.empty(c).normal_(std=std))
        # three embeddings are added up here
        std = INIT_GAIN / math.sqrt(3 * base)
        self.row = nn.Parameter(torch.empty(config.grid, c).normal_(std=std))
        self.column = nn.Parameter(torch.empty(config.grid, c).normal_(std=std))

    def forward(self, read_BI: Tensor, place_I: Tensor | None = None) -> Tensor:
        """Tokens read at positions ``place_I``, else at 0, 1 ..; ``NO_TOKEN`` for the start."""
        token = F.embedding(read_BI.clamp(min=0), self.token)
        token = torch.where((read_BI == NO_TOKEN)[..., None], self.start, token)
        if place_I is None:
            place_I = torch.arange(read_BI.shape[1], device=read_BI.device)
        row = F.embedding(place_I // self.grid, self.row)
        column = F.embedding(place_I % self.grid, self.column)
        return token.float() + row.float() + column.float()


class Attention(nn.Module):
    """Multi-head attention through one of the paper's patterns (figure 11)."""

    def __init__(self, config: DalleConfig, pattern: Pattern) -> None:
        super().__init__()
        self.n_head, self.pattern = config.n_head, pattern
        self.backend: str | None = None
        self.qkv = Dense(config.d_model, 3 * config.d_model)
        self.out = Dense(config.d_model, config.d_model, gain=_residual_gain(config))
        width = config.d_model // config.n_head
        # of queries and keys; a bias of the keys would change nothing
        norms = (LayerNorm(width, has_bias=False) for _ in range(2))
        self.norms = nn.ModuleList(norms) if config.qk_norm else None

    def forward(self, x_BNC: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Attention of all positions, or with a ``cache`` of the next ones."""
        qkv_BN3HD = rearrange(
            self.qkv(x_BNC), "b n (three h d) -> b n three h d", three=3, h=self.n_head
        )
        if self.norms is not None:
            q_BNHD, k_BNHD, v_BNHD = qkv_BN3HD.unbind(2)
            q_BNHD, k_BNHD = (
                norm(x.float()).to(x.dtype)
                for norm, x in zip(self.norms, (q_BNHD, k_BNHD), strict=True)
            )
            qkv_BN3HD = torch.stack([q_BNHD, k_BNHD, v_BNHD], dim=2)
        if cache is None:
            o_BNHD = packed_attention(qkv_BN3HD, self.pattern, backend=self.backend)
        else:
            o_BNHD = cache.attend(*qkv_BN3HD.unbind(2))
        out: Tensor = self.out(o_BNHD.flatten(2))
        return out


class MLP(nn.Module):
    """Four times as wide in between, with the sigmoid form of GELU."""

    def __init__(self, config: DalleConfig) -> None:
        super().__init__()
        c = config.d_model
        self.up = Dense(c, 4 * c)
        self.down = Dense(4 * c, c, gain=_residual_gain(config))

    def forward(self, x_BNC: Tensor) -> Tensor:
        """[B, N, C] to the same."""
        h = self.up(x_BNC)
        # x * sigmoid(1.702 x): Sparse Transformers, section 5.2
        out: Tensor = self.down(h * torch.sigmoid(1.702 * h))
        return out


def _residual_gain(config: DalleConfig) -> float:
    """Scale of the last matrix of the 2 * n_layer residual blocks (1904.10509, section 6)."""
    return 1 / math.sqrt(2 * config.n_layer)


class Block(nn.Module):
    """One layer: an attention and an MLP residual block, LayerNorm first.

    ``scales`` are those of the two residual blocks' gradients, None for none.
    """

    def __init__(self, config: DalleConfig, pattern: Pattern) -> None:
        super().__init__()
        self.scales: tuple[Scale | None, Scale | None] = (None, None)
        self.attention_norm = LayerNorm(config.d_model)
        self.attention = Attention(config, pattern)
        self.mlp_norm = LayerNorm(config.d_model)
        self.mlp = MLP(config)

    def forward(self, x_BNC: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """[B, N, C] float32 to the same."""
        first, second = self.scales
        h_BNC = self.attention_norm(enter(x_BNC, first))
        x_BNC = x_BNC + leave(self.attention(h_BNC, cache), first)
        h_BNC = self.mlp_norm(enter(x_BNC, second))
        x_BNC = x_BNC + leave(self.mlp(h_BNC), second)
        return x_BNC


def layer_patterns(config: DalleConfig) -> list[Pattern]:
    """Of each layer i from 1 (B.1): column where (i - 2) mod 4 = 0, conv last, else row."""
    patterns = []
    for i in range(1, config.n_layer + 1):
        kind: Kind = "column" if (i - 2) % 4 == 0 else "row"
        if i == config.n_layer:
            kind = "conv"
        patterns.append(Pattern(kind, config.n_text, config.grid, kernel=config.conv_kernel))
    return patterns


class Dalle(nn.Module):
    """The transformer. ``forward`` trains; the sampler calls its parts with caches."""

    ZERO_LEAVES = (Block,)  # ZeRO-3 gathers a block in one message, as the paper does (2.5)

    def __init__(self, config: DalleConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.text_embedding = TextEmbedding(config)
        self.image_embedding = ImageEmbedding(config)
        self.blocks = nn.ModuleList(Block(config, p) for p in layer_patterns(config))
        self.norm = LayerNorm(config.d_model)
        self.text_head = Head(config, config.n_text_vocab)
        self.image_head = Head(config, config.n_image_vocab)
        self._ends: tuple[Scale | None, Scale | None] = (None, None)  # of embeddings and heads

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Compute the matrices of the blocks, and attention, in ``dtype``."""
        for module in self.modules():
            if isinstance(module, Dense):
                module.compute_dtype = dtype

    def set_attention_backend(self, backend: str | None) -> None:
        """The path of ``kernels.packed_attention``; None for the fastest that can run."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def take_gradient_scales(self) -> dict[str, Scale]:
        """Give every residual block a gradient scale of its own, and return them by block.

        Embeddings and heads, which the paper keeps in float32, get one each too: where all
        parameters are stored in 16 bits, so are their gradients.
        """
        scales = {self.block_of(name): Scale() for name, _ in self.named_parameters()}
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            block.scales = scales[f"blocks.{i}.attention"], scales[f"blocks.{i}.mlp"]
        self._ends = scales["embeddings"], scales["heads"]
        return scales

    @staticmethod
    def block_of(name: str) -> str:
        """The residual block that a parameter belongs to, else "embeddings" or "heads"."""
        first, *rest = name.split(".")
        if first == "blocks":
            return f"blocks.{rest[0]}.{rest[1].removesuffix('_norm')}"
        return "embeddings" if first.endswith("_embedding") else "heads"

    def lr_scale(self, name: str) -> float:
        """Of a parameter's step size: with muP the matrices take smaller ones the wider they are.

        Table 8 of arXiv 2203.03466, for Adam; the heads' part is a multiplier of the logits, the
        attention's is none, for heads are 64 wide at every width.
        """
        is_matrix = name.startswith("blocks.") and name.endswith(".weight")
        return 1 / self.config.width_multiplier if is_matrix else 1.0

    def forward(self, text_BT: Tensor, image_BI: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of every token from those before it.

        Args:
            text_BT: int64 in [0, n_text_vocab), ``NO_TOKEN`` after the caption's end.
            image_BI: int64 in [0, n_image_vocab).

        Returns:
            text_logits_BTV and image_logits_BIV, float32, each from its own positions only.
        """
        start = torch.full_like(image_BI[:, :1], NO_TOKEN)
        read_BI = torch.cat([start, image_BI[:, :-1]], dim=1)
        x_BNC = torch.cat([self.text_embedding(text_BT), self.image_embedding(read_BI)], dim=1)
        embeddings, heads = self._ends
        x_BNC = leave(x_BNC, embeddings)
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x_BNC = checkpoint(block, x_BNC, use_reentrant=False)
            else:
                x_BNC = block(x_BNC)
        x_BNC = self.norm(enter(x_BNC, heads))
        n_text = self.config.n_text
        text_logits_BTV = self.text_head(x_BNC[:, :n_text])
        image_logits_BIV = self.image_head(x_BNC[:, n_text:])
        return leave(text_logits_BTV, heads), leave(image_logits_BIV, heads)


def z_sums(
    text_logits_BTV: Tensor, image_logits_BIV: Tensor, text_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Squares of the log of the softmax's sum, added up over text tokens and image tokens.

    Kept small, they keep logits from drifting (PaLM, arXiv 2204.02311; Chameleon, 2405.09818).
    """
    text_BT1 = (text_BT != NO_TOKEN)[..., None]
    text = (text_logits_BTV.logsumexp(-1, keepdim=True).square() * text_BT1).sum()
    return text, image_logits_BIV.logsumexp(-1).square().sum()


def nll_sums(
    text_logits_BTV: Tensor, image_logits_BIV: Tensor, text_BT: Tensor, image_BI: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the text tokens and over the image tokens, in nats.

    Positions past a caption's end predict nothing and count nothing.
    """
    text_nll = F.cross_entropy(
        text_logits_BTV.flatten(0, 1), text_BT.flatten(), ignore_index=NO_TOKEN, reduction="sum"
    )
    image_nll = F.cross_entropy(image_logits_BIV.flatten(0, 1), image_BI.flatten(), reduction="sum")
    return text_nll, image_nll


def save_dalle(
    folder: str | Path, model_state: dict[str, Tensor], config: DalleConfig, made_of: dict
) -> str:
    """Write trained weights as a self-describing folder; returns their fingerprint."""
    return save_weights(folder, "dalle", as_dict(config), model_state, made_of)


def load_dalle(folder: str | Path, device: str | torch.device = "cpu") -> tuple[Dalle, dict, str]:
    """The model of a folder in evaluation mode, what it was made of, and its fingerprint.

    Raises:
        InputError: no such folder, another kind of model, weights that do not fit their config.
    """
    artifact = load_weights(folder, "dalle")
    with torch.device("meta"):
        model = Dalle(artifact.config_as(DalleConfig))
    model.to_empty(device="cpu")
    artifact.fill(model)
    return model.to(device).eval().requires_grad_(False), artifact.made_of, artifact.fingerprint
