"""What attention is held against, with whole tables of angles: PyTorch's own operator, and softmax written out."""

import math

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


def rope_of(tokens, head_dim, device, **options):
    prefix, grid = grid_of(tokens)
    return ek.Rope2d(grid, head_dim, prefix_tokens=prefix, **options).to(device)


def kept_of(batch, patches, keep, device, dtype=torch.int16):
    noise = torch.rand(batch, patches, generator=torch.Generator().manual_seed(1))
    return noise.argsort(1)[:, :keep].to(device, dtype)


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


def gradients(*inputs, dout, **options):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = ours(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def by_others(inputs, dout, **options):
    """Gradients by PyTorch's operator in the inputs' dtype, and in float64."""
    for function, dtype in ((by_torch, inputs[0].dtype), (by_softmax, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        yield torch.autograd.grad(function(*leaves, **options), leaves, dout.to(dtype))


def in_nan(x):
    """A view of the values of x whose neighbours in memory are all NaN."""
    batch, tokens, heads, channels = x.shape
    around = torch.full((batch + 1, tokens + 2, heads + 1, channels + 16), math.nan, dtype=x.dtype, device=x.device)
    view = around[:batch, 1 : tokens + 1, :heads, 8 : channels + 8]
    view.copy_(x)
    return view


# Of (B, N, H, D): the same values, laid out otherwise.
VIEWS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "packed": lambda x: torch.stack((x, x, x), 2)[:, :, 1],
    "odd": lambda x: torch.cat((x[..., :1], x), -1)[..., 1:],
    "strided channels": lambda x: torch.stack((x, x), -1)[..., 0],
    "odd start": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
}
