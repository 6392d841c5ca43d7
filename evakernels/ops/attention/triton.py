"""Attention by Triton kernels (`triton_kernels.py`): for any length and head dimension, float32 too."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from evakernels import jit, native
from evakernels.ops.attention import triton_kernels


class Config(NamedTuple):
    """Tiles of a kernel: queries and keys, warps of a program, stages of its loop."""

    queries: int
    keys: int
    warps: int
    stages: int


def forward_config(tokens: int, head_dim: int, size: int, hopper: bool) -> Config:
    if size == 4:
        return Config(64, 32, 4, 1)
    return Config(64 if tokens <= 64 else 128, 64, 4 if tokens <= 64 else 8, 2)


def backward_config(tokens: int, head_dim: int, size: int, hopper: bool) -> Config:
    if size == 4:
        return Config(32, 32, 4, 1)
    return Config(64, 64, 4, 2)


def refuses(op: str, *args) -> str | None:
    """Why the kernels cannot serve this call: the device, the dtype, the scale or the grid."""
    x, (rows, columns), scale = args[0], args[-7:-5], args[-1]
    if op == "apply_rope":
        (rows, columns), scale = args[1:3], 1.0
    if reason := jit.refusal(x):
        return reason
    if not 0 < abs(scale) < math.inf:
        return f"its kernels take a finite scale other than 0, not {scale}"
    if rows is not None and rows.shape[0] * columns.shape[0] >= 1 << 31:
        return f"its kernels take grids of fewer than 2^31 patches, not {rows.shape[0]} x {columns.shape[0]}"
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


def apply_rope(x, rows, columns, positions, prefix, interleaved, conjugate):
    turned = x.new_empty(x.shape)
    rotation = _Rotation.of(x, rows, columns, positions, prefix, interleaved)
    _turn((_aligned(x),), (turned,), rotation, keep=True, back=conjugate)
    return turned


class _Rotation(NamedTuple):
    """What kernels take of a rotation: two tables, ids; prefix tokens, patches, their columns; the order of pairs."""

    tensors: tuple[Tensor | None, Tensor | None, Tensor | None]
    numbers: tuple[int, int, int]
    halves: bool

    @classmethod
    def of(cls, x, rows, columns, positions, prefix, interleaved) -> "_Rotation":
        if rows is None:
            return cls((None, None, None), (0, 1, 1), False)
        ids, *_ = native.kept_ids(positions, x.shape[1] - prefix)
        grid = rows.shape[0], columns.shape[0]
        return cls((rows.contiguous(), columns.contiguous(), ids), (prefix, grid[0] * grid[1], grid[1]), not interleaved)

    def __bool__(self) -> bool:
        return self.tensors[0] is not None


def _forward(q, k, v, out, rows, columns, positions, prefix, interleaved, causal, scale) -> Tensor:
    if scale < 0:
        return _forward(-q, k, v, out, rows, columns, positions, prefix, interleaved, causal, -scale)
    batch, tokens, heads, head_dim = q.shape
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    q, k, v = map(_aligned, (q, k, v))
    rotation = _Rotation.of(q, rows, columns, positions, prefix, interleaved)
    config = forward_config(tokens, head_dim, q.element_size(), jit.capability(q.device) >= (9, 0))
    blocks = -(-tokens // config.queries)
    apart = rotation and _pays_apart(blocks, q.element_size())
    if apart:
        (k,) = _turned((k,), rotation)
    jit.launch(
        triton_kernels.forward,
        (blocks * heads * batch,),
        *(q, k, v, out, lse, *rotation.tensors),
        *(*_strides(q), *_strides(k), *_strides(v)),
        *(heads, tokens, *rotation.numbers, scale),
        D=head_dim,
        QUERIES=config.queries,
        KEYS=config.keys,
        CAUSAL=causal,
        TURN_Q=bool(rotation),
        TURN_K=bool(rotation and not apart),
        HALVES=rotation.halves,
        warps=config.warps,
        stages=config.stages,
    )
    return lse


def _backward(dout, q, k, v, out, lse, dq, dk, dv, rows, columns, positions, prefix, interleaved, causal, scale) -> None:
    if scale < 0:
        _backward(dout, -q, k, v, out, lse, dq, dk, dv, rows, columns, positions, prefix, interleaved, causal, -scale)
        dq.neg_()
        return
    batch, tokens, heads, head_dim = q.shape
    q, k, v, dout = map(_aligned, (q, k, v, dout.to(q.dtype)))
    out, lse = out.contiguous(), lse.contiguous()
    rotation = _Rotation.of(q, rows, columns, positions, prefix, interleaved)
    config = backward_config(tokens, head_dim, q.element_size(), jit.capability(q.device) >= (9, 0))
    whole = tokens <= config.keys
    apart = rotation and _pays_apart(-(-tokens // min(config[:2])), q.element_size())
    if apart:
        q, k = _turned((q, k), rotation)
    delta = None if whole else torch.empty_like(lse)
    strides = [s for x in (q, k, v, dout, dq) for s in _strides(x)]
    numbers = heads, tokens, *rotation.numbers, scale
    constants = {
        "D": head_dim,
        "QUERIES": config.queries,
        "KEYS": config.keys,
        "CAUSAL": causal,
        "TURN": bool(rotation and not apart),
        "TURN_BACK": bool(rotation),
        "HALVES": rotation.halves,
    }
    how = {"warps": config.warps, "stages": config.stages}
    if not whole:
        grid = (-(-tokens // config.queries) * heads * batch,)
        tensors = q, k, v, out, dout, lse, delta, dq, *rotation.tensors
        jit.launch(triton_kernels.backward_queries, grid, *tensors, *strides, *numbers, **how, **constants)
    grid = (-(-tokens // config.keys) * heads * batch,)
    tensors = q, k, v, out, dout, lse, delta, dq, dk, dv, *rotation.tensors
    jit.launch(triton_kernels.backward_keys, grid, *tensors, *strides, *numbers, **how, **constants, WHOLE=whole)


def _pays_apart(blocks: int, size: int) -> bool:
    return blocks * 4 > 3 * 2 * size


def _turned(tensors: tuple[Tensor, ...], rotation: _Rotation) -> tuple[Tensor, ...]:
    batch, tokens, heads, head_dim = tensors[0].shape
    to = tuple(x.new_empty((batch, heads, tokens, head_dim)).transpose(1, 2) for x in tensors)
    _turn(tensors, to, rotation, keep=False, back=False)
    return to


def _turn(tensors, to, rotation: _Rotation, keep: bool, back: bool) -> None:
    x = tensors[0]
    batch, tokens, heads, head_dim = x.shape
    rows = 32
    blocks = -(-tokens // rows) * batch
    groups = min(heads, -(-8 * native.multiprocessors(x.device) // max(blocks, 1)))
    share = -(-heads // max(groups, 1))
    groups = -(-heads // max(share, 1))
    jit.launch(
        triton_kernels.turn,
        (blocks * groups,),
        *(*tensors, None)[:2],
        *(*to, None)[:2],
        *rotation.tensors,
        *(*_strides(x), *_strides(tensors[-1]), *_strides(to[0])),
        *(heads, share, tokens, *rotation.numbers),
        D=head_dim,
        TOKENS=rows,
        HALVES=rotation.halves,
        KEEP=keep,
        BACK=back,
    )


def _strides(x: Tensor) -> tuple[int, int, int]:
    """In units of 8 elements."""
    batch, token, head, _ = x.stride()
    return batch // 8, token // 8, head // 8


def _aligned(x: Tensor) -> Tensor:
    """Rows of neighbouring channels that begin at multiples of 16 bytes; a copy where they do not."""
    batch, token, head, channel = x.stride()
    if channel == 1 and (batch | token | head) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
