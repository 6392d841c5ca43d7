"""Attention on a CPU: rotation as one complex product, then PyTorch's own flash attention, forward and backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from evakernels.ops.attention.reference import patch_ids
from evakernels.ops.checks import accumulator

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def refuses(op: str, *args) -> str | None:
    """What PyTorch's kernel assumes and does not check: elements at all, and a contiguous last dimension."""
    if args[0].device.type != "cpu":
        return f"it serves CPU tensors, and these are on {args[0].device}"
    heads = [x for x in args if isinstance(x, Tensor) and x.dim() >= 4]
    if any(0 in x.shape for x in heads):
        return "it takes no empty tensors"
    if any(x.stride(-1) != 1 for x in heads):
        return "it needs a contiguous last dimension"
    return None


def attention(q, k, v, rows, columns, positions, prefix, interleaved, causal, scale):
    if rows is not None:
        phase = _phases(q, rows, columns, positions, prefix)
        q, k = (_rotate(x, phase, interleaved) for x in (q, k))
    out, lse = _flash(*_heads_first(q, k, v), 0.0, causal, scale=scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def attention_backward(dout, q, k, v, out, lse, rows, columns, positions, prefix, interleaved, causal, scale):
    if rows is not None:
        phase = _phases(q, rows, columns, positions, prefix)
        q, k = (_rotate(x, phase, interleaved) for x in (q, k))
    dout, q, k, v, out = _heads_first(dout, q, k, v, out)
    gradients = _flash_backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)
    dq, dk, dv = (x.contiguous() for x in _heads_first(*gradients))
    if rows is not None:
        back = phase.conj_physical()
        dq, dk = (_rotate(x, back, interleaved) for x in (dq, dk))
    return dq, dk, dv


def attention_qkvpacked(qkv, *args):
    return attention(*qkv.unbind(2), *args)


def attention_qkvpacked_backward(dout, qkv, *args):
    return torch.stack(attention_backward(dout, *qkv.unbind(2), *args), 2)


def apply_rope(x, rows, columns, positions, prefix, interleaved, conjugate):
    phase = _phases(x, rows, columns, positions, prefix)
    return _rotate(x, phase.conj_physical() if conjugate else phase, interleaved).contiguous()


def _phases(x: Tensor, rows: Tensor, columns: Tensor, positions: Tensor | None, prefix: int) -> Tensor:
    """cos + i sin for every token of x, (B or 1, N, H or 1, D/2) complex; 1 for prefix tokens."""
    height, width, pairs = len(rows), len(columns), rows.shape[1]
    grid = (torch.view_as_complex(t).expand(height, width, pairs) for t in (rows[:, None], columns))
    still = rows.new_ones(prefix, 2 * pairs, dtype=torch.complex64)
    phase = torch.cat((still, torch.cat(tuple(grid), 2).flatten(0, 1)))[:, None]
    if x.shape[3] % 16 == 0:
        # Repeated for every head, the product is one long run, twice as fast on short heads. Only where heads are
        # whole vectors, though: the last few of a run are rounded differently, and the strides of x decide which.
        phase = phase.expand(-1, x.shape[2], -1).contiguous()
    if positions is None:
        return phase[None]
    ids = F.pad(patch_ids(positions, height, width) + prefix, (prefix, 0))  # prefix tokens all look up the first 1
    return phase.index_select(0, ids.flatten()).view(*ids.shape, *phase.shape[1:])


def _rotate(x: Tensor, phase: Tensor, interleaved: bool) -> Tensor:
    """A new tensor of the dtype, shape and order of x: each pair of channels, a complex number, times its phase."""
    wide = x.to(accumulator(x.dtype))
    if not interleaved:
        pairs = torch.view_as_real(torch.complex(*wide.chunk(2, -1)) * phase)
        return pairs.transpose(-1, -2).flatten(-2).to(x.dtype)
    if wide.storage_offset() % 2 or any(stride % 2 for stride in wide.stride()[:-1]):
        wide = wide.clone(memory_format=torch.contiguous_format)  # complex numbers start at even addresses
    return (wide.view(wide.dtype.to_complex()) * phase).view(wide.dtype).to(x.dtype)


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)
