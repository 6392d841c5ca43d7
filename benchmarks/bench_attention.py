"""Attention with and without rotary embedding, of packed projections, at the sequence lengths of EVA-CLIP's towers.

FLOPs are those of the two products forward and the five backward over all pairs of tokens, also where half of them are
masked; the floor by products has rows and columns padded to 16, and the one by exponentials one for each pair, forward
and backward. Backward, the exponentials are made again. Where attention is causal, skipping what is masked may go
below these two floors.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import evakernels as ek
from benchmarks import harness, rates

PASSES = {"forward": 4, "backward": 8}  # elements that move for a token's channel: q, k, v, o; these, and gradients
FLOPS = {"forward": 4, "backward": 10}  # of a pair of tokens and a channel
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,  # on the CPU alone
}


class Case(NamedTuple):
    tower: str
    batch: int
    tokens: int
    heads: int
    head_dim: int
    side: int = 0  # of the grid of patches where there is rotary embedding; tokens may be fewer than it has
    causal: bool = False

    @property
    def dropped(self) -> bool:
        return self.tokens < 1 + self.side**2

    def __str__(self) -> str:
        kinds = {"RoPE": self.side, "some dropped": self.dropped, "causal": self.causal}
        size = f"{self.batch} x {self.tokens} tokens, {self.heads} heads of {self.head_dim}"
        return ", ".join([self.tower, size, *(kind for kind, so in kinds.items() if so)])


CASES = (
    Case("B/16", 512, 99, 12, 64, side=14),
    Case("B/16", 512, 197, 12, 64, side=14),
    Case("L/14", 256, 129, 16, 64, side=16),
    Case("L/14", 256, 257, 16, 64, side=16),
    Case("L/14", 256, 129, 16, 64),
    Case("L/14", 256, 257, 16, 64),
    Case("g/14", 256, 129, 16, 88),
    Case("bigE/14", 128, 129, 16, 112),
    Case("8B", 64, 129, 32, 128),
    Case("L/14, 336 px", 128, 289, 16, 64, side=24),
    Case("L/14, 336 px", 128, 577, 16, 64, side=24),
    Case("text", 1024, 77, 12, 64, causal=True),
)
CPU = tuple(case._replace(batch=2, heads=4) for case in CASES if case.side or case.causal)
TINY = (
    Case("tiny", 2, 6, 2, 64, side=3),
    Case("tiny", 2, 10, 2, 64, side=3),
    Case("tiny", 2, 10, 2, 88),
    Case("tiny", 2, 7, 2, 64, causal=True),
)


def ours(case: Case) -> Callable:
    rope = ek.Rope2d(case.side, case.head_dim).to(harness.device()) if case.side else None

    def attention(qkv: Tensor, positions: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        return ek.attention_qkvpacked(qkv, rope=rope, positions=positions, causal=case.causal)

    return attention


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Packed q, k and v; ids where tokens were dropped; cos and sin of each sample's tokens, for the peers.

    As in timm, a model gathers them once for all its layers: that is no part of the peers' times.
    """
    device = harness.device()
    qkv = torch.randn(case.batch, case.tokens, 3, case.heads, case.head_dim, device=device, dtype=dtype)
    qkv.requires_grad_()
    if not case.side:
        return qkv, None, None, None
    rope, positions = ek.Rope2d(case.side, case.head_dim), None
    each = torch.arange(case.side**2)
    tables = torch.cat((rope.row_table[each // case.side], rope.column_table[each % case.side]), 1)
    cos, sin = (table.repeat_interleave(2, -1)[None, :, None].to(device) for table in tables.unbind(-1))
    if case.dropped:
        ids = torch.rand(case.batch, case.side**2, device=device).argsort(1)[:, : case.tokens - 1].sort(1).values
        positions, cos, sin = ids.to(torch.int16), cos[0, ids], sin[0, ids]
    return qkv, positions, cos, sin


def rotated(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """All tokens but the first turned, as EVA-CLIP and timm do it: tables in float32, the result in the dtype of x."""
    if cos is None or sin is None:
        return x
    patches = x[:, 1:]
    crossed = torch.stack((-patches[..., 1::2], patches[..., ::2]), -1).flatten(-2)
    return torch.cat((x[:, :1], (patches * cos + crossed * sin).to(x.dtype)), 1)


def after_rotation(attend: Callable) -> Callable:
    """A peer from its attention of q, k and v, each (batch, tokens, heads, channels)."""

    def attention(qkv: Tensor, positions: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        q, k, v = qkv.unbind(2)
        return attend(rotated(q, cos, sin), rotated(k, cos, sin), v)

    return attention


def sdpa(backend: SDPBackend, causal: bool) -> Callable:
    def attend(*qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), is_causal=causal)
        return out.transpose(1, 2).contiguous()  # the layout that the next layer reads; most backends write it

    return attend


def peers(case: Case, dtype: torch.dtype) -> dict[str, Callable | str]:
    """Eager rotation, where there is one, and then PyTorch's attention or another's; and rotation by torch.compile."""
    on_cpu = harness.device().type == "cpu"
    found: dict[str, Callable | str] = {}
    for name, backend in BACKENDS.items():
        if name == "math" and not on_cpu:
            continue
        peer = after_rotation(sdpa(backend, case.causal))
        why = declines(peer, case, dtype)
        found[f"SDPA, {name}"] = why or peer
        if case.side and name != "math":
            found[f"torch.compile, {name}"] = why or harness.compiled(peer)
    flash_attn, xformers = harness.peer("flash_attn"), harness.peer("xformers.ops")
    found["flash-attn"] = flash_attn if isinstance(flash_attn, str) else by_flash_attn(flash_attn, case)
    found["xformers"] = xformers if isinstance(xformers, str) else by_xformers(xformers, case)
    return found


def declines(peer: Callable, case: Case, dtype: torch.dtype) -> str | None:
    """Why a backend does not serve a case, by its answer to one sample, forward and backward; None where it does."""
    qkv, *rotation = inputs(case._replace(batch=1), dtype)
    try:
        peer(qkv, *rotation).sum().backward()
    except RuntimeError as error:
        return str(error).split(". ")[0]
    return None


def by_flash_attn(module, case: Case) -> Callable:
    if not case.side:
        return lambda qkv, *_: module.flash_attn_qkvpacked_func(qkv, causal=case.causal)
    return after_rotation(lambda q, k, v: module.flash_attn_func(q, k, v, causal=case.causal))


def by_xformers(module, case: Case) -> Callable:
    mask = module.LowerTriangularMask() if case.causal else None
    return after_rotation(lambda q, k, v: module.memory_efficient_attention(q, k, v, attn_bias=mask))


def work(case: Case) -> tuple[int, int, int]:
    """Channels of tokens, channels of pairs of tokens with both padded to 16, and pairs, of all heads and samples."""
    heads, padded = case.batch * case.heads, -(-case.tokens // 16) * 16
    return heads * case.tokens * case.head_dim, heads * padded**2 * case.head_dim, heads * case.tokens**2


def rows(quick: bool) -> Iterator[dict]:
    """Each tower's attention forward and backward, with the floors by bytes, by products and by exponentials."""
    on_gpu = harness.device().type == "cuda"
    dtype = torch.bfloat16 if on_gpu or harness.emulated() else torch.float32  # of 16 bits, as the kernels take it
    towers = [case for case in CASES if case.tower == "L/14"] if quick else CASES
    for case in towers if on_gpu else TINY if quick else CPU:
        elements, padded, pairs = work(case)
        for row in harness.both_ways(
            "attention",
            str(case),
            dtype,
            ours(case),
            peers(case, dtype),
            lambda case=case: inputs(case, dtype),
            tuple(passes * elements * dtype.itemsize for passes in PASSES.values()),
            quick,
            flops=tuple(flops * pairs * case.head_dim for flops in FLOPS.values()),
        ):
            yield row | rates.floors(FLOPS[row["mode"]] * padded, pairs, quick)
