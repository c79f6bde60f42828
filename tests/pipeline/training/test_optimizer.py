import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config import Optimizer
from pipeline.models.dalle import Dalle
from pipeline.models.dvae import DiscreteVAE
from pipeline.training.engine import PlainEngine
from pipeline.training.optimizer import parameter_groups
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_cpu_thread")

RECIPE = Optimizer(
    betas=(0.9, 0.96), weight_decay=0.045, gradient_clipping=4.0, ema_decay=0.9, ema_every=7
)
SHAPES = {"weight": (3, 5), "bias": (5,), "gain": (4,)}


class Toy(nn.Module):
    """Three parameters whose gradients a test chooses."""

    def __init__(self):
        super().__init__()
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))


def toy_engine(**changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    return PlainEngine(Toy, dataclasses.replace(tiny.dalle(), optimizer=recipe))


def push(engine, gradients):
    """Make ``gradients`` the gradients of the next update."""
    parameters = dict(engine.model.named_parameters())
    engine.backward(
        sum((parameters[n] * torch.tensor(g).float()).sum() for n, g in gradients.items())
    )


def random_gradients(rng, scale=1.0):
    return {name: scale * rng.standard_normal(shape) for name, shape in SHAPES.items()}


class Reference:
    """The update written down from Loshchilov and Hutter, and the average, in float64."""

    def __init__(self, weights, recipe):
        self.recipe, self.updates = recipe, 0
        self.weights = {name: value.double().numpy().copy() for name, value in weights.items()}
        self.m = {name: np.zeros(shape) for name, shape in SHAPES.items()}
        self.v = {name: np.zeros(shape) for name, shape in SHAPES.items()}
        self.ema = {}

    def update(self, gradients, lr):
        r = self.recipe
        self.updates += 1
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        shrink = min(1.0, r.gradient_clipping / norm) if r.gradient_clipping else 1.0
        for name, g in gradients.items():
            g = g * shrink
            self.m[name] = r.betas[0] * self.m[name] + (1 - r.betas[0]) * g
            self.v[name] = r.betas[1] * self.v[name] + (1 - r.betas[1]) * g**2
            m = self.m[name] / (1 - r.betas[0] ** self.updates)
            v = self.v[name] / (1 - r.betas[1] ** self.updates)
            decay = r.weight_decay if name == "weight" else 0.0
            self.weights[name] = self.weights[name] * (1 - lr * decay)
            self.weights[name] -= lr * m / (np.sqrt(v) + r.eps)
            if self.updates == 1:
                self.ema[name] = self.weights[name]
            elif self.updates % r.ema_every == 0:
                self.ema[name] = (
                    r.ema_decay * self.ema[name] + (1 - r.ema_decay) * self.weights[name]
                )
        return norm


@pytest.mark.parametrize("ema_every", [1, 7])
def test_weights_and_average_follow_a_float64_reference_for_200_updates(ema_every):
    engine = toy_engine(ema_every=ema_every)
    recipe = dataclasses.replace(RECIPE, ema_every=ema_every)
    reference = Reference(engine.gather("weight"), recipe)
    rng = np.random.default_rng(0)
    for step in range(200):
        gradients = random_gradients(rng, scale=rng.uniform(0.1, 3.0))
        push(engine, gradients)
        lr = 0.01 / (1 + step / 50)
        assert engine.update(lr) == pytest.approx(reference.update(gradients, lr), rel=1e-5)
    for key, wanted in (("weight", reference.weights), ("ema", reference.ema)):
        for name, value in engine.gather(key).items():
            np.testing.assert_allclose(value.numpy(), wanted[name], rtol=1e-4, atol=1e-5)
    # a wrong rhythm or decay would show
    assert np.abs(reference.ema["weight"] - reference.weights["weight"]).max() > 1e-3


def test_gains_and_biases_do_not_decay():
    engine = toy_engine()
    before = engine.gather("weight")
    push(engine, {name: np.zeros(shape) for name, shape in SHAPES.items()})
    engine.update(0.1)
    after = engine.gather("weight")
    torch.testing.assert_close(after["weight"], before["weight"] * (1 - 0.1 * 0.045))
    assert not torch.equal(after["weight"], before["weight"])
    for name in ("bias", "gain"):
        assert torch.equal(after[name], before[name])


def decaying(model):
    """(names that decay, names that do not), each cut to its last part."""
    names = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
    groups = parameter_groups(model, RECIPE)
    assert [group["weight_decay"] for group in groups] == [RECIPE.weight_decay, 0.0]
    assert sum(len(g["params"]) for g in groups) == len(names)
    return tuple({names[id(p)] for p in group["params"]} for group in groups)


def test_matrices_and_token_embeddings_of_the_transformer_decay():
    weights, others = decaying(Dalle(tiny.dalle().model))
    assert weights == {"weight", "token"}
    assert others == {"bias", "gain", "pad", "start", "position", "row", "column"}


def test_convolutions_of_the_dvae_decay_and_their_biases_do_not():
    assert decaying(DiscreteVAE(tiny.DVAE)) == ({"w"}, {"b"})


def first_moments(engine):
    return {name: part.values["exp_avg"] for name, part in engine.slices()}


@pytest.mark.parametrize(("norm", "kept"), [(10.0, 4.0), (3.0, 3.0)])
def test_the_gradient_is_cut_to_norm_4(norm, kept):
    engine = toy_engine()
    gradients = random_gradients(np.random.default_rng(1))
    length = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    push(engine, {name: g * norm / length for name, g in gradients.items()})
    assert engine.update(0.01) == pytest.approx(norm, rel=1e-5)
    moments = torch.cat(list(first_moments(engine).values()))
    assert moments.norm().item() == pytest.approx(kept * (1 - 0.9), rel=1e-4)


def test_clipping_at_0_is_off():
    engine = toy_engine(gradient_clipping=0.0)
    push(engine, {name: np.full(shape, 100.0) for name, shape in SHAPES.items()})
    engine.update(0.01)
    for moment in first_moments(engine).values():
        torch.testing.assert_close(moment, torch.full_like(moment, 10.0))
