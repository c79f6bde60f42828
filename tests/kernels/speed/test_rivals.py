from functools import partial

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from kernels.patterns import Pattern, mask_on
from kernels.speed import rivals
from kernels.speed.rivals import Inputs, Rival

CPU = torch.device("cpu")
SMALL = {"batch": 2, "heads": 3, "width": 4, "dtype": "float32"}
PATTERNS = [
    Pattern("row", 5, 6),
    Pattern("column", 7, 5),
    Pattern("conv", 6, 7, kernel=3),
    Pattern("conv", 2, 5, kernel=11),
    Pattern("conv", 6, 7, kernel=5, edge="clamp"),
    Pattern("conv", 0, 4, kernel=11, edge="clamp"),
    Pattern("dense", 4, 3),
]


def transposed(pattern):
    """Token of each place, from the definition: text, then column by column."""
    T, W = pattern.n_text, pattern.grid
    image = [T + row * W + column for column in range(W) for row in range(W)]
    return torch.tensor([*range(T), *image])


def expected_mask(pattern):
    mask = pattern.mask()
    if pattern.kind == "column":
        order = transposed(pattern)
        mask = mask[order][:, order]
    return mask


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_flex_attends_to_the_pairs_of_the_pattern(pattern):
    N = pattern.n_tokens
    mask = create_mask(rivals.flex_mask(pattern), 1, 1, N, N, device="cpu")[0, 0]
    assert torch.equal(mask, expected_mask(pattern))


@pytest.mark.parametrize("kind", ["row", "column", "conv", "dense"])
def test_flex_skips_the_empty_blocks_of_the_paper(kind):
    pattern = Pattern(kind, 256, 32)
    rule, N = rivals.flex_mask(pattern), pattern.n_tokens
    blocks = create_block_mask(rule, None, None, N, N, CPU, BLOCK_SIZE=64)
    pooled = expected_mask(pattern).view(20, 64, 20, 64).any(3).any(1)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), pooled)
    assert pooled.sum() == {"row": 105, "column": 90, "conv": 132, "dense": 210}[kind]


def test_by_columns_is_its_own_inverse_and_the_order_of_the_grid():
    pattern = Pattern("column", 3, 4)
    x_BHND = torch.arange(19.0).view(1, 1, 19, 1)
    made = rivals.by_columns(x_BHND, pattern)
    assert made.flatten().tolist() == transposed(pattern).tolist()
    assert torch.equal(rivals.by_columns(made, pattern), x_BHND)


@pytest.mark.parametrize("form", ["packed", "apart", "columns"])
def test_every_form_gives_the_same_outputs(form):
    pattern = Pattern("column", 3, 4)
    mask = expected_mask(pattern) if form == "columns" else mask_on(pattern, CPU)
    attend = partial(rivals.sdpa, attn_mask=mask)
    if form == "packed":
        attend = rivals.rivals(pattern, CPU)["windowed"].attend
    inputs = Inputs(pattern, SMALL, CPU)
    outputs = inputs.outputs(Rival(attend, form, pattern))
    errors = rivals.distances(outputs, inputs.truth(pattern))
    assert list(errors) == ["o", "dq", "dk", "dv"]
    assert all(0 < error < 1e-6 for error in errors.values())
    # the last sample, the last two heads
    assert outputs["dq"].shape == (1, 19, 2, 4)


def test_a_result_that_is_not_written_has_a_large_error():
    pattern = Pattern("row", 3, 4)
    inputs = Inputs(pattern, SMALL, CPU)
    lazy = Rival(lambda q, k, v: 0 * (q + k + v), "apart", pattern)
    errors = rivals.distances(inputs.outputs(lazy), inputs.truth(pattern))
    assert errors == pytest.approx({"o": 1, "dq": 1, "dk": 1, "dv": 1})


def test_naive_is_left_out_where_its_scores_do_not_fit():
    paper, large = Pattern("row", 256, 32), {"batch": 8, "heads": 62}
    assert "16 GB" in rivals.too_large("naive", large, paper)
    assert rivals.too_large("windowed", large, paper) is None
    assert rivals.too_large("naive", {"batch": 1, "heads": 2}, paper) is None
