"""Outputs that tell what was not written, and what was written beside them."""

import math
from collections.abc import Iterator

import torch


class Outputs:
    """How `Tensor.new_empty` allocates while a test runs.

    `guard` is the number of elements on either side of an output: with 3, no output is aligned to a vector. Fake
    tensors lie elsewhere in memory: turn it `on` and off.
    """

    def __init__(self):
        self.on, self.guard, self.guarded = True, 64, []

    def new_empty(self, like, shape, dtype=None):
        dtype, shape = dtype or like.dtype, (shape,) if isinstance(shape, int) else shape
        memory = torch.full((math.prod(shape) + 2 * self.guard,), math.nan, dtype=dtype, device=like.device)
        self.guarded.append((memory, self.guard))
        return memory[self.guard : memory.numel() - self.guard].view(shape)


def guarded(monkeypatch) -> Iterator[Outputs]:
    """Outputs are allocated full of NaN and between guards, which must outlive the test."""
    made, plain = Outputs(), torch.Tensor.new_empty

    def new_empty(like, *shape, dtype=None, **how):
        if not made.on:
            return plain(like, *shape, dtype=dtype, **how)
        return made.new_empty(like, shape[0] if len(shape) == 1 else shape, dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield made
    for memory, guard in made.guarded:
        assert memory[:guard].isnan().all() and memory[-guard:].isnan().all(), "written outside an output"
