"""Tensors that are not read yet: what files are opened as, cut and joined without reading them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lazy:
    """A tensor that is not read yet; reading it twice gives the same values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    origin: "tuple[Lazy, int, int] | None" = None  # (whole, i, n): part i of n of another tensor, along the first axis

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.numel * self.dtype.itemsize

    def view(self, *shape: int) -> "Lazy":
        """With another shape of as many elements."""
        return Lazy(shape, self.dtype, lambda: self.read().reshape(shape))

    def transposed(self) -> "Lazy":
        """With its two axes exchanged."""
        return Lazy(self.shape[::-1], self.dtype, lambda: self.read().T)


def lazy(tensor: Tensor) -> Lazy:
    """A tensor that is there already."""
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def full(shape: tuple[int, ...], value: float) -> Lazy:
    """A constant in float32."""
    return Lazy(shape, torch.float32, lambda: torch.full(shape, value))


def split(whole: Lazy, count: int) -> list[Lazy]:
    """Equal parts along the first axis, which must be a multiple of their number."""
    if count == 1:
        return [whole]
    shape = (whole.shape[0] // count, *whole.shape[1:])

    def part(i: int) -> Lazy:
        return Lazy(shape, whole.dtype, lambda: whole.read().chunk(count)[i], origin=(whole, i, count))

    return [part(i) for i in range(count)]


def join(parts: Sequence[Lazy]) -> Lazy:
    """Parts one after the other along the first axis; those of one tensor become it again, and are read once."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if first.origin is not None:
        whole = first.origin[0]
        if [part.origin for part in parts] == [(whole, i, len(parts)) for i in range(len(parts))]:
            return whole
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return Lazy(shape, dtype, lambda: torch.cat([part.read().to(dtype) for part in parts]))
