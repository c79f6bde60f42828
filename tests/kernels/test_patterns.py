import re
from pathlib import Path

import pytest
import torch

from kernels import Pattern
from kernels.patterns import mask_on
from tests.kernels.helpers import LARGE, SMALL, name_of

GOLDEN = Path(__file__).parent / "golden" / "attention_masks_figure11.txt"

PATTERNS = [
    *SMALL,
    *LARGE,
    Pattern("row", 0, 1),
    Pattern("column", 0, 1),
    Pattern("conv", 0, 1),
    Pattern("conv", 3, 2, kernel=3),
    Pattern("conv", 2, 7, kernel=5),
    Pattern("conv", 2, 7, kernel=7),
    Pattern("conv", 0, 7, kernel=9),
    Pattern("conv", 1, 6, kernel=1, edge="clamp"),
    Pattern("conv", 0, 7, kernel=5, edge="clamp"),
    Pattern("conv", 2, 4, kernel=11, edge="clamp"),
]


def golden_mask(name):
    block = re.search(rf"^\[{name}\]\n((?:[#.]+\n)+)", GOLDEN.read_text(), re.MULTILINE).group(1)
    return torch.tensor([[cell == "#" for cell in line] for line in block.splitlines()])


def mask_by_definition(pattern):
    """Paper, appendix B.1 and figure 11, with loops over rows and columns of the grid."""
    T, W, N, R = pattern.n_text, pattern.grid, pattern.n_tokens, pattern.kernel // 2
    mask = torch.zeros(N, N, dtype=torch.bool)
    for q in range(T):
        mask[q, : q + 1] = True
    for i in range(W * W):
        row, column = divmod(i, W)
        mask[T + i, :T] = True
        mask[T + i, T + i] = True
        if pattern.kind == "dense":
            mask[T + i, T : T + i + 1] = True
        elif pattern.kind == "row":
            for back in range(1, W + 1):
                if i - back >= 0:
                    mask[T + i, T + i - back] = True
        elif pattern.kind == "column":
            for above in range(row):
                mask[T + i, T + above * W + column] = True
        else:
            for dr in range(R + 1):
                for dc in range(-R, R + 1):
                    if pattern.edge == "clamp":
                        if row - dr < 0 or not 0 <= column + dc < W:
                            continue
                        k = (row - dr) * W + column + dc
                    else:
                        k = i - dr * W - (-dc) % W
                    if 0 <= k <= i:
                        mask[T + i, T + k] = True
    return mask


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_mask_is_figure_11(kind):
    assert torch.equal(Pattern(kind, 6, 4, kernel=3).mask(), golden_mask(kind))


def test_transposed_column_mask_is_figure_11():
    order = torch.cat([torch.arange(6), 6 + torch.arange(16).view(4, 4).T.flatten()])
    mask = Pattern("column", 6, 4).mask()[order][:, order]
    assert torch.equal(mask, golden_mask("column_transposed"))


@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
def test_mask_follows_the_definition(pattern):
    assert torch.equal(pattern.mask(), mask_by_definition(pattern))


@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
def test_pairs_counts_the_mask(pattern):
    assert pattern.pairs() == pattern.mask().sum()


@pytest.mark.parametrize("kind", ["row", "column", "conv", "dense"])
def test_paper_size_has_the_golden_pair_counts(kind):
    golden = int(re.search(rf"^{kind} (\d+)$", GOLDEN.read_text(), re.MULTILINE).group(1))
    known = {"row": 328_304, "column": 311_936, "conv": 356_384, "dense": 819_840}
    pattern = Pattern(kind, 256, 32)
    assert known[kind] == golden == pattern.pairs() == pattern.mask().sum()


def test_clamped_conv_drops_the_pairs_across_the_border():
    wrap, clamp = Pattern("conv", 6, 4, kernel=3), Pattern("conv", 6, 4, kernel=3, edge="clamp")
    # ru-dalle's v3 mask differs from figure 11(d) in 18 of 484 cells, all of them in the image
    assert (wrap.mask() != clamp.mask()).sum() == 18
    assert not (clamp.mask() & ~wrap.mask()).any()


@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
def test_reach_is_the_largest_distance(pattern):
    q, k = pattern.mask()[pattern.n_text :, pattern.n_text :].nonzero().unbind(1)
    assert pattern.reach == (q - k).max()


@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
def test_image_keys_are_the_mask_rows(pattern):
    image = pattern.mask()[pattern.n_text :, pattern.n_text :]
    for i in range(pattern.n_image):
        keys = pattern.image_keys(i)
        assert keys.dtype == torch.int64
        assert torch.equal(keys, image[i].nonzero()[:, 0])


@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
def test_slots_hold_the_visible_keys_at_every_step(pattern):
    slots, is_key = pattern.slot_table()
    ring = torch.full((pattern.n_slots,), -1)
    for i in range(pattern.n_image):
        ring[pattern.slot_of(torch.tensor(i))] = i
        assert torch.equal(ring[pattern.key_slots(i)], pattern.image_keys(i))
        assert torch.equal(ring[slots[i][is_key[i]]], pattern.image_keys(i))
        assert (slots[i][~is_key[i]] == 0).all()
    assert is_key.sum(1).max() == is_key.shape[1] == slots.shape[1]


@pytest.mark.parametrize(
    ("pattern", "n_slots"),
    [
        (Pattern("row", 256, 32), 33),
        (Pattern("column", 256, 32), 993),
        (Pattern("conv", 256, 32), 192),
        (Pattern("conv", 256, 32, edge="clamp"), 166),
        (Pattern("dense", 256, 32), 1024),
        (Pattern("row", 0, 1), 1),
    ],
    ids=name_of,
)
def test_ring_is_no_larger_than_it_must_be(pattern, n_slots):
    assert pattern.n_slots == n_slots


@pytest.mark.parametrize("grid", [1, 2, 32])
def test_the_keys_of_a_column_are_neighbours(grid):
    pattern = Pattern("column", 3, grid)
    for i in range(pattern.n_image - grid):
        slots = pattern.key_slots(i)
        assert torch.equal(slots, slots[0] + torch.arange(len(slots)))


def test_mask_on_is_built_once():
    pattern, cpu = Pattern("row", 3, 3), torch.device("cpu")
    assert mask_on(pattern, cpu) is mask_on(Pattern("row", 3, 3), cpu)
    assert torch.equal(mask_on(pattern, cpu), pattern.mask())


def test_mask_first_asked_for_in_inference_mode_can_be_saved_for_backward():
    with torch.inference_mode():
        assert not mask_on(Pattern("row", 4, 2), torch.device("cpu")).is_inference()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kind": "axial"}, r"kind is 'axial'; choose one of row, column, conv, dense"),
        ({"n_text": -1}, r"n_text is -1; it must be an int of at least 0"),
        ({"n_text": 2.0}, r"n_text is 2\.0; it must be an int"),
        ({"grid": 0}, r"grid is 0; it must be an int of at least 1"),
        ({"grid": True}, r"grid is True; it must be an int"),
        ({"kernel": -1}, r"kernel is -1; it must be an int of at least 1"),
        ({"kernel": 4}, r"kernel is 4; it must be odd to have a centre, take 3 or 5"),
        ({"edge": "torus"}, r"edge is 'torus'; choose one of wrap, clamp"),
        ({"kind": "row", "edge": "clamp"}, r"edge 'clamp' is for kind 'conv', not 'row'"),
    ],
)
def test_wrong_arguments_are_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Pattern(**{"kind": "conv", "n_text": 2, "grid": 3, **arguments})


@pytest.mark.parametrize("i", [-1, 9])
def test_query_outside_the_image_is_named(i):
    with pytest.raises(ValueError, match=rf"image query {i} is outside the image; use 0 to 8"):
        Pattern("row", 2, 3).key_slots(i)


@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
def test_a_spelled_pattern_is_read_as_itself(pattern):
    assert Pattern.read(pattern.spelled) == pattern
