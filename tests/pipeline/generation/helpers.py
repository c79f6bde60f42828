import torch

from pipeline.config import DalleConfig, DvaeConfig
from pipeline.models.dalle import NO_TOKEN, Dalle
from pipeline.models.dvae import DiscreteVAE


def tiny_config(**changes):
    config = {
        "n_layer": 3, "d_model": 32, "n_head": 2, "n_text": 5, "n_text_vocab": 300,
        "grid": 4, "n_image_vocab": 24, "conv_kernel": 3,
    }  # fmt: skip
    return DalleConfig(**(config | changes))


def random_dalle(config, seed=0):
    """A model in which every parameter matters: heads and biases start at zero otherwise."""
    torch.manual_seed(seed)
    model = Dalle(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


def random_dvae(config, seed=0):
    torch.manual_seed(seed)
    dvae = DiscreteVAE(
        DvaeConfig(image_size=8 * config.grid, n_vocab=config.n_image_vocab, n_hid=8, n_init=8)
    )
    return dvae.eval().requires_grad_(False)


def random_captions(config, n, seed=0):
    """Captions of all lengths, none of them to the last position."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(config.n_text_vocab, (n, config.n_text), generator=generator)
    for row in range(n):
        text[row, max(config.n_text - 1 - row % config.n_text, 0) :] = NO_TOKEN
    return text
