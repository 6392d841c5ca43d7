"""LayerNorm and RMSNorm, alone or fused with the residual step before (pre-norm) or after (res-post-norm)."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evakernels.dispatch import define
from evakernels.ops import checks
from evakernels.ops.norm.buffers import statistics


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Layer normalisation over the last dimension, statistics in float32.

    Args:
        x: (..., C), any row length; float32, bfloat16, float16 (float64 on the CPU).
        weight, bias: (C,), any floating dtype; their gradients take it.
        eps: added to the variance.

    Returns:
        (..., C) in autocast's dtype, or that of `x` without autocast.

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit.

    Source: Ba et al., arXiv 1607.06450.
    """
    return _norm("layer_norm", x, weight, bias, eps, rms=False)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Root-mean-square normalisation over the last dimension, statistics in float32.

    Args:
        x: (..., C), any row length; float32, bfloat16, float16 (float64 on the CPU).
        weight: (C,), any floating dtype; its gradient takes it.
        eps: added to the mean square.

    Returns:
        (..., C) in autocast's dtype, or that of `x` without autocast.

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit.

    Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    return _norm("rms_norm", x, weight, None, eps, rms=True)


def add_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    rms: bool = False,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The pre-norm step in one pass: s = residual + row_scale * layer_scale * branch, and norm(s).

    Args:
        residual, branch: (B, ..., C), each in its own dtype.
        weight, bias: (C,) of the norm that follows the sum; no bias with `rms`.
        eps: added to the variance (to the mean square with `rms`).
        rms: RMSNorm instead of LayerNorm.
        layer_scale: (C,), the learned scale of the branch.
        row_scale: (B,) float32, stochastic depth: 0 or 1 / keep probability for each sample.

    Returns:
        s in the dtype of `residual`; norm(s) in autocast's dtype, or that of `residual` without autocast.

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit.
    """
    _check("add_norm", residual, branch, weight, bias, rms, layer_scale, row_scale)
    dtype = checks.output_dtype(residual)
    if checks.needs_grad(residual, branch, weight, bias, layer_scale):
        return _AddNorm.apply(residual, branch, weight, bias, eps, rms, layer_scale, row_scale, dtype)
    total, y, _, _ = _add_norm(residual, branch, weight, bias, eps, rms, layer_scale, row_scale, dtype)
    return total, y


def norm_add(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    rms: bool = False,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """The res-post-norm step in one pass: residual + row_scale * layer_scale * norm(branch).

    Args:
        residual, branch: (B, ..., C), each in its own dtype.
        weight, bias: (C,) of the norm of the branch; no bias with `rms`.
        eps: added to the variance (to the mean square with `rms`).
        rms: RMSNorm instead of LayerNorm.
        layer_scale: (C,), the learned scale of the normalised branch.
        row_scale: (B,) float32, stochastic depth: 0 or 1 / keep probability for each sample.

    Returns:
        (B, ..., C) in the dtype of `residual`.

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit.
    """
    _check("norm_add", residual, branch, weight, bias, rms, layer_scale, row_scale)
    if checks.needs_grad(residual, branch, weight, bias, layer_scale):
        return _NormAdd.apply(residual, branch, weight, bias, eps, rms, layer_scale, row_scale)
    return _norm_add(residual, branch, weight, bias, eps, rms, layer_scale, row_scale)[0]


def _norm(function: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    _check_weights(function, x, weight, bias)
    dtype = checks.output_dtype(x)
    if checks.needs_grad(x, weight, bias):
        return _Norm.apply(x, weight, bias, eps, rms, dtype)
    return _norm_op(x, weight, bias, eps, rms, dtype)[0]


def _check_weights(function: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight is None:
        raise TypeError(f"{function}: weight is None; pass torch.ones({x.shape[-1]}), in the dtype of its gradient")
    checks.floating(function, x=x, weight=weight, bias=bias)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{function}: the input has shape {tuple(x.shape)}; rows of at least 1 element are needed")
    channels = (x.shape[-1],)
    checks.shape(function, "weight", weight, channels, "one value per channel of the last dimension")
    checks.shape(function, "bias", bias, channels, "one value per channel of the last dimension")
    checks.same_device(function, x, weight=weight, bias=bias)


def _check(function, residual, branch, weight, bias, rms, layer_scale, row_scale) -> None:
    _check_weights(function, residual, weight, bias)
    checks.floating(function, branch=branch, layer_scale=layer_scale, row_scale=row_scale)
    if rms and bias is not None:
        raise ValueError(f"{function}: RMSNorm has no bias; drop the bias or pass rms=False")
    checks.shape(function, "branch", branch, tuple(residual.shape), "that of the residual")
    checks.shape(function, "layer_scale", layer_scale, (residual.shape[-1],), "one value per channel")
    checks.shape(function, "row_scale", row_scale, (residual.shape[0],), "one value per sample of the batch")
    checks.same_device(function, residual, branch=branch, layer_scale=layer_scale, row_scale=row_scale)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, rms, dtype):
        y, mean, rstd = _norm_op(x, weight, bias, eps, rms, dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = _norm_backward(dy, x, weight, mean, rstd, ctx.bias)
        return dx, dweight, dbias if ctx.bias else None, None, None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, branch, weight, bias, eps, rms, layer_scale, row_scale, dtype):
        total, y, mean, rstd = _add_norm(residual, branch, weight, bias, eps, rms, layer_scale, row_scale, dtype)
        # The branch itself is wanted only for the gradient of the layer scale.
        kept = branch if layer_scale is not None else None
        ctx.save_for_backward(total, kept, weight, mean, rstd, layer_scale, row_scale)
        ctx.bias, ctx.branch_dtype = bias is not None, branch.dtype
        ctx.set_materialize_grads(False)  # the sum of the last block is not used any more: no zeros for it
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dsum, dy):
        total, branch, weight, mean, rstd, layer_scale, row_scale = ctx.saved_tensors
        dy = torch.zeros_like(total) if dy is None else dy
        dresidual, dbranch, dweight, dbias, dscale = _add_norm_backward(
            dsum, dy, total, branch, weight, mean, rstd, layer_scale, row_scale, ctx.bias, ctx.branch_dtype
        )
        if not dbranch.numel():
            dbranch = dresidual
        return (
            *(dresidual, dbranch, dweight, dbias if ctx.bias else None, None, None),
            *(dscale if layer_scale is not None else None, None, None),
        )


class _NormAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, branch, weight, bias, eps, rms, layer_scale, row_scale):
        out, mean, rstd = _norm_add(residual, branch, weight, bias, eps, rms, layer_scale, row_scale)
        ctx.save_for_backward(branch, weight, bias, mean, rstd, layer_scale, row_scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        branch, weight, bias, mean, rstd, layer_scale, row_scale = ctx.saved_tensors
        dbranch, dweight, dbias, dscale = _norm_add_backward(
            dout, branch, weight, bias, mean, rstd, layer_scale, row_scale
        )
        return (
            *(dout, dbranch, dweight, dbias if bias is not None else None, None, None),
            *(dscale if layer_scale is not None else None, None),
        )


def _empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _optional(wanted: bool, like: Tensor) -> Tensor:
    return _empty_like(like) if wanted else like.new_empty(0)


_norm_op = define(
    "norm",
    "norm(Tensor x, Tensor weight, Tensor? bias, float eps, bool rms, ScalarType dtype)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    lambda x, weight, bias, eps, rms, dtype: (_empty_like(x, dtype), *statistics(x, rms)),
)
_norm_backward = define(
    "norm",
    "norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool bias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    lambda dy, x, weight, mean, rstd, bias: (_empty_like(x), _empty_like(weight), _optional(bias, weight)),
)
_add_norm = define(
    "norm",
    "add_norm(Tensor residual, Tensor branch, Tensor weight, Tensor? bias, float eps, bool rms,"
    " Tensor? layer_scale, Tensor? row_scale, ScalarType dtype) -> (Tensor sum, Tensor y, Tensor mean, Tensor rstd)",
    lambda residual, branch, weight, bias, eps, rms, layer_scale, row_scale, dtype: (
        *(_empty_like(residual), _empty_like(residual, dtype)),
        *statistics(residual, rms),
    ),
)
# Where nothing scales the branch and its dtype is the sum's, its gradient is the residual's and `dbranch` is empty.
_add_norm_backward = define(
    "norm",
    "add_norm_backward(Tensor? dsum, Tensor dy, Tensor sum, Tensor? branch, Tensor weight, Tensor mean, Tensor rstd,"
    " Tensor? layer_scale, Tensor? row_scale, bool bias, ScalarType branch_dtype)"
    " -> (Tensor dresidual, Tensor dbranch, Tensor dweight, Tensor dbias, Tensor dlayer_scale)",
    lambda dsum, dy, total, branch, weight, mean, rstd, layer_scale, row_scale, bias, branch_dtype: (
        _empty_like(total),
        total.new_empty(
            (0,) if layer_scale is None and row_scale is None and branch_dtype == total.dtype else total.shape,
            dtype=branch_dtype,
        ),
        *(_empty_like(weight), _optional(bias, weight)),
        _empty_like(layer_scale) if layer_scale is not None else _empty(total),
    ),
)
_norm_add = define(
    "norm",
    "norm_add(Tensor residual, Tensor branch, Tensor weight, Tensor? bias, float eps, bool rms,"
    " Tensor? layer_scale, Tensor? row_scale) -> (Tensor out, Tensor mean, Tensor rstd)",
    lambda residual, branch, weight, bias, eps, rms, layer_scale, row_scale: (
        _empty_like(residual),
        *statistics(branch, rms),
    ),
)
_norm_add_backward = define(
    "norm",
    "norm_add_backward(Tensor dout, Tensor branch, Tensor weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " Tensor? layer_scale, Tensor? row_scale) -> (Tensor dbranch, Tensor dweight, Tensor dbias, Tensor dlayer_scale)",
    lambda dout, branch, weight, bias, mean, rstd, layer_scale, row_scale: (
        *(_empty_like(branch), _empty_like(weight), _optional(bias is not None, weight)),
        _empty_like(layer_scale) if layer_scale is not None else _empty(branch),
    ),
)


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=checks.accumulator(like.dtype))
