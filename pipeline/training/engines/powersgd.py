"""PowerSGD between the nodes, as the paper runs it (section 2.5, appendix E).

A matrix of gradients E [m, n] is sent as two thin factors, P [m, r] and Q [n, r]. What they leave
out stays with its node and is added to the next gradient (error feedback), so nothing is lost, only
late. Differences from Vogels et al. (1905.13727), all the paper's: the matrix that P is projected
with is random and stays what it was at the start, and P is made orthonormal by Householder
reflections, for Gram-Schmidt was unstable. Each GPU compresses its own shard.

Ours: P and Q are sent as float32, where the paper has a 16-bit format of its own.
"""

import zlib
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from pipeline.console import InputError

NUDGE = 1e-6  # on P's diagonal: columns that are zero become orthonormal too (appendix E)


def pays(rows: int, columns: int, rank: int) -> bool:
    """Whether factors of ``rank`` are fewer numbers than the matrix, and not more than it has."""
    return rank <= min(rows, columns) and rank * (rows + columns) < rows * columns


def compressible(shapes: dict[str, list[int]], ranks: int, rank: int) -> dict[str, tuple[int, int]]:
    """What ``PowerSGD`` takes on each of ``ranks`` GPUs that share the parameters as ZeRO-3 does.

    Matrices of the residual blocks of which a GPU holds whole rows. Embeddings, heads, gains and
    biases are sent as they are, as in the paper.

    Raises:
        InputError: none of them is large enough for factors of this rank.
    """
    parts = {
        name: (shape[0] // ranks, shape[1])
        for name, shape in shapes.items()
        if name.startswith("blocks.") and len(shape) == 2 and shape[0] % ranks == 0
    }
    found = {name: part for name, part in parts.items() if pays(*part, rank)}
    if not found:
        raise InputError(
            f"hybrid_sharding.powersgd_rank is {rank * ranks}, {rank} a GPU: no matrix of this "
            "model is large enough that factors of that rank were smaller; take less, or 0"
        )
    return found


class PowerSGD:
    """The errors and projections of one GPU's matrices.

    Args:
        shapes: name -> (rows, columns) of this GPU's part of a matrix, each one that ``pays``.
        rank: of the factors.
        seed: of the projections, the same on all nodes.
        device: of the gradients.

    Attributes:
        error: name -> float32 [rows, columns], what this node has not sent yet.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, int]], rank: int, seed: int, device: torch.device
    ) -> None:
        self.rank = rank
        self.error = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        self._projection = {}
        for name, shape in shapes.items():
            draw = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            self._projection[name] = torch.randn(max(shape), rank, generator=draw).to(device)

    @property
    def sent(self) -> int:
        """Numbers that an exchange sends."""
        return sum(self.rank * sum(error.shape) for error in self.error.values())

    @torch.no_grad()
    def add_up(
        self,
        gradients: dict[str, Tensor],
        nodes: int,
        add: Callable[[list[Tensor]], None],
        leave: Collection[str] = (),
    ) -> None:
        """Replace each gradient by an approximation of its sum over the nodes.

        Where factors are not finite, the gradient becomes NaN on all nodes, and the error stays
        what it is, or zero where it is not finite either.

        Args:
            gradients: name -> float32 [rows * columns], in place.
            nodes: how many there are.
            add: sums tensors over the nodes, in place.
            leave: names whose block does not update: neither gradient nor error changes.
        """
        names = [name for name in self.error if name not in leave]
        for name in names:
            error = self.error[name]
            error += gradients[name].view_as(error)
        left = {name: _wide(self.error[name]) @ self._projection[name] for name in names}
        add(list(left.values()))
        _orthonormalise(left)
        right = {name: _wide(self.error[name]).T @ left[name] for name in names}
        add(list(right.values()))
        is_bad = _not_finite([right[name] for name in names])
        for name, bad in zip(names, is_bad, strict=True):
            error, gradient = self.error[name], gradients[name]
            if bad:
                gradient.fill_(torch.nan)
                if not bool(torch.isfinite(error).all()):
                    error.zero_()
                continue
            found = left[name] @ right[name].T
            found = found if found.shape == error.shape else found.T
            gradient.copy_(found.flatten())
            # each node takes its share of what all have sent
            error.sub_(found, alpha=1 / nodes)


def _wide(matrix: Tensor) -> Tensor:
    """The matrix with its shorter side first."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _orthonormalise(factors: dict[str, Tensor]) -> None:
    """Columns of each factor become orthonormal: QR by Householder reflections, by shape at once.

    What is not finite stays so; LAPACK does not get to see it.
    """
    by_shape: dict[torch.Size, list[str]] = {}
    for name, factor in factors.items():
        by_shape.setdefault(factor.shape, []).append(name)
    for shape, names in by_shape.items():
        stacked = torch.stack([factors[name] for name in names])
        is_finite = torch.isfinite(stacked).flatten(1).all(1)[:, None, None]
        nudged = stacked.nan_to_num(0.0, 0.0, 0.0) + NUDGE * torch.eye(*shape).to(stacked)
        made = torch.where(is_finite, torch.linalg.qr(nudged).Q, torch.nan)
        for name, factor in zip(names, made, strict=True):
            factors[name] = factor


def _not_finite(tensors: list[Tensor]) -> list[bool]:
    """Of each tensor, waiting for the device once."""
    if not tensors:
        return []
    norms = torch.stack(torch._foreach_norm(tensors, float("inf")))
    found: list[bool] = (~torch.isfinite(norms)).tolist()
    return found
