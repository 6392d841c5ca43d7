"""Sizes that the operators' fakes, the CUDA and the Triton kernels share."""

from torch import Tensor

from evakernels.ops import checks


def statistics(x: Tensor, rms: bool) -> tuple[Tensor, Tensor]:
    """Room for mean and 1/std of each row; RMSNorm has no mean."""
    acc = checks.accumulator(x.dtype)
    return x.new_empty((0,) if rms else x.shape[:-1], dtype=acc), x.new_empty(x.shape[:-1], dtype=acc)


def sizes(x: Tensor) -> tuple[int, int, int]:
    """Rows, rows of a sample, and the row length."""
    rows = x.numel() // x.shape[-1]
    return rows, max(1, rows // max(1, x.shape[0])) if x.dim() > 1 else 1, x.shape[-1]
