"""Ranks that are threads of one process, each with a grid of lines: more of them than there could be processes."""

import threading
from collections.abc import Callable

import torch

from evakernels.ops.contrastive.ranks import Grid, Line, shape


class Meeting:
    """Where the ranks of a line lay down what they have, and see what the others have."""

    def __init__(self, size: int):
        self.barrier, self.slots = threading.Barrier(size), [torch.empty(0)] * size

    def exchange(self, rank: int, x: torch.Tensor, use: Callable) -> Callable:
        self.slots[rank] = x
        self.barrier.wait(60)
        result = use(self.slots)
        self.barrier.wait(60)  # nobody overwrites what another still reads
        return lambda: result


class Thread(Line):
    def __init__(self, meeting: Meeting, rank: int):
        self.group, self.meeting, self.size, self.rank = None, meeting, meeting.barrier.parties, rank

    def all_gather(self, out, x):
        return self.meeting.exchange(self.rank, x, lambda all_: torch.stack(all_, out=out))

    def reduce_scatter(self, out, x):
        return self.meeting.exchange(self.rank, x, lambda all_: out.copy_(sum(y[self.rank] for y in all_)))

    def maximum(self, x):
        return self._all_reduce(x, lambda all_: torch.stack(all_).amax(0))

    def sum(self, x):
        return self._all_reduce(x, sum)

    def _all_reduce(self, x, reduce):
        reduced = self.meeting.exchange(self.rank, x, reduce)()
        x.copy_(reduced)
        return lambda: None


def run(size: int, function: Callable[[Grid, int], object]) -> list:
    """What `function(grid, rank)` returns on each of `size` ranks."""
    p, q = shape(size)
    everyone, rows, columns = Meeting(size), [Meeting(q) for _ in range(p)], [Meeting(p) for _ in range(q)]
    results: list = [None] * size

    def rank(r: int) -> None:
        row, column = divmod(r, q)
        grid = Grid(Thread(everyone, r), Thread(rows[row], column), Thread(columns[column], row))
        try:
            results[r] = function(grid, r)
        except BaseException as error:
            results[r] = error
            for meeting in (everyone, *rows, *columns):
                meeting.barrier.abort()

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [r for r in results if isinstance(r, BaseException)]
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results
