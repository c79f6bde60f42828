"""Reads CLIP's weights as OpenAI and open_clip gave them away; nothing in a file is run."""

import math
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config import ClipConfig, TowerConfig
from pipeline.console import InputError
from pipeline.models.clip import Clip

# numbers that OpenAI's state dicts hold beside weights
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
WAY_OUT = (
    "take a vision transformer's open_clip_model.safetensors, such as that of "
    "huggingface.co/timm/vit_base_patch32_clip_224.openai"
)


# of open_clip's ViT-H, ViT-g and ViT-bigG; of all others 64
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}


def load_foreign(
    path: Path,
    *,
    quick_gelu: bool,
    vision_head_width: int | None = None,
    text_head_width: int = 64,
) -> Clip:
    """The model whose weights are in ``path``, in float32 on the CPU; shapes give its config.

    Args:
        path: safetensors, or a state dict of torch.save.
        quick_gelu: of the weights: OpenAI's have it, open_clip's own mostly have not. No shape
            tells, and with the wrong one features are off without a word.
        vision_head_width: of the attention of the vision tower, which no shape tells either; None
            for that of ``HEAD_WIDTHS``.
        text_head_width: of the text tower.

    Raises:
        InputError: no such file, none of these formats, or weights of another model.
    """
    tensors = _read(path)
    if missing := [name for name in _SHAPED if name not in tensors]:
        raise InputError(f"{path} has no {missing[0]}: no CLIP of two transformers; {WAY_OUT}")
    try:
        config = _config(tensors, quick_gelu, vision_head_width, text_head_width)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path} has shapes that no CLIP has ({error}); {WAY_OUT}") from error
    with torch.device("meta"):
        clip = Clip(config)
    tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
    wanted = {name: tuple(value.shape) for name, value in clip.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if differing := sorted(set(wanted.items()) ^ set(found.items())):
        name = differing[0][0]
        raise InputError(
            f"{path}: {name} is {found.get(name, 'not there')}, and "
            f"{wanted.get(name, 'not there')} in the model that the other shapes make; {WAY_OUT}"
        )
    clip.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    return clip.eval().requires_grad_(False)


# what the config is read from
_SHAPED = (
    "visual.conv1.weight", "visual.positional_embedding", "visual.proj", "positional_embedding",
    "token_embedding.weight", "text_projection", "logit_scale",
)  # fmt: skip


def _config(
    tensors: dict[str, Tensor],
    quick_gelu: bool,
    vision_head_width: int | None,
    text_head_width: int,
) -> ClipConfig:
    def tower(prefix: str, width: int, head_width: int) -> TowerConfig:
        block = re.compile(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
        layers = {found[1] for found in map(block.match, tensors) if found}
        if width % head_width:
            raise InputError(
                f"a tower is {width} wide, which does not divide into heads of {head_width}: give "
                "--vision-head-width or --text-head-width as the model's card says"
            )
        return TowerConfig(width, len(layers), width // head_width)

    vision_width, _, patch, _ = tensors["visual.conv1.weight"].shape
    n_patches = len(tensors["visual.positional_embedding"]) - 1
    n_text, text_width = tensors["positional_embedding"].shape
    n_vocab, _ = tensors["token_embedding.weight"].shape
    _, n_embed = tensors["text_projection"].shape
    return ClipConfig(
        image_size=patch * math.isqrt(n_patches),
        patch_size=patch,
        vision=tower(
            "visual.", vision_width, vision_head_width or HEAD_WIDTHS.get(vision_width, 64)
        ),
        n_text=n_text,
        n_vocab=n_vocab,
        text=tower("", text_width, text_head_width),
        n_embed=n_embed,
        quick_gelu=quick_gelu,
    )


def _read(path: Path) -> dict[str, Tensor]:
    tensors: Any
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        elif _is_torchscript(path):
            raise InputError(
                f"{path} is a TorchScript archive, which holds code beside weights and is not "
                f"opened: {WAY_OUT}"
            )
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"--weights {path} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # what is no pickle makes the restricted unpickler raise anything
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise InputError(
            f"{path} holds no weights that can be read without running it, or is damaged "
            f"({reason[0][:200]}); {WAY_OUT}"
        ) from error
    if isinstance(tensors, dict) and "state_dict" in tensors:
        tensors = tensors["state_dict"]  # a checkpoint of open_clip's training
    if not isinstance(tensors, dict):
        raise InputError(f"{path} holds a {type(tensors).__name__}, no state dict; {WAY_OUT}")
    named = {str(name).removeprefix("module."): value for name, value in tensors.items()}
    named = {name: value for name, value in named.items() if name not in NO_WEIGHTS}
    if wrong := [name for name, value in named.items() if not isinstance(value, Tensor)]:
        raise InputError(f"{path} holds {wrong[0]!r}, which is no tensor; {WAY_OUT}")
    return named


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        path.open("rb").close()  # of a file that is not there it says no, too
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
