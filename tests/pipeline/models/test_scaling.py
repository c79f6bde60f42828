import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from pipeline.config import DalleConfig
from pipeline.models.dalle import Dalle, nll_sums
from pipeline.models.scaling import Scale, enter, leave
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_cpu_thread")

CONFIG = tiny.dalle().model


def tokens(config=CONFIG, batch=3):
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(0, config.n_text_vocab, (batch, config.n_text), generator=generator)
    image = torch.randint(0, config.n_image_vocab, (batch, config.n_image), generator=generator)
    return text, image


def gradients(model, text, image):
    model.zero_grad()
    text_nll, image_nll = nll_sums(*model(text, image), text, image)
    (text_nll / text.numel() + image_nll / image.numel()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def trained(config=CONFIG):
    """A model whose heads do not stand at zero, where no gradient passes."""
    torch.manual_seed(0)
    model = Dalle(config)
    for head in (model.text_head, model.image_head):
        torch.nn.init.normal_(head.weight, std=0.1)
    return model


@pytest.mark.parametrize("checkpointed", [False, True])
def test_every_gradient_is_multiplied_by_the_scale_of_its_block_and_no_other(checkpointed):
    text, image = tokens()
    model = trained()
    wanted = gradients(model, text, image)
    logits = [x.detach() for x in model(text, image)]
    scales = model.take_gradient_scales()
    assert len(scales) == 2 * CONFIG.n_layer + 2
    for i, scale in enumerate(scales.values()):
        scale.value = 2.0 ** (i + 1)
    model.checkpoint_activations = checkpointed
    got = gradients(model, text, image)
    for name, gradient in got.items():
        # powers of two: nothing is rounded
        assert torch.equal(gradient / scales[model.block_of(name)].value, wanted[name]), name
    for new, old in zip(model(text, image), logits, strict=True):
        assert torch.equal(new, old)


def test_the_scale_is_taken_before_16_bits_and_given_back_behind_them():
    # 2^-20 is no float16 number
    x = torch.ones(4, requires_grad=True)
    w = torch.full((4,), 0.5, dtype=torch.float16, requires_grad=True)
    for scale, wanted in ((Scale(1.0), 0.0), (Scale(2.0**12), 2.0**-20)):
        x.grad = w.grad = None
        y = leave(enter(x, scale).to(torch.float16) * w, scale)
        assert y.dtype == torch.float32
        y.backward(torch.full((4,), 2.0**-30 if scale.value == 1 else 2.0**-20))
        assert x.grad.tolist() == [wanted / 2] * 4
        assert w.grad.dtype == torch.float16


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stops_at_the_border_of_a_block(bad):
    x, scale = torch.ones(3, requires_grad=True), Scale(4.0)
    leave(enter(x, scale), scale).backward(torch.tensor([1.0, bad, 2.0]))
    assert x.grad.tolist() == [1.0, 0.0, 2.0]

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.tensor([1.0, bad, 1.0])

    x.grad = None
    leave(Spoil.apply(enter(x, scale)), scale).backward(torch.ones(3))
    assert x.grad.tolist() == [1.0, 0.0, 1.0]


# ---- what is not the paper's


@pytest.mark.parametrize("width", [32, 64])
def test_queries_and_keys_are_normalised_head_by_head(width):
    config = dataclasses.replace(CONFIG, d_model=width, qk_norm=True)
    model = trained(config)
    plain = trained(dataclasses.replace(config, qk_norm=False))
    text, image = tokens(config)
    attention = model.blocks[0].attention
    head = width // config.n_head
    assert [norm.gain.shape for norm in attention.norms] == [(head,), (head,)]
    # whatever the size of queries and keys, the logits are the same
    outputs = []
    for factor in (1.0, 30.0):
        with torch.no_grad():
            attention.qkv.weight[: 2 * width] *= factor
            attention.qkv.bias[: 2 * width] *= factor
        outputs.append(model(text, image)[1].detach())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-2, atol=1e-3)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(plain(text, image)[1], outputs[1], atol=1e-2)


def moved(mup_width, width, lr=1e-3, updates=6):
    """How far a block's output and the logits are from where they began, after updates of Adam."""
    config = DalleConfig(
        n_layer=2, d_model=width, n_head=width // 16, n_text=8, n_text_vocab=300, grid=4,
        n_image_vocab=24, conv_kernel=3, mup_width=mup_width,
    )  # fmt: skip
    model = trained(config)
    torch.nn.init.zeros_(model.text_head.weight)
    torch.nn.init.zeros_(model.image_head.weight)
    optimizer = torch.optim.Adam(
        {"params": [p], "lr": lr * model.lr_scale(name)} for name, p in model.named_parameters()
    )
    text, image = tokens(config, batch=8)
    seen = []
    model.blocks[-1].mlp.register_forward_hook(lambda module, args, y: seen.append(y.detach()))
    for _ in range(updates + 1):
        logits = model(text, image)
        optimizer.zero_grad()
        sum(
            F.cross_entropy(x.flatten(0, 1), y.flatten())
            for x, y in zip(logits, (text, image), strict=True)
        ).backward()
        optimizer.step()
    return (seen[-1] - seen[0]).square().mean().sqrt().item(), logits[1].std().item()


def test_with_mup_the_first_updates_move_a_wide_model_as_far_as_a_narrow_one():
    narrow, wide, without = moved(32, 32), moved(32, 512), moved(None, 512)
    for a, b, c in zip(narrow, wide, without, strict=True):
        assert 0.7 < b / a < 1.4
        assert c / a > 2.5
    assert without[0] / narrow[0] > 20
