"""Attention by Triton kernels (`triton_kernels.py`): any number of tokens, any head dimension, float32 too."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evakernels import jit, native
from evakernels.ops.attention import triton_kernels
from evakernels.ops.attention.buffers import aligned, operators

MOST_PATCHES = (1 << 31) - 1


def refuses(op: str, *args) -> str | None:
    """Why the kernels cannot serve this call: the device, a dtype, the scale or the grid."""
    rotated_alone = op == "apply_rope"
    (rows, columns), scale = (args[1:3], 1.0) if rotated_alone else (args[-7:-5], args[-1])
    if reason := jit.refusal(*(x for x in args[:2] if isinstance(x, Tensor) and x.dim() > 3)):
        return reason
    if not 0 < abs(scale) < math.inf:
        return f"its kernels take a finite scale other than 0, not {scale}; of equal weights `v.mean(1)` is the result"
    if rotated_alone and ((head_dim := args[0].shape[-1]) % 8 or head_dim > 240):
        return f"its kernels turn head dimensions of up to 240 in steps of 8, not {head_dim}"
    if rows is not None and rows.shape[0] * columns.shape[0] > MOST_PATCHES:
        return f"its kernels take grids of up to {MOST_PATCHES} patches, not {rows.shape[0]} x {columns.shape[0]}"
    return None


def apply_rope(x, rows, columns, positions, prefix, interleaved, conjugate):
    turned = x.new_empty(x.shape)
    _turn([aligned(x)], [turned], _rotation(x, rows, columns, positions, prefix, interleaved), True, conjugate)
    return turned


# Which tiles, and where keys are turned. By formula and by what the compiler makes of them (docs/attention.md): no
# kernel spills, and nothing here has been timed.


class Plan(NamedTuple):
    """A kernel's tiles: queries and keys; warps of a program; stages of its loop; are streamed rows turned in it?"""

    queries: int
    keys: int
    warps: int
    stages: int
    turns: bool = False


class Device(NamedTuple):
    """What plans ask of a GPU."""

    warpgroups: bool  # products take their operands from shared memory (wgmma and later), not from registers
    multiprocessors: int


def device_of(x: Tensor) -> Device:
    large = native.shared_memory(x.device) >= 200 << 10  # consumer GPUs are newer and have 99 KiB
    return Device(large and jit.capability(x.device) >= (9, 0), native.multiprocessors(x.device))


def forward_plan(tokens: int, head_dim: int, size: int, rotated: bool, device: Device) -> Plan:
    """Of the forward kernel, for elements of `size` bytes.

    To turn keys before, in a kernel of its own, moves 4 bytes per channel (of 8 to 12), once; to turn them in the
    loop costs every block of queries about 6 instructions a channel. On an H100 (25 bytes and 4 x 32 lanes a
    nanosecond and multiprocessor) four blocks do that in the time of the bytes. On an A100 every one of a program's
    4 or 8 warps turns all keys itself, because each needs them in its registers: one block.
    """
    rows = _rows_of_a_block(tokens)
    if size == 4:  # no tensor cores: operands are in registers, whose number decides
        return Plan(32, 16, 4, 1)
    if device.warpgroups:
        turns = rotated and -(-tokens // rows) <= 4
        return Plan(rows, 64, rows // 16, 1 if turns else 3, turns)
    if rotated and tokens <= 64:
        return Plan(64, 16 if head_dim in (40, 48, 72) else 32, 4, 1, True)  # 32 spill a few bytes there
    if head_dim > 96:
        rows = 64  # of 128 a few bytes spill where causal, as of 64 keys beyond 80 channels
    return Plan(rows, 64 if head_dim <= 80 and rows == 128 else 32, rows // 16, 2)


def queries_plan(tokens: int, head_dim: int, size: int, rotated: bool, device: Device) -> Plan:
    """Of the backward kernel that makes dq of a block of queries."""
    if size == 4:
        return Plan(16, 32, 4, 1) if head_dim <= 96 else Plan(16, 16, 8, 1)
    if not device.warpgroups:
        return Plan(64, 32, 4, 2)
    rows = _rows_of_a_block(tokens)
    turns = rotated and _turns_backward(tokens, head_dim)
    return Plan(rows, 64, rows // 16, 1 if turns else 2, turns)


def keys_plan(tokens: int, head_dim: int, size: int, rotated: bool, device: Device) -> Plan:
    """Of the backward kernel that makes dk and dv of a block of keys."""
    if size == 4:
        return Plan(16, 16, 4, 1)
    if not device.warpgroups:
        return Plan(32 if head_dim <= 32 or 48 < head_dim <= 80 else 16, 64, 4, 2)
    if makes_dq(tokens, head_dim, size, rotated, device):
        return Plan(32, 64, 4, 1, rotated) if tokens <= 64 else Plan(64, 128, 8, 1, rotated)
    rows = _rows_of_a_block(tokens) if head_dim <= 96 else 128
    if rotated and _turns_backward(tokens, head_dim):
        return Plan(32, rows, rows // 16, 1, True)
    return Plan(64 if head_dim <= 64 else 32, rows, rows // 16, 2)


def makes_dq(tokens: int, head_dim: int, size: int, rotated: bool, device: Device) -> bool:
    """Whether that kernel has all keys of a head in one block, and makes dq too: five products, each tensor read once.

    Else there are seven, and most tensors are read twice. Where operands are in registers there are too few.
    """
    return size == 2 and device.warpgroups and head_dim <= 64 and tokens <= 128


def _turns_backward(tokens: int, head_dim: int) -> bool:
    """As forward, up to four blocks of 64; beyond 64 channels registers do not suffice."""
    return head_dim <= 64 and tokens <= 256


def _rows_of_a_block(tokens: int) -> int:
    """128, which read the other operand half as often as 64; unless a quarter of them would be empty."""
    return 64 if 4 * -(-tokens // 64) <= 6 * -(-tokens // 128) else 128


# Launches


class _Rotation(NamedTuple):
    """What kernels take of a rotation: two tables, ids; prefix tokens, patches, their columns; the order of pairs."""

    tensors: tuple[Tensor | None, Tensor | None, Tensor | None]
    numbers: tuple[int, int, int]
    halves: bool


def _rotation(x, rows, columns, positions, prefix, interleaved) -> _Rotation:
    if rows is None:
        return _Rotation((None, None, None), (0, 1, 1), False)
    ids, *_ = native.kept_ids(positions, x.shape[1] - prefix)
    width = columns.shape[0]
    return _Rotation(
        (rows.contiguous(), columns.contiguous(), ids), (prefix, rows.shape[0] * width, width), not interleaved
    )


def _forward(q, k, v, out, *options) -> Tensor:
    *rotation, causal, scale = options
    if scale < 0:
        return _forward(-q, k, v, out, *rotation, causal, -scale)
    batch, tokens, heads, head_dim = q.shape
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    q, k, v = map(aligned, (q, k, v))
    turning, rotated = _rotation(q, *rotation), rotation[0] is not None
    plan = forward_plan(tokens, head_dim, q.element_size(), rotated, device_of(q))
    if rotated and not plan.turns:
        (k,) = _turned([k], turning)
    jit.launch(
        triton_kernels.forward,
        (-(-tokens // plan.queries) * heads * batch,),
        *(q, k, v, out, lse, *turning.tensors),
        *_strides(q, k, v),
        *(heads, tokens, *turning.numbers, scale),
        **_constants(plan, head_dim, causal, turning),
        TURN_Q=rotated,
        TURN_K=plan.turns,
    )
    return lse


def _backward(dout, q, k, v, out, lse, dq, dk, dv, *options) -> None:
    *rotation, causal, scale = options
    if scale < 0:
        _backward(dout, -q, k, v, out, lse, dq, dk, dv, *rotation, causal, -scale)
        dq.neg_()
        return
    batch, tokens, heads, head_dim = q.shape
    q, k, v, dout = map(aligned, (q, k, v, dout.to(q.dtype)))
    out, lse = out.contiguous(), lse.contiguous()
    turning, rotated = _rotation(q, *rotation), rotation[0] is not None
    shape = tokens, head_dim, q.element_size(), rotated, device_of(q)
    by_keys, whole = keys_plan(*shape), makes_dq(*shape)
    if rotated and not by_keys.turns:
        q, k = _turned([q, k], turning)
    delta = None if whole else torch.empty_like(lse)
    inputs, strides = (q, k, v, out, dout, lse, delta), _strides(q, k, v, dout, dq)
    numbers = heads, tokens, *turning.numbers, scale
    how = {"TURN": by_keys.turns, "TURN_BACK": rotated}
    if not whole:  # what makes dq leaves delta for the other
        by_queries = queries_plan(*shape)
        jit.launch(
            triton_kernels.backward_queries,
            (-(-tokens // by_queries.queries) * heads * batch,),
            *(*inputs, dq, *turning.tensors),
            *(*strides, *numbers),
            **_constants(by_queries, head_dim, causal, turning),
            **how,
        )
    jit.launch(
        triton_kernels.backward_keys,
        (-(-tokens // by_keys.keys) * heads * batch,),
        *(*inputs, dq, dk, dv, *turning.tensors),
        *(*strides, *numbers),
        **_constants(by_keys, head_dim, causal, turning),
        **how,
        WHOLE=whole,
    )


def _turned(tensors: list[Tensor], rotation: _Rotation) -> list[Tensor]:
    """Turned rows, one head's side by side and its pairs of channels too."""
    batch, tokens, heads, head_dim = tensors[0].shape
    to = [x.new_empty((batch, heads, tokens, head_dim)).transpose(1, 2) for x in tensors]
    _turn(tensors, to, rotation, False, False)
    return to


def _turn(tensors: list[Tensor], to: list[Tensor], rotation: _Rotation, keep: bool, back: bool) -> None:
    batch, tokens, heads, head_dim = tensors[0].shape
    rows = 32 if head_dim * tensors[0].element_size() <= 128 else 16
    blocks = -(-tokens // rows) * batch
    # A program turns many heads by the angles it has; as many as leave 8 programs to each multiprocessor.
    wanted = 8 * native.multiprocessors(tensors[0].device)
    share = max(1, min(heads, blocks * heads // wanted))
    jit.launch(
        triton_kernels.turn,
        (blocks * -(-heads // share),),
        *(*tensors, None)[:2],
        *(*to, None)[:2],
        *rotation.tensors,
        *_strides(tensors[0], tensors[-1], to[0]),
        *(heads, share, tokens, *rotation.numbers),
        D=head_dim,
        TOKENS=rows,
        HALVES=rotation.halves,
        KEEP=keep,
        BACK=back,
    )


def _constants(plan: Plan, head_dim: int, causal: bool, rotation: _Rotation) -> dict[str, Any]:
    tiles = {"D": head_dim, "QUERIES": plan.queries, "KEYS": plan.keys}
    return tiles | {"CAUSAL": causal, "HALVES": rotation.halves, "warps": plan.warps, "stages": plan.stages}


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of samples, tokens and heads, in units of 8 elements."""
    return tuple(stride // 8 for x in tensors for stride in x.stride()[:3])


attention, attention_backward, attention_qkvpacked, attention_qkvpacked_backward = operators(_forward, _backward)
