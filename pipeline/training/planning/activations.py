"""What autograd keeps of ``pipeline.models.dalle`` between the passes, and needs in them: bytes.

Counted from the model's code; a test counts the same of a real pass.

Letters: C model width, N tokens of a sample, H heads; c bytes of a number of the matrices.
"""

from kernels import Pattern
from kernels.attention.windowed import plan_for
from pipeline.config import DalleConfig
from pipeline.models.dalle import layer_patterns

FLOAT32 = 4


def attention_bytes(model: DalleConfig, pattern: Pattern, c: int, path: str) -> tuple[int, int]:
    """(kept for the backward pass, most that is needed besides) of one sample's attention.

    From the packed projection to what the projection out reads, both counted.
    """
    N, C, H = model.n_ctx, model.d_model, model.n_head
    kept = N * 4 * C * c  # q, k, v and the output
    if model.qk_norm:
        # float32 of queries and keys, or views that keep all of the first projection; their
        # moments for the backward pass
        kept += N * (2 * C * FLOAT32 if c < FLOAT32 else 3 * C * FLOAT32) + N * 2 * H * 2 * FLOAT32
    if path == "triton":
        # kept: the log of the softmax's sum. Besides: as much again for rows of o * do, and the
        # gradient of the packed projection, with that of the output
        return kept + N * H * FLOAT32, N * H * FLOAT32 + N * 4 * C * c
    plan = plan_for(pattern)
    assert plan is not None, "the layers of the model have windows"
    n = H * (plan.n_text**2 + (N - plan.n_text) * (plan.n_text + plan.window))
    if plan.n_text == 0:
        kept += N * 3 * C * c  # a view of no text keeps what q, k and v were copied from
    # kept: the weights. Besides: scores, scores side by side, and their softmax, in float32
    return kept + n * c, 3 * n * FLOAT32


def block_bytes(
    model: DalleConfig, pattern: Pattern, c: int, path: str
) -> tuple[int, int, int, int]:
    """Of one sample in one block, bytes.

    Returns:
        (kept of the attention, besides; kept of the MLP, besides), where "kept" is what autograd
        keeps for the backward pass without recomputation and "besides" the most that the pass
        needs on top of it.
    """
    N, C = model.n_ctx, model.d_model
    # LayerNorm keeps its input, which is the residual stream in float32, a mean and a deviation;
    # the projection after it keeps its input
    entrance = N * (C * FLOAT32 + 2 * FLOAT32 + C * c)
    kept, besides = attention_bytes(model, pattern, c, path)
    # the projection up, its sigmoid, their product
    mlp = N * 12 * C * c
    # gradients: of the stream in float32; of the product and its two factors, the product gone
    return entrance + kept, besides, entrance + mlp, N * (C * FLOAT32 + 8 * C * c)


def kept_bytes(
    model: DalleConfig, c: int, path: str, recompute: bool, *, copies_weights: bool = False
) -> tuple[int, int]:
    """What autograd keeps between the passes: bytes (of each sample, of each micro-batch).

    Args:
        model: the model.
        c: bytes of a number of the matrices.
        path: of attention.
        recompute: whether of a block only its input is kept.
        copies_weights: whether matrices are computed in another type than they are stored in.
    """
    N, C = model.n_ctx, model.d_model
    patterns = layer_patterns(model)
    # the last LayerNorm, and what the heads read
    end = N * (C * FLOAT32 + 2 * FLOAT32 + C * FLOAT32)
    if recompute:
        return len(patterns) * N * C * FLOAT32 + end, 0
    blocks = 0
    for pattern in patterns:
        attention, _, mlp, _ = block_bytes(model, pattern, c, path)
        blocks += attention + mlp
    return blocks + end, model.matrix_parameters * c if copies_weights else 0


def heads_bytes(model: DalleConfig) -> int:
    """The weights of both heads in float32."""
    return (model.n_text_vocab + model.n_image_vocab) * model.d_model * FLOAT32
