"""SwiGLU and the LayerNorm after it by the compiled kernels (`csrc/swiglu/`)."""

import torch
from torch import Tensor

from evakernels import native


def refuses(op: str, *args) -> str | None:
    """Why the kernels cannot serve this call: the library, a dtype, or the row length."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if reason := native.refusal("swiglu", tensors[0].device.type):
        return reason
    if wrong := {t.dtype for t in tensors} - native.DTYPES.keys():
        return f"its kernels take float32, bfloat16 and float16, not {', '.join(map(str, wrong))}"
    if "packed" not in op:
        gate, up = args[1:3] if op.endswith("backward") else args[:2]
        if gate.dtype != up.dtype:
            return f"its kernels take gate and up of one dtype, not {gate.dtype} and {up.dtype}"
    weight = {"swiglu_backward": 3, "swiglu_packed_backward": 2}.get(op)
    if weight is not None and args[weight] is not None:
        return native.row_refusal(len(args[weight]), 2, tensors[0])
    return None


def swiglu(gate: Tensor, up: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
    y, (mean, rstd) = gate.new_empty(gate.shape), _statistics(gate, weight)
    _forward(_rows(gate), _rows(up), weight, bias, y, mean, rstd, eps, gate.shape[-1])
    return y, mean, rstd


def swiglu_backward(dy, gate, up, weight, mean, rstd, bias: bool):
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    dweight, dbias = _weight_gradients(gate, weight, bias)
    _backward(
        *(_rows(dy.to(gate.dtype)), _rows(gate), _rows(up), weight, mean, rstd),
        *(_rows(dgate), _rows(dup), dweight, dbias, gate.shape[-1]),
    )
    return dgate, dup, dweight, dbias


def swiglu_packed(gate_up: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, width: int):
    y = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
    gate, up = _rows(gate_up).chunk(2, -1)
    mean, rstd = _statistics(gate_up, weight)
    _forward(gate, up, weight, bias, y, mean, rstd, eps, width)
    return y, mean, rstd


def swiglu_packed_backward(dy, gate_up, weight, mean, rstd, bias: bool, width: int):
    dgate_up = gate_up.new_empty(gate_up.shape)
    dweight, dbias = _weight_gradients(gate_up, weight, bias)
    (gate, up), (dgate, dup) = _rows(gate_up).chunk(2, -1), _rows(dgate_up).chunk(2, -1)
    _backward(_rows(dy.to(gate_up.dtype)), gate, up, weight, mean, rstd, dgate, dup, dweight, dbias, width)
    return dgate_up, dweight, dbias


def _statistics(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = x.shape[:-1] if weight is not None else (0,)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def _weight_gradients(x: Tensor, weight: Tensor | None, bias: bool) -> tuple[Tensor, Tensor]:
    like = weight if weight is not None else x.new_empty(0)
    return like.new_empty(like.shape), like.new_empty(like.shape if bias else 0)


def _rows(x: Tensor) -> Tensor:
    """(rows, columns) with neighbouring columns side by side; copied where no view of `x` is so."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _with_pitch(*rows: Tensor):
    for x in rows:
        yield from (x, x.stride(0))


def _with_dtype(*columns: Tensor | None):
    for x in columns:
        yield from (None, 0) if x is None else (x.contiguous(), native.DTYPES[x.dtype])


def _forward(gate, up, weight, bias, y, mean, rstd, eps: float, width: int) -> None:
    rows, padded = gate.shape
    if not rows:
        return
    native.call(
        *("swiglu_forward", gate, native.DTYPES[gate.dtype], rows, width, padded, *_with_pitch(gate, up)),
        *(*_with_dtype(weight, bias), y, mean, rstd, eps, native.multiprocessors(gate.device)),
    )


def _backward(dy, gate, up, weight, mean, rstd, dgate, dup, dweight, dbias, width: int) -> None:
    rows, padded = gate.shape
    if not rows:
        dweight.zero_(), dbias.zero_()
        return
    multiprocessors = native.multiprocessors(gate.device)
    blocks = native.compiled(gate).swiglu_blocks(rows, padded, multiprocessors) if weight is not None else 0
    native.call(
        *("swiglu_backward", gate, native.DTYPES[gate.dtype], rows, width, padded, *_with_pitch(dy, gate, up)),
        *(*_with_dtype(weight), mean.contiguous(), rstd.contiguous(), dgate, dup, dgate.stride(0)),
        *(dweight, dbias if dbias.numel() else None, mean.new_empty(blocks, 2, width), multiprocessors),
    )
