"""The processes that share a batch: a grid of them, and what its lines gather and sum.

    1 rank           nobody to talk to
    up to 64 ranks   one line: every rank keeps its own images, and all texts pass by (B D elements in, B D out)
    more             p lines of q neighbours, q the divisor nearest below the root: a rank has the images of its line
                     (B / p) and sees the texts of the ranks that have its place in theirs (B / q): 2 B D / sqrt(R)

Two lines have one rank in common, and between a row of images and a column of texts every pair of samples meets on one
rank; a sample's own pair on the rank that it came from.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# By formula: a second kind of group is worth its latency where the network, not the products, sets the time of one
# line; at 50 GB/s between nodes that is about 64 GPUs.
LINE = 64

_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)

Wait = Callable[[], object]


class Line:
    """Ranks that gather from and reduce to one another; the collectives return what waits for them."""

    def __init__(self, group: "dist.ProcessGroup | None" = None):
        self.group = group
        self.size: int = 1 if group is None else group.size()
        self.rank: int = 0 if group is None else group.rank()

    def all_gather(self, out: Tensor, x: Tensor) -> Wait:
        """`x` of every rank into out (size, *x.shape), both contiguous."""
        return _gather(out.flatten(0, 1) if x.dim() else out, x, group=self.group, async_op=True).wait  # type: ignore[misc]

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Wait:
        """The sum over ranks of their x[rank], where x is (size, *out.shape), both contiguous."""
        return _scatter(out, x.flatten(0, 1), group=self.group, async_op=True).wait  # type: ignore[misc]

    def maximum(self, x: Tensor) -> Wait:
        """The maximum over ranks, in place."""
        return dist.all_reduce(x, dist.ReduceOp.MAX, self.group, async_op=True).wait

    def sum(self, x: Tensor) -> Wait:
        """The sum over ranks, in place."""
        return dist.all_reduce(x, dist.ReduceOp.SUM, self.group, async_op=True).wait


class Grid(NamedTuple):
    everyone: Line
    rows: Line  # q neighbours, who share their images
    columns: Line  # p ranks, whose texts pass by


ALONE = Grid(Line(), Line(), Line())
_grids: dict[str, Grid] = {}


def shape(size: int) -> tuple[int, int]:
    """(p, q): as many lines of as many neighbours."""
    q = 1 if size <= LINE else max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)
    return size // q, q


def grid(name: str) -> Grid:
    """The grid of a process group, by its name; "" is this process alone. Its lines are made at the first call."""
    if not name:
        return ALONE
    group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore
    known = _grids.get(name)
    if known is None or known.everyone.group is not group:  # a later group may have the name of one destroyed
        p, q = shape(group.size())
        if q == 1:
            known = Grid(Line(group), Line(), Line(group))
        else:
            ranks = torch.tensor(dist.get_process_group_ranks(group)).view(p, q)
            row, column = divmod(group.rank(), q)
            lines = (_line(group, line.tolist()) for line in (ranks[row], ranks[:, column]))
            known = Grid(Line(group), *lines)
        _grids[name] = known
    return known


def _line(group: dist.ProcessGroup, ranks: list[int]) -> Line:
    return Line(dist.new_group(ranks, backend=dist.get_backend(group), use_local_synchronization=True))
