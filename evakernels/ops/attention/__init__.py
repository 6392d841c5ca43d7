"""Attention with two-dimensional rotary position embedding, and the rotation alone."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evakernels.dispatch import define
from evakernels.ops import checks
from evakernels.ops.attention.rope import Rope2d

HEAD_DIMS = range(32, 129, 8)

__all__ = ["Rope2d", "apply_rope", "attention", "attention_qkvpacked"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rope: Rope2d | None = None,
    positions: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Exact softmax attention, q and k rotated on the way in.

    Args:
        q, k, v: (B, N, H, D), one shape and dtype, any strides (a strided last dimension is copied once); float32,
            bfloat16, float16 (float64 on the CPU); D from 32 to 128 in steps of 8.
        rope: the angles; tokens after its `prefix_tokens` are its grid, or what `positions` says.
        positions: (B, N - prefix_tokens), any integer dtype, any order: the patch id of each token after the prefix.
        causal: token n sees tokens 0 to n.
        scale: of the scores; D ** -0.5 where None.

    Returns:
        (B, N, H, D) in autocast's dtype, or that of q without autocast.

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit; on the CPU, also a patch id outside the grid
        (elsewhere such an id is taken for the nearest valid one).

    Source: Vaswani et al., arXiv 1706.03762; Dao et al., arXiv 2205.14135.
    """
    checks.floating("attention", q=q, k=k, v=v)
    _check_heads("attention", "q", q, ("B", "N", "H", "D"))
    for name, other in (("k", k), ("v", v)):
        checks.shape("attention", name, other, tuple(q.shape), "that of q")
        if other.dtype != q.dtype:
            raise TypeError(f"attention: {name} has dtype {other.dtype}, q has {q.dtype}; give all three one dtype")
    checks.same_device("attention", q, k=k, v=v)
    rotation = _rotation("attention", q, rope, positions)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    dtype = checks.output_dtype(q)
    q, k, v = (_loadable(x, dtype) for x in (q, k, v))
    if checks.needs_grad(q, k, v):
        return _Attention.apply(q, k, v, *rotation, causal, scale)
    return _attention(q, k, v, *rotation, causal, scale)[0]


def attention_qkvpacked(
    qkv: Tensor,
    *,
    rope: Rope2d | None = None,
    positions: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`attention` on the output of one projection; its gradient comes back packed, with no split and no cat.

    Args:
        qkv: (B, N, 3, H, D), q, k and v in this order; dtypes, strides and D as in `attention`.
        rope, positions, causal, scale: as in `attention`.

    Returns:
        (B, N, H, D) in autocast's dtype, or that of qkv without autocast.

    Raises:
        ValueError, TypeError: as `attention`.
    """
    checks.floating("attention_qkvpacked", qkv=qkv)
    _check_heads("attention_qkvpacked", "qkv", qkv, ("B", "N", "3", "H", "D"))
    if qkv.shape[2] != 3:
        raise ValueError(f"attention_qkvpacked: qkv has shape {tuple(qkv.shape)}; its third dimension must be 3")
    rotation = _rotation("attention_qkvpacked", qkv, rope, positions)
    scale = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    qkv = _loadable(qkv, checks.output_dtype(qkv))
    if checks.needs_grad(qkv):
        return _AttentionPacked.apply(qkv, *rotation, causal, scale)
    return _attention_qkvpacked(qkv, *rotation, causal, scale)[0]


def apply_rope(x: Tensor, rope: Rope2d, positions: Tensor | None = None) -> Tensor:
    """The rotation alone: every token after the prefix turned by the angles of its patch, in float32, rounded once.

    Args:
        x: (B, N, H, D), any strides; float32, bfloat16, float16 (float64 on the CPU); D is `rope.head_dim`.
        rope: the angles.
        positions: (B, N - prefix_tokens) patch ids as in `attention`; the whole grid in order where None.

    Returns:
        (B, N, H, D) in the dtype of x.

    Raises:
        ValueError, TypeError: as `attention`.

    Source: Su et al., arXiv 2104.09864.
    """
    checks.floating("apply_rope", x=x)
    if x.dim() != 4:
        raise ValueError(f"apply_rope: x has shape {tuple(x.shape)}; expected (B, N, H, D)")
    if rope is None:
        raise TypeError("apply_rope: rope is None; expected an evakernels.Rope2d")
    rotation = _rotation("apply_rope", x, rope, positions)
    x = _loadable(x, x.dtype)
    if checks.needs_grad(x):
        return _ApplyRope.apply(x, *rotation)
    return _apply_rope(x, *rotation, False)


def _check_heads(function: str, name: str, x: Tensor, dimensions: tuple[str, ...]) -> None:
    if x.dim() != len(dimensions) or x.shape[1] == 0:
        raise ValueError(
            f"{function}: {name} has shape {tuple(x.shape)}; expected ({', '.join(dimensions)}) with at least one token"
        )
    head_dim = x.shape[-1]
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"{function}: the head dimension is {head_dim}; allowed are 32 to 128 in steps of 8")


def _rotation(function: str, x: Tensor, rope: Rope2d | None, positions: Tensor | None) -> tuple:
    """What the ops take in place of the module: rows, columns, positions, prefix, interleaved."""
    if rope is None:
        if positions is not None:
            raise ValueError(
                f"{function}: positions were given without a rope to look them up in; give both or neither"
            )
        return None, None, None, 0, True
    if not isinstance(rope, Rope2d):
        raise TypeError(f"{function}: rope is a {type(rope).__name__}; expected an evakernels.Rope2d")
    if rope.head_dim != x.shape[-1]:
        raise ValueError(f"{function}: the head dimension is {x.shape[-1]}, but rope was made for {rope.head_dim}")
    (height, width), prefix, tokens = rope.grid, rope.prefix_tokens, x.shape[1]
    if positions is None:
        if tokens != prefix + height * width:
            raise ValueError(
                f"{function}: there are {tokens} tokens, but rope has {prefix} prefix tokens and a grid of "
                f"{height} x {width}, {prefix + height * width} in all; give positions if tokens were dropped"
            )
    else:
        if positions.dtype.is_floating_point or positions.dtype.is_complex or positions.dtype == torch.bool:
            raise TypeError(f"{function}: positions has dtype {positions.dtype}; patch ids have an integer dtype")
        if tokens < prefix:
            raise ValueError(f"{function}: there are {tokens} tokens, fewer than the {prefix} prefix tokens of rope")
        because = f"a patch id for every token after the {prefix} of the prefix"
        checks.shape(function, "positions", positions, (x.shape[0], tokens - prefix), because)
    rows, columns = rope.row_table, rope.column_table
    checks.same_device(function, x, rope=rows, positions=positions)
    return rows, columns, positions, prefix, rope.interleaved


def _loadable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype wanted, with the contiguous last dimension that every implementation reads."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


# q and k are saved as they came: the backward rotates again rather than keep what it can compute.
class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, rows, columns, positions, *options):
        out, lse = _attention(q, k, v, rows, columns, positions, *options)
        ctx.save_for_backward(q, k, v, out, lse, rows, columns, positions)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        gradients = _attention_backward(_loadable(dout, dout.dtype), *ctx.saved_tensors, *ctx.options)
        return (*gradients, *[None] * 7)


class _AttentionPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, rows, columns, positions, *options):
        out, lse = _attention_qkvpacked(qkv, rows, columns, positions, *options)
        ctx.save_for_backward(qkv, out, lse, rows, columns, positions)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        dqkv = _attention_qkvpacked_backward(_loadable(dout, dout.dtype), *ctx.saved_tensors, *ctx.options)
        return (dqkv, *[None] * 7)


class _ApplyRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, columns, positions, *options):
        ctx.save_for_backward(rows, columns, positions)
        ctx.options = options
        return _apply_rope(x, rows, columns, positions, *options, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return (_apply_rope(dout.contiguous(), *ctx.saved_tensors, *ctx.options, True), *[None] * 5)


def _fake_outputs(q):
    batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=checks.accumulator(q.dtype))


_ROTATION = "Tensor? rows, Tensor? columns, Tensor? positions, int prefix, bool interleaved"

_attention = define(
    "attention",
    f"attention(Tensor q, Tensor k, Tensor v, {_ROTATION}, bool causal, float scale) -> (Tensor out, Tensor lse)",
    lambda q, k, v, rows, columns, positions, prefix, interleaved, causal, scale: _fake_outputs(q),
)
_attention_backward = define(
    "attention",
    f"attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_ROTATION}, bool causal,"
    " float scale) -> (Tensor dq, Tensor dk, Tensor dv)",
    lambda dout, q, k, v, out, lse, rows, columns, positions, prefix, interleaved, causal, scale: tuple(
        x.new_empty(x.shape) for x in (q, k, v)
    ),
)
_attention_qkvpacked = define(
    "attention",
    f"attention_qkvpacked(Tensor qkv, {_ROTATION}, bool causal, float scale) -> (Tensor out, Tensor lse)",
    lambda qkv, rows, columns, positions, prefix, interleaved, causal, scale: _fake_outputs(qkv[:, :, 0]),
)
_attention_qkvpacked_backward = define(
    "attention",
    f"attention_qkvpacked_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_ROTATION}, bool causal,"
    " float scale) -> Tensor dqkv",
    lambda dout, qkv, out, lse, rows, columns, positions, prefix, interleaved, causal, scale: qkv.new_empty(qkv.shape),
)
_apply_rope = define(
    "attention",
    "apply_rope(Tensor x, Tensor rows, Tensor columns, Tensor? positions, int prefix, bool interleaved,"
    " bool conjugate) -> Tensor",
    lambda x, rows, columns, positions, prefix, interleaved, conjugate: x.new_empty(x.shape),
)
