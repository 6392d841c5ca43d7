"""LayerNorm and RMSNorm, alone and with a residual, by their formulas in plain PyTorch.

    LayerNorm   normed = (x - mean(x)) * rstd,   rstd = 1 / sqrt(var(x) + eps)
    RMSNorm     normed = x * rstd,               rstd = 1 / sqrt(mean(x^2) + eps)
    both        y = normed * weight + bias

Backward, with g = dy * weight and the means over the row:
    dx = rstd * (g - mean(g) - normed * mean(g * normed)),   without mean(g) for RMSNorm
    dweight = sum(dy * normed),   dbias = sum(dy)

Statistics and sums are float32 (float64 for float64 input). `mean` is empty for RMSNorm.
"""

import torch
from torch import Tensor

from evakernels.ops.checks import accumulator


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, dtype: torch.dtype):
    acc = accumulator(x.dtype)
    wide = _wide(x, acc)
    if rms:
        mean = wide.new_empty(0)
        rstd = (wide.square().mean(-1) + eps).rsqrt()
    else:
        var, mean = torch.var_mean(wide, -1, correction=0)
        rstd = (var + eps).rsqrt()
    y = _normed(wide, mean, rstd) * weight.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(dtype), mean, rstd


def norm_backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, bias: bool):
    acc = accumulator(x.dtype)
    dx, dweight, dbias = _backward(_wide(dy, acc), _wide(x, acc), weight.to(acc), mean, rstd)
    return dx.to(x.dtype), dweight.to(weight.dtype), _dbias(dbias, weight, bias)


def add_norm(residual, branch, weight, bias, eps, rms, layer_scale, row_scale, dtype):
    acc = accumulator(residual.dtype)
    total = (_wide(residual, acc) + _scaled(_wide(branch, acc), layer_scale, row_scale)).to(residual.dtype)
    return total, *norm(total, weight, bias, eps, rms, dtype)


def add_norm_backward(dsum, dy, total, branch, weight, mean, rstd, layer_scale, row_scale, bias, branch_dtype):
    acc = accumulator(total.dtype)
    dx, dweight, dbias = _backward(_wide(dy, acc), _wide(total, acc), weight.to(acc), mean, rstd)
    if dsum is not None:
        dx = dx + _wide(dsum, acc)
    dbranch, dscale = dx, dx.new_empty(0)
    if row_scale is not None:
        dbranch = dbranch * _rows(row_scale, dx)
    if layer_scale is not None:
        dscale = _over_rows(dbranch * _wide(branch, acc)).to(layer_scale.dtype)
        dbranch = dbranch * layer_scale.to(acc)
    if dbranch is dx and branch_dtype == total.dtype:
        dbranch = dx.new_empty(0)
    return (
        dx.to(total.dtype),
        dbranch.to(branch_dtype),
        dweight.to(weight.dtype),
        _dbias(dbias, weight, bias),
        dscale,
    )


def norm_add(residual, branch, weight, bias, eps, rms, layer_scale, row_scale):
    acc = accumulator(residual.dtype)
    y, mean, rstd = norm(branch, weight, bias, eps, rms, accumulator(branch.dtype))
    out = _wide(residual, acc) + _scaled(y.to(acc), layer_scale, row_scale)
    return out.to(residual.dtype), mean, rstd


def norm_add_backward(dout, branch, weight, bias, mean, rstd, layer_scale, row_scale):
    acc = accumulator(branch.dtype)
    dy = _wide(dout, acc)
    wide = _wide(branch, acc)
    dscale = dy.new_empty(0)
    if row_scale is not None:
        dy = dy * _rows(row_scale, dy)
    if layer_scale is not None:
        y = _normed(wide, mean, rstd) * weight.to(acc)
        if bias is not None:
            y = y + bias.to(acc)
        dscale = _over_rows(dy * y).to(layer_scale.dtype)
        dy = dy * layer_scale.to(acc)
    dx, dweight, dbias = _backward(dy, wide, weight.to(acc), mean, rstd)
    return dx.to(branch.dtype), dweight.to(weight.dtype), _dbias(dbias, weight, bias is not None), dscale


def _wide(x: Tensor, acc: torch.dtype) -> Tensor:
    return x.to(acc).contiguous()  # so that every result is contiguous, whatever the strides of the input


def _normed(wide: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (wide - mean[..., None] if mean.numel() else wide) * rstd[..., None]


def _backward(dy: Tensor, wide: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor):
    normed = _normed(wide, mean, rstd)
    g = dy * weight
    dx = g - normed * (g * normed).mean(-1, keepdim=True)
    if mean.numel():
        dx = dx - g.mean(-1, keepdim=True)
    return dx * rstd[..., None], _over_rows(dy * normed), _over_rows(dy)


def _over_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).sum(0)


def _dbias(dbias: Tensor, weight: Tensor, wanted: bool) -> Tensor:
    return dbias.to(weight.dtype) if wanted else dbias.new_empty(0)


def _rows(row_scale: Tensor, like: Tensor) -> Tensor:
    return row_scale.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _scaled(branch: Tensor, layer_scale: Tensor | None, row_scale: Tensor | None) -> Tensor:
    if layer_scale is not None:
        branch = branch * layer_scale.to(branch.dtype)
    return branch if row_scale is None else branch * _rows(row_scale, branch)
