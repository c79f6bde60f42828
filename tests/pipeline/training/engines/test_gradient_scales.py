import json
import math
from functools import partial

import pytest
import torch

from pipeline.config import DalleConfig, DalleRun, Optimizer, Ramp
from pipeline.console import InputError
from pipeline.models.dalle import Dalle, nll_sums
from pipeline.models.scaling import Scale, enter, leave
from pipeline.training.engines import gradient_scales
from pipeline.training.engines.engine import PlainEngine
from pipeline.training.engines.gradient_scales import GradientScales
from tests.pipeline.models.test_scaling import tokens

pytestmark = pytest.mark.usefixtures("one_cpu_thread")

NAMES = ("a", "b", "c")


def make():
    return GradientScales({name: Scale() for name in NAMES})


def same(flags):
    return flags


def parts(**values):
    return {name: [torch.tensor([1.0, values.get(name, 2.0)])] for name in NAMES}


def values(scales):
    return [block.scale.value for block in scales._blocks.values()]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_only_the_block_that_overflowed_is_skipped_and_its_gradients_are_zero(bad):
    scales = make()
    gradients = parts(b=bad)
    assert scales.unscale(gradients, same) == {"a": False, "b": True, "c": False}
    for name in "ac":
        assert gradients[name][0].tolist() == [1 / 2**13, 2 / 2**13]
    assert gradients["b"][0].tolist() == [0, 0]
    up, down = 2**13 * 2 ** (1 / 1000), 2**13 / math.sqrt(2)
    assert values(scales) == pytest.approx([up, down, up], rel=1e-12)


def test_a_block_is_skipped_where_any_rank_saw_it_overflow():
    scales = make()
    gradients = parts(a=math.nan)
    assert scales.unscale(gradients, lambda flags: torch.maximum(flags, torch.tensor([0, 0, 1.0])))
    assert gradients["a"][0].tolist() == gradients["c"][0].tolist() == [0, 0]
    assert gradients["b"][0].tolist() != [0, 0]


def test_a_scale_shrinks_once_in_125_updates_and_stays_within_its_bounds():
    scales = make()
    seen = []
    for _ in range(2000):
        scales.unscale(parts(b=math.inf), same)
        seen.append(values(scales)[1])
    shrunk = [i for i in range(1, 2000) if seen[i] < seen[i - 1]]
    assert seen[0] == pytest.approx(2**12.5)
    assert shrunk[:3] == [125, 250, 375]
    assert seen[-1] == 2**7
    scales = make()
    for _ in range(12_000):
        scales.unscale({}, same)
    assert values(scales) == [2**24] * 3


def test_the_share_of_skipped_updates_is_told():
    scales = make()
    for i in range(10):
        scales.unscale(parts(b=math.inf if i < 3 else 1.0), same)
    assert scales.figures()["skipped_share"] == pytest.approx(3 / 30)
    assert scales.by_block(scales.zeros)["b/skipped_share"] == pytest.approx(0.3)
    assert scales.figures()["scale_log2_min"] == pytest.approx(13 - 0.5 + 9 / 1000 - 0.002)
    assert scales.figures()["scale_log2_max"] == pytest.approx(13.01)


def test_zeros_are_counted_when_somebody_looks():
    scales = make()
    gradients = {"a": [torch.tensor([0.0, 1.0, -0.0, 2.0]), torch.zeros(4)], "b": [torch.ones(2)]}
    scales.unscale(gradients, same)
    assert scales.zeros.tolist() == [[0, 0]] * 3
    scales.looks = True
    scales.unscale(gradients, same)
    assert scales.zeros.tolist() == [[6, 8], [0, 2], [0, 0]]
    shares = [scales.by_block(scales.zeros)[f"{name}/zero_share"] for name in NAMES]
    assert shares == [0.75, 0, 0]


def test_200_updates_equal_a_plain_reference_across_a_resume():
    rng = torch.Generator().manual_seed(0)
    scales, scale, shrunk = make(), dict.fromkeys(NAMES, 2.0**13), dict.fromkeys(NAMES, -125)
    for update in range(200):
        bad = {name for name in NAMES if torch.rand((), generator=rng) < 0.05}
        scales.unscale(parts(**dict.fromkeys(bad, math.nan)), same)
        for name in NAMES:
            if name not in bad:
                scale[name] = min(2.0**24, scale[name] * 2 ** (1 / 1000))
            elif update - shrunk[name] >= 125:
                scale[name], shrunk[name] = max(2.0**7, scale[name] / math.sqrt(2)), update
        if update == 90:
            kept, scales = json.loads(json.dumps(scales.state())), make()
            scales.restore(kept)
        assert values(scales) == pytest.approx(list(scale.values()), rel=1e-12)


@pytest.mark.parametrize("state", [{}, {"updates": 3, "blocks": {"a": [1, 2, 3]}}, {"blocks": 3}])
def test_a_state_of_other_blocks_is_a_sentence(state):
    with pytest.raises(InputError, match=r"gradient scales lack or garble .*: delete that checkp"):
        make().restore(state)


# ---- gradients in 16 bits


class Round16(torch.autograd.Function):
    """The identity whose gradient goes through float16, as in a block that computes in it."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.half().float()


class Deep(torch.nn.Module):
    """Residual blocks whose gradients are powers of two apart; each fits columns of its own.

    Block i adds ``size_i * (W_i u)`` to its columns of the stream, and the loss takes the columns
    by ``1 / size_i``: all blocks matter alike, with gradients of about ``1 / size_i``.
    """

    def __init__(self, sizes, width=4):
        super().__init__()
        self.sizes, self.width = sizes, width
        self.weights = torch.nn.ParameterList(torch.zeros(width, 6) for _ in sizes)
        self.scales = [None] * len(sizes)

    def forward(self, u, targets):
        x = torch.zeros(len(u), len(self.sizes) * self.width)
        for i, (size, weight, scale) in enumerate(
            zip(self.sizes, self.weights, self.scales, strict=True)
        ):
            h = enter(x, scale)
            y = torch.zeros_like(h)
            y[:, i * self.width : (i + 1) * self.width] = size * (u @ weight.T)
            y = y + 0 * h
            x = x + leave(y if scale is None else Round16.apply(y), scale)
        size = torch.tensor(self.sizes).repeat_interleave(self.width)
        return (x / size - targets).square().mean()


def fitted(kind, updates=400):
    """How far each block is from the truth: in float32, with one scale for all, or one for each."""
    sizes = [2.0 ** (31 - 3 * i) for i in range(16)]  # gradients from 2^-40 to 2^5
    model = Deep(sizes)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(32, 6, generator=generator)
    truth = torch.randn(len(sizes) * model.width, 6, generator=generator)
    shared = Scale()
    scales = None
    if kind != "float32":
        model.scales = [shared if kind == "one" else Scale() for _ in sizes]
        chosen = {"all": shared} if kind == "one" else dict(enumerate(model.scales))
        scales = GradientScales({str(name): scale for name, scale in chosen.items()})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(updates):
        optimizer.zero_grad()
        # noise, or gradients would vanish with the loss, and scales grow without an end
        noise = torch.randn(32, len(truth), generator=generator)
        model(u, u @ truth.T + noise).backward()
        if scales is not None:
            gradients = [weight.grad for weight in model.weights]
            by_block = dict(zip(map(str, range(len(sizes))), ([g] for g in gradients), strict=True))
            skipped = scales.unscale({"all": gradients} if kind == "one" else by_block, same)
            for i, weight in enumerate(model.weights):
                if skipped["all" if kind == "one" else str(i)]:
                    weight.grad = None
        optimizer.step()
    left = [
        (weight.detach() - truth[i * model.width : (i + 1) * model.width]).square().mean().item()
        for i, weight in enumerate(model.weights)
    ]
    return left, scales


def test_blocks_far_apart_learn_with_a_scale_each_and_not_with_one_for_all(monkeypatch):
    # a thousand updates in sixteen
    monkeypatch.setattr(gradient_scales, "GROWTH", 2 ** (1 / 16))
    monkeypatch.setattr(gradient_scales, "PAUSE", 2)
    exact, _ = fitted("float32")
    each, scales = fitted("each")
    one, _ = fitted("one")
    assert max(exact) < 0.005
    assert max(each) < 0.005
    assert one[0] > 0.3
    assert one[1] > 0.3
    # the quietest take all the scale they may, the loudest hardly any
    found = [block.scale.value for block in scales._blocks.values()]
    assert found[0] == 2**24
    assert found[-1] < 2**13
    assert 0.005 < scales.figures()["skipped_share"] < 0.1


RUN = DalleRun(
    model=DalleConfig(
        n_layer=3, d_model=32, n_head=2, n_text=6, n_text_vocab=300, grid=4, n_image_vocab=16,
        conv_kernel=3,
    ),
    optimizer=Optimizer(
        betas=(0.9, 0.96), weight_decay=0.045, gradient_clipping=4.0, ema_decay=0.9,
        max_exp_avg_sq=5.0,
    ),
    batch=8, steps=100, warmup=1, lr=Ramp(1e-2, 1e-2, 1),
)  # fmt: skip


def curve(dtype, updates=50):
    """Image losses of a small transformer that learns eight pictures by heart."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, 300, (8, 6), generator=generator)
    image = torch.randint(0, 16, (8, 16), generator=generator)
    engine = PlainEngine(lambda: Dalle(RUN.model), RUN, dtype=dtype)
    engine.module.set_compute_dtype(engine.compute_dtype)
    losses = []
    for _ in range(updates):
        text_nll, image_nll = nll_sums(*engine.model(text, image), text, image)
        losses.append(image_nll.item() / image.numel())
        engine.backward((text_nll / text.numel() + 7 * image_nll / image.numel()) / 8)
        engine.update(RUN.lr.start)
    return losses, engine


def test_the_transformer_learns_in_float16_what_it_learns_in_float32():
    exact, plain = curve(torch.float32)
    rough, engine = curve(torch.float16)
    assert plain.scales is None
    assert exact[0] == pytest.approx(math.log(16))
    assert exact[-1] < 0.3
    torch.testing.assert_close(rough[:10], exact[:10], rtol=0.02, atol=0)
    assert rough[-1] < 0.4
    figures = engine.scales.figures()
    assert figures["scale_log2_max"] == pytest.approx(13 + 50 / 1000, abs=0.01)
    # a planted overflow: one block stays as it is, and the run goes on
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    engine.model.get_parameter("blocks.1.mlp.up.weight").grad = torch.full((128, 32), math.inf)
    for p in engine.model.parameters():
        if p.grad is None:
            p.grad = torch.randn_like(p)
    assert math.isfinite(engine.update(1e-2))
    for name, p in engine.model.named_parameters():
        is_same = engine.module.block_of(name) == "blocks.1.mlp"
        assert torch.equal(p, before[name]) == is_same, name


def keep(found, module, inner, outer):
    found.append(outer[0].clone())


def test_the_papers_convention_gives_the_same_16_bit_gradients():
    """A loss divided by the batch of M ranks, and scales of M * 2^13: what is in 16 bits agrees."""
    ranks = 8
    seen = []
    for share, start in ((1 / ranks, ranks * 2.0**13), (1.0, 2.0**13)):
        torch.manual_seed(0)
        model = Dalle(RUN.model)
        torch.nn.init.normal_(model.image_head.weight, std=0.1)
        model.set_compute_dtype(torch.float16)
        for scale in model.take_gradient_scales().values():
            scale.value = start
        found = []
        for module in model.modules():
            if hasattr(module, "compute_dtype"):
                module.register_full_backward_hook(partial(keep, found))
        _, image_nll = nll_sums(*model(*tokens(RUN.model)), *tokens(RUN.model))
        (image_nll * share / 48).backward()
        seen.append(found)
    assert {gradient.dtype for gradient in seen[0]} == {torch.float16}
    assert len(seen[0]) == 4 * RUN.model.n_layer
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one, other)
        assert one.abs().max() > 0
