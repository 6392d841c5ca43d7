"""LayerNorm and RMSNorm, alone and in the residual step."""

import numerics
import pytest
import torch
import torch.nn.functional as F
from shapes import ROW_LENGTHS
from torch.library import opcheck

import evakernels as ek

OPS = torch.ops.evakernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The implementations that run on any CPU, and whether RMSNorm is asked of them.
SERVES = pytest.mark.parametrize(("implementation", "rms"), [("reference", False), ("reference", True), ("cpu", False)])


def rows(*shape, dtype=torch.float64, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.3).to(dtype).requires_grad_(grad)


def by_torch(x, weight, bias, rms, eps=1e-6):
    if rms:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def ours(x, weight, bias, rms, eps=1e-6):
    return ek.rms_norm(x, weight, eps) if rms else ek.layer_norm(x, weight, bias, eps)


@SERVES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", ROW_LENGTHS)
def test_is_as_exact_as_pytorch(channels, dtype, implementation, rms):
    inputs = [
        rows(6, channels, dtype=dtype),
        rows(channels, dtype=dtype, seed=1),
        rows(channels, dtype=dtype, seed=2),
    ]
    dy = rows(6, channels, dtype=dtype, seed=3, grad=False)

    def run(function, dtype):
        x, weight, bias = (t.detach().to(dtype).requires_grad_() for t in inputs)
        y = function(x, weight, None if rms else bias, rms)
        y.backward(dy.to(y.dtype))
        return [y.detach(), x.grad, weight.grad] + ([] if rms else [bias.grad])

    peer, oracle = run(by_torch, dtype), run(by_torch, torch.float64)
    with ek.using(implementation):
        actual = run(ours, dtype)
    for name, a, p, o in zip(("y", "dx", "dweight", "dbias"), actual, peer, oracle, strict=False):
        factor = numerics.OUTPUTS if name == "y" else numerics.GRADIENTS
        numerics.assert_as_exact_as(a, p, o, factor, name)


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("row_scale", [False, True])
@SERVES
@pytest.mark.parametrize("function", [ek.add_norm, ek.norm_add])
def test_residual_step_is_its_formula_with_its_gradient(function, implementation, rms, row_scale, layer_scale):
    residual, branch = rows(3, 4, 7), rows(3, 4, 7, seed=1)
    weight, bias = rows(7, seed=2), None if rms else rows(7, seed=3)
    layer = rows(7, seed=4) if layer_scale else None
    keep = torch.tensor([0.0, 1.25, 1.25]) if row_scale else None

    def call(residual, branch, weight, layer, bias):
        return function(residual, branch, weight, bias, eps=1e-5, rms=rms, layer_scale=layer, row_scale=keep)

    def formula(residual, branch, weight, layer, bias):
        def scaled(x):
            x = x if layer is None else x * layer
            return x if keep is None else x * keep.double()[:, None, None]

        if function is ek.norm_add:
            return residual + scaled(by_torch(branch, weight, bias, rms, 1e-5))
        total = residual + scaled(branch)
        return total, by_torch(total, weight, bias, rms, 1e-5)

    arguments = (residual, branch, weight, layer, bias)
    with ek.using(implementation):
        torch.testing.assert_close(call(*arguments), formula(*arguments))
        assert torch.autograd.gradcheck(call, arguments)
        if bias is not None and layer_scale:
            assert torch.autograd.gradcheck(call, (*arguments[:-1], None))


@SERVES
def test_gradients_of_layer_and_rms_norm(implementation, rms):
    x, weight, bias = rows(2, 3, 5), rows(5, seed=1), rows(5, seed=2)
    with ek.using(implementation):
        if rms:
            assert torch.autograd.gradcheck(ek.rms_norm, (x, weight))
        else:
            assert torch.autograd.gradcheck(ek.layer_norm, (x, weight, bias))
            assert torch.autograd.gradcheck(ek.layer_norm, (x, weight))


def test_rms_norm_on_the_cpu_falls_back_to_the_reference():
    with ek.using("cpu"), pytest.raises(NotImplementedError, match="cpu: PyTorch has no fused RMSNorm on the CPU"):
        ek.rms_norm(rows(2, 5), rows(5))
    x, weight = rows(2, 5), rows(5, seed=1)
    loss = ek.norm_add(x, x, weight, eps=1e-6, rms=True, layer_scale=weight).sum()
    total, y = ek.add_norm(x, x, weight, eps=1e-6, rms=True, layer_scale=weight)
    assert all(g.any() for g in torch.autograd.grad(loss + total.sum() + y.square().sum(), (x, weight)))


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize(
    ("dtype", "branch_dtype"), [*zip(DTYPES, DTYPES, strict=True), (torch.float32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("function", [ek.add_norm, ek.norm_add])
@SERVES
def test_residual_step_is_as_exact_as_pytorch_in_float32(
    function, implementation, rms, dtype, branch_dtype, layer_scale
):
    """PyTorch's peer of a pass that rounds nothing between load and store is its own norm in float32."""
    inputs = [rows(3, 5, 770, dtype=dtype), rows(3, 5, 770, dtype=branch_dtype, seed=1)]
    inputs += [rows(770, dtype=dtype, seed=s) for s in (2, 3, 4)]
    keep = torch.tensor([0.0, 1.25, 1.25])
    dy = rows(3, 5, 770, dtype=dtype, seed=5, grad=False)

    def run(function, dtype, out):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        residual, branch, weight, bias, layer = leaves
        results = function(residual, branch, weight, None if rms else bias, layer if layer_scale else None, out)
        torch.autograd.backward(results, [dy.to(y.dtype) for y in results])
        return [y.detach() for y in results], [t.grad for t in leaves if t.grad is not None]

    def called(residual, branch, weight, bias, layer, _):
        out = function(residual, branch, weight, bias, eps=1e-6, rms=rms, layer_scale=layer, row_scale=keep)
        return out if isinstance(out, tuple) else (out,)

    def composed(residual, branch, weight, bias, layer, out):
        def scaled(x):
            return (x if layer is None else x * layer) * keep.to(x.dtype)[:, None, None]

        if function is ek.norm_add:
            return ((residual + scaled(by_torch(branch, weight, bias, rms))).to(out),)
        # The sum is an output and an input of the norm: rounded once, as it is stored.
        total = (residual + scaled(branch)).to(out)
        return total, by_torch(total.to(residual.dtype), weight, bias, rms).to(out)

    peer, oracle = run(composed, torch.float32, dtype), run(composed, torch.float64, torch.float64)
    with ek.using(implementation):
        actual = run(called, None, dtype)
    for factor, *triples in zip((numerics.OUTPUTS, numerics.GRADIENTS), actual, peer, oracle, strict=True):
        for place, (a, p, o) in enumerate(zip(*triples, strict=True)):
            numerics.assert_as_exact_as(a, p, o, factor, f"{'output' if factor == 2 else 'gradient'} {place}")


def test_second_derivative_raises():
    x, weight = rows(2, 5), rows(5, seed=1)
    (dx,) = torch.autograd.grad(ek.rms_norm(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@SERVES
@pytest.mark.parametrize(("dtype", "layer_scale"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_ops_pass_opcheck(implementation, rms, dtype, layer_scale):
    with ek.using(implementation):
        pass_opcheck(rms, layer_scale, dtype)


def pass_opcheck(rms, layer_scale, dtype):
    x, y = (rows(2, 3, 8, dtype=dtype, seed=s, grad=False) for s in (0, 1))
    weight, bias = (
        rows(8, dtype=torch.float32, grad=False),
        None if rms else rows(8, dtype=torch.float32, grad=False),
    )
    layer = rows(8, dtype=torch.float32, grad=False) if layer_scale else None
    keep = torch.tensor([0.0, 2.0])
    out = torch.bfloat16
    _, mean, rstd = OPS.norm(x, weight, bias, 1e-6, rms, out)
    opcheck(OPS.norm.default, (x, weight, bias, 1e-6, rms, out))
    opcheck(OPS.norm_backward.default, (y.to(out), x, weight, mean, rstd, bias is not None))
    opcheck(OPS.add_norm.default, (x, y, weight, bias, 1e-6, rms, layer, keep, out))
    for dsum in (None, y):
        opcheck(
            OPS.add_norm_backward.default,
            (dsum, y, x, y, weight, mean, rstd, layer, keep, bias is not None, torch.float32),
        )
    opcheck(OPS.norm_add.default, (x, y, weight, bias, 1e-6, rms, layer, keep))
    opcheck(OPS.norm_add_backward.default, (y, x, weight, bias, mean, rstd, layer, keep))


def all_four(x, branch, weight, bias, layer):
    total, y = ek.add_norm(x, branch, weight, bias, eps=1e-6, layer_scale=layer)
    out = ek.norm_add(total, y, weight, eps=1e-6, rms=True)
    return ek.layer_norm(out, weight, bias) + ek.rms_norm(out, weight)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager_forward_and_backward(backend):
    inputs = [rows(2, 3, 8), rows(2, 3, 8, seed=1), rows(8, seed=2), rows(8, seed=3), rows(8, seed=4)]
    eager = torch.autograd.grad(all_four(*inputs).sin().sum(), inputs)
    compiled = torch.compile(all_four, fullgraph=True, backend=backend)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*inputs).sin().sum(), inputs), eager, rtol=1e-12, atol=1e-12
    )


def test_autocast_gives_autocast_dtype_and_keeps_the_residual():
    x, branch = rows(2, 3, 8, dtype=torch.float32), rows(2, 3, 8, dtype=torch.bfloat16)
    weight = rows(8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ek.layer_norm(x, weight).dtype == torch.bfloat16
        total, y = ek.add_norm(x, branch, weight, eps=1e-6)
        assert (total.dtype, y.dtype) == (torch.float32, torch.bfloat16)
        out = ek.norm_add(x, branch, weight, eps=1e-6)
        assert out.dtype == torch.float32
    (out.sum() + y.sum()).backward()
    assert (x.grad.dtype, branch.grad.dtype, weight.grad.dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.float32,
    )


def test_repeats_are_bitwise_equal():
    x, weight = rows(64, 1009, dtype=torch.bfloat16), rows(1009, dtype=torch.bfloat16)

    def once():
        return torch.autograd.grad(ek.layer_norm(x, weight).float().sin().sum(), (x, weight))

    first = once()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((torch.ones(2, 4), torch.ones(5)), ValueError, r"weight has shape \(5,\), expected \(4,\)"),
        ((torch.ones(2, 4, dtype=torch.int32), torch.ones(4)), TypeError, "x has dtype torch.int32; allowed"),
        ((torch.ones(2, 4), torch.ones(4), torch.ones(3)), ValueError, r"bias has shape \(3,\)"),
        ((torch.ones(2, 0), torch.ones(0)), ValueError, "at least 1 element"),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        ek.layer_norm(*arguments)


def test_rms_refuses_a_bias():
    with pytest.raises(ValueError, match="RMSNorm has no bias"):
        ek.add_norm(torch.ones(2, 4), torch.ones(2, 4), torch.ones(4), torch.ones(4), eps=1e-6, rms=True)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("rms", [False, True])
def test_outputs_are_contiguous_for_permuted_inputs(rms, implementation):
    if rms and implementation == "cpu":
        pytest.skip("PyTorch has no fused RMSNorm on the CPU")
    x, y = (rows(8, 3, 2, dtype=torch.float32, seed=s, grad=False).transpose(0, 2) for s in (0, 1))
    weight, keep = torch.ones(8), torch.tensor([0.0, 2.0])
    with ek.using(implementation):
        _, mean, rstd = OPS.norm(x, weight, None, 1e-6, rms, torch.float32)
        outputs = [
            *OPS.norm(x, weight, None, 1e-6, rms, torch.float32),
            *OPS.norm_backward(y, x, weight, mean, rstd, False),
            *OPS.add_norm(x, y, weight, None, 1e-6, rms, weight, keep, torch.float32),
            *OPS.add_norm_backward(y, y, x, y, weight, mean, rstd, weight, keep, False, torch.float32),
            *OPS.norm_add(x, y, weight, None, 1e-6, rms, weight, keep),
            *OPS.norm_add_backward(y, x, weight, None, mean, rstd, weight, keep),
        ]
    assert all(output.is_contiguous() for output in outputs)


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_of_add_norm_may_go_unused(used):
    inputs = [rows(2, 3, 5), rows(2, 3, 5, seed=1), rows(5, seed=2)]
    residual, branch, weight = inputs
    total = residual + branch
    expected = (total, by_torch(total, weight, None, rms=True))[used]
    actual = ek.add_norm(residual, branch, weight, eps=1e-6, rms=True)[used]
    wanted = torch.autograd.grad(expected.sin().sum(), inputs, allow_unused=True)
    for a, b in zip(torch.autograd.grad(actual.sin().sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
