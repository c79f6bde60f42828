"""The discrete VAE: pictures to a grid of codes and back (section 2.1, appendix A).

The architecture and its names are those of the released model, github.com/openai/DALL-E: four
groups of residual blocks, three poolings, no norms. Letters: B batch, C channels or colours, V
vocabulary, Y X grid of codes; an image is [B, C, 8 Y, 8 X].
"""

import math
import re
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import LAYER_GROUPS, DvaeConfig, FsqConfig, ImageModel, as_dict
from pipeline.console import InputError
from pipeline.models.fsq import Fsq
from pipeline.models.released import read_released
from pipeline.weights import load_weights, save_weights

EPS = 0.1  # of the pixel map: appendix A.3


def map_pixels(image: Tensor) -> Tensor:
    """[0, 1] to [eps, 1 - eps], where the logit of a pixel is bounded (appendix A.3)."""
    return (1 - 2 * EPS) * image + EPS


def unmap_pixels(x: Tensor) -> Tensor:
    """The inverse of ``map_pixels``, clamped to [0, 1]."""
    return ((x - EPS) / (1 - 2 * EPS)).clamp(0, 1)


def logit_laplace_nll(x_BCYX: Tensor, stats_BSYX: Tensor) -> Tensor:
    """Negative log-likelihood of mapped pixels under the logit-Laplace distribution (A.3, eq. 2).

    Args:
        x_BCYX: mapped pixels in (0, 1), float32.
        stats_BSYX: six maps: mu of red, green, blue, then ln b of the three.

    Returns:
        nll_BCYX in nats; negative where the density is above one.
    """
    mu_BCYX, ln_b_BCYX = stats_BSYX.float().chunk(2, dim=1)
    logit_BCYX = torch.logit(x_BCYX)
    spread_BCYX = (logit_BCYX - mu_BCYX).abs() * torch.exp(-ln_b_BCYX)
    return math.log(2) + ln_b_BCYX + torch.log(x_BCYX * (1 - x_BCYX)) + spread_BCYX


def kl_to_uniform(logits_BVYX: Tensor) -> Tensor:
    """KL(q || uniform) of each image, summed over its positions, in nats: kl_B.

    From the encoder's logits at temperature 1, whatever the relaxation's temperature, and one
    image at a
    time: the value does not know how large the batch is (A.2; openai/DALL-E issue 26).
    """
    log_q_BVYX = F.log_softmax(logits_BVYX.float(), dim=1)
    n_vocab = logits_BVYX.shape[1]
    return (log_q_BVYX.exp() * (log_q_BVYX + math.log(n_vocab))).sum(dim=(1, 2, 3))


class Conv2d(nn.Module):
    """A convolution with weights ``w`` and ``b``, padded to keep the size, stored in float32."""

    def __init__(self, n_in: int, n_out: int, kw: int, *, full_precision: bool = False) -> None:
        super().__init__()
        self.padding = (kw - 1) // 2
        self.full_precision = full_precision  # computes in float32 even under ``compute_dtype``
        self.compute_dtype = torch.float32
        self.w = nn.Parameter(torch.empty(n_out, n_in, kw, kw))
        self.b = nn.Parameter(torch.zeros(n_out))
        # no gain for the ReLU: the released code's initialisation
        nn.init.normal_(self.w, std=1 / math.sqrt(n_in * kw**2))

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, Y, X] to [B, n_out, Y, X], in ``compute_dtype``."""
        dtype = torch.float32 if self.full_precision else self.compute_dtype
        return F.conv2d(x.to(dtype), self.w.to(dtype), self.b.to(dtype), padding=self.padding)


class Block(nn.Module):
    """A residual block; ``kernels`` is 3, 3, 3, 1 in the encoder and 1, 3, 3, 3 in the decoder."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, ...], n_layers: int) -> None:
        super().__init__()
        n_hid = n_out // 4
        # keeps the sum of all blocks near the identity at the start: "especially important", A.1
        self.post_gain = 1 / n_layers**2
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = (n_in, n_hid, n_hid, n_hid, n_out)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kw in enumerate(kernels):
            layers[f"relu_{i + 1}"] = nn.ReLU()
            layers[f"conv_{i + 1}"] = Conv2d(widths[i], widths[i + 1], kw)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, Y, X] to [B, n_out, Y, X]."""
        y: Tensor = self.id_path(x) + self.post_gain * self.res_path(x)
        return y


def _groups(widths: list[int], config: ImageModel, kernels: tuple[int, ...]) -> OrderedDict:
    """group_1 .. group_4 of residual blocks from ``widths[i]`` to ``widths[i + 1]`` channels."""
    n_layers = LAYER_GROUPS * config.n_blk_per_group
    groups: OrderedDict[str, nn.Sequential] = OrderedDict()
    for g in range(LAYER_GROUPS):
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(config.n_blk_per_group):
            n_in = widths[g] if i == 0 else widths[g + 1]
            blocks[f"block_{i + 1}"] = Block(n_in, widths[g + 1], kernels, n_layers)
        groups[f"group_{g + 1}"] = nn.Sequential(blocks)
    return groups


class Encoder(nn.Module):
    """Mapped pixels [B, 3, 8 Y, 8 X] to logits [B, V, Y, X], float32; V is ``n_out``."""

    def __init__(self, config: ImageModel, n_out: int) -> None:
        super().__init__()
        h = config.n_hid
        groups = _groups([h, h, 2 * h, 4 * h, 8 * h], config, (3, 3, 3, 1))
        for name in ("group_1", "group_2", "group_3"):
            groups[name].add_module("pool", nn.MaxPool2d(kernel_size=2))
        output = nn.Sequential(
            OrderedDict(relu=nn.ReLU(), conv=Conv2d(8 * h, n_out, 1, full_precision=True))
        )
        self.blocks = nn.Sequential(OrderedDict(input=Conv2d(3, h, 7), **groups, output=output))

    def forward(self, x: Tensor) -> Tensor:
        """The 8 x 8 pixels of each position become n_out numbers."""
        logits: Tensor = self.blocks(x)
        return logits


class Decoder(nn.Module):
    """Codes as (relaxed) one-hot maps [B, V, Y, X] to stats [B, 6, 8 Y, 8 X]; V is ``n_in``."""

    def __init__(self, config: ImageModel, n_in: int) -> None:
        super().__init__()
        h = config.n_hid
        groups = _groups([config.n_init, 8 * h, 4 * h, 2 * h, h], config, (1, 3, 3, 3))
        for name in ("group_1", "group_2", "group_3"):
            groups[name].add_module("upsample", nn.Upsample(scale_factor=2, mode="nearest"))
        output = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(h, 6, 1)))
        codebook = Conv2d(n_in, config.n_init, 1, full_precision=True)
        self.blocks = nn.Sequential(OrderedDict(input=codebook, **groups, output=output))

    def forward(self, z: Tensor) -> Tensor:
        """Each position becomes 8 x 8 pixels of mu and ln b; float32."""
        stats: Tensor = self.blocks(z)
        return stats.float()


class DiscreteVAE(nn.Module):
    """The tokenizer: ``encode`` pictures to codes, ``decode`` codes to pictures.

    ``set_compute_dtype(torch.bfloat16)`` makes all convolutions but the two around the relaxation
    compute in 16 bit, as the released model does; logits and stats stay float32. With an
    ``FsqConfig``, codes are made by finite scalar quantisation instead (``pipeline.models.fsq``):
    the two convolutions then have a few channels where the dVAE's have n_vocab.
    """

    # ZeRO-3 gathers each of these whole, in one message: convolution by convolution the messages
    # cost twice what a small model computes
    ZERO_LEAVES = (Encoder, Decoder)

    def __init__(self, config: ImageModel) -> None:
        super().__init__()
        self.config = config
        self.fsq = Fsq(config.levels) if isinstance(config, FsqConfig) else None
        n_channels = config.n_vocab if self.fsq is None else self.fsq.n_channels
        self.encoder = Encoder(config, n_channels)
        self.decoder = Decoder(config, n_channels)

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Compute the convolutions in ``dtype``."""
        for module in self.modules():
            if isinstance(module, Conv2d):
                module.compute_dtype = dtype

    def forward(
        self, image_BCYX: Tensor, gumbel_BVYX: Tensor | None = None, tau: float = 1.0
    ) -> dict[str, Tensor]:
        """The two terms of the ELBO, one value an image (section 2.1).

        Args:
            image_BCYX: float32 in [0, 1].
            gumbel_BVYX: standard Gumbel noise for the relaxation at ``tau``, forward and backward
                alike (issue 1 of the released code: no straight-through); None takes the argmax
                codes, as FSQ does always.
            tau: temperature of the relaxation; at 0, its limit, the codes are a sample of q.

        Returns:
            ``nll_B`` sum of -ln p over the pixel values, ``kl_B`` KL to the uniform prior (0 with
            FSQ), both in nats; ``codes_BYX`` the codes without noise; ``picture_BCYX`` the
            reconstruction in [0, 1], and ``error_B`` its mean squared error.
        """
        x_BCYX = map_pixels(image_BCYX)
        # ZeRO-3 lets go of a leaf's weights when the gradient of its input is done, so it needs one
        x_BCYX.requires_grad_(torch.is_grad_enabled())
        logits_BVYX = self._encoder_logits(x_BCYX)
        z_BVYX = self._decoder_input(logits_BVYX, gumbel_BVYX, tau)
        stats_BSYX = self.decoder(z_BVYX.contiguous(memory_format=torch.channels_last))
        nll_B = logit_laplace_nll(x_BCYX, stats_BSYX).sum(dim=(1, 2, 3))
        with torch.no_grad():
            picture_BCYX = _picture(stats_BSYX)
            error_B = (picture_BCYX - image_BCYX).square().mean(dim=(1, 2, 3))
        return {
            "nll_B": nll_B,
            "kl_B": kl_to_uniform(logits_BVYX) if self.fsq is None else torch.zeros_like(nll_B),
            "codes_BYX": self._codes(logits_BVYX),
            "picture_BCYX": picture_BCYX,
            "error_B": error_B,
        }

    def logits(self, image_BCYX: Tensor) -> Tensor:
        """Encoder logits [B, V, Y, X] of pictures in [0, 1]; with FSQ what it is to round.

        Raises:
            InputError: pictures that are not [B, 3, image_size, image_size].
        """
        side = self.config.image_size
        if tuple(image_BCYX.shape[1:]) != (3, side, side):
            raise InputError(
                f"pictures of shape {tuple(image_BCYX.shape)}; this dVAE takes "
                f"[B, 3, {side}, {side}]"
            )
        return self._encoder_logits(map_pixels(image_BCYX))

    def _encoder_logits(self, x_BCYX: Tensor) -> Tensor:
        # channels last: 10 to 70 times faster for these small convolutions on a CPU (measured)
        logits: Tensor = self.encoder(x_BCYX.contiguous(memory_format=torch.channels_last))
        return logits

    def _decoder_input(self, logits_BVYX: Tensor, gumbel_BVYX: Tensor | None, tau: float) -> Tensor:
        if self.fsq is not None:
            values: Tensor = self.fsq(logits_BVYX)
            return values
        if gumbel_BVYX is not None and tau > 0:
            return F.softmax((logits_BVYX + gumbel_BVYX) / tau, dim=1)
        noisy_BVYX = logits_BVYX if gumbel_BVYX is None else logits_BVYX + gumbel_BVYX
        z_BYXV = F.one_hot(noisy_BVYX.argmax(dim=1), self.config.n_vocab)
        return z_BYXV.permute(0, 3, 1, 2).float()

    def _codes(self, logits_BVYX: Tensor) -> Tensor:
        return logits_BVYX.argmax(dim=1) if self.fsq is None else self.fsq.codes(logits_BVYX)

    def encode(self, image_BCYX: Tensor) -> Tensor:
        """Codes int64 [B, Y, X] of pictures in [0, 1]: the argmax of the logits (section 2.2)."""
        return self._codes(self.logits(image_BCYX))

    def decode(self, codes_BYX: Tensor) -> Tensor:
        """Pictures float32 [B, 3, 8 Y, 8 X] in [0, 1] of codes int64 in [0, n_vocab)."""
        if self.fsq is not None:
            return _picture(self.decoder(self.fsq.values(codes_BYX)))
        codebook, *others = self.decoder.blocks
        assert isinstance(codebook, Conv2d)
        # a 1x1 convolution of one-hot maps, which take 32 MB a picture at the paper's size
        h_BYXC = F.embedding(codes_BYX, codebook.w[:, :, 0, 0].t()) + codebook.b
        h = h_BYXC.permute(0, 3, 1, 2)
        for layer in others:
            h = layer(h)
        return _picture(h)


def _picture(stats_BSYX: Tensor) -> Tensor:
    """The most likely looking picture: mu through the sigmoid, ln b ignored."""
    return unmap_pixels(torch.sigmoid(stats_BSYX[:, :3].float()))


def save_dvae(folder: str | Path, dvae: DiscreteVAE, made_of: dict | None = None) -> str:
    """Write ``dvae`` as a self-describing folder; returns its fingerprint."""
    state = {name: value.float() for name, value in dvae.state_dict().items()}
    return save_weights(folder, "dvae", as_dict(dvae.config), state, made_of or {})


def load_dvae(folder: str | Path, device: str | torch.device = "cpu") -> tuple[DiscreteVAE, str]:
    """The frozen dVAE of a folder, of either kind, in evaluation mode, and its fingerprint.

    Raises:
        InputError: no such folder, another kind of model in it, weights that do not fit their
        config.
    """
    artifact = load_weights(folder, "dvae")
    kind: type[DvaeConfig] | type[FsqConfig] = DvaeConfig
    if "levels" in artifact.config:
        kind = FsqConfig
    dvae = DiscreteVAE(artifact.config_as(kind))
    artifact.fill(dvae)
    return dvae.to(device).eval().requires_grad_(False), artifact.fingerprint


def load_openai(
    encoder_path: str | Path, decoder_path: str | Path, image_size: int = 256
) -> DiscreteVAE:
    """The dVAE that OpenAI released, frozen, in evaluation mode, float32 on the CPU.

    Args:
        encoder_path: encoder.pkl, as downloaded; nothing in it is run.
        decoder_path: decoder.pkl, likewise.
        image_size: pixels a side of the pictures that it is to take; it was trained with 256.

    Raises:
        InputError: files that ``read_released`` refuses, halves of two models.
    """
    encoder = read_released(encoder_path, "Encoder")
    decoder = read_released(decoder_path, "Decoder")
    n_vocab, *_ = encoder.shape("blocks.output.conv.w")
    n_hid, *_ = encoder.shape("blocks.input.w")
    n_init, *_ = decoder.shape("blocks.input.w")
    first_of_block = re.compile(r"blocks\.group_1\.block_\d+\.res_path\.conv_1\.w")
    n_blk = sum(first_of_block.fullmatch(name) is not None for name in encoder.tensors)
    config = DvaeConfig(image_size, n_vocab, n_hid, n_init, n_blk)
    with torch.device("meta"):  # no memory before everything is known to fit
        dvae = DiscreteVAE(config)
    halves = ((encoder, dvae.encoder), (decoder, dvae.decoder))
    for half, module in halves:
        wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in half.tensors.items()}
        if wanted != found:
            name = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
            raise InputError(
                f"{half.path}: {name} has shape {found.get(name)}, and beside the first layers of "
                f"{encoder.path} it must have {wanted.get(name)}; name the two halves of one model"
            )
    dvae.to_empty(device="cpu")
    for half, module in halves:
        module.load_state_dict(half.tensors)
    return dvae.eval().requires_grad_(False)
