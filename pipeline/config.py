"""The shapes of the models and the recipes of their training, as frozen dataclasses.

``presets.py`` fills them in; ``ds_configs/`` says how a run fits its machines. Nothing here imports
anything of the project but the way to complain.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from pipeline.console import InputError

# 16 bits of which 7 are of the fraction do for a variance that moves by 4 % an update (beta2 0.96)
MOMENT_DTYPES = ("float32", "bfloat16")
LAYER_GROUPS = 4  # of the dVAE: fixed by the released architecture (github.com/openai/DALL-E)
DOWNSAMPLING = 2 ** (LAYER_GROUPS - 1)  # pixels a side of one code: three poolings


def require(holds: bool, sentence: str) -> None:
    """Raise ``InputError(sentence)`` unless ``holds``."""
    if not holds:
        raise InputError(sentence)


@dataclass(frozen=True)
class DvaeConfig:
    """The image tokenizer (section 2.1, appendix A.1; the released code's names).

    The defaults are the released model: 53,786,240 parameters in the encoder, 43,829,766 in the
    decoder.
    """

    image_size: int = 256  # pixels a side
    n_vocab: int = 8192
    n_hid: int = 256  # channels of the first group; doubles from group to group
    n_init: int = 128  # width of the codebook: the decoder's first convolution
    n_blk_per_group: int = 2

    def __post_init__(self) -> None:
        _check_image_model(self)
        require(
            2 <= self.n_vocab <= 65536,
            f"n_vocab is {self.n_vocab}; codes are stored as uint16, so take 2 to 65,536",
        )

    @property
    def grid(self) -> int:
        """Codes a side."""
        return self.image_size // DOWNSAMPLING


@dataclass(frozen=True)
class FsqConfig:
    """An image tokenizer with the dVAE's layers and a codebook that is not learnt.

    Finite scalar quantisation (arXiv 2309.15505): a code is one of ``levels[i]`` values in each of
    a few channels. The defaults are the levels of its table 1 for 2^14 codes.
    """

    image_size: int = 256  # pixels a side
    levels: tuple[int, ...] = (8, 8, 8, 6, 5)
    n_hid: int = 256
    n_init: int = 128
    n_blk_per_group: int = 2

    def __post_init__(self) -> None:
        _check_image_model(self)
        object.__setattr__(self, "levels", tuple(self.levels))  # JSON knows lists only
        require(
            all(isinstance(n, int) and n >= 2 for n in self.levels) and 2 <= self.n_vocab <= 65536,
            f"levels are {list(self.levels)}, which make {self.n_vocab} codes; take whole numbers "
            "from 2 on whose product is at most 65,536, for codes are stored as uint16",
        )

    @property
    def n_vocab(self) -> int:
        """Codes: all combinations of levels."""
        return math.prod(self.levels)

    @property
    def grid(self) -> int:
        """Codes a side."""
        return self.image_size // DOWNSAMPLING


ImageModel = DvaeConfig | FsqConfig


def _check_counts(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 1, f"{name} is {value}; take at least 1")


def _check_image_model(config: "ImageModel") -> None:
    """Sizes of the layers that both tokenizers have."""
    require(
        config.image_size >= DOWNSAMPLING and config.image_size % DOWNSAMPLING == 0,
        f"image_size is {config.image_size}; it must be a positive multiple of {DOWNSAMPLING}, "
        "the side of one code in pixels",
    )
    require(
        config.n_hid >= 4 and config.n_hid % 4 == 0,
        f"n_hid is {config.n_hid}; residual paths are a quarter as wide, so take a multiple of 4",
    )
    _check_counts(config, "n_init", "n_blk_per_group")


@dataclass(frozen=True)
class DalleConfig:
    """The transformer (section 2.2, appendix B.1). The defaults are the 12B model."""

    n_layer: int = 64
    d_model: int = 3968
    n_head: int = 62
    n_text: int = 256  # text positions
    n_text_vocab: int = 16384
    grid: int = 32  # image tokens a side
    n_image_vocab: int = 8192
    conv_kernel: int = 11
    # not the paper's, and off in its presets
    qk_norm: bool = False  # LayerNorm of queries and keys, head by head (arXiv 2302.05442)
    mup_width: int | None = None  # of the model whose step size this one takes (arXiv 2203.03466)

    def __post_init__(self) -> None:
        _check_counts(self, "n_layer", "d_model", "n_head", "n_text", "grid")
        for name in ("n_text_vocab", "n_image_vocab"):
            value = getattr(self, name)
            require(2 <= value <= 65536, f"{name} is {value}; take 2 to 65,536")
        require(
            self.d_model % self.n_head == 0,
            f"d_model {self.d_model} does not divide into {self.n_head} heads; "
            "take d_model = 64 * n_head as the paper does",
        )
        require(
            self.conv_kernel >= 1 and self.conv_kernel % 2 == 1,
            f"conv_kernel is {self.conv_kernel}; it must be odd",
        )
        require(
            self.mup_width is None or self.mup_width >= 1,
            f"mup_width is {self.mup_width}; take the width that the step size was found at",
        )

    @property
    def width_multiplier(self) -> float:
        """How much wider than the model whose step size it takes; 1 without muP."""
        return 1.0 if self.mup_width is None else self.d_model / self.mup_width

    @property
    def n_image(self) -> int:
        """Image tokens, in raster order."""
        return self.grid * self.grid

    @property
    def n_ctx(self) -> int:
        """Positions of the stream: text, then image."""
        return self.n_text + self.n_image

    @property
    def image_size(self) -> int:
        """Pixels a side of the pictures behind the tokens."""
        return self.grid * DOWNSAMPLING

    @property
    def matrix_parameters(self) -> int:
        """Elements of the attention and MLP matrices: 12 * n_layer * d_model^2 (Table 1)."""
        return 12 * self.n_layer * self.d_model**2


@dataclass(frozen=True)
class TowerConfig:
    """One of CLIP's transformers; heads are ``width / n_head`` wide, MLPs four times ``width``."""

    width: int
    n_layer: int
    n_head: int

    def __post_init__(self) -> None:
        _check_counts(self, "width", "n_layer", "n_head")
        require(
            self.width % self.n_head == 0,
            f"width {self.width} does not divide into {self.n_head} heads; take a multiple",
        )


@dataclass(frozen=True)
class ClipConfig:
    """The contrastive model (arXiv 2103.00020, section 2.4).

    The defaults are ViT-B/32: 151,277,313 parameters.
    """

    image_size: int = 224  # pixels a side
    patch_size: int = 32
    vision: TowerConfig = TowerConfig(768, 12, 12)
    n_text: int = 77  # text positions; the last token of a caption is the end of text
    n_vocab: int = 49408  # the largest token is the end of text
    text: TowerConfig = TowerConfig(512, 12, 8)
    n_embed: int = 512  # features
    quick_gelu: bool = True  # x sigmoid(1.702 x) for GELU, as in OpenAI's weights

    def __post_init__(self) -> None:
        for name in ("vision", "text"):  # JSON knows no dataclasses
            if isinstance(tower := getattr(self, name), dict):
                object.__setattr__(self, name, TowerConfig(**tower))
        require(
            1 <= self.patch_size <= self.image_size and self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} does not divide into patches of {self.patch_size}",
        )
        _check_counts(self, "n_text", "n_embed")
        require(self.n_vocab >= 2, f"n_vocab is {self.n_vocab}; take at least 2")

    @property
    def end_of_text(self) -> int:
        """The token that ends a caption."""
        return self.n_vocab - 1


@dataclass(frozen=True)
class Ramp:
    """From ``start`` to ``end`` in half a cosine over ``steps`` updates; then it stays."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"a ramp over {self.steps} steps; take at least 1")


@dataclass(frozen=True)
class Plateau:
    """``start``, halved whenever the training loss has stopped falling (appendix B.2).

    The paper halved five times and tells neither where nor by which rule. Here: when the mean loss
    of the last ``window`` updates is not a share ``gain`` below that of the ``window`` before.
    """

    start: float
    halvings: int = 5  # at most
    window: int = 5_000  # updates
    gain: float = 1e-3
    patience: int = 20_000  # updates between two halvings

    def __post_init__(self) -> None:
        require(self.halvings >= 0, f"{self.halvings} halvings; take 0 or more")
        require(
            self.window >= 50 and self.window % 50 == 0,
            f"a plateau's window is {self.window} updates; take a multiple of 50",
        )
        require(self.gain >= 0, f"a plateau's gain is {self.gain}; take 0 or more")
        require(
            self.patience >= 2 * self.window,
            f"a plateau's patience is {self.patience} updates; two windows take {2 * self.window}",
        )


@dataclass(frozen=True)
class WarmupStableDecay:
    """``start`` until the last ``decay`` of ``steps`` updates, in which it falls to ``end``.

    Linear, as in MiniCPM (arXiv 2404.06395), whose runs can go on from before the decay.
    """

    start: float
    end: float
    steps: int
    decay: int

    def __post_init__(self) -> None:
        require(
            1 <= self.decay <= self.steps,
            f"a decay over {self.decay} of {self.steps} updates; take 1 to {self.steps}",
        )


StepSize = Ramp | Plateau | WarmupStableDecay


@dataclass(frozen=True)
class Optimizer:
    """AdamW and what surrounds it."""

    betas: tuple[float, float]
    weight_decay: float  # not on gains, biases
    gradient_clipping: float  # of the global norm; 0 is off
    ema_decay: float
    ema_every: int = 1  # updates
    eps: float = 1e-8
    max_exp_avg_sq: float = 0.0  # the running variance is clipped to it by value; 0 is off
    moment_dtype: str = "float32"  # of both moments between updates

    def __post_init__(self) -> None:
        require(self.ema_every >= 1, f"ema_every is {self.ema_every}; take at least 1")
        require(
            self.max_exp_avg_sq >= 0,
            f"max_exp_avg_sq is {self.max_exp_avg_sq}; take 0 for no bound, or a bound above it",
        )
        require(
            self.moment_dtype in MOMENT_DTYPES,
            f"moment_dtype is {self.moment_dtype!r}; take one of {', '.join(MOMENT_DTYPES)}",
        )


@dataclass(frozen=True)
class Spike:
    """A loss that has run away: no number, or far above the losses before."""

    deviations: float = 6.0  # standard deviations above the mean ...
    window: int = 200  # ... of so many updates
    skips: int = 20  # in a row; then back to the last checkpoint, and on behind these batches
    returns: int = 3  # then the run ends

    def __post_init__(self) -> None:
        require(self.deviations > 0, f"a spike of {self.deviations} deviations; take more than 0")
        for name in ("window", "skips"):
            value = getattr(self, name)
            require(value >= 1, f"a spike's {name} is {value}; take 1 or more")
        require(self.returns >= 0, f"a spike's returns is {self.returns}; take 0 or more")


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """What every training has, whatever is learned."""

    optimizer: Optimizer
    batch: int  # pictures an update, over all ranks
    steps: int
    val_images: int = 1024  # looked at in one validation
    val_every: int = 1000
    save_every: int = 1000
    log_every: int = 10
    patience_s: float = 3600.0  # an update that takes longer is a hang; 0 waits for ever
    spike: Spike | None = None  # None takes every loss that is a number
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "steps", "val_images", "val_every", "save_every", "log_every"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and value >= 1,
                f"{name} is {value!r} in the preset; take a whole number from 1 on",
            )
        require(
            self.patience_s >= 0, f"patience_s is {self.patience_s}; take 0 for ever, or seconds"
        )


@dataclass(frozen=True, kw_only=True)
class DvaeRun(_Recipe):
    """Stage 1: what is learned, in which steps (appendix A.2)."""

    model: ImageModel
    lr: Ramp
    beta: Ramp | None  # weight of the KL term; None, and no other, with FSQ
    tau: Ramp | None  # temperature of the relaxation; likewise
    pixel_noise: float = 0.0  # standard deviation added to training pictures in [0, 1]; paper: 0

    def __post_init__(self) -> None:
        super().__post_init__()
        is_relaxed = isinstance(self.model, DvaeConfig)
        require(
            all(isinstance(ramp, Ramp) == is_relaxed for ramp in (self.beta, self.tau)),
            "beta and tau are ramps in the preset of a dVAE, and None in one with FSQ, which has "
            "no KL term and no temperature",
        )


@dataclass(frozen=True, kw_only=True)
class DalleRun(_Recipe):
    """Stage 2: what is learned, in which steps (appendix B.2)."""

    model: DalleConfig
    warmup: int  # updates over which the step size grows linearly to lr.start
    lr: StepSize
    text_weight: float = 1 / 8  # of the text loss; the image loss has the rest (section 2.2)
    bpe_dropout: float = 0.1  # footnote 5
    # share of captions that are left empty, so that guidance has something to move away from
    # (arXiv 2207.12598); paper: none
    caption_dropout: float = 0.0
    z_loss: float = 0.0  # weight of the mean square of the log of the softmax's sum; paper: none

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.bpe_dropout <= 1, f"bpe_dropout is {self.bpe_dropout}; it lies in [0, 1]")
        require(
            0 <= self.caption_dropout < 1,
            f"caption_dropout is {self.caption_dropout}; take 0 or more, and less than 1",
        )
        require(self.z_loss >= 0, f"z_loss is {self.z_loss}; take 0 or more")


@dataclass(frozen=True, kw_only=True)
class ClipRun(_Recipe):
    """CLIP: what is learned, in which steps (arXiv 2103.00020, section 2.5).

    Each picture of a batch is told apart from all others.
    """

    model: ClipConfig
    warmup: int  # updates over which the step size grows linearly to lr.start
    lr: Ramp
    val_batch: int = 256  # held-out pictures among which a caption's own is looked for

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            2 <= self.val_batch <= self.val_images,
            f"val_batch is {self.val_batch}; take 2 to the {self.val_images} of val_images",
        )


Run = DvaeRun | DalleRun | ClipRun


def as_dict(config: Any) -> dict[str, Any]:
    """A config as JSON would keep it (tuples become lists)."""
    result: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return result


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that stand for any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
