"""LayerNorm, alone and with a residual, composed around PyTorch's own CPU kernels for it and its backward.

A layer scale after the norm is folded into its weight and bias. PyTorch's kernels for half-precision rows round the
weight gradients as they sum them, and with half-precision weights the statistics: so weights are passed in float32,
and the backward pass runs in float32. RMSNorm has no fused kernel on the CPU.
"""

import torch
from torch import Tensor

from evakernels.ops.checks import accumulator
from evakernels.ops.norm.reference import _over_rows, _rows, _scaled

aten = torch.ops.aten

# Where each op's arguments tell RMSNorm from LayerNorm: the flag, or `mean`, which is empty for RMSNorm, and `rstd`.
RMS = {
    "norm": 4,
    "add_norm": 5,
    "norm_add": 5,
    "norm_backward": 3,
    "add_norm_backward": 5,
    "norm_add_backward": 4,
}


def refuses(op: str, *args) -> str | None:
    rms, rstd = args[RMS[op]], args[RMS[op] + 1]
    if rms.shape != rstd.shape if isinstance(rms, Tensor) else rms:
        return "PyTorch has no fused RMSNorm on the CPU"
    return None


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, dtype: torch.dtype):
    acc = accumulator(x.dtype)
    if x.dtype != dtype:
        x = x.to(acc)  # else the result would be rounded to the dtype of x on its way
    bias = bias.to(acc) if bias is not None else None
    y, mean, rstd = aten.native_layer_norm(x, weight.shape, weight.to(acc), bias, eps)
    return y.to(dtype), mean.squeeze(-1), rstd.squeeze(-1)


def norm_backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, bias: bool):
    dx, dweight, dbias = _backward(dy, x, weight, mean, rstd, bias)
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)


def add_norm(residual, branch, weight, bias, eps, rms, layer_scale, row_scale, dtype):
    if layer_scale is not None or row_scale is not None:
        branch = _scaled(branch.to(accumulator(residual.dtype)), layer_scale, row_scale)
    total = _add(residual, branch)
    return total, *norm(total, weight, bias, eps, rms, dtype)


def add_norm_backward(dsum, dy, total, branch, weight, mean, rstd, layer_scale, row_scale, bias, branch_dtype):
    acc = accumulator(total.dtype)
    dx, dweight, dbias = _backward(dy, total, weight, mean, rstd, bias)
    if dsum is not None:
        dx += dsum
    dbranch, dscale = dx, dx.new_empty(0)
    if row_scale is not None:
        dbranch = dbranch * _rows(row_scale, dx)
    if layer_scale is not None:
        dscale = _over_rows(dbranch * branch.to(acc)).to(layer_scale.dtype)
        dbranch = dbranch * layer_scale.to(acc)
    if dbranch is dx and branch_dtype == total.dtype:
        dbranch = dx.new_empty(0)
    return (
        dx.to(total.dtype),
        dbranch.to(branch_dtype),
        dweight.to(weight.dtype),
        dbias.to(weight.dtype),
        dscale,
    )


def norm_add(residual, branch, weight, bias, eps, rms, layer_scale, row_scale):
    acc = accumulator(branch.dtype)
    if layer_scale is not None:
        weight, bias = weight.to(acc) * layer_scale, bias.to(acc) * layer_scale if bias is not None else None
    y, mean, rstd = norm(branch, weight, bias, eps, rms, acc)
    if row_scale is not None:
        y *= _rows(row_scale, y)
    return _add(residual, y), mean, rstd


def norm_add_backward(dout, branch, weight, bias, mean, rstd, layer_scale, row_scale):
    acc = accumulator(branch.dtype)
    dy, scaled, scale = dout.to(acc), weight.to(acc), None
    if row_scale is not None:
        dy = dy * _rows(row_scale, dy)
    if layer_scale is not None:
        scale = layer_scale.to(acc)
        scaled = scaled * scale
    # sum(dy * normed) and sum(dy), of which the gradients of weight, bias and layer scale are multiples.
    dx, by_normed, summed = _backward(dy, branch, scaled, mean, rstd, bias is not None)
    if scale is None:
        dweight, dbias, dscale = by_normed, summed, dx.new_empty(0)
    else:
        dweight, dbias, dscale = by_normed * scale, by_normed.new_empty(0), by_normed * weight
        if bias is not None:
            dbias, dscale = summed * scale, dscale + summed * bias
        dscale = dscale.to(layer_scale.dtype)
    return dx.to(branch.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype), dscale


def _backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, bias: bool):
    acc = accumulator(x.dtype)
    weight = weight.to(acc)
    dx, dweight, dbias = aten.native_layer_norm_backward(
        *(dy.to(acc), x.to(acc), weight.shape, mean[..., None], rstd[..., None]),
        *(weight, weight if bias else None, (True, True, bias)),  # of the bias only device and dtype are read
    )
    return dx, dweight, dbias if bias else weight.new_empty(0)


def _add(residual: Tensor, branch: Tensor) -> Tensor:
    return torch.add(residual, branch).to(residual.dtype).contiguous()
