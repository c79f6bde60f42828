"""Hybrid sharding, the paper's topology (section 2.5): parameters are sharded inside a node.

ZeRO-3 works among the GPUs of one node, and every node holds the whole model. Once an update each
GPU sums its shard of the gradients with those of its peers, one on each other node: dense, or
compressed by PowerSGD. Weights never leave the node.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.console import InputError, logger
from pipeline.training.engines.powersgd import PowerSGD

MESSAGE = 1 << 25  # float32 numbers that are sent together at most

log = logger("train")


class Nodes:
    """The process groups of ``world`` ranks in nodes; what DeepSpeed calls a model-parallel unit.

    Ranks of a node follow each other, as the launcher numbers them.

    Args:
        rank: of this process.
        world: processes.
        per_node: of them, a divisor.

    Attributes:
        count: nodes.
        index: of this process' node.
        local: rank inside the node.
        inside: group of the node.
        between: group of the processes with this local rank.
    """

    def __init__(self, rank: int, world: int, per_node: int) -> None:
        self.count, self.per_node = world // per_node, per_node
        self.index, self.local = divmod(rank, per_node)
        # every process makes every group, in one order
        nodes = [dist.new_group(_node(i, per_node)) for i in range(self.count)]
        peers = [dist.new_group(range(i, world, per_node)) for i in range(per_node)]
        alone = [dist.new_group([i]) for i in range(world)]
        self.inside, self.between, self._alone = nodes[self.index], peers[self.local], alone[rank]

    def get_data_parallel_group(self) -> Any:
        """Among which ZeRO shards."""
        return self.inside

    def get_data_parallel_world_size(self) -> int:
        """Ranks of a node."""
        return self.per_node

    def get_data_parallel_rank(self) -> int:
        """This one's among them."""
        return self.local

    def get_model_parallel_group(self) -> Any:
        """No model parallelism: this process alone."""
        return self._alone

    def get_model_parallel_world_size(self) -> int:
        """One."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """The only one's."""
        return 0


def _node(index: int, per_node: int) -> range:
    return range(index * per_node, (index + 1) * per_node)


class Exchange:
    """The sum of gradient shards over the nodes.

    Args:
        nodes: the groups.
        powersgd: of the matrices that are compressed; None for none.
    """

    def __init__(self, nodes: Nodes, powersgd: PowerSGD | None) -> None:
        self.nodes, self.powersgd = nodes, powersgd
        self._has_spoken = False

    def add_up(self, gradients: dict[str, Tensor], leave: Collection[str] = ()) -> None:
        """Sum the shards, in place.

        Args:
            gradients: parameter -> float32, this rank's part of it, flat.
            leave: parameters whose block does not update, which send nothing.
        """
        if self.nodes.count == 1:
            return
        compressed = self.powersgd.error.keys() if self.powersgd else set()
        dense = [g for name, g in gradients.items() if name not in compressed and name not in leave]
        self._say_once(gradients, sum(g.numel() for g in dense))
        self._add(dense)
        if self.powersgd is not None:
            self.powersgd.add_up(gradients, self.nodes.count, self._add, leave)

    def _add(self, tensors: list[Tensor]) -> None:
        for together in _messages(tensors):
            flat = torch.cat([tensor.flatten() for tensor in together])
            dist.all_reduce(flat, group=self.nodes.between)
            for tensor, part in zip(
                together, flat.split([t.numel() for t in together]), strict=True
            ):
                tensor.copy_(part.view_as(tensor))

    def _say_once(self, gradients: dict[str, Tensor], n_dense: int) -> None:
        if self._has_spoken:
            return
        self._has_spoken = True
        whole = sum(g.numel() for g in gradients.values())
        sent = n_dense + (self.powersgd.sent if self.powersgd else 0)
        log.info(
            "%d nodes: each GPU sums %.6g of %.6g MB of gradients with its peers, %.1f %%",
            self.nodes.count, sent * 4 / 1e6, whole * 4 / 1e6, 100 * sent / whole,
        )  # fmt: skip

    def check(self, checksum: Tensor) -> None:
        """Make sure that the nodes hold the same weights; all ranks call it.

        Args:
            checksum: of this rank's part of them, a float64 scalar.

        Raises:
            InputError: they do not.
        """
        bounds = torch.stack([checksum, -checksum])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self.nodes.between)
        spread = bounds.sum()
        dist.all_reduce(spread, op=dist.ReduceOp.MAX)  # all ranks raise, or none
        if float(spread) != 0:
            raise InputError(
                "the nodes no longer hold the same weights, so one of them computes wrongly: "
                "nothing was saved; test the machines, and go on from the last checkpoint"
            )

    def compresses(self, name: str) -> bool:
        """Whether a parameter is sent as factors."""
        return self.powersgd is not None and name in self.powersgd.error

    def error_of(self, name: str) -> Tensor | None:
        """What all nodes together have not sent of a parameter, flat, on the first node.

        The paper keeps the sum alone (appendix E), for each node's own would take a checkpoint a
        node. All ranks call it; None where nothing is compressed.
        """
        if self.powersgd is None or not self.compresses(name):
            return None
        summed = self.powersgd.error[name].flatten().clone()
        if self.nodes.count > 1:
            dist.all_reduce(summed, group=self.nodes.between)
        return summed

    def set_error(self, name: str, summed: Tensor | None) -> None:
        """Give each node its share of an ``error_of``; without one, nothing is left to send."""
        assert self.powersgd is not None
        error = self.powersgd.error[name]
        if summed is None:
            error.zero_()
        else:
            error.copy_((summed / self.nodes.count).view_as(error))


def _messages(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors that are sent together, at most ``MESSAGE`` numbers unless one alone has more."""
    together: list[Tensor] = []
    n = 0
    for tensor in tensors:
        if together and n + tensor.numel() > MESSAGE:
            yield together
            together, n = [], 0
        together.append(tensor)
        n += tensor.numel()
    if together:
        yield together
