"""Attention by the compiled kernels (`csrc/attention/`): the rotation happens on the way into and out of them."""

import torch
from torch import Tensor

from evakernels import native

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


def attention(q: Tensor, k: Tensor, v: Tensor, *options):
    out = q.new_empty(q.shape)
    return out, _forward(q, k, v, out, *options)


def attention_qkvpacked(qkv: Tensor, *options):
    q, k, v = qkv.unbind(2)
    out = qkv.new_empty(q.shape)
    return out, _forward(q, k, v, out, *options)


def attention_backward(dout, q, k, v, out, lse, *options):
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    _backward(dout, q, k, v, out, lse, dq, dk, dv, *options)
    return dq, dk, dv


def attention_qkvpacked_backward(dout, qkv, out, lse, *options):
    dqkv = qkv.new_empty(qkv.shape)
    _backward(dout, *qkv.unbind(2), out, lse, *dqkv.unbind(2), *options)
    return dqkv


def _forward(q, k, v, out, *options) -> Tensor:
    batch, tokens, heads, _ = q.shape
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    if batch and heads:
        _call("attention_forward", [*map(_aligned, (q, k, v)), out], lse, *options)
    return lse


def _backward(dout, q, k, v, out, lse, dq, dk, dv, *options) -> None:
    if q.shape[0] and q.shape[2]:
        # Addresses say nothing of dtypes and strides: what a caller of the operator gives is made what kernels read.
        inputs = map(_aligned, (q, k, v, out, dout.to(q.dtype)))
        _call("attention_backward", [*inputs, dq, dk, dv], lse.contiguous(), *options)


def _aligned(x: Tensor) -> Tensor:
    """Rows of neighbouring channels that begin at multiples of 16 bytes; a copy where they do not."""
    batch, token, head, channel = x.stride()
    if channel == 1 and (batch | token | head) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


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
