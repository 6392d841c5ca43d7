"""SwiGLU, silu(gate) * up, alone or with the LayerNorm that follows it in the same pass (EVA-02's sub-LN)."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evakernels.dispatch import define
from evakernels.ops import checks
from evakernels.ops.swiglu.buffers import statistics, weight_gradients


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; the backward pass recomputes from `gate` and `up` and nothing else is saved.

    Args:
        gate, up: (..., F), one dtype of float32, bfloat16, float16 (float64 on the CPU); strided views, such as
            the halves of one tensor, are not copied. Autocast casts both.

    Returns:
        (..., F) in autocast's dtype, or that of `gate` without autocast.

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit.

    Source: Shazeer, arXiv 2002.05202.
    """
    return _split("swiglu", gate, up, None, None, 0.0)


def swiglu_norm(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6) -> Tensor:
    """LayerNorm(silu(gate) * up) over the last dimension; the product is never stored.

    The backward pass saves `gate`, `up` and two float32 statistics a row. The product is not rounded before it is
    normalised.

    Args:
        gate, up: (..., F), one dtype of float32, bfloat16, float16 (float64 on the CPU); strided views, such as
            the halves of one tensor, are not copied. Autocast casts both.
        weight, bias: (F,) of the LayerNorm, any floating dtype, never cast by autocast.
        eps: added to the variance.

    Returns:
        (..., F) in autocast's dtype, or that of `gate` without autocast.

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit.

    Source: Fang et al., EVA-02, arXiv 2303.11331, section 2.1.
    """
    return _split("swiglu_norm", gate, up, weight, bias, eps)


def swiglu_norm_packed(
    gate_up: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6, *, width: int
) -> Tensor:
    """`swiglu_norm` on the output of one matrix product whose two halves are padded to an aligned width.

    Args:
        gate_up: (..., 2 * padded): gate in [..., :width], up in [..., padded : padded + width]; the other columns
            may hold anything.
        weight, bias: (width,) of the LayerNorm; both None for `swiglu` alone.
        eps: added to the variance.
        width: the logical width F, at most `padded`.

    Returns:
        (..., padded) in autocast's dtype, or that of `gate_up` without autocast; the columns from `width` on are
        zero, and so are the pad columns of the gradient of `gate_up`.

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit.
    """
    function = "swiglu_norm_packed"
    checks.floating(function, gate_up=gate_up)
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2 or not 1 <= width <= gate_up.shape[-1] // 2:
        raise ValueError(
            f"{function}: gate_up has shape {tuple(gate_up.shape)} and width is {width}; the last dimension must be"
            " even and width between 1 and half of it"
        )
    _check_norm(function, gate_up, weight, bias, width)
    gate_up = gate_up.to(checks.output_dtype(gate_up))
    if checks.needs_grad(gate_up, weight, bias):
        return _SwigluPacked.apply(gate_up, weight, bias, eps, width)
    return _swiglu_packed(gate_up, weight, bias, eps, width)[0]


def _split(function: str, gate: Tensor, up: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    checks.floating(function, gate=gate, up=up)
    if gate.dim() < 1 or gate.shape[-1] == 0:
        raise ValueError(f"{function}: gate has shape {tuple(gate.shape)}; rows of at least 1 element are needed")
    checks.shape(function, "up", up, tuple(gate.shape), "that of gate")
    checks.same_device(function, gate, up=up)
    _check_norm(function, gate, weight, bias, gate.shape[-1])
    gate, up = gate.to(checks.output_dtype(gate)), up.to(checks.output_dtype(up))
    if gate.dtype != up.dtype:
        raise TypeError(f"{function}: gate has dtype {gate.dtype} and up {up.dtype}; cast one to the other's")
    if checks.needs_grad(gate, up, weight, bias):
        return _Swiglu.apply(gate, up, weight, bias, eps)
    return _swiglu(gate, up, weight, bias, eps)[0]


def _check_norm(function: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, width: int) -> None:
    checks.floating(function, weight=weight, bias=bias)
    checks.shape(function, "weight", weight, (width,), "one value per column")
    checks.shape(function, "bias", bias, (width,), "one value per column")
    checks.same_device(function, x, weight=weight, bias=bias)
    if weight is None and (bias is not None or function == "swiglu_norm"):
        raise ValueError(f"{function}: the LayerNorm needs a weight; pass torch.ones({width}), or call swiglu")


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, weight, bias, eps):
        y, mean, rstd = _swiglu(gate, up, weight, bias, eps)
        ctx.save_for_backward(gate, up, weight, mean, rstd)
        ctx.bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up, weight, mean, rstd = ctx.saved_tensors
        dgate, dup, dweight, dbias = _swiglu_backward(dy, gate, up, weight, mean, rstd, ctx.bias)
        return dgate, dup, dweight if weight is not None else None, dbias if ctx.bias else None, None


class _SwigluPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, weight, bias, eps, width):
        y, mean, rstd = _swiglu_packed(gate_up, weight, bias, eps, width)
        ctx.save_for_backward(gate_up, weight, mean, rstd)
        ctx.bias, ctx.width = bias is not None, width
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate_up, weight, mean, rstd = ctx.saved_tensors
        dgate_up, dweight, dbias = _swiglu_packed_backward(dy, gate_up, weight, mean, rstd, ctx.bias, ctx.width)
        return dgate_up, dweight if weight is not None else None, dbias if ctx.bias else None, None, None


def _empty_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


# Without a weight there is no norm: statistics and weight gradients are then empty.
_swiglu = define(
    "swiglu",
    "swiglu(Tensor gate, Tensor up, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    lambda gate, up, weight, bias, eps: (_empty_like(gate), *statistics(gate, weight)),
)
_swiglu_backward = define(
    "swiglu",
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up, Tensor? weight, Tensor mean, Tensor rstd, bool bias)"
    " -> (Tensor dgate, Tensor dup, Tensor dweight, Tensor dbias)",
    lambda dy, gate, up, weight, mean, rstd, bias: (
        *(_empty_like(gate), _empty_like(up)),
        *weight_gradients(gate, weight, bias),
    ),
)
_swiglu_packed = define(
    "swiglu",
    "swiglu_packed(Tensor gate_up, Tensor? weight, Tensor? bias, float eps, SymInt width)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    lambda gate_up, weight, bias, eps, width: (
        gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
        *statistics(gate_up, weight),
    ),
)
_swiglu_packed_backward = define(
    "swiglu",
    "swiglu_packed_backward(Tensor dy, Tensor gate_up, Tensor? weight, Tensor mean, Tensor rstd, bool bias,"
    " SymInt width) -> (Tensor dgate_up, Tensor dweight, Tensor dbias)",
    lambda dy, gate_up, weight, mean, rstd, bias, width: (
        _empty_like(gate_up),
        *weight_gradients(gate_up, weight, bias),
    ),
)
