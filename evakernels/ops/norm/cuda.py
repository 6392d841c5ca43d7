"""The norms by the compiled kernels (`csrc/norm/`)."""

import torch
from torch import Tensor

from evakernels import native
from evakernels.ops.norm import buffers

NORM, ADD_NORM, NORM_ADD = range(3)  # `enum class NormKind` of csrc/norm/norm.hpp


def refuses(op: str, *args) -> str | None:
    """Why the kernels cannot serve this call: the library, a dtype, or the row length."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if reason := native.refusal("norm", tensors[0].device.type):
        return reason
    if wrong := {t.dtype for t in tensors} - native.DTYPES.keys():
        return f"its kernels take float32, bfloat16 and float16, not {', '.join(map(str, wrong))}"
    if op.endswith("backward"):
        scaled = op != "norm_backward" and args[7 if op == "add_norm_backward" else 6] is not None
        if reason := native.row_refusal(tensors[0].shape[-1], 3 if scaled else 2, tensors[0]):
            return reason
    wide, narrow = _dtypes(op, args)
    if wide not in (narrow, torch.float32):
        return f"its kernels compute {narrow} beside the same dtype or float32, not {wide}"
    if op == "add_norm" and narrow not in (args[1].dtype, torch.float32):
        return f"its kernels do not round a branch of {args[1].dtype} to {narrow} before they add it"
    return None


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, dtype: torch.dtype):
    y, statistics = x.new_empty(x.shape, dtype=dtype), buffers.statistics(x, rms)
    _forward(NORM, x.dtype, dtype, _ready(x), None, weight, bias, None, None, y, None, *statistics, eps, rms)
    return y, *statistics


def add_norm(residual, branch, weight, bias, eps, rms, layer_scale, row_scale, dtype):
    total, statistics = residual.new_empty(residual.shape), buffers.statistics(residual, rms)
    y = residual.new_empty(residual.shape, dtype=dtype)
    _forward(
        *(ADD_NORM, residual.dtype, dtype, _ready(branch, dtype), _ready(residual)),
        *(weight, bias, layer_scale, row_scale, y, total, *statistics, eps, rms),
    )
    return total, y, *statistics


def norm_add(residual, branch, weight, bias, eps, rms, layer_scale, row_scale):
    out, statistics = residual.new_empty(residual.shape), buffers.statistics(branch, rms)
    _forward(
        *(NORM_ADD, residual.dtype, branch.dtype, _ready(branch), _ready(residual)),
        *(weight, bias, layer_scale, row_scale, None, out, *statistics, eps, rms),
    )
    return out, *statistics


def norm_backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, bias: bool):
    dx = x.new_empty(x.shape)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight) if bias else weight.new_empty(0)
    _backward(
        *(NORM, x.dtype, dy.dtype, _ready(dy), None, _ready(x), None, weight, None, None, None, mean, rstd),
        *(dx, None, dweight, dbias, None),
    )
    return dx, dweight, dbias


def add_norm_backward(dsum, dy, total, branch, weight, mean, rstd, layer_scale, row_scale, bias, branch_dtype):
    dresidual = total.new_empty(total.shape)
    alike = layer_scale is None and row_scale is None and branch_dtype == total.dtype
    dbranch = total.new_empty((0,) if alike else total.shape, dtype=dy.dtype)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight) if bias else weight.new_empty(0)
    dscale = torch.empty_like(layer_scale) if layer_scale is not None else rstd.new_empty(0)
    _backward(
        *(ADD_NORM, total.dtype, dy.dtype, _ready(dy), _ready(dsum), _ready(total), _ready(branch, dy.dtype)),
        *(weight, None, layer_scale, row_scale, mean, rstd, dresidual, dbranch, dweight, dbias, dscale),
    )
    return dresidual, dbranch.to(branch_dtype), dweight, dbias, dscale


def norm_add_backward(dout, branch, weight, bias, mean, rstd, layer_scale, row_scale):
    dbranch = branch.new_empty(branch.shape)
    dweight = torch.empty_like(weight)
    dbias = torch.empty_like(weight) if bias is not None else weight.new_empty(0)
    dscale = torch.empty_like(layer_scale) if layer_scale is not None else rstd.new_empty(0)
    _backward(
        *(NORM_ADD, dout.dtype, branch.dtype, _ready(dout), None, _ready(branch), None, weight, bias),
        *(layer_scale, row_scale, mean, rstd, dbranch, None, dweight, dbias, dscale),
    )
    return dbranch, dweight, dbias, dscale


def _dtypes(op: str, args: tuple) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the residual stream (of x, where there is none) and that of everything else."""
    match op:
        case "norm":
            return args[0].dtype, args[-1]
        case "norm_backward":
            return args[1].dtype, args[0].dtype
        case "add_norm":
            return args[0].dtype, args[-1]
        case "add_norm_backward":
            return args[2].dtype, args[1].dtype
        case _:
            return args[0].dtype, args[1].dtype


def _ready(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Contiguous, of this dtype, and at a multiple of 16 bytes; copied where it is not."""
    if x is None:
        return None
    x = (x if dtype is None else x.to(dtype)).contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _codes(*columns: Tensor | None) -> list[int]:
    return [0 if c is None else native.DTYPES[c.dtype] for c in columns]


def _forward(kind, wide, narrow, x, residual, weight, bias, layer_scale, row_scale, y, total, mean, rstd, eps, rms):
    if not x.numel():
        return
    weight, bias, layer_scale = map(_ready, (weight, bias, layer_scale))
    native.call(
        *("norm_forward", x, kind, native.DTYPES[wide], native.DTYPES[narrow], x, residual),
        *(weight, bias, layer_scale, _row_scale(row_scale), *_codes(weight, bias, layer_scale)),
        *(y, total, mean, rstd, *buffers.sizes(x), eps, rms, native.multiprocessors(x.device)),
    )


def _backward(
    kind, wide, narrow, dy, dsum, x, branch, weight, bias, layer_scale, row_scale, mean, rstd,
    dx, dbranch, dweight, dbias, dscale,
):  # fmt: skip
    rows, _, width = sizes = buffers.sizes(x)
    if not x.numel():
        for gradient in (dweight, dbias, dscale):
            if gradient is not None:
                gradient.zero_()
        return
    weight, bias, layer_scale = map(_ready, (weight, bias, layer_scale))
    multiprocessors = native.multiprocessors(x.device)
    blocks = native.compiled(x).norm_blocks(rows, width, layer_scale is not None, multiprocessors)
    native.call(
        *("norm_backward", x, kind, native.DTYPES[wide], native.DTYPES[narrow], dy, dsum, x, branch),
        *(weight, bias, layer_scale, _row_scale(row_scale), *_codes(weight, bias, layer_scale)),
        *(mean.contiguous(), rstd.contiguous(), dx, dbranch, dweight, dbias, dscale),
        *(rstd.new_empty(blocks, 3, width), *sizes, not mean.numel(), multiprocessors),
    )


def _row_scale(row_scale: Tensor | None) -> Tensor | None:
    return None if row_scale is None else row_scale.float().contiguous()
