"""The four ops over kernels that read q, k and v, and write their results, wherever these lie in memory."""

from collections.abc import Callable

import torch
from torch import Tensor


def operators(forward: Callable, backward: Callable) -> tuple[Callable, Callable, Callable, Callable]:
    """attention and its backward; the same of packed q, k and v, of which kernels see views.

    Args:
        forward: of (q, k, v, out, *options); fills `out` and returns the log-sum-exp.
        backward: of (dout, q, k, v, out, lse, dq, dk, dv, *options); fills dq, dk and dv.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, *options):
        out = q.new_empty(q.shape)
        return out, forward(q, k, v, out, *options)

    def attention_backward(dout, q, k, v, out, lse, *options):
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        backward(dout, q, k, v, out, lse, dq, dk, dv, *options)
        return dq, dk, dv

    def attention_qkvpacked(qkv: Tensor, *options):
        q, k, v = qkv.unbind(2)
        out = qkv.new_empty(q.shape)
        return out, forward(q, k, v, out, *options)

    def attention_qkvpacked_backward(dout, qkv, out, lse, *options):
        dqkv = qkv.new_empty(qkv.shape)
        backward(dout, *qkv.unbind(2), out, lse, *dqkv.unbind(2), *options)
        return dqkv

    return attention, attention_backward, attention_qkvpacked, attention_qkvpacked_backward


def aligned(x: Tensor) -> Tensor:
    """Rows of neighbouring channels that begin at multiples of 16 bytes; a copy where they do not."""
    batch, token, head, channel = x.stride()
    if channel == 1 and (batch | token | head) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
