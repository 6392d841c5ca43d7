"""SwiGLU and the LayerNorm after it by the compiled kernels (`csrc/swiglu/`)."""

from torch import Tensor

from evakernels import native
from evakernels.ops.swiglu.buffers import operators


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
        *("swiglu_backward", gate, native.DTYPES[gate.dtype], rows, width, padded),
        *_with_pitch(dy.to(gate.dtype), gate, up),
        *(*_with_dtype(weight), mean.contiguous(), rstd.contiguous(), dgate, dup, dgate.stride(0)),
        *(dweight, dbias if dbias.numel() else None, mean.new_empty(blocks, 2, width), multiprocessors),
    )


swiglu, swiglu_backward, swiglu_packed, swiglu_packed_backward = operators(_forward, _backward)
