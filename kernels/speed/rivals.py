"""Every way to attend that is measured, ours and PyTorch's, and its tensors.

Axes: B batch, N token, H head, D head width; T text token, I image token, Y X its grid place.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels.attention.naive import naive_attention
from kernels.attention.op import BACKENDS, packed_attention
from kernels.patterns import Pattern, mask_on
from kernels.speed.clock import DTYPES
from kernels.speed.figures import CAUSAL, FLEX, OUTPUTS, YARDSTICK

# score matrices that the naive path holds at its worst, and the memory they may take
SCORES = 5
MOST_SCORE_BYTES = 8e9
# heads of the last sample that are compared with float64
COMPARED = 2


@dataclass(frozen=True)
class Rival:
    """A way to attend.

    Args:
        attend: from its tensors to o.
        form: the tensors, see ``Inputs``: "packed", "apart" or "columns".
        pattern: under which it attends.
    """

    attend: Callable[..., Tensor]
    form: str
    pattern: Pattern


def by_columns(x_BHND: Tensor, pattern: Pattern) -> Tensor:
    """The text, then the grid column by column; applied twice, the grid in raster order again."""
    text_BHTD, image_BHID = x_BHND.split([pattern.n_text, pattern.n_image], dim=2)
    image_BHYXD = image_BHID.unflatten(2, (pattern.grid, pattern.grid))
    return torch.cat([text_BHTD, image_BHYXD.transpose(2, 3).flatten(2, 3)], dim=2)


class Inputs:
    """The same q, k, v and do as each rival wants them.

    Forms: "packed" is qkv [B, N, 3, H, D] with o [B, N, H, D]; "apart" is q, k, v and o
    [B, H, N, D], contiguous; "columns" is that with N in the order of grid columns.
    """

    def __init__(self, pattern: Pattern, shape: dict[str, Any], device: torch.device) -> None:
        B, N, H, D = shape["batch"], pattern.n_tokens, shape["heads"], shape["width"]
        dtype, generator = DTYPES[shape["dtype"]], torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, generator=generator, device=device)
        self.qkv_BN3HD, self.do_BNHD = normal(B, N, 3, H, D).to(dtype), normal(B, N, H, D).to(dtype)
        self.pattern = pattern
        self._made: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}

    def of(self, form: str) -> tuple[tuple[Tensor, ...], Tensor]:
        """Leaves with gradients, and do."""
        if form not in self._made:
            leaves: tuple[Tensor, ...] = (self.qkv_BN3HD,)
            do = self.do_BNHD
            if form != "packed":
                leaves = tuple(self._apart(x, form) for x in self.qkv_BN3HD.unbind(2))
                do = self._apart(do, form)
            self._made[form] = tuple(x.detach().requires_grad_() for x in leaves), do
        return self._made[form]

    def _apart(self, x_BNHD: Tensor, form: str) -> Tensor:
        x_BHND = x_BNHD.transpose(1, 2)
        if form == "columns":
            x_BHND = by_columns(x_BHND, self.pattern)
        return x_BHND.contiguous()

    def outputs(self, rival: Rival) -> dict[str, Tensor]:
        """O, dq, dk, dv of one run, the compared heads of the last sample, [1, N, H, D]."""
        leaves, do = self.of(rival.form)
        # what an earlier run left in freed memory must not pass for a result
        poison = [torch.full_like(self.qkv_BN3HD, math.nan) for _ in range(3)]
        del poison
        o = rival.attend(*leaves)
        grads = torch.autograd.grad(o, leaves, do)
        if rival.form == "packed":
            grads = grads[0].unbind(2)
        found = dict(zip(OUTPUTS, (o.detach(), *grads), strict=True))
        return {name: self._compared(x, rival.form) for name, x in found.items()}

    def _compared(self, x: Tensor, form: str) -> Tensor:
        if form == "columns":
            x = by_columns(x, self.pattern)
        x_BNHD = x if form == "packed" else x.transpose(1, 2)
        return x_BNHD[-1:, :, -COMPARED:]

    def truth(self, pattern: Pattern) -> dict[str, Tensor]:
        """What ``outputs`` should be, in float64 from the same numbers."""
        qkv_BN3HD = self.qkv_BN3HD[-1:, :, :, -COMPARED:].double().requires_grad_()
        q_BNHD, k_BNHD, v_BNHD = qkv_BN3HD.unbind(2)
        o_BNHD = naive_attention(q_BNHD, k_BNHD, v_BNHD, pattern, q_BNHD.shape[-1] ** -0.5)
        do_BNHD = self.do_BNHD[-1:, :, -COMPARED:].double()
        (grad,) = torch.autograd.grad(o_BNHD, qkv_BN3HD, do_BNHD)
        return dict(zip(OUTPUTS, (o_BNHD.detach(), *grad.unbind(2)), strict=True))


def sdpa(
    q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, by: SDPBackend | None = None, **choice: Any
) -> Tensor:
    """PyTorch's attention, by one of its backends or by its own choice."""
    with nullcontext() if by is None else sdpa_kernel(by):
        return scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, **choice)


def flex_mask(pattern: Pattern) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule of ``pattern`` as FlexAttention's mask_mod; that of "column" is ``by_columns``."""
    T, W, R = pattern.n_text, pattern.grid, pattern.radius

    def in_row(q: Tensor, k: Tensor) -> Tensor:
        return q - k <= W

    def in_column(q: Tensor, k: Tensor) -> Tensor:
        return q // W == k // W

    def in_window(q: Tensor, k: Tensor) -> Tensor:
        m = q - k
        return ((m + R) % W <= 2 * R) & (m // W <= R)

    def in_clamped_window(q: Tensor, k: Tensor) -> Tensor:
        return (q // W - k // W <= R) & ((q % W - k % W).abs() <= R)

    near = {"column": in_column, "conv": in_window}.get(pattern.kind, in_row)
    if pattern.edge == "clamp":
        near = in_clamped_window

    def causal(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    def sparse(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & ((k < T) | near(q - T, k - T))

    return causal if pattern.kind == "dense" else sparse


def flex_rivals(pattern: Pattern, device: torch.device) -> dict[str, Rival]:
    """FlexAttention with blocks of 64 and of 128, compiled at the first call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    N, form = pattern.n_tokens, "columns" if pattern.kind == "column" else "apart"
    found = {}
    for block in (64, 128):
        mask = create_block_mask(flex_mask(pattern), None, None, N, N, device, BLOCK_SIZE=block)
        # the tiles that it takes unasked on Hopper are larger than 64, and it then refuses
        options: Any = {"max_autotune": True} if block == 64 else {}
        attend = torch.compile(flex_attention, dynamic=False, options=options)
        found[f"{FLEX} {block}"] = Rival(partial(attend, block_mask=mask), form, pattern)
    if pattern.kind == "column":
        inside = found[f"{FLEX} 64"].attend

        def permuting(*qkv_BHND: Tensor) -> Tensor:
            return by_columns(inside(*(by_columns(x, pattern) for x in qkv_BHND)), pattern)

        found[f"{FLEX} 64 permuting"] = Rival(permuting, "apart", pattern)
    return found


def rivals(pattern: Pattern, device: torch.device) -> dict[str, Rival]:
    """Every way to attend under ``pattern`` on a device, by name; FlexAttention comes apart."""
    causal = Pattern("dense", pattern.n_text, pattern.grid)
    found = {
        name: Rival(partial(packed_attention, pattern=pattern, backend=name), "packed", pattern)
        for name in BACKENDS
    }
    masked = partial(sdpa, attn_mask=mask_on(pattern, device))
    found[YARDSTICK] = Rival(masked, "apart", pattern)
    found[CAUSAL] = Rival(partial(sdpa, is_causal=True), "apart", causal)
    if device.type == "cuda":
        for by in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            name = f"{CAUSAL} {by.name.split('_')[0].lower()}"
            found[name] = Rival(partial(sdpa, is_causal=True, by=by), "apart", causal)
    return found


def too_large(name: str, shape: dict[str, Any], pattern: Pattern) -> str | None:
    """Why a rival is not tried on this shape, None if it is."""
    if name != "naive":
        return None
    scores_bytes = 4 * SCORES * shape["batch"] * shape["heads"] * pattern.n_tokens**2
    if scores_bytes <= MOST_SCORE_BYTES:
        return None
    return (
        f"its scores would take about {scores_bytes / 1e9:.0f} GB; "
        f"it is measured up to {MOST_SCORE_BYTES / 1e9:.0f}"
    )


def distances(got: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative Frobenius distance of each output from float64."""
    return {name: ((got[name].double() - x).norm() / x.norm()).item() for name, x in truth.items()}
