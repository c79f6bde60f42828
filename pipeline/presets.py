"""Named runs. Every number that is the paper's says where it stands there (arXiv 2102.12092)."""

import dataclasses
import inspect
from typing import Any, TypeVar

from pipeline.config import (
    ClipConfig,
    ClipRun,
    DalleConfig,
    DalleRun,
    DvaeConfig,
    DvaeRun,
    FsqConfig,
    Optimizer,
    Plateau,
    Ramp,
    Run,
    Spike,
    TowerConfig,
)
from pipeline.console import InputError
from pipeline.plugin import blame, load_function

Kind = TypeVar("Kind", DvaeRun, DalleRun, ClipRun)

# what a run trains, and how its presets are called
SAID = {
    DvaeRun: ("the dVAE", "dvae"),
    DalleRun: ("the transformer", "dalle"),
    ClipRun: ("CLIP", "clip"),
}


def dvae_paper() -> DvaeRun:
    """The released image tokenizer, as trained for the paper (section 2.1, appendix A)."""
    return DvaeRun(
        model=DvaeConfig(),
        # A.2; exponential average 0.999 per update
        optimizer=Optimizer(
            betas=(0.9, 0.999), weight_decay=1e-4, gradient_clipping=0.0, ema_decay=0.999
        ),
        batch=512,  # A.2: 8 images on each of 64 GPUs
        steps=3_000_000,
        lr=Ramp(1e-4, 1.25e-6, 1_200_000),
        beta=Ramp(0.0, 6.6, 5_000),
        tau=Ramp(1.0, 1 / 16, 150_000),
        log_every=100,
        val_every=10_000,
        save_every=5_000,
    )


def dvae_demo() -> DvaeRun:
    """64-pixel pictures into 8x8 codes out of 128, in minutes on two CPU cores.

    Three things differ from the paper's recipe, because a demo has thousands of updates and not
    millions (all measured). The KL weight starts high and falls: from zero, the encoder saturates
    on one code within some hundred updates and stays there. Gradients are clipped: their peaks are
    fifty times their median. And pixels get noise: drawn pictures are so flat that the density of
    their background has no floor, and learning it ever sharper drowns all else.
    """
    return DvaeRun(
        model=DvaeConfig(image_size=64, n_vocab=128, n_hid=16, n_init=32, n_blk_per_group=1),
        optimizer=Optimizer(
            betas=(0.9, 0.99), weight_decay=1e-4, gradient_clipping=1.0, ema_decay=0.99
        ),
        batch=16,
        steps=4_000,
        lr=Ramp(4e-3, 2e-4, 4_000),
        beta=Ramp(12.0, 4.0, 2_000),
        tau=Ramp(1.0, 1 / 16, 1_200),
        pixel_noise=8 / 255,
        val_images=128,
        val_every=500,
        save_every=500,
    )


def dvae_own() -> DvaeRun:
    """64-pixel pictures of any kind into 8x8 codes out of 512: ``./demo.sh DATA``."""
    return dataclasses.replace(
        dvae_demo(),
        model=DvaeConfig(image_size=64, n_vocab=512, n_hid=16, n_init=64, n_blk_per_group=1),
        lr=Ramp(3e-3, 2e-4, 4_000),
    )


def fsq_paper() -> DvaeRun:
    """Finite scalar quantisation in the paper's recipe: 15,360 codes that are not learnt.

    The released dVAE's reconstructions limit any transformer that is trained on its codes. Levels:
    arXiv 2309.15505, table 1, for 2^14 codes. A transformer of these codes takes n_image_vocab
    15,360.
    """
    return dataclasses.replace(dvae_paper(), model=FsqConfig(), beta=None, tau=None)


def fsq_demo() -> DvaeRun:
    """``dvae_demo`` with finite scalar quantisation: 128 codes too, so ``dalle_demo`` fits.

    Its gradients pass the rounding as they are, so it wants smaller steps (measured).
    """
    return dataclasses.replace(
        dvae_demo(),
        model=FsqConfig(image_size=64, levels=(8, 4, 4), n_hid=16, n_init=32, n_blk_per_group=1),
        lr=Ramp(1.5e-3, 1e-4, 4_000),
        beta=None,
        tau=None,
    )


def _dalle(n_layer: int, d_model: int) -> DalleRun:
    """The paper's recipe (appendix B.2) for a member of its family: heads of width 64 (Table 1)."""
    return DalleRun(
        model=DalleConfig(n_layer=n_layer, d_model=d_model, n_head=d_model // 64),
        optimizer=Optimizer(
            betas=(0.9, 0.96),
            weight_decay=4.5e-2,
            gradient_clipping=4.0,
            # B.2: every 25 updates with 0.99
            ema_decay=0.99,
            ema_every=25,
            max_exp_avg_sq=5.0,
        ),
        batch=1024,
        steps=430_000,
        warmup=5_000,
        # halved at five plateaus of the training loss; the rule is ours, for the paper tells none
        lr=Plateau(4.5e-4),
        spike=Spike(),
        log_every=10,
    )


def _mup(run: DalleRun) -> DalleRun:
    """A run whose step size is that of a model of width 256 (arXiv 2203.03466)."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, mup_width=256))


def dalle_12b() -> DalleRun:
    """The paper's model: 12,092,178,432 matrix parameters."""
    return _dalle(64, 3968)


def dalle_6b() -> DalleRun:
    """Table 1's middle model."""
    return _dalle(64, 2688)


def dalle_3b() -> DalleRun:
    """Table 1's smallest model."""
    return _dalle(64, 1920)


def dalle_1b() -> DalleRun:
    """The preliminary model of section 2.3, whose width 1280 follows from its 1.2B parameters."""
    return _dalle(64, 1280)


def dalle_256_mup() -> DalleRun:
    """Where the step size of ``dalle_12b_mup`` is looked for: as deep, and 256 wide."""
    return _mup(_dalle(64, 256))


def dalle_12b_mup() -> DalleRun:
    """``dalle_12b`` with the step sizes of ``dalle_256_mup``, whatever they turn out to be."""
    return _mup(_dalle(64, 3968))


def dalle_demo() -> DalleRun:
    """Four layers with all three patterns, for the codes of ``dvae_demo``."""
    return DalleRun(
        model=DalleConfig(
            n_layer=4,
            d_model=128,
            n_head=4,
            n_text=32,
            n_text_vocab=512,
            grid=8,
            n_image_vocab=128,
            conv_kernel=5,
        ),
        optimizer=Optimizer(
            betas=(0.9, 0.96), weight_decay=4.5e-2, gradient_clipping=4.0, ema_decay=0.99
        ),
        batch=32,
        steps=2_000,
        warmup=100,
        lr=Ramp(2e-3, 2e-4, 2_000),
        caption_dropout=0.05,
        val_images=256,
        val_every=500,
        save_every=500,
    )


def dalle_own() -> DalleRun:
    """Four wider layers for the codes of ``dvae_own``: ``./demo.sh DATA``."""
    return dataclasses.replace(
        dalle_demo(),
        model=DalleConfig(
            n_layer=4,
            d_model=192,
            n_head=3,
            n_text=48,
            n_text_vocab=2048,
            grid=8,
            n_image_vocab=512,
            conv_kernel=5,
        ),
        steps=800,
        warmup=50,
        lr=Ramp(2e-3, 2e-4, 800),
        caption_dropout=0.05,
        val_images=128,
        val_every=200,
        save_every=200,
    )


def clip_b32() -> ClipRun:
    """ViT-B/32 in the recipe of its paper (arXiv 2103.00020, section 2.5, tables 18 and 20)."""
    return ClipRun(
        model=ClipConfig(),
        # table 18, where beta2 and eps are those of vision transformers; weights that are gains or
        # biases do not decay (2.5); no gradient is clipped, no weight averaged
        optimizer=Optimizer(
            betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, gradient_clipping=0.0, ema_decay=0.0
        ),
        batch=32_768,
        # 32 epochs of 400 million pairs
        steps=390_625,
        warmup=2_000,
        lr=Ramp(5e-4, 0.0, 390_625),
        val_images=8_192,
        val_batch=1_024,
        val_every=5_000,
        save_every=1_000,
    )


def clip_demo() -> ClipRun:
    """Ranks the pictures of ``dalle_demo``: its tokenizer, and a token more for the end of text.

    Small towers and large patches, for two CPU cores and minutes: with patches of 8 and more
    layers, as many seconds raise the accuracy of the best of 8 half as much (measured).
    """
    return ClipRun(
        model=ClipConfig(
            image_size=64,
            patch_size=16,
            vision=TowerConfig(64, 2, 4),
            # the demo's longest caption has 16 tokens
            n_text=24,
            n_vocab=513,
            text=TowerConfig(64, 1, 4),
            n_embed=64,
            quick_gelu=False,
        ),
        optimizer=Optimizer(
            betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, gradient_clipping=1.0, ema_decay=0.9
        ),
        batch=128,
        steps=1_000,
        warmup=50,
        lr=Ramp(4e-3, 0.0, 1_000),
        val_images=256,
        val_batch=64,
        val_every=250,
        save_every=250,
        log_every=20,
    )


def names() -> list[str]:
    """The presets of this file."""
    module = inspect.getmodule(names)
    return sorted(
        name
        for name, value in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_") and inspect.signature(value).return_annotation in SAID
    )


def load(name: str, **changes: Any) -> Run:
    """The run called ``name``, or a user's ``FILE.py:FUNCTION``, with ``changes`` to its fields.

    Raises:
        InputError: no preset, file or function of that name, or a function that gives something
        else.
    """
    if ":" in name:
        run = _from_file(name)
    elif name in names():
        run = globals()[name]()
    else:
        raise InputError(
            f"no preset is called {name!r}; there are {', '.join(names())}, "
            "and FILE.py:FUNCTION takes one of your own"
        )
    if not isinstance(run, Run):
        raise InputError(
            f"{name} gives a {type(run).__name__}; a preset gives a DvaeRun, DalleRun or ClipRun"
        )
    return dataclasses.replace(run, **changes) if changes else run


def load_kind(name: str, kind: type[Kind]) -> Kind:
    """``load``, for who takes one kind of run.

    Raises:
        InputError: as ``load``, and a run of another kind.
    """
    run = load(name)
    if not isinstance(run, kind):
        raise InputError(f"{name} trains {SAID[type(run)][0]}; take a {SAID[kind][1]} preset")
    return run


def _from_file(name: str) -> Any:
    function = load_function(name, "preset")
    try:
        return function()
    except InputError:
        raise
    except Exception as error:  # the code is the user's: it may raise anything
        raise InputError(f"preset {name!r} cannot be made: {blame(error, name)}") from error
