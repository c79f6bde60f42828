"""Attention with the dense mask: the truth that every faster path is held to.

Axes: B batch, N token (text, then image), H head, D head width, T query, S key.
"""

import torch
from torch import Tensor

from kernels.patterns import Pattern, mask_on


def naive_attention(
    q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, pattern: Pattern, scale: float
) -> Tensor:
    """Softmax attention under ``pattern.mask()``, written as its definition.

    Args:
        q_BNHD: any floating dtype; computed in float32, float64 stays float64.
        k_BNHD: like q.
        v_BNHD: like q.
        pattern: N must be ``pattern.n_tokens``.
        scale: multiplies the scores.

    Returns:
        o_BNHD, in the dtype of q.
    """
    dtype = torch.float64 if q_BNHD.dtype == torch.float64 else torch.float32
    s_BHTS = torch.einsum("bthd,bshd->bhts", q_BNHD.to(dtype), k_BNHD.to(dtype)) * scale
    s_BHTS = s_BHTS.masked_fill(~mask_on(pattern, q_BNHD.device), float("-inf"))
    o_BNHD = torch.einsum("bhts,bshd->bthd", s_BHTS.softmax(-1), v_BNHD.to(dtype))
    return o_BNHD.to(q_BNHD.dtype)
