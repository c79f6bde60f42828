"""Attention step by step against the dense definition of all steps at once."""

import pytest
import torch

from kernels import Pattern, sparse_attention
from kernels.attention import decode
from kernels.attention.block_sparse import INTERPRETED
from kernels.attention.decode import Kept, Place, decode_plain, decode_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# the interpreter multiplies bfloat16 wrongly
HALF = torch.float16 if DEVICE.type == "cpu" else torch.bfloat16
PATHS = [
    pytest.param(decode_plain, id="plain"),
    pytest.param(
        decode_triton,
        id="triton",
        marks=pytest.mark.skipif(
            DEVICE.type == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter"
        ),
    ),
]
PATTERNS = [
    Pattern("row", 5, 4), Pattern("column", 5, 4), Pattern("conv", 5, 4, kernel=3),
    Pattern("dense", 5, 3), Pattern("row", 1, 1), Pattern("column", 70, 2),
    Pattern("conv", 3, 4, kernel=5, edge="clamp"), Pattern("conv", 2, 2, kernel=1),
]  # fmt: skip
HEADS, WIDTH = 2, 32


def tokens(pattern, captions, dtype=torch.float32, seed=0):
    """q, k, v [B, N, H, D]; the text of rows with one caption is the same."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(captions), pattern.n_tokens, HEADS, WIDTH
    qkv = torch.randn(3, *shape, generator=generator)
    for row, caption in enumerate(captions):
        qkv[:, row, : pattern.n_text] = qkv[:, captions.index(caption), : pattern.n_text]
    return qkv.to(DEVICE, dtype)


def decoded(attend, pattern, captions, qkv, n_captions=None):
    """o_BIHD of the image tokens, one step after the other, strided as a projection is."""
    place = Place(len(captions), n_captions or max(captions) + 1, DEVICE)
    kept = Kept(pattern, place, HEADS, WIDTH, qkv.dtype)
    # what was in memory before must not matter
    kept.text_ZCHTD.fill_(float("nan"))
    kept.image_ZBHSD.fill_(float("nan"))
    place.restart(captions)
    for row, caption in enumerate(captions):
        kept.text_ZCHTD[:, caption] = qkv[1:, row, : pattern.n_text].transpose(1, 2)
    outs = []
    for i in range(pattern.n_image):
        packed = torch.stack(list(qkv[:, :, pattern.n_text + i]), dim=1)
        outs.append(attend(packed[:, 0], packed[:, 1:].transpose(0, 1), kept))
        place.advance()
    return torch.stack(outs, dim=1)


@pytest.mark.parametrize("captions", [[0, 1, 1, 0, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.spelled)
@pytest.mark.parametrize("attend", PATHS)
def test_steps_equal_attention_of_all_tokens_at_once(attend, pattern, captions):
    q, k, v = qkv = tokens(pattern, captions)
    want = sparse_attention(q, k, v, pattern, backend="naive")[:, pattern.n_text :]
    got = decoded(attend, pattern, captions, qkv)
    assert (got - want).abs().max() <= 2e-6


@pytest.mark.parametrize("kind", ["row", "column", "conv", "dense"])
@pytest.mark.parametrize("attend", PATHS)
def test_sixteen_bits_stay_near_the_truth(attend, kind):
    pattern = Pattern(kind, 5, 4, kernel=3)
    q, k, v = qkv = tokens(pattern, [0, 0, 1], HALF)
    want = sparse_attention(*(x.double() for x in (q, k, v)), pattern, backend="naive")
    got = decoded(attend, pattern, [0, 0, 1], qkv)
    assert got.dtype == HALF
    most = 2e-3 if torch.float16 == HALF else 2e-2
    assert (got.double() - want[:, pattern.n_text :]).abs().max() <= most


@pytest.mark.parametrize("attend", PATHS)
def test_more_rows_than_a_tile_holds(attend):
    pattern, n = Pattern("row", 3, 2), decode.TILE + 3
    captions = [*[1] * n, 0]
    q, k, v = qkv = tokens(pattern, captions)
    want = sparse_attention(q, k, v, pattern, backend="naive")[:, pattern.n_text :]
    assert (decoded(attend, pattern, captions, qkv) - want).abs().max() <= 2e-6


@pytest.mark.parametrize("kind", ["row", "column", "conv", "dense"])
@pytest.mark.parametrize("attend", PATHS if DEVICE.type == "cuda" else [decode_plain])
def test_a_row_does_not_depend_on_who_shares_its_caption(attend, kind):
    # not the interpreter, whose products are numpy's and round rows in different ways
    pattern = Pattern(kind, 19, 2, kernel=3)
    n = decode.TILE + 3
    alike = tokens(pattern, [0] * n)
    together = decoded(attend, pattern, [0] * n, alike)
    # the same text under other numbers, in tiles and calls of other sizes
    for captions in (list(range(n)), [row % 2 for row in range(n)], [*[1] * 4, *[0] * (n - 4)]):
        assert torch.equal(decoded(attend, pattern, captions, alike), together)
    other = alike.clone()
    other[:, 1:] = torch.randn(other[:, 1:].shape, generator=torch.Generator().manual_seed(9))
    assert torch.equal(decoded(attend, pattern, list(range(n)), other)[0], together[0])


@pytest.mark.parametrize("attend", PATHS)
def test_a_batch_begins_anew_in_what_the_last_one_left(attend):
    pattern = Pattern("row", 4, 3)
    place = Place(2, 2, DEVICE)
    kept = Kept(pattern, place, HEADS, WIDTH, torch.float32)
    for seed in range(2):
        q, k, v = tokens(pattern, [0, 1], seed=seed)
        want = sparse_attention(q, k, v, pattern, backend="naive")
        place.restart([1, 0])
        for row in range(2):
            text = torch.stack([k, v])[:, row, :4].transpose(1, 2)
            kept.text_ZCHTD[:, 1 - row] = text
        for i in range(4, pattern.n_tokens):
            got = attend(q[:, i], torch.stack([k[:, i], v[:, i]]), kept)
            assert (got - want[:, i]).abs().max() <= 2e-6
            place.advance()


def test_a_batch_of_few_captions_leaves_tiles_empty():
    place = Place(20, 20, DEVICE)
    place.restart([0] * 20, at=3)
    assert (place.row_MR >= 0).sum(1).tolist() == [decode.TILE, 4, *[0] * 19]
    assert (place.i, place.i_1.item()) == (3, 3)


@pytest.mark.parametrize("kind", ["row", "column", "conv", "dense"])
def test_sizes_of_the_kernel_cover_all_keys(kind):
    for n_text, grid in ((1, 2), (32, 8), (48, 8), (256, 32)):
        pattern = Pattern(kind, n_text, grid)
        for width, itemsize in decode.STEPS:
            sizes = decode.constants(pattern, width, itemsize)
            most = max(len(pattern.image_keys(i)) for i in range(0, pattern.n_image, 7)) - 1
            assert sizes["K"] % sizes["IMAGE"] == 0
            assert sizes["K"] >= most
            assert 16 <= sizes["TEXT"] < 2 * max(n_text, 16)


def test_the_paths_are_chosen_by_what_can_run():
    pattern, place = Pattern("row", 4, 3), Place(1, 1, DEVICE)
    assert Kept(pattern, place, 1, 24, torch.float32).is_triton is False
    assert Kept(pattern, place, 1, 32, torch.float32).is_triton is (DEVICE.type == "cuda")


def test_a_caption_is_kept_once_for_all_rows_that_share_it():
    meta = torch.device("meta")
    kept = Kept(Pattern("column", 256, 32), Place(64, 1, meta), 62, 64, torch.bfloat16)
    # 15,872 bytes of keys and values a token
    assert kept.nbytes == 15_872 * (256 + 64 * 993)
