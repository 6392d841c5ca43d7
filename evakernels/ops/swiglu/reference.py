"""SwiGLU and the LayerNorm after it, by their formulas in plain PyTorch.

    p = silu(gate) * up,   silu(x) = x * sigmoid(x)
    y = normed * weight + bias,   normed = (p - mean(p)) * rstd,   rstd = 1 / sqrt(var(p) + eps)

Backward, with g = dy * weight and the means over the row:
    dp = rstd * (g - mean(g) - normed * mean(g * normed))
    dgate = dp * up * s * (1 + gate * (1 - s)),   s = sigmoid(gate)
    dup = dp * silu(gate)
    dweight = sum(dy * normed),   dbias = sum(dy)

Everything between load and store is float32 (float64 for float64 input). Without a weight there is no norm: y = p,
dp = dy, and the statistics and weight gradients are empty.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from evakernels.ops.checks import accumulator


def swiglu(gate: Tensor, up: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
    acc = accumulator(gate.dtype)
    wide = gate.to(acc)
    y = wide * wide.sigmoid() * up.to(acc)
    if weight is None:
        return contiguous(y, gate.dtype), y.new_empty(0), y.new_empty(0)
    var, mean = torch.var_mean(y, -1, correction=0)
    rstd = (var + eps).rsqrt()
    y = _normed(y, mean, rstd) * weight.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    return contiguous(y, gate.dtype), mean.contiguous(), rstd.contiguous()


def swiglu_backward(dy, gate, up, weight, mean, rstd, bias: bool):
    acc = accumulator(gate.dtype)
    dp, wide, wide_up = dy.to(acc), gate.to(acc), up.to(acc)
    sigmoid = wide.sigmoid()
    silu = wide * sigmoid
    dweight, dbias = gate.new_empty(0), gate.new_empty(0)
    if weight is not None:
        normed = _normed(silu * wide_up, mean, rstd)
        dweight = _over_rows(dp * normed).to(weight.dtype)
        dbias = _over_rows(dp).to(weight.dtype) if bias else weight.new_empty(0)
        g = dp * weight.to(acc)
        dp = (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)) * rstd[..., None]
    dgate = dp * wide_up * sigmoid * (1 + wide * (1 - sigmoid))
    return contiguous(dgate, gate.dtype), contiguous(dp * silu, up.dtype), dweight, dbias


def on_packed(swiglu: Callable, swiglu_backward: Callable) -> tuple[Callable, Callable]:
    """The packed forms of both passes: the logical columns of a padded tensor, the rest filled with zeros."""

    def swiglu_packed(gate_up: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, width: int):
        y, mean, rstd = swiglu(*_halves(gate_up, width), weight, bias, eps)
        pad = gate_up.shape[-1] // 2 - width
        return torch.nn.functional.pad(y, (0, pad)) if pad else y, mean, rstd

    def swiglu_packed_backward(dy, gate_up, weight, mean, rstd, bias: bool, width: int):
        halves = _halves(gate_up, width)
        dgate, dup, dweight, dbias = swiglu_backward(dy[..., :width], *halves, weight, mean, rstd, bias)
        dgate_up = gate_up.new_zeros(gate_up.shape)
        for half, gradient in zip(_halves(dgate_up, width), (dgate, dup), strict=True):
            half.copy_(gradient)
        return dgate_up, dweight, dbias

    return swiglu_packed, swiglu_packed_backward


swiglu_packed, swiglu_packed_backward = on_packed(swiglu, swiglu_backward)


def contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous()


def _halves(gate_up: Tensor, width: int) -> tuple[Tensor, Tensor]:
    padded = gate_up.shape[-1] // 2
    return gate_up[..., :width], gate_up[..., padded : padded + width]


def _normed(p: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (p - mean[..., None]) * rstd[..., None]


def _over_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).sum(0)
