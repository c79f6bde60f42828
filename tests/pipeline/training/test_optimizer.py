import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config import Optimizer
from pipeline.models.dalle import Dalle
from pipeline.models.dvae import DiscreteVAE
from pipeline.training.checkpoint import Keeping, Save, resume
from pipeline.training.engines.engine import PlainEngine
from pipeline.training.optimizer import AdamW, parameter_groups
from tests import tiny
from tests.tiny import whole

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
            if r.max_exp_avg_sq:  # before it is used, and for all updates to come (B.2)
                self.v[name] = np.minimum(self.v[name], r.max_exp_avg_sq)
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


@pytest.mark.parametrize("stops_at", [None, 101])
@pytest.mark.parametrize("ema_every", [1, 7])
def test_weights_and_average_follow_a_float64_reference_for_200_updates(
    ema_every, stops_at, tmp_path
):
    engine = toy_engine(ema_every=ema_every)
    recipe = dataclasses.replace(RECIPE, ema_every=ema_every)
    reference = Reference(whole(engine, "weight"), recipe)
    rng = np.random.default_rng(0)
    for step in range(200):
        gradients = random_gradients(rng, scale=rng.uniform(0.1, 3.0))
        push(engine, gradients)
        lr = 0.01 / (1 + step / 50)
        assert engine.update(lr) == pytest.approx(reference.update(gradients, lr), rel=1e-5)
        if step == stops_at:
            described = {"kind": "toy", "identity": {}, "state": {}}
            Save(engine, tmp_path, described, Keeping()).wait()
            engine = toy_engine(ema_every=ema_every)
            resume(engine, tmp_path, {})
    for key, wanted in (("weight", reference.weights), ("ema", reference.ema)):
        for name, value in whole(engine, key).items():
            np.testing.assert_allclose(value.numpy(), wanted[name], rtol=1e-4, atol=1e-5)
    # a wrong rhythm or decay would show
    assert np.abs(reference.ema["weight"] - reference.weights["weight"]).max() > 1e-3


@pytest.mark.parametrize("bound", [1e-3, 0.02, 0.5])
def test_the_running_variance_is_clipped_before_it_is_used(bound):
    engine = toy_engine(max_exp_avg_sq=bound)
    recipe = dataclasses.replace(RECIPE, max_exp_avg_sq=bound)
    reference = Reference(whole(engine, "weight"), recipe)
    rng = np.random.default_rng(2)
    n_clipped = 0
    for _ in range(60):
        gradients = random_gradients(rng, scale=rng.uniform(0.1, 3.0))
        push(engine, gradients)
        engine.update(0.01)
        reference.update(gradients, 0.01)
        n_clipped += sum(int((v == bound).sum()) for v in reference.v.values())
    assert n_clipped > 20
    for name, value in whole(engine, "weight").items():
        np.testing.assert_allclose(value.numpy(), reference.weights[name], rtol=1e-4, atol=1e-5)
    for name, part in engine.slices():
        variance = part.values["exp_avg_sq"].view(SHAPES[name])
        np.testing.assert_allclose(variance, reference.v[name], rtol=1e-4, atol=1e-7)
        assert variance.max() <= bound * (1 + 1e-4)


def test_moments_of_16_bits_stay_near_those_of_32():
    engines = [toy_engine(moment_dtype=kind) for kind in ("float32", "bfloat16")]
    rng = np.random.default_rng(3)
    for _ in range(100):
        gradients = random_gradients(rng)
        for engine in engines:
            push(engine, gradients)
            engine.update(0.01)
    (exact, rough) = (dict(engine.slices()) for engine in engines)
    for name, part in rough.items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert exact[name].values[key].dtype == torch.float32
            assert part.values[key].dtype == torch.bfloat16
        for key in ("weight", "ema"):
            assert part.values[key].dtype == torch.float32
        moved = exact[name].values["weight"] - part.values["weight"]
        assert 0 < moved.abs().max() < 0.05
        torch.testing.assert_close(
            part.values["exp_avg_sq"].float(), exact[name].values["exp_avg_sq"], rtol=0.1, atol=0
        )


def test_a_skipped_block_keeps_weights_moments_and_count():
    model = Dalle(tiny.dalle().model)
    groups = parameter_groups(model, RECIPE, by_block=True)
    blocks = {group["block"] for group in groups}
    layers = [f"blocks.{i}.{part}" for i in range(3) for part in ("attention", "mlp")]
    assert blocks == {"embeddings", "heads", *layers}
    for group in groups:
        assert {model.block_of(n) for n, p in model.named_parameters()
                if any(p is q for q in group["params"])} == {group["block"]}  # fmt: skip
    optimizer = AdamW(groups, RECIPE)
    optimizer.set_lr(0.1)
    generator = torch.Generator().manual_seed(0)

    def update(skipped):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.skip({block: block in skipped for block in blocks})
        optimizer.step()

    def state(name, p):
        kept = optimizer.state[p]
        return [p, *(kept[key] for key in ("exp_avg", "exp_avg_sq", "step"))]

    # one is skipped before it has any state
    update({"blocks.0.mlp"})
    before = {n: [v.clone() for v in state(n, p)] for n, p in model.named_parameters()}
    update({"blocks.0.mlp", "blocks.2.attention"})
    for name, p in model.named_parameters():
        is_same = [torch.equal(a, b) for a, b in zip(state(name, p), before[name], strict=True)]
        is_skipped = model.block_of(name) in ("blocks.0.mlp", "blocks.2.attention")
        assert all(is_same) if is_skipped else not any(is_same), name
        steps = {"blocks.0.mlp": 0, "blocks.2.attention": 1}.get(model.block_of(name), 2)
        assert optimizer.state[p]["step"] == steps


def test_gains_and_biases_do_not_decay():
    engine = toy_engine()
    before = whole(engine, "weight")
    push(engine, {name: np.zeros(shape) for name, shape in SHAPES.items()})
    engine.update(0.1)
    after = whole(engine, "weight")
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
