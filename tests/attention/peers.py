"""What attention is held against, with whole tables of angles: PyTorch's own operator, and softmax written out."""

import numerics
import torch
import torch.nn.functional as F

import evakernels as ek


def random(*shape, dtype=torch.float32, seed=0, grad=False, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_(grad)


def grid_of(tokens):
    """A prefix and the squarest grid that fill so many tokens."""
    prefix = 1 if tokens > 1 else 0
    patches = tokens - prefix
    height = max(h for h in range(1, int(patches**0.5) + 1) if patches % h == 0)
    return prefix, (height, patches // height)


def turned(x, rope, positions=None):
    """x * cos + rot(x) * sin with whole tables, differentiable, in float32 or wider and rounded once."""
    if rope is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    height, width = rope.grid
    everywhere = torch.arange(height * width, device=x.device).expand(len(x), -1)
    ids = everywhere if positions is None else positions.long()
    rows, columns = rope.row_table.to(wide.dtype)[ids // width], rope.column_table.to(wide.dtype)[ids % width]
    cos, sin = torch.cat((rows, columns), 2)[:, :, None].unbind(-1)
    still, moved = wide[:, : rope.prefix_tokens], wide[:, rope.prefix_tokens :]
    x0, x1 = (moved[..., 0::2], moved[..., 1::2]) if rope.interleaved else moved.chunk(2, -1)
    pairs = torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), -1 if rope.interleaved else -2)
    return torch.cat((still, pairs.flatten(-2)), 1).to(x.dtype)


def by_torch(q, k, v, rope=None, positions=None, causal=False, scale=None):
    q, k, v = (x.transpose(1, 2) for x in (turned(q, rope, positions), turned(k, rope, positions), v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)


def by_softmax(q, k, v, rope=None, positions=None, causal=False, scale=None):
    q, k = turned(q, rope, positions), turned(k, rope, positions)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        n = torch.arange(q.shape[1], device=q.device)
        scores = scores.masked_fill(n[:, None] < n, float("-inf"))
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


def ours(q, k, v, rope=None, positions=None, causal=False, scale=None):
    return ek.attention(q, k, v, rope=rope, positions=positions, causal=causal, scale=scale)


def assert_exact(shape, dtype, device="cpu", **options):
    """Our output and gradients are as exact as PyTorch's, against float64."""
    inputs = [random(*shape, dtype=dtype, seed=s, device=device) for s in range(3)]
    dout = random(*shape, dtype=dtype, seed=3, device=device)

    def run(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves, **options)
        assert out.dtype == dtype
        return out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))

    results = run(ours, dtype), run(by_torch, dtype), run(by_softmax, torch.float64)
    for name, actual, peer, oracle in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        factor = numerics.OUTPUTS if name == "out" else numerics.GRADIENTS
        if shape[1] == 1 and name in ("dq", "dk"):
            # Exactly 0: a difference of two equal sums, of which float32 leaves its rounding.
            terms = (dout * inputs[2]).double().abs().sum(-1).max() * max(x.double().abs().max() for x in inputs)
            assert actual.double().abs().max() <= 2**-22 * terms, name
        else:
            numerics.assert_as_exact_as(actual, peer, oracle, factor, name)
