"""SwiGLU and the LayerNorm after it, composed of PyTorch's own CPU kernels: silu, layer_norm and their backwards.

Half precision is computed in float32, as in `reference`: PyTorch's half-precision layer_norm would round the product
first, and keep its statistics in half precision.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from evakernels.ops.checks import accumulator
from evakernels.ops.swiglu.reference import contiguous, on_packed

aten = torch.ops.aten


def swiglu(gate: Tensor, up: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
    acc = accumulator(gate.dtype)
    y, mean, rstd = silu(gate.to(acc)).mul_(up), gate.new_empty(0, dtype=acc), gate.new_empty(0, dtype=acc)
    if weight is not None:
        bias = bias.to(acc) if bias is not None else None
        y, mean, rstd = aten.native_layer_norm(y, weight.shape, weight.to(acc), bias, eps)
        mean, rstd = mean.squeeze(-1), rstd.squeeze(-1)
    return contiguous(y, gate.dtype), mean, rstd


def swiglu_backward(dy, gate, up, weight, mean, rstd, bias: bool):
    acc = accumulator(gate.dtype)
    dp, wide = dy.to(acc), gate.to(acc)
    activated = silu(wide)
    dweight, dbias = gate.new_empty(0), gate.new_empty(0)
    if weight is not None:
        # The third tensor only has to exist: where dbias is wanted, PyTorch asks the bias for its device.
        dp, dweight, dbias = aten.native_layer_norm_backward(
            *(dp, activated * up, weight.shape, mean[..., None], rstd[..., None]),
            *(weight.to(acc), weight.to(acc) if bias else None, (True, True, bias)),
        )
        dweight = dweight.to(weight.dtype)
        dbias = dbias.to(weight.dtype) if bias else weight.new_empty(0)
    dgate = aten.silu_backward(dp * up, wide)
    return contiguous(dgate, gate.dtype), contiguous(activated.mul_(dp), up.dtype), dweight, dbias


swiglu_packed, swiglu_packed_backward = on_packed(swiglu, swiglu_backward)
