import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from kernels import Pattern, packed_attention
from pipeline.config import DalleConfig
from pipeline.models import dalle as dalle_module
from pipeline.models.dalle import (
    NO_TOKEN,
    Attention,
    Block,
    Dalle,
    Dense,
    Head,
    ImageEmbedding,
    LayerNorm,
    TextEmbedding,
    layer_patterns,
    load_dalle,
    nll_sums,
    save_dalle,
)

FIGURE_11 = Path(__file__).parents[2] / "kernels" / "golden" / "attention_masks_figure11.txt"
# the loss of 20 updates of ``train_twenty_steps``; one line an update
LOSSES = Path(__file__).parent / "golden" / "losses.txt"


def tiny_config(n_layer=4, n_text=5, grid=4):
    return DalleConfig(
        n_layer=n_layer,
        d_model=16,
        n_head=2,
        n_text=n_text,
        n_text_vocab=11,
        grid=grid,
        n_image_vocab=9,
        conv_kernel=3,
    )


def random_dalle(config, seed=0):
    """Every parameter random and large, so that whatever is read shows."""
    model = Dalle(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.4, generator=generator)
            if name.endswith("gain"):
                parameter.add_(1)
    return model


def random_tokens(config, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(config.n_text_vocab, (batch, config.n_text), generator=generator)
    image = torch.randint(config.n_image_vocab, (batch, config.n_image), generator=generator)
    return text, image


def stream_logits(model, text, image):
    """What each position of the stream predicts, as a list of [B, V]."""
    with torch.no_grad():
        text_logits, image_logits = model(text, image)
    return [*text_logits.unbind(1), *image_logits.unbind(1)]


# ---- the layers


@pytest.mark.parametrize(
    ("n_layer", "kinds"),
    [
        (1, ["conv"]),
        (2, ["row", "conv"]),
        (3, ["row", "column", "conv"]),
        (4, ["row", "column", "row", "conv"]),
        (5, ["row", "column", "row", "row", "conv"]),
        (6, ["row", "column", "row", "row", "row", "conv"]),
        (7, ["row", "column", "row", "row", "row", "column", "conv"]),
    ],
)
def test_layers_follow_the_papers_order(n_layer, kinds):
    config = tiny_config(n_layer)
    wanted = [Pattern(kind, 5, 4, kernel=3) for kind in kinds]
    assert layer_patterns(config) == wanted
    assert [block.attention.pattern for block in Dalle(config).blocks] == wanted


def test_the_paper_has_47_row_16_column_and_one_convolution_layer():
    patterns = layer_patterns(DalleConfig())
    kinds = [pattern.kind for pattern in patterns]
    assert {kind: kinds.count(kind) for kind in kinds} == {"row": 47, "column": 16, "conv": 1}
    assert [i for i, kind in enumerate(kinds, 1) if kind == "column"] == list(range(2, 63, 4))
    assert patterns[-1] == Pattern("conv", 256, 32, kernel=11)


def test_paper_size_has_12_billion_parameters():
    with torch.device("meta"):
        model = Dalle(DalleConfig())
    dense = [m for m in model.modules() if isinstance(m, Dense)]
    assert sum(m.weight.numel() for m in dense) == 12_092_178_432
    d, n_layer = 3968, 64
    biases = n_layer * (3 + 1 + 4 + 1) * d
    norms = (2 * n_layer + 1) * 2 * d
    text = (16384 + 256 + 256 + 1) * d  # tokens, positions, pads, start
    image = (8192 + 32 + 32 + 1) * d  # tokens, rows, columns, start
    heads = (16384 + 8192) * d
    total = sum(p.numel() for p in model.parameters())
    assert total == 12_092_178_432 + biases + norms + text + image + heads
    assert total / 1e9 == pytest.approx(12.293, abs=5e-4)


# ---- the start


def test_first_loss_is_that_of_a_uniform_guess():
    config = DalleConfig(n_layer=2, d_model=16, n_head=2, n_text=5, grid=4)
    assert (config.n_text_vocab, config.n_image_vocab) == (16384, 8192)
    torch.manual_seed(0)
    text, image = random_tokens(config)
    logits = Dalle(config)(text, image)
    assert [tuple(x.shape) for x in logits] == [(2, 5, 16384), (2, 16, 8192)]
    assert not any(x.any() for x in logits)
    text_nll, image_nll = nll_sums(*logits, text, image)
    loss = text_nll / text.numel() / 8 + 7 * image_nll / image.numel() / 8
    assert loss.item() == pytest.approx(9.0976, abs=5e-4)


def test_initial_standard_deviations_are_those_of_sparse_transformers():
    config = DalleConfig(
        n_layer=3, d_model=256, n_head=4, n_text=64, n_text_vocab=512, grid=16, n_image_vocab=512
    )
    torch.manual_seed(0)
    found = dict(Dalle(config).named_parameters())
    d, residual = 256, 1 / math.sqrt(2 * 3)
    wanted = {
        "text_embedding.token": 0.125 / math.sqrt(d),
        "text_embedding.pad": 0.125 / math.sqrt(d),
        "text_embedding.start": 0.125 / math.sqrt(d),
        "text_embedding.position": 0.125 / math.sqrt(2 * d),
        "image_embedding.token": 0.125 / math.sqrt(d),
        "image_embedding.start": 0.125 / math.sqrt(d),
        "image_embedding.row": 0.125 / math.sqrt(3 * d),
        "image_embedding.column": 0.125 / math.sqrt(3 * d),
        "text_head.weight": 0,
        "image_head.weight": 0,
        "norm.gain": 1,
        "norm.bias": 0,
    }
    for i in range(3):
        wanted |= {
            f"blocks.{i}.attention.qkv.weight": 0.125 / math.sqrt(d),
            f"blocks.{i}.attention.out.weight": 0.125 / math.sqrt(d) * residual,
            f"blocks.{i}.mlp.up.weight": 0.125 / math.sqrt(d),
            f"blocks.{i}.mlp.down.weight": 0.125 / math.sqrt(4 * d) * residual,
        }
        wanted |= {f"blocks.{i}.{norm}_norm.gain": 1 for norm in ("attention", "mlp")}
        biases = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
        biases += ("attention_norm", "mlp_norm")
        wanted |= {f"blocks.{i}.{layer}.bias": 0 for layer in biases}
    assert found.keys() == wanted.keys()
    for name, std in wanted.items():
        values = found[name].detach()
        if std in (0, 1):
            assert torch.equal(values, torch.full_like(values, std)), name
        else:
            # four standard errors of a measured standard deviation
            error = 4 / math.sqrt(2 * values.numel())
            assert values.std().item() == pytest.approx(std, rel=error), name
            assert abs(values.mean().item()) < 4 * std / math.sqrt(values.numel()), name


# ---- the input stream


def read_stream(model, text, image):
    """What the first block reads."""
    seen = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(text, image)
    hook.remove()
    return seen[0]


def test_a_position_reads_the_token_before_it_and_carries_its_own_place():
    config = tiny_config(n_layer=1)
    model = random_dalle(config)
    words, codes = random_tokens(config, batch=3)
    words[0, 2:], words[1, :] = NO_TOKEN, NO_TOKEN
    x = read_stream(model, words, codes)
    assert x.shape == (3, 21, 16)
    text, image = model.text_embedding, model.image_embedding
    for b in range(3):
        for p in range(5):
            if p == 0:
                token = text.start
            elif words[b, p - 1] == NO_TOKEN:
                token = text.pad[p]
            else:
                token = text.token[words[b, p - 1]]
            torch.testing.assert_close(x[b, p], token + text.position[p])
        for i in range(16):
            token = image.start if i == 0 else image.token[codes[b, i - 1]]
            place = image.row[i // 4] + image.column[i % 4]
            torch.testing.assert_close(x[b, 5 + i], token + place)


def test_image_positions_can_be_embedded_a_few_at_a_time():
    embed = random_dalle(tiny_config(1)).image_embedding
    read = torch.tensor([[NO_TOKEN, *range(8), *range(7)]])
    with torch.no_grad():
        whole = embed(read)
        for first in range(16):
            for count in (1, 3):
                place = torch.arange(16)[first : first + count]
                part = embed(read[:, first : first + count], place)
                assert torch.equal(part, whole[:, first : first + count])


def test_pads_are_read_and_attended_to_after_the_caption_only():
    config = tiny_config()
    model = random_dalle(config)
    text, image = random_tokens(config)
    text[:, 2:] = NO_TOKEN  # t0 t1, and pads at positions 3 and 4; position 2 reads t1
    before = stream_logits(model, text, image)
    for p in range(config.n_text):
        kept = model.text_embedding.pad[p].clone()
        with torch.no_grad():
            model.text_embedding.pad[p] += 1
        after = stream_logits(model, text, image)
        with torch.no_grad():
            model.text_embedding.pad[p] = kept
        is_read = p >= 3
        for position, (a, b) in enumerate(zip(after, before, strict=True)):
            assert torch.equal(a, b) == (not is_read or position < p), (p, position)


def test_a_token_of_an_ended_caption_is_worth_nothing():
    """Whether the last text token is there shows in no logit: no position reads it."""
    config = tiny_config()
    model = random_dalle(config)
    text, image = random_tokens(config)
    shorter = text.clone()
    shorter[:, -1] = NO_TOKEN
    pairs = zip(
        stream_logits(model, text, image), stream_logits(model, shorter, image), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    logits = model(shorter, image)
    assert nll_sums(*logits, shorter, image)[0] < nll_sums(*logits, text, image)[0]


# ---- nothing leaks


def one_layer(kind):
    model = random_dalle(tiny_config(n_layer=1))
    model.blocks[0].attention.pattern = Pattern(kind, 5, 4, kernel=3)
    return model


LEAK_MODELS = {
    "row": partial(one_layer, "row"),
    "column": partial(one_layer, "column"),
    "conv": partial(one_layer, "conv"),
    "dense": partial(one_layer, "dense"),
    "row-conv": lambda: random_dalle(tiny_config(2)),
    "row-column-row-conv": lambda: random_dalle(tiny_config(4)),
    "row-column-row-row-row-conv": lambda: random_dalle(tiny_config(6)),
}


@pytest.mark.parametrize("backend", [None, "naive"], ids=["default", "naive"])
@pytest.mark.parametrize("layers", LEAK_MODELS)
def test_a_token_shows_from_the_next_position_on_and_nowhere_before(layers, backend, monkeypatch):
    calls = []

    def attend(*arguments, **choice):
        calls.append(choice)
        return packed_attention(*arguments, **choice)

    monkeypatch.setattr(dalle_module, "packed_attention", attend)
    model = LEAK_MODELS[layers]()
    model.set_attention_backend(backend)
    config = model.config
    text, image = random_tokens(config, batch=1)
    before = stream_logits(model, text, image)
    for j in range(config.n_ctx):
        changed_text, changed_image = text.clone(), image.clone()
        if j < config.n_text:
            changed_text[0, j] = (text[0, j] + 1) % config.n_text_vocab
        else:
            i = j - config.n_text
            changed_image[0, i] = (image[0, i] + 1) % config.n_image_vocab
        after = stream_logits(model, changed_text, changed_image)
        changed = {p for p in range(config.n_ctx) if not torch.equal(before[p], after[p])}
        assert not any(p <= j for p in changed), f"token {j} leaks to {min(changed)}"
        is_input = j not in (config.n_text - 1, config.n_ctx - 1)
        assert (j + 1 in changed) == is_input, f"token {j} and the position after it"
        if j < config.n_text - 1:
            # every image position sees all of the text
            assert changed >= set(range(config.n_text, config.n_ctx))
    assert len(calls) == (config.n_ctx + 1) * config.n_layer


# ---- against a model written another way


def figure_11(kind):
    block = re.search(rf"^\[{kind}\]\n((?:[#.]+\n)+)", FIGURE_11.read_text(), re.MULTILINE)
    rows = block.group(1).splitlines()
    return torch.tensor([[0.0 if cell == "#" else -math.inf for cell in row] for row in rows])


def reference_logits(state, config, text, image):
    """The transformer in float64 for one caption and picture, after the paper's text."""
    w = {name: value.double() for name, value in state.items()}
    d, heads = config.d_model, config.n_head

    def normed(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)
        return x * w[f"{name}.gain"] + w[f"{name}.bias"]

    def matrix(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    rows = [w["text_embedding.start"]]
    for p in range(1, config.n_text):
        token = int(text[p - 1])
        rows.append(w["text_embedding.token"][token] if token >= 0 else w["text_embedding.pad"][p])
    rows = [x + w["text_embedding.position"][p] for p, x in enumerate(rows)]
    for i in range(config.n_image):
        token = w["image_embedding.token"][image[i - 1]] if i else w["image_embedding.start"]
        row, column = divmod(i, config.grid)
        rows.append(token + w["image_embedding.row"][row] + w["image_embedding.column"][column])
    x = torch.stack(rows)
    for layer, kind in enumerate(["row", "column", "row", "conv"]):
        name = f"blocks.{layer}"
        packed = matrix(normed(x, f"{name}.attention_norm"), f"{name}.attention.qkv")
        width, out = d // heads, []
        for h in range(heads):
            q, k, v = (packed[:, s * d + h * width : s * d + (h + 1) * width] for s in range(3))
            scores = q @ k.T / math.sqrt(width) + figure_11(kind)
            weights = torch.exp(scores - scores.amax(-1, keepdim=True))
            out.append(weights / weights.sum(-1, keepdim=True) @ v)
        x = x + matrix(torch.cat(out, -1), f"{name}.attention.out")
        hidden = matrix(normed(x, f"{name}.mlp_norm"), f"{name}.mlp.up")
        x = x + matrix(hidden / (1 + torch.exp(-1.702 * hidden)), f"{name}.mlp.down")
    x = normed(x, "norm")
    text_logits = x[: config.n_text] @ w["text_head.weight"].T
    return text_logits, x[config.n_text :] @ w["image_head.weight"].T


@pytest.mark.parametrize("backend", [None, "naive"], ids=["default", "naive"])
def test_logits_are_those_of_a_plain_float64_model(backend):
    config = tiny_config(n_layer=4, n_text=6)
    model = random_dalle(config)
    model.set_attention_backend(backend)
    text, image = random_tokens(config, batch=3)
    text[1, 3:], text[2, :] = NO_TOKEN, NO_TOKEN
    with torch.no_grad():
        got = model(text, image)
    for b in range(3):
        wanted = reference_logits(model.state_dict(), config, text[b], image[b])
        for ours, theirs in zip(got, wanted, strict=True):
            assert theirs.abs().max() > 1
            torch.testing.assert_close(ours[b].double(), theirs, rtol=1e-5, atol=1e-5)


# ---- the loss


def test_nll_sums_are_the_negative_log_of_the_tokens_shares():
    config = tiny_config()
    generator = torch.Generator().manual_seed(0)
    text, image = random_tokens(config)
    text[0, 3:] = NO_TOKEN
    text_logits = torch.randn(2, 5, 11, generator=generator)
    image_logits = torch.randn(2, 16, 9, generator=generator)

    def nll(logits, tokens):
        total = 0.0
        for row, token in zip(
            logits.flatten(0, 1).tolist(), tokens.flatten().tolist(), strict=True
        ):
            if token != NO_TOKEN:
                total -= math.log(math.exp(row[token]) / sum(map(math.exp, row)))
        return total

    got = nll_sums(text_logits, image_logits, text, image)
    assert got[0].item() == pytest.approx(nll(text_logits, text), rel=1e-5)
    assert got[1].item() == pytest.approx(nll(image_logits, image), rel=1e-5)


def test_empty_captions_cost_nothing_and_train_all_the_same():
    config = tiny_config()
    model = random_dalle(config)
    text, image = random_tokens(config)
    text[:] = NO_TOKEN
    text_nll, image_nll = nll_sums(*model(text, image), text, image)
    assert text_nll.item() == 0
    (text_nll + image_nll).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# ---- memory and precision


def test_activation_checkpointing_changes_no_gradient():
    config = tiny_config()
    text, image = random_tokens(config)
    text[0, 2:] = NO_TOKEN
    gradients, forwards = {}, {}
    for checkpointed in (False, True):
        model = random_dalle(config)
        model.checkpoint_activations = checkpointed
        calls = []
        model.blocks[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        sum(nll_sums(*model(text, image), text, image)).backward()
        gradients[checkpointed] = {name: p.grad for name, p in model.named_parameters()}
        forwards[checkpointed] = len(calls)
    assert forwards == {False: 1, True: 2}
    for name, gradient in gradients[False].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[True][name], gradient, rtol=1e-6, atol=1e-6)


def dtypes_of(model, text, image):
    """What each kind of module read and wrote, and the logits."""
    seen = {}

    def note(module, inputs, output):
        kinds = seen.setdefault(type(module), set())
        kinds.add((inputs[0].dtype, output.dtype))

    hooks = [
        module.register_forward_hook(note)
        for module in model.modules()
        if isinstance(
            module,
            (Attention, Block, Dense, Head, ImageEmbedding, LayerNorm, TextEmbedding),
        )
    ]
    with torch.no_grad():
        logits = model(text, image)
    for hook in hooks:
        hook.remove()
    return seen, logits


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_is_for_the_matrices_only(stored, monkeypatch):
    config = tiny_config()
    model = random_dalle(config).to(stored)
    text, image = random_tokens(config)
    text[0, 3:] = NO_TOKEN
    _, exact = dtypes_of(model, text, image)
    model.set_compute_dtype(torch.bfloat16)
    attended = set()

    def attend(qkv, pattern, **choice):
        attended.add(qkv.dtype)
        return packed_attention(qkv, pattern, **choice)

    monkeypatch.setattr(dalle_module, "packed_attention", attend)
    seen, logits = dtypes_of(model, text, image)
    full, half = torch.float32, torch.bfloat16
    assert seen[Block] == seen[LayerNorm] == seen[Head] == {(full, full)}
    assert seen[TextEmbedding] == seen[ImageEmbedding] == {(torch.int64, full)}
    assert seen[Attention] == {(full, half)}
    assert {output for _, output in seen[Dense]} == {half}
    assert attended == {half}
    for ours, theirs in zip(logits, exact, strict=True):
        assert ours.dtype == theirs.dtype == full
        assert not torch.equal(ours, theirs)
        assert (ours - theirs).square().mean() < 1e-3 * theirs.square().mean()


# ---- the whole


def train_twenty_steps():
    """A small model learns eight captioned pictures by heart; the weighted loss of each step."""
    config = tiny_config(n_layer=4)
    torch.manual_seed(0)
    model = Dalle(config)
    text, image = random_tokens(config, batch=8)
    for b in range(8):
        text[b, 2 + b % 4 :] = NO_TOKEN
    # a large eps: gradients that are nothing but rounding must not move a parameter
    adam = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.96), eps=1e-5)
    losses = []
    for _ in range(20):
        text_nll, image_nll = nll_sums(*model(text, image), text, image)
        loss = text_nll / (text != NO_TOKEN).sum() / 8 + 7 * image_nll / image.numel() / 8
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


def test_twenty_steps_have_the_losses_on_record():
    wanted = [float(line) for line in LOSSES.read_text().splitlines()]
    assert wanted[-1] < 0.8 * wanted[0]
    assert train_twenty_steps() == pytest.approx(wanted, rel=1e-4)


def test_a_saved_model_comes_back_bit_for_bit(tmp_path):
    config = tiny_config()
    model = random_dalle(config)
    fingerprint = save_dalle(tmp_path / "dalle", model.state_dict(), config, {"dvae": "abc"})
    loaded, made_of, found = load_dalle(tmp_path / "dalle")
    assert (found, made_of, loaded.config) == (fingerprint, {"dvae": "abc"}, config)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    tokens = random_tokens(config)
    with torch.no_grad():
        for ours, theirs in zip(loaded(*tokens), model(*tokens), strict=True):
            assert torch.equal(ours, theirs)
