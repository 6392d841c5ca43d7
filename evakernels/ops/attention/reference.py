"""Attention with two-dimensional rotary embedding, by its formulas in plain PyTorch.

    rotation    (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin) for each pair of channels of q and k
    forward     S = scale * Q K^T,   lse = log sum exp S over keys,   P = exp(S - lse),   O = P V
    backward    dV = P^T dO,   dP = dO V^T,   dS = P * (dP - sum(P * dP)),   dQ = scale * dS K,   dK = scale * dS^T Q,
                then dQ and dK through the conjugate rotation; sum(P * dP) over keys is sum(dO * O) over channels

Rotation, products and statistics are float32 (float64 for float64 input); rotated q and k are rounded once to their
dtype. Tables are (cos, sin): rows (h, D/4, 2), columns (w, D/4, 2); None without rotary embedding.
"""

import torch
from torch import Tensor

from evakernels.ops.checks import accumulator


def attention(q, k, v, rows, columns, positions, prefix, interleaved, causal, scale):
    angle = angles(rows, columns, positions)
    q, k = (rotate(x, angle, prefix, interleaved).to(x.dtype) for x in (q, k))
    scores = _scores(_heads_first(q), _heads_first(k), causal, scale)
    # Not exp(scores - lse), which the backward uses: the rounding of lse would be an error of all of a row's weights.
    out = scores.softmax(-1) @ _heads_first(v)
    return _heads_last(out).to(v.dtype), scores.logsumexp(-1)


def attention_backward(dout, q, k, v, out, lse, rows, columns, positions, prefix, interleaved, causal, scale):
    dtype, angle = q.dtype, angles(rows, columns, positions)
    q, k = (rotate(x, angle, prefix, interleaved).to(dtype) for x in (q, k))
    dout, q, k, v = (_heads_first(x) for x in (dout, q, k, v))
    p = (_scores(q, k, causal, scale) - lse[..., None]).exp()
    dp = dout @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dq, dk = (rotate(_heads_last(x), angle, prefix, interleaved, conjugate=True) for x in (ds @ k, ds.mT @ q))
    return dq.to(dtype), dk.to(dtype), _heads_last(p.mT @ dout).to(dtype)


def attention_qkvpacked(qkv, *args):
    return attention(*qkv.unbind(2), *args)


def attention_qkvpacked_backward(dout, qkv, *args):
    return torch.stack(attention_backward(dout, *qkv.unbind(2), *args), 2)


def apply_rope(x, rows, columns, positions, prefix, interleaved, conjugate):
    return rotate(x, angles(rows, columns, positions), prefix, interleaved, conjugate).to(x.dtype)


def angles(rows: Tensor | None, columns: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """cos and sin, each (B or 1, patches, 1, D/2), of the patches at `positions`, or of the whole grid."""
    if rows is None or columns is None:
        return None
    height, width = len(rows), len(columns)
    if positions is None:
        ids = torch.arange(height * width, device=rows.device)[None]
    else:
        ids = patch_ids(positions, height, width)
    cos, sin = torch.cat((rows[ids // width], columns[ids % width]), -2)[:, :, None].unbind(-1)
    return cos, sin


def patch_ids(positions: Tensor, height: int, width: int) -> Tensor:
    """The ids as int64; one outside the grid raises on the CPU, and is clamped where a look would synchronise."""
    ids = positions.long()
    last = height * width - 1
    if ids.device.type != "cpu":
        return ids.clamp(0, last)
    if ids.numel():
        low, high = (int(extreme) for extreme in ids.aminmax())
        if low < 0 or high > last:
            raise ValueError(
                f"positions contains patch id {high if high - last > -low else low}, but a grid of {height} x {width} "
                f"has the ids 0 to {last}; patches are numbered row by row, prefix tokens not counted"
            )
    return ids


def rotate(x: Tensor, angle, prefix: int, interleaved: bool, conjugate: bool = False) -> Tensor:
    """Every patch's pairs of channels turned by their angles (back by them: conjugate), in the accumulator's dtype."""
    wide = x.to(accumulator(x.dtype))
    if angle is None:
        return wide
    cos, sin = angle
    if conjugate:
        sin = -sin
    still, moved = wide[:, :prefix], wide[:, prefix:]
    shape, pair = ((-1, 2), -1) if interleaved else ((2, -1), -2)
    x0, x1 = moved.unflatten(-1, shape).unbind(pair)
    turned = torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), pair).flatten(-2)
    return torch.cat((still, turned), 1)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = q @ k.mT * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores


def _heads_first(x: Tensor) -> Tensor:
    # Contiguous: small products of strided matrices sum one by one, with twice the error.
    return x.to(accumulator(x.dtype)).transpose(1, 2).contiguous()


def _heads_last(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()
