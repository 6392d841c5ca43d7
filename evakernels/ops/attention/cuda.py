"""Attention by the compiled kernels (`csrc/attention/`): the rotation happens on the way into and out of them."""

import torch
from torch import Tensor

from evakernels import native
from evakernels.ops.attention.buffers import aligned, operators

HEAD_DIMS = (32, 64, 72, 80, 88, 96, 104, 112, 128)  # csrc/attention/select.hpp
MOST_PATCHES = 1 << 20  # csrc/common/rope.hpp
MOST_TOKENS = 7168  # of which the backward kernel has two numbers each in shared memory, beside its tiles


def refuses(op: str, *args) -> str | None:
    """Why the kernels cannot serve this call: the library, the dtype, the head dimension, the scale or the grid."""
    x = args[0]
    if reason := native.refusal("attention", x.device.type):
        return reason
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels take bfloat16 and float16, not {x.dtype}; give it one of these, or run under autocast"
    if x.shape[-1] not in HEAD_DIMS:
        return f"its kernels take head dimensions {', '.join(map(str, HEAD_DIMS))}, not {x.shape[-1]}"
    tokens = x.shape[1]
    if tokens > MOST_TOKENS:
        return f"its kernels take up to {MOST_TOKENS} tokens, not {tokens}"
    rows, columns, scale = *args[-7:-5], args[-1]
    if not scale > 0:
        return f"its kernels take a positive scale, not {scale}"
    if rows is not None and rows.shape[0] * columns.shape[0] > MOST_PATCHES:
        return f"its kernels take grids of up to {MOST_PATCHES} patches, not {rows.shape[0]} x {columns.shape[0]}"
    return None


def _forward(q, k, v, out, *options) -> Tensor:
    batch, tokens, heads, _ = q.shape
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    if batch and heads:
        _call("attention_forward", [*map(aligned, (q, k, v)), out], lse, *options)
    return lse


def _backward(dout, q, k, v, out, lse, dq, dk, dv, *options) -> None:
    if q.shape[0] and q.shape[2]:
        # Addresses say nothing of dtypes and strides: what a caller of the operator gives is made what kernels read.
        inputs = map(aligned, (q, k, v, out, dout.to(q.dtype)))
        _call("attention_backward", [*inputs, dq, dk, dv], lse.contiguous(), *options)


def _call(name: str, tensors: list[Tensor], lse: Tensor, rows, columns, positions, prefix, interleaved, causal, scale):
    q = tensors[0]
    batch, tokens, heads, head_dim = q.shape
    shape = (native.DTYPES[q.dtype], batch, tokens, heads, head_dim, scale, causal)
    ids, *kind = native.kept_ids(positions, tokens - prefix)
    tables = [None if x is None else x.contiguous() for x in (rows, columns)]
    grid = (1, 1) if rows is None else (rows.shape[0], columns.shape[0])
    touched = [x for x in (*tensors, *tables, ids) if x is not None]
    rotation = (*map(_address, tables), *grid, prefix, interleaved, _address(ids), *kind)
    strided = [(x.data_ptr(), *x.stride()[:3]) for x in tensors]
    native.call(name, q, shape, rotation, *strided, lse, native.shared_memory(q.device), touches=touched)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


attention, attention_backward, attention_qkvpacked, attention_qkvpacked_backward = operators(_forward, _backward)
