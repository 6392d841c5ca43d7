"""One rank of many on one device: collectives that take no time, where every other rank has this one's samples."""

import torch
from torch import Tensor

from evakernels.ops.contrastive.ranks import Grid, Line, Wait, shape


def done() -> None:
    pass


class OneOfMany(Line):
    """A line of `size` ranks, all of which hold what this one does."""

    def __init__(self, size: int, rank: int = 0):
        self.group, self.size, self.rank = None, size, rank

    def all_gather(self, out: Tensor, x: Tensor) -> Wait:
        out.copy_(x.expand_as(out))
        return done

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Wait:
        torch.mul(x[self.rank], self.size, out=out)
        return done

    def maximum(self, x: Tensor) -> Wait:
        return done

    def sum(self, x: Tensor) -> Wait:
        x.mul_(self.size)
        return done


def one_of(size: int) -> Grid:
    """The grid of the first of `size` ranks."""
    p, q = shape(size)
    return Grid(OneOfMany(size), OneOfMany(q), OneOfMany(p))
