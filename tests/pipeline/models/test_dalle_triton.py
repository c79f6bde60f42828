"""The whole model on the Triton kernels: on a GPU compiled, else in Triton's interpreter."""

import dataclasses

import pytest
import torch

from pipeline import presets
from pipeline.config import DalleConfig
from pipeline.models.dalle import Dalle, nll_sums
from pipeline.training.optimizer import AdamW, parameter_groups
from pipeline.training.schedules import LearningRate

ON_A_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_A_GPU else "cpu")
pytestmark = [pytest.mark.gpu] if ON_A_GPU else []
# all of the demo's model; of what the interpreter does in seconds, one head
STEPS, BATCH, HEADS = (30, 32, 4) if ON_A_GPU else (6, 2, 1)


def losses(config: DalleConfig, backend: str, dtype: torch.dtype) -> list[float]:
    """The first losses of the demo's recipe on random captions and codes, new ones each step."""
    run = presets.dalle_demo()
    torch.manual_seed(0)
    model = Dalle(config).to(DEVICE)
    model.set_compute_dtype(dtype)
    model.set_attention_backend(backend)
    optimizer = AdamW(parameter_groups(model, run.optimizer), run.optimizer)
    generator = torch.Generator().manual_seed(1)
    curve = []
    for step in range(STEPS):
        shape = (BATCH, config.n_text), (BATCH, config.n_image)
        text = torch.randint(40, shape[0], generator=generator).to(DEVICE)
        image = torch.randint(10, shape[1], generator=generator).to(DEVICE)
        text_nll, image_nll = nll_sums(*model(text, image), text, image)
        loss = text_nll / text.numel() / 8 + image_nll / image.numel() * 7 / 8
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.gradient_clipping)
        optimizer.set_lr(LearningRate(run.lr, run.warmup).at(step))
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        (torch.float32, 1e-4),
        pytest.param(
            torch.bfloat16,
            1e-3,
            marks=pytest.mark.skipif(not ON_A_GPU, reason="the interpreter has no bfloat16"),
        ),
    ],
    ids=str,
)
def test_the_demo_model_learns_the_same_through_both_paths(dtype, bound):
    config = dataclasses.replace(presets.dalle_demo().model, d_model=32 * HEADS, n_head=HEADS)
    triton, naive = (losses(config, backend, dtype) for backend in ("triton", "naive"))
    assert triton == pytest.approx(naive, rel=bound)
    assert naive[-1] < naive[0] - 1e-3


def test_a_token_shows_from_the_next_position_on_and_nowhere_before():
    """The leak test of test_dalle.py on these kernels, for every seventh token."""
    config = dataclasses.replace(
        presets.dalle_demo().model, d_model=32, n_head=1, n_text=5, grid=4, conv_kernel=3
    )
    torch.manual_seed(0)
    model = Dalle(config).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    model.set_attention_backend("triton")
    text = torch.randint(config.n_text_vocab, (1, config.n_text), device=DEVICE)
    image = torch.randint(config.n_image_vocab, (1, config.n_image), device=DEVICE)

    @torch.no_grad()
    def logits(text, image):
        of_text, of_image = model(text, image)
        return [*of_text[0], *of_image[0]]

    before = logits(text, image)
    for j in range(0, config.n_ctx, 7):
        stream = torch.cat([text, image], dim=1)
        stream[0, j] = (stream[0, j] + 1) % config.n_image_vocab
        after = logits(stream[:, : config.n_text], stream[:, config.n_text :])
        changed = {p for p in range(config.n_ctx) if not torch.equal(before[p], after[p])}
        assert min(changed) == j + 1, f"token {j}"
