"""The rule as Triton code against the dense masks, in Triton's interpreter."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.attention.geometry import (
    job_of_program,
    keys_before,
    sees,
    tokens_of,
    window_end,
    window_start,
)
from kernels.attention.launch import constants
from kernels.tiles import Tile
from tests.kernels.helpers import LARGE, SMALL, name_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
TILE = Tile(16, 16, 16, 4, 1)


@triton.jit
def rule_kernel(
    p_mask, p_token, p_start, p_end, p_before,
    T: tl.constexpr, W: tl.constexpr, R: tl.constexpr, REACH: tl.constexpr, KIND: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, LOCAL: tl.constexpr,
    PLACES: tl.constexpr,
):  # fmt: skip
    """One program a query's place: its row of the mask, its token, and the bounds around it."""
    i = tl.program_id(0)
    o_k = tl.arange(0, PLACES)
    o_q = i + tl.zeros([PLACES], tl.int32)
    b_seen = sees(o_q, o_k, W, R, REACH, KIND)
    tl.store(p_mask + i * W * W + o_k, b_seen.to(tl.int8), mask=o_k < W * W)
    tl.store(p_token + i, tokens_of(i, T, W, KIND))
    tl.store(p_start + i, window_start(i, W, REACH, KIND))
    tl.store(p_end + i, window_end(i, W * W, W, REACH, KIND))
    tl.store(p_before + i, keys_before(i, T, KIND))


@pytest.mark.parametrize("pattern", SMALL + LARGE, ids=name_of)
def test_rule_is_the_mask_and_its_bounds_miss_no_pair(pattern):
    n = pattern.n_image
    mask = torch.empty(n, n, dtype=torch.int8, device=DEVICE)
    token, start, end, before = torch.empty(4, n, dtype=torch.int32, device=DEVICE)
    rule_kernel[(n,)](
        mask, token, start, end, before, **constants(pattern, 32, TILE),
        PLACES=triton.next_power_of_2(n),
    )  # fmt: skip
    mask, token, start, end, before = (x.cpu().long() for x in (mask, token, start, end, before))
    assert sorted(token.tolist()) == list(range(pattern.n_text, pattern.n_tokens))
    whole = pattern.mask()
    assert torch.equal(mask.bool(), whole[token][:, token])
    for place in range(n):
        keys = mask[place].nonzero()[:, 0]
        # what lies before the window is seen by all queries from here on: it is among keys_before
        assert (before[place] - pattern.n_text) in (0, place)
        assert whole[token[place:], : before[place]].all()
        assert start[place] <= keys.min() or before[place] > pattern.n_text
        queries = mask[:, place].nonzero()[:, 0]
        assert queries.min() == place
        if pattern.kind == "dense":
            assert end[place] == place + 1
        else:
            assert queries.max() < end[place] <= n


@triton.jit
def job_kernel(
    p_job, n_z, T: tl.constexpr, I: tl.constexpr, ROWS: tl.constexpr, IMAGE_FIRST: tl.constexpr
):
    """Writes head, tile and segment of each program."""
    i_z, i_tile, is_image = job_of_program(T, I, ROWS, n_z, IMAGE_FIRST)
    p = p_job + tl.program_id(0) * 3
    tl.store(p, i_z)
    tl.store(p + 1, i_tile)
    tl.store(p + 2, is_image.to(tl.int32))


@pytest.mark.parametrize("image_first", [True, False])
@pytest.mark.parametrize(("n_text", "n_image"), [(32, 64), (7, 25), (0, 25)])
def test_every_tile_of_every_head_has_one_program(n_text, n_image, image_first):
    rows, n_z = 16, 5
    n_tiles = {1: triton.cdiv(n_image, rows), 0: triton.cdiv(n_text, rows)}
    job = torch.empty(n_z * sum(n_tiles.values()), 3, dtype=torch.int32, device=DEVICE)
    job_kernel[(len(job),)](job, n_z, n_text, n_image, rows, image_first)
    found = [tuple(row) for row in job.tolist()]
    wanted = [(z, tile, s) for s, n in n_tiles.items() for z in range(n_z) for tile in range(n)]
    assert sorted(found) == sorted(wanted)
    # the segment with the long jobs comes first, and one head's tiles stand side by side
    first = int(image_first)
    assert found[: n_z * n_tiles[first]] == [job for job in wanted if job[2] == first]
