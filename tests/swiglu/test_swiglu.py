"""SwiGLU, alone and with its LayerNorm, on two tensors and on one packed and padded tensor."""

import math

import numerics
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import evakernels as ek

OPS = torch.ops.evakernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = ("reference", "cpu")
WIDTHS = (1, 170, 1009, 2048, 2730)
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}  # of float64, where only the order of operations may differ


def rows(*shape, dtype=torch.float64, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.3).to(dtype).requires_grad_(grad)


def by_torch(gate, up, weight=None, bias=None, eps=1e-6):
    """PyTorch's operators, in float32 for half precision: a product rounded before its norm is no peer."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    y = F.silu(gate.to(wide)) * up.to(wide)
    if weight is not None:
        y = F.layer_norm(y, weight.shape, weight.to(wide), bias.to(wide) if bias is not None else None, eps)
    return y.to(gate.dtype)


def ours(gate, up, weight=None, bias=None, eps=1e-6):
    return ek.swiglu(gate, up) if weight is None else ek.swiglu_norm(gate, up, weight, bias, eps)


def pack(gate, up, padded, filler=math.nan):
    fill = (0, padded - gate.shape[-1])
    return torch.cat([F.pad(gate, fill, value=filler), F.pad(up, fill, value=filler)], -1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_is_as_exact_as_pytorch(width, dtype, norm, implementation):
    inputs = [rows(6, width, seed=s) for s in (0, 1)] + [rows(width, seed=s) for s in (2, 3)][: 2 * norm]
    inputs = [t.to(dtype) for t in inputs]
    dy = rows(6, width, dtype=dtype, seed=4, grad=False)

    def run(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        y = function(*leaves)
        y.backward(dy.to(y.dtype))
        return [y.detach(), *(t.grad for t in leaves)]

    peer, oracle = run(by_torch, dtype), run(by_torch, torch.float64)
    with ek.using(implementation):
        actual = run(ours, dtype)
    for name, a, p, o in zip(("y", "dgate", "dup", "dweight", "dbias"), actual, peer, oracle, strict=False):
        factor = numerics.OUTPUTS if name == "y" else numerics.GRADIENTS
        numerics.assert_as_exact_as(a, p, o, factor, name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_is_its_formula_with_its_gradient(implementation):
    gate, up, weight, bias = rows(2, 3, 5), rows(2, 3, 5, seed=1), rows(5, seed=2), rows(5, seed=3)
    with ek.using(implementation):
        for inputs in ((gate, up), (gate, up, weight), (gate, up, weight, bias)):
            call = {2: ek.swiglu, 3: lambda g, u, w: ek.swiglu_norm(g, u, w, None), 4: ek.swiglu_norm}[len(inputs)]
            torch.testing.assert_close(call(*inputs), by_torch(*inputs))
            assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("norm", [False, True])
def test_packed_is_unpacked_in_the_logical_columns_and_zero_in_the_pad_whatever_the_pad_holds(norm, implementation):
    width, padded = 5, 8
    gate, up = rows(2, 3, width), rows(2, 3, width, seed=1)
    weights = (rows(width, seed=2), rows(width, seed=3)) if norm else (None, None)
    packed = pack(gate, up, padded).detach().requires_grad_()
    dy = rows(2, 3, width, seed=4, grad=False)
    inputs = [t for t in (gate, up, *weights) if t is not None]
    with ek.using(implementation):
        split = ours(gate, up, *weights)
        gradients = torch.autograd.grad(split, inputs, dy)
        y = ek.swiglu_norm_packed(packed, *weights, width=width)
        leaves = [t for t in (packed, *weights) if t is not None]
        dpacked, *dweights = torch.autograd.grad(y, leaves, F.pad(dy, (0, padded - width), value=math.nan))
    torch.testing.assert_close(y, F.pad(split, (0, padded - width)), **ROUNDING)
    torch.testing.assert_close(dpacked, pack(*gradients[:2], padded, filler=0.0), **ROUNDING)
    torch.testing.assert_close(dweights, list(gradients[2:]), **ROUNDING)
    pad = [y[..., width:], dpacked[..., width:padded], dpacked[..., padded + width :]]
    assert not any(columns.any() for columns in pad)
    assert y.is_contiguous() and dpacked.is_contiguous()


def test_packed_without_padding_is_the_two_halves():
    packed, weight, bias = rows(3, 2, 10), rows(5, seed=1), rows(5, seed=2)
    expected = ek.swiglu_norm(*packed.chunk(2, -1), weight, bias)
    torch.testing.assert_close(ek.swiglu_norm_packed(packed, weight, bias, width=5), expected, **ROUNDING)
    assert torch.autograd.gradcheck(lambda *a: ek.swiglu_norm_packed(*a, width=5), (packed, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saves_the_inputs_themselves_and_two_float32_statistics_a_row(dtype):
    both = rows(4, 16, dtype=dtype)
    gate, up = both.chunk(2, -1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ek.swiglu_norm(gate, up, rows(8, dtype=dtype), rows(8, dtype=dtype))
        assert [t.data_ptr() for t in saved[:2]] == [gate.data_ptr(), up.data_ptr()]
        assert [(t.shape, t.dtype) for t in saved[3:]] == [((4,), torch.float32)] * 2
        saved.clear()
        ek.swiglu(gate, up)
        assert [t.data_ptr() for t in saved[:2]] == [gate.data_ptr(), up.data_ptr()]
        assert [t.numel() for t in saved[2:]] == [0, 0]
        saved.clear()
        ek.swiglu_norm_packed(both, rows(8, dtype=dtype), None, width=8)
        assert saved[0].data_ptr() == both.data_ptr() and [t.shape for t in saved[2:]] == [(4,), (4,)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_any_strides_give_the_same_contiguous_results(implementation):
    gate, up = rows(3, 4, 16).transpose(0, 1).chunk(2, -1)
    dy = rows(3, 4, 8, seed=1, grad=False).transpose(0, 1)
    with ek.using(implementation):
        for weights in ((), (rows(8, seed=2), rows(8, seed=3))):
            strided, dense = ours(gate, up, *weights), ours(gate.contiguous(), up.contiguous(), *weights)
            gradients = torch.autograd.grad(strided, (gate, up), dy), torch.autograd.grad(dense, (gate, up), dy)
            assert strided.is_contiguous()
            torch.testing.assert_close((strided, gradients[0]), (dense, gradients[1]), **ROUNDING)


def test_no_rows_are_allowed():
    gate, weight = rows(0, 8, dtype=torch.float32), rows(8, dtype=torch.float32)
    y = ek.swiglu_norm(gate, gate, weight, weight)
    y.sum().backward()
    assert y.shape == gate.grad.shape == (0, 8) and torch.equal(weight.grad, torch.zeros(8))


def test_second_derivative_raises():
    gate, up = rows(2, 5), rows(2, 5, seed=1)
    (dgate,) = torch.autograd.grad(ek.swiglu(gate, up).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dgate.sum().backward()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("weights", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops_pass_opcheck(dtype, weights, implementation):
    packed, dy = rows(2, 3, 16, dtype=dtype, grad=False), rows(2, 3, 8, dtype=dtype, grad=False)
    weight, bias = (rows(7, dtype=torch.float32, grad=False) if n < weights else None for n in range(2))
    gate, up = packed[..., :7], packed[..., 8:15]
    with ek.using(implementation):
        _, mean, rstd = OPS.swiglu(gate, up, weight, bias, 1e-6)
        opcheck(OPS.swiglu.default, (gate, up, weight, bias, 1e-6))
        opcheck(OPS.swiglu_backward.default, (dy[..., :7], gate, up, weight, mean, rstd, bias is not None))
        opcheck(OPS.swiglu_packed.default, (packed, weight, bias, 1e-6, 7))
        opcheck(OPS.swiglu_packed_backward.default, (dy, packed, weight, mean, rstd, bias is not None, 7))


def all_three(packed, weight, bias):
    y = ek.swiglu_norm_packed(packed, weight, bias, width=7)
    gate, up = (packed + 1).chunk(2, -1)
    return y + ek.swiglu(gate, up) + F.pad(ek.swiglu_norm(gate[..., :7], up[..., 1:], weight, bias), (0, 1))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager_forward_and_backward(backend):
    inputs = [rows(2, 3, 16), rows(7, seed=2), rows(7, seed=3)]
    eager = torch.autograd.grad(all_three(*inputs).sin().sum(), inputs)
    compiled = torch.compile(all_three, fullgraph=True, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs).sin().sum(), inputs), eager, **ROUNDING)


def test_autocast_casts_gate_and_up_but_not_the_weights():
    gate, up = rows(2, 3, 8, dtype=torch.float32), rows(2, 3, 8, dtype=torch.bfloat16)
    weight, bias = rows(8, dtype=torch.float32, seed=1), rows(8, dtype=torch.float32, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ek.swiglu_norm(gate, up, weight, bias)
        assert ek.swiglu(gate, up).dtype == torch.bfloat16
        packed = ek.swiglu_norm_packed(torch.cat([gate, up.float()], -1), weight, bias, width=8)
    assert y.dtype == torch.bfloat16 and torch.equal(packed, y)
    assert torch.equal(y, ek.swiglu_norm(gate.bfloat16(), up, weight, bias))
    y.sum().backward()
    dtypes = [t.grad.dtype for t in (gate, up, weight, bias)]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_repeats_are_bitwise_equal(implementation):
    gate, up, weight = (rows(*s, dtype=torch.bfloat16) for s in ((64, 1009), (64, 1009), (1009,)))

    def once():
        return torch.autograd.grad(ek.swiglu_norm(gate, up, weight, None).float().sin().sum(), (gate, up, weight))

    with ek.using(implementation):
        first = once()
        assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, once(), strict=True))


X, W = torch.ones(2, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: ek.swiglu(X, X[:1]), ValueError, r"swiglu: up has shape \(1, 4\), expected \(2, 4\)"),
        (lambda: ek.swiglu(X, X.double()), TypeError, "gate has dtype torch.float32 and up torch.float64; cast"),
        (lambda: ek.swiglu(X.int(), X), TypeError, "gate has dtype torch.int32; allowed"),
        (lambda: ek.swiglu(X[:, :0], X[:, :0]), ValueError, "at least 1 element"),
        (lambda: ek.swiglu_norm(X, X, None, None), ValueError, "needs a weight; pass torch.ones"),
        (lambda: ek.swiglu_norm(X, X, W[1:], W), ValueError, r"weight has shape \(3,\), expected \(4,\)"),
        (lambda: ek.swiglu_norm(X, X, W, W[1:]), ValueError, r"bias has shape \(3,\)"),
        (lambda: ek.swiglu_norm_packed(X, W, W, width=4), ValueError, r"\(2, 4\) and width is 4; .* half of it"),
        (lambda: ek.swiglu_norm_packed(X[:, 1:], W, W, width=1), ValueError, "must be even"),
        (lambda: ek.swiglu_norm_packed(X, W, W, width=2), ValueError, r"weight has shape \(4,\), expected \(2,\)"),
        (lambda: ek.swiglu_norm_packed(X, None, W[:2], width=2), ValueError, "needs a weight"),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()
