"""Attention, separate and packed, with and without rotation."""

import numerics
import pytest
import torch
from attention.peers import assert_exact, by_softmax, grid_of, ours, random, turned
from shapes import HEAD_DIMS, TOKENS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import evakernels as ek

OPS = torch.ops.evakernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = ("reference", "cpu")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with ek.using(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 88])
@pytest.mark.parametrize("tokens", TOKENS)
def test_is_as_exact_as_pytorch_at_every_length(implementation, tokens, head_dim, dtype):
    prefix, grid = grid_of(tokens)
    rope = ek.Rope2d(grid, head_dim, prefix_tokens=prefix)
    assert_exact((1 if tokens > 200 else 2, tokens, 2, head_dim), dtype, rope=rope)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_is_as_exact_as_pytorch_at_every_head_dimension(implementation, head_dim, rotate, dtype):
    for tokens in (7, 50):
        prefix, grid = grid_of(tokens)
        rope = ek.Rope2d(grid, head_dim, prefix_tokens=prefix) if rotate else None
        assert_exact((2, tokens, 3, head_dim), dtype, rope=rope)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 13, 77])
def test_causal_is_as_exact_as_pytorch(implementation, tokens, dtype):
    assert_exact((2, tokens, 2, 64), dtype, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_kept_tokens_causal_and_scaled_is_as_exact_as_pytorch(implementation, prefix, dtype):
    rope = ek.Rope2d((5, 8), 80, prefix_tokens=prefix)
    generator = torch.Generator().manual_seed(0)
    kept = torch.stack([torch.randperm(40, generator=generator)[:20] for _ in range(2)]).to(torch.int16)
    options = {"rope": rope, "positions": kept, "scale": 0.3}
    assert_exact((2, prefix + 20, 3, 80), dtype, **options)
    assert_exact((2, prefix + 20, 3, 80), dtype, causal=True, **options)


def test_order_of_kept_tokens_does_not_matter(implementation):
    rope = ek.Rope2d((4, 7), 64)
    q, k, v = (random(2, 29, 2, 64, dtype=torch.float64, seed=s) for s in range(3))
    order = torch.randperm(28, generator=torch.Generator().manual_seed(5))
    tokens = torch.cat((torch.zeros(1, dtype=torch.long), order + 1))
    shuffled = ours(q[:, tokens], k[:, tokens], v[:, tokens], rope, order.expand(2, -1))
    torch.testing.assert_close(shuffled, ours(q, k, v, rope)[:, tokens])
    # The order of rows and columns does: a transposed grid is another grid.
    assert not torch.allclose(shuffled, ours(q, k, v, ek.Rope2d((7, 4), 64))[:, tokens], atol=1e-3)


@pytest.mark.parametrize("interleaved", [True, False])
def test_attention_is_rotation_then_attention(implementation, interleaved):
    rope = ek.Rope2d((3, 4), 40, interleaved=interleaved)
    q, k, v = (random(2, 13, 3, 40, seed=s, grad=True) for s in range(3))
    fused = ours(q, k, v, rope)
    apart = ours(ek.apply_rope(q, rope), ek.apply_rope(k, rope), v)
    torch.testing.assert_close(fused, apart)
    dout = random(2, 13, 3, 40, seed=3)
    torch.testing.assert_close(torch.autograd.grad(fused, (q, k, v), dout), torch.autograd.grad(apart, (q, k, v), dout))


@pytest.mark.parametrize("head_dim", [32, 40, 64, 88])
@pytest.mark.parametrize("case", ["plain", "causal", "grid", "kept"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_equals_separate_bitwise(implementation, dtype, case, head_dim):
    tokens = 7 if case == "kept" else 13
    options = {
        "plain": {},
        "causal": {"causal": True},
        "grid": {"rope": ek.Rope2d((3, 4), head_dim)},
        "kept": {"rope": ek.Rope2d((3, 4), head_dim), "positions": torch.tensor([[11, 3, 4, 0, 7, 1]] * 2)},
    }[case]
    qkv = random(2, tokens, 3, 2, head_dim, dtype=dtype, grad=True)
    q, k, v = (x.detach().clone().requires_grad_() for x in qkv.unbind(2))
    dout = random(2, tokens, 2, head_dim, dtype=dtype, seed=1)
    packed, separate = ek.attention_qkvpacked(qkv, **options), ek.attention(q, k, v, **options)
    assert packed.is_contiguous() and torch.equal(packed, separate)
    (dqkv,) = torch.autograd.grad(packed, qkv, dout)
    assert dqkv.is_contiguous()
    assert torch.equal(dqkv, torch.stack(torch.autograd.grad(separate, (q, k, v), dout), 2))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack((x, x, x), 2)[:, :, 1],
        lambda x: torch.cat((x[..., :1], x), -1)[..., 1:],
        lambda x: torch.stack((x, x), -1)[..., 0],
    ],
    ids=["heads first", "packed", "odd", "strided channels"],
)
def test_strides_change_nothing(implementation, view):
    rope = ek.Rope2d((3, 4), 64)
    inputs = [random(2, 13, 3, 64, seed=s, grad=True) for s in range(4)]
    expected = ours(*inputs[:3], rope)
    actual = ours(*(view(x) for x in inputs[:3]), rope)
    assert actual.is_contiguous() and torch.equal(actual, expected)
    gradients = [torch.autograd.grad(out, inputs[:3], view(inputs[3].detach())) for out in (actual, expected)]
    assert all(torch.equal(a, e) for a, e in zip(*gradients, strict=True))


def test_every_implementation_agrees_on_a_strided_op_call():
    """PyTorch's kernel would read past such tensors: the call falls back to the reference."""
    q, k, v = (torch.stack((x, x), -1)[..., 0] for x in (random(2, 13, 3, 64, seed=s) for s in range(3)))
    arguments = (None, None, None, 0, True, False, 0.125)
    actual, _ = OPS.attention(q, k, v, *arguments)
    torch.testing.assert_close(actual, by_softmax(q, k, v))
    with ek.using("cpu"), pytest.raises(NotImplementedError, match="needs a contiguous last dimension"):
        OPS.attention(q, k, v, *arguments)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_lse_is_the_natural_logarithm_of_the_scaled_scores(implementation, dtype, causal):
    rope = ek.Rope2d((4, 4), 64)
    q, k, v = (random(2, 17, 3, 64, dtype=dtype, seed=s) for s in range(3))
    _, lse = OPS.attention(q, k, v, rope.row_table, rope.column_table, None, 1, True, causal, 0.2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert lse.dtype == wide and lse.shape == (2, 3, 17) and lse.is_contiguous()
    rotated = [turned(x, rope).transpose(1, 2) for x in (q, k)]
    later = torch.ones(17, 17, dtype=torch.bool).triu(1) if causal else torch.zeros(17, 17, dtype=torch.bool)
    scores = (rotated[0].double() @ rotated[1].double().transpose(2, 3) * 0.2).masked_fill(later, float("-inf"))
    _, peer = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *rotated, v.transpose(1, 2), 0.0, causal, scale=0.2
    )
    # Products of half-precision values are exact in float32, so the floor of one ulp of float32 holds for them too.
    numerics.assert_as_exact_as(lse, peer, scores.logsumexp(-1), numerics.OUTPUTS)


@pytest.mark.parametrize("positions", [None, torch.tensor([[5, 0, 2]])])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_the_formula(implementation, causal, positions):
    rope = ek.Rope2d((2, 3), 32)
    tokens = 7 if positions is None else 4
    q, k, v = (random(1, tokens, 1, 32, dtype=torch.float64, seed=s, grad=True) for s in range(3))
    options = {"rope": rope, "positions": positions, "causal": causal}
    torch.testing.assert_close(ek.attention(q, k, v, **options), by_softmax(q, k, v, **options))
    assert torch.autograd.gradcheck(lambda *x: ek.attention(*x, **options), (q, k, v), fast_mode=True)
    qkv = torch.stack((q, k, v), 2).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ek.attention_qkvpacked(x, **options), qkv, fast_mode=True)


def test_only_what_needs_a_gradient_gets_one():
    q, k, v = (random(2, 7, 2, 32, seed=s) for s in range(3))
    ours(q, k, v.requires_grad_()).sum().backward()
    assert q.grad is None and k.grad is None and v.grad is not None
    with torch.no_grad():
        assert not ours(q, k, v).requires_grad


def test_second_derivative_raises():
    qkv, rope = random(1, 7, 3, 2, 32, grad=True), ek.Rope2d((2, 3), 32)
    for out in (ek.attention_qkvpacked(qkv), ours(*qkv.unbind(2)), ek.apply_rope(qkv[:, :, 0], rope)):
        (gradient,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_saved_for_backward_is_nothing_big_beyond_inputs_and_output():
    rope = ek.Rope2d((8, 8), 64)
    qkv = random(2, 65, 3, 2, 64, grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = ek.attention_qkvpacked(qkv, rope=rope)
    own = [x for x in saved if x.data_ptr() not in (qkv.data_ptr(), out.data_ptr())]
    tables = [rope.row_table.data_ptr(), rope.column_table.data_ptr()]
    assert [x.shape for x in own if x.data_ptr() not in tables] == [(2, 2, 65)]  # the log-sum-exp


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops_pass_opcheck(implementation, rotate, dtype):
    rope, kept = ek.Rope2d((2, 4), 32), torch.tensor([[5, 0, 1]] * 2, dtype=torch.int16)
    qkv, dout = random(2, 4, 3, 2, 32, dtype=dtype), random(2, 4, 2, 32, dtype=dtype, seed=1)
    tables = (rope.row_table, rope.column_table, kept, 1) if rotate else (None, None, None, 0)
    options = (*tables, True, not rotate, 0.2)
    q, k, v = qkv.unbind(2)
    out, lse = OPS.attention(q, k, v, *options)
    opcheck(OPS.attention.default, (q, k, v, *options))
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    opcheck(OPS.attention_backward.default, (dout, heads_first, k, heads_first, out, lse, *options))
    opcheck(OPS.attention_qkvpacked.default, (qkv, *options))
    opcheck(OPS.attention_qkvpacked_backward.default, (dout, qkv, out, lse, *options))


def every_function(q, k, v, kept, rope):
    x = ek.attention(q, k, v, rope=rope)
    dropped = torch.stack((ek.apply_rope(x, rope), k, v), 2)[:, :4]
    return ek.attention_qkvpacked(dropped, rope=rope, positions=kept, scale=0.3)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager_forward_and_backward(backend):
    rope, kept = ek.Rope2d((2, 3), 32), torch.tensor([[5, 0, 1]] * 2, dtype=torch.int16)
    inputs = [random(2, 7, 2, 32, dtype=torch.float64, seed=s, grad=True) for s in range(3)]
    compiled = torch.compile(every_function, fullgraph=True, backend=backend)
    out, eager = compiled(*inputs, kept, rope), every_function(*inputs, kept, rope)
    torch.testing.assert_close(out, eager, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(x.sin().sum(), inputs) for x in (out, eager)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_shapes_are_known_without_computing():
    with FakeTensorMode():
        rope = ek.Rope2d(14, 64)
        qkv = torch.empty(2, 99, 3, 12, 64, dtype=torch.bfloat16, requires_grad=True)
        kept = torch.empty(2, 98, dtype=torch.int16)
        out = ek.attention_qkvpacked(qkv, rope=rope, positions=kept)
        assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape
        with torch.device("meta"):
            turned = ek.apply_rope(torch.empty(2, 197, 12, 64), ek.Rope2d(14, 64))
    assert (out.shape, out.dtype) == ((2, 99, 12, 64), torch.bfloat16)
    assert (turned.shape, turned.device.type) == ((2, 197, 12, 64), "meta")


def test_autocast_gives_autocast_dtype_and_gradients_in_the_inputs_own(implementation):
    rope = ek.Rope2d((3, 4), 32)
    q, k, v = (random(2, 13, 2, 32, seed=s, grad=True) for s in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(q, k, v, rope)
        wide = ours(q.double(), k.double(), v.double(), rope)
    assert (out.dtype, wide.dtype) == (torch.bfloat16, torch.float64)
    assert torch.equal(out, ours(q.bfloat16(), k.bfloat16(), v.bfloat16(), rope))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), (q, k, v)))


def test_repeats_are_bitwise_equal(implementation):
    rope, qkv = ek.Rope2d((8, 8), 64), random(4, 65, 3, 3, 64, dtype=torch.bfloat16, grad=True)

    def once():
        out = ek.attention_qkvpacked(qkv, rope=rope)
        return out, *torch.autograd.grad(out.float().sin().sum(), qkv)

    first = once()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, once(), strict=True))


def test_an_empty_batch_gives_an_empty_batch():
    qkv = torch.zeros(0, 7, 3, 2, 32, requires_grad=True)
    out = ek.attention_qkvpacked(qkv, rope=ek.Rope2d((2, 3), 32))
    out.sum().backward()
    assert out.shape == (0, 7, 2, 32) and qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("packed", [False, True])
def test_an_id_outside_the_grid_raises(implementation, packed):
    qkv, kept = random(1, 4, 3, 2, 32), torch.tensor([[0, 6, 3]])
    with pytest.raises(ValueError, match="patch id 6, but a grid of 2 x 3 has the ids 0 to 5"):
        if packed:
            ek.attention_qkvpacked(qkv, rope=ek.Rope2d((2, 3), 32), positions=kept)
        else:
            ek.attention(*qkv.unbind(2), rope=ek.Rope2d((2, 3), 32), positions=kept)


X = torch.zeros(2, 7, 2, 32)


@pytest.mark.parametrize(
    ("inputs", "options", "error", "sentence"),
    [
        ((X, X[:, :6], X), {}, ValueError, r"k has shape \(2, 6, 2, 32\), expected \(2, 7, 2, 32\) \(that of q\)"),
        ((X, X, X.half()), {}, TypeError, "v has dtype torch.float16, q has torch.float32"),
        ((X.int(), X, X), {}, TypeError, "q has dtype torch.int32; allowed"),
        ((X, X, X.to("meta")), {}, ValueError, "v is on meta"),
        ((X[0], X[0], X[0]), {}, ValueError, r"q has shape \(7, 2, 32\); expected \(B, N, H, D\)"),
        ((X[:, :0],) * 3, {}, ValueError, "at least one token"),
        ((X[..., :24],) * 3, {}, ValueError, "head dimension is 24; allowed are 32 to 128 in steps of 8"),
        ((torch.zeros(2, 7, 2, 36),) * 3, {}, ValueError, "head dimension is 36"),
        ((torch.zeros(2, 7, 2, 136),) * 3, {}, ValueError, "head dimension is 136"),
        ((X, X, X), {"rope": ek.Rope2d(3, 32)}, ValueError, "give positions if tokens were dropped"),
        ((X, X, X), {"rope": ek.Rope2d((2, 3), 64)}, ValueError, "rope was made for 64"),
        ((X, X, X), {"positions": torch.zeros(2, 6).long()}, ValueError, "without a rope"),
        ((X, X, X), {"rope": ek.Rope2d((2, 3), 32).to("meta")}, ValueError, "rope is on meta"),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(inputs, options, error, sentence):
    with pytest.raises(error, match=sentence):
        ek.attention(*inputs, **options)


def test_packed_wants_three():
    with pytest.raises(ValueError, match=r"shape \(2, 7, 2, 2, 32\); its third dimension must be 3"):
        ek.attention_qkvpacked(torch.zeros(2, 7, 2, 2, 32))
    with pytest.raises(ValueError, match=r"expected \(B, N, 3, H, D\)"):
        ek.attention_qkvpacked(X)
