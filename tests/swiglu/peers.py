"""What the SwiGLU kernels are held against, and what CUDA's and Triton's alike must do."""

import math

import numerics
import torch
import torch.nn.functional as F
from swiglu.test_swiglu import by_torch, ours, pack
from torch.library import opcheck

import evakernels as ek

OPS = torch.ops.evakernels
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
DENSE = torch.contiguous_format
NAMES = ("y", "dgate", "dup", "dweight", "dbias")


def draw(*shape, dtype=FLOAT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.3).to(dtype)


def arguments(rows, width, dtype, norm=2, weights=None):
    """gate, up, and of weight and bias the first `norm`; the gradient of the output."""
    rows = (rows,) if isinstance(rows, int) else rows
    inputs = [draw(*rows, width, dtype=dtype, seed=seed) for seed in (0, 1)]
    inputs += [draw(width, dtype=weights or dtype, seed=seed) for seed in (2, 3)[:norm]]
    return inputs, draw(*rows, width, dtype=dtype, seed=4)


def enough(width):
    """Rows of so many elements that PyTorch's largest error among them is hardly small by luck."""
    return max(3, min(1000, 16000 // width))


def call(function, inputs, dy):
    """Output and gradients; the inputs may be views of anything."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    padded = dict(enumerate(leaves)) | {i: None for i in range(len(leaves), 4)}
    y = function(*padded.values())
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def expected(inputs, dy):
    """What PyTorch gets in these dtypes, and in float64."""
    return call(by_torch, inputs, dy), call(by_torch, [t.double() for t in inputs], dy)


def assert_exact(actual, inputs, dy):
    for name, a, p, o in zip(NAMES, actual, *expected(inputs, dy), strict=False):
        numerics.assert_as_exact_as(a.cpu(), p, o, numerics.OUTPUTS if name == "y" else numerics.GRADIENTS, name)


def check(device, rows, width, dtype, norm=2, weights=None):
    inputs, dy = arguments(rows, width, dtype, norm, weights)
    assert_exact(call(ours, [t.to(device) for t in inputs], dy.to(device)), inputs, dy)


def check_packed(device, rows, width, padded, dtype, norm=2, weights=None):
    """The same, on one tensor whose pad is NaN; in the pads of the results there are zeros."""
    inputs, dy = arguments(rows, width, dtype, norm, weights)
    gate, up, *columns = [t.to(device) for t in inputs]
    packed, columns = pack(gate, up, padded).requires_grad_(), [t.requires_grad_() for t in columns]
    weight, bias = [*columns, None, None][:2]
    y = ek.swiglu_norm_packed(packed, weight, bias, width=width)
    wide_dy = F.pad(dy.to(device), (0, padded - width), value=math.nan)
    dpacked, *dcolumns = torch.autograd.grad(y, (packed, *columns), wide_dy)
    dgate, dup = dpacked.chunk(2, -1)
    results = [t[..., :width] for t in (y, dgate, dup)]
    assert_exact([*results, *dcolumns], inputs, dy)
    assert not any(t[..., width:].any() for t in (y, dgate, dup)), "pad columns are not zero"


def views(rows, width, dtype, device):
    """Pairs of tensors that lie in memory in many ways, by name."""

    def fresh(columns, seed, rows=rows):
        return draw(rows, columns, dtype=dtype, seed=seed).to(device)

    both = fresh(2 * width + 11, 0)
    yield "halves", both[:, :width], both[:, width : 2 * width]
    yield "shifted halves", both[:, 3 : 3 + width], both[:, width + 8 : 2 * width + 8]
    yield "one wider", fresh(width + 3, 1)[:, 2:-1], fresh(width, 2)
    yield "other one wider", fresh(width, 1), fresh(width + 16, 2)[:, 8:-8]
    yield "aligned pitches, unaligned start", fresh(width + 16 + -width % 8, 1)[:, 3 : 3 + width], fresh(width, 2)
    yield "one row for all", fresh(width, 1)[:1].expand(rows, -1), fresh(width, 2)
    yield "transposed", fresh(rows, 1, width).T, fresh(width, 2)
    yield "one of two columns", fresh(2 * width, 1)[:, ::2], fresh(2 * width, 2)[:, 1::2]


def assert_every_layout_is_served(rows, width, dtype, device):
    for name, gate, up in views(rows, width, dtype, device):
        for norm in (0, 2):
            inputs = [gate, up, *(draw(width, dtype=dtype, seed=seed).to(device) for seed in (3, 4)[:norm])]
            dy = draw(rows, width + 5, dtype=dtype, seed=5).to(device)[:, 5:]
            strided, dense = call(ours, inputs, dy), call(ours, [t.clone(memory_format=DENSE) for t in inputs], dy)
            for what, x, o in zip(NAMES, strided, dense, strict=False):
                # Windows and blocks may begin elsewhere, so sums may be in another order.
                difference = (x.double() - o.double()).abs().max() / o.double().abs().max()
                assert difference <= 4 * torch.finfo(dtype).eps, f"{name}, norm {norm}: {what}, {difference:.1e}"


def assert_statistics_are_those_of_the_product(dtype, device):
    (gate, up, weight, bias), _ = arguments((2, 3), 170, dtype)
    _, mean, rstd = OPS.swiglu(*(t.to(device) for t in (gate, up, weight, bias)), 1e-3)
    packed = pack(gate, up, 176).to(device)
    _, packed_mean, packed_rstd = OPS.swiglu_packed(packed, weight.to(device), bias.to(device), 1e-3, 170)
    var, expected_mean = torch.var_mean(F.silu(gate.double()) * up.double(), -1, correction=0)
    for actual_mean, actual_rstd in ((mean, rstd), (packed_mean, packed_rstd)):
        assert actual_mean.dtype == actual_rstd.dtype == FLOAT and actual_mean.shape == (2, 3)
        torch.testing.assert_close(actual_mean.cpu().double(), expected_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(actual_rstd.cpu().double(), (var + 1e-3).rsqrt(), rtol=1e-6, atol=0)


def assert_saturated_gates_are_exact(dtype, device):
    gate = torch.tensor([0.0, 1, -1, 17, -17, 88, -88, 104, -104, 1e4, -1e4, 6e4, -6e4]).repeat(3, 1).to(dtype)
    up, dy = draw(3, 13, dtype=dtype), draw(3, 13, dtype=dtype, seed=1)
    actual = call(ours, [gate.to(device), up.to(device)], dy.to(device))
    for name, a, o in zip(NAMES, actual, expected([gate, up], dy)[1], strict=False):
        tolerance = 4 * torch.finfo(dtype).eps
        finite = o.abs() <= torch.finfo(dtype).max
        torch.testing.assert_close(
            a.cpu().double()[finite], o[finite], rtol=tolerance, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_one_row_of_nan_stays_alone(device):
    (gate, up, weight, bias), dy = arguments(4, 21, FLOAT)
    clean = call(ours, [t.to(device) for t in (gate, up, weight, bias)], dy.to(device))
    packed = pack(gate, up, 24).to(device)
    packed[1, 0] = math.nan
    _, mean, rstd = forward = OPS.swiglu_packed(packed, weight.to(device), bias.to(device), 1e-6, 21)
    wide_dy = F.pad(dy, (0, 3)).to(device)
    dpacked, *_ = OPS.swiglu_packed_backward(wide_dy, packed, weight.to(device), mean, rstd, True, 21)
    others = [0, 2, 3]
    torch.testing.assert_close(forward[0][others, :21], clean[0][others])
    torch.testing.assert_close(dpacked[others, :21], clean[1][others])
    assert forward[0][1, :21].isnan().all()
    assert not any(t[..., 21:].any() for t in (forward[0], *dpacked.chunk(2, -1)))


def assert_weights_keep_their_dtypes(device):
    for weights in (FLOAT, HALF):
        check(device, 5, 170, BF16, weights=weights)
        inputs, dy = arguments(5, 170, BF16, weights=weights)
        gradients = call(ours, [t.to(device) for t in inputs], dy.to(device))[1:]
        assert [g.dtype for g in gradients] == [BF16, BF16, weights, weights]
    check(device, 5, 5130, BF16, weights=FLOAT)


def assert_an_expanded_gradient_is_served(device):
    inputs, _ = arguments(3, 40, FLOAT)
    one = torch.ones(1, 1, device=device).expand(3, 40)
    assert_exact(call(ours, [t.to(device) for t in inputs], one), inputs, one.cpu())


def assert_ops_pass_opcheck(weights, device):
    packed, dy = draw(2, 3, 16, dtype=BF16).to(device), draw(2, 3, 8, dtype=BF16, seed=1).to(device)
    weight, bias = [*(draw(7, seed=n).to(device) for n in range(weights)), None, None][:2]
    gate, up = packed[..., :7], packed[..., 8:15]
    _, mean, rstd = OPS.swiglu(gate, up, weight, bias, 1e-6)
    opcheck(OPS.swiglu.default, (gate, up, weight, bias, 1e-6))
    opcheck(OPS.swiglu_backward.default, (dy[..., :7], gate, up, weight, mean, rstd, bias is not None))
    opcheck(OPS.swiglu_packed.default, (packed, weight, bias, 1e-6, 7))
    opcheck(OPS.swiglu_packed_backward.default, (dy, packed, weight, mean, rstd, bias is not None, 7))


def assert_no_rows_are_served(device):
    gate = torch.empty(0, 3, 8, device=device, requires_grad=True)
    weight = torch.ones(8, device=device, requires_grad=True)
    y = ek.swiglu_norm(gate, gate, weight, weight)
    y.sum().backward()
    assert y.shape == gate.grad.shape == (0, 3, 8) and not weight.grad.any()
    packed = ek.swiglu_norm_packed(gate, weight[:3], None, width=3)
    packed.sum().backward()
    assert packed.shape == (0, 3, 4)


def assert_repeats(rows, width, device, between=lambda run: None, runs=4):
    """All runs have the same bits, exact ones; before each, `between` is called with its number."""
    inputs, dy = arguments(rows, width, BF16, weights=FLOAT)
    on_device = [t.to(device) for t in inputs], dy.to(device)
    seen = []
    for run in range(runs):
        between(run)
        seen.append(call(ours, *on_device))
    assert_exact(seen[0], inputs, dy)
    for other in seen[1:]:
        assert all(torch.equal(x, y) for x, y in zip(seen[0], other, strict=True))
