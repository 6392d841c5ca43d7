"""The Triton kernels of attention through the public functions, interpreted and on a GPU."""

import math

import interpreter
import numerics
import pytest
import torch
from attention.peers import (
    VIEWS,
    assert_exact,
    by_others,
    by_softmax,
    by_torch,
    gradients,
    in_nan,
    kept_of,
    ours,
    random,
    rope_of,
    turned,
)
from shapes import HEAD_DIMS, TOKENS

import evakernels as ek
from evakernels import native

jit = pytest.importorskip("evakernels.jit", reason="triton is not installed")
from evakernels.ops.attention import triton as plans  # noqa: E402

OPS = torch.ops.evakernels
A100, H100 = ((8, 0), 163 << 10, 108), ((9, 0), 227 << 10, 132)  # capability, shared memory, multiprocessors
GPUS = {"A100": A100, "H100": H100}


def pretend(monkeypatch, gpu):
    for module, name, value in zip(
        (jit, native, native), ("capability", "shared_memory", "multiprocessors"), gpu, strict=True
    ):
        monkeypatch.setattr(module, name, lambda device, value=value: value)


@pytest.fixture
def device(triton_kernels, monkeypatch):
    if triton_kernels.type == "cpu":
        interpreter.mend(monkeypatch)
        pretend(monkeypatch, A100)
    return triton_kernels


@pytest.fixture(params=GPUS)
def each_plan(request, triton_kernels, monkeypatch):
    """The device, and the plans of one GPU and of the other; a real one has its own."""
    if triton_kernels.type == "cpu":
        interpreter.mend(monkeypatch)
        pretend(monkeypatch, GPUS[request.param])
    elif request.param == "A100":
        pytest.skip("a GPU has one plan")
    return triton_kernels


@pytest.mark.parametrize("tokens", TOKENS)
def test_is_as_exact_as_pytorch(device, tokens):
    heads, head_dim = (2, 64) if tokens < 100 else (1, 32)  # the interpreter takes long
    assert_exact((1, tokens, heads, head_dim), torch.bfloat16, device, rope=rope_of(tokens, head_dim, device))


# Of each plan of a GPU with wgmma: one block of keys makes dq too, keys are turned in the loop, or before.
@pytest.mark.parametrize(("tokens", "head_dim"), [(50, 64), (99, 56), (129, 40), (257, 32), (577, 32)])
def test_is_as_exact_as_pytorch_with_the_plans_of_an_h100(device, monkeypatch, tokens, head_dim):
    if device.type == "cpu":
        pretend(monkeypatch, H100)
    assert_exact((1, tokens, 1, head_dim), torch.bfloat16, device, rope=rope_of(tokens, head_dim, device))


@pytest.mark.parametrize("tokens", [1, 33, 77, 130])
def test_causal_is_as_exact_as_pytorch(each_plan, tokens):
    assert_exact((1, tokens, 1, 64), torch.bfloat16, each_plan, causal=True)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("head_dim", sorted({*HEAD_DIMS, 40, 48, 56, 120}))
def test_kept_tokens_and_both_orders_of_pairs_are_as_exact_as_pytorch(device, head_dim, prefix):
    """At every head dimension, with each dtype, causal and not."""
    dtype = (torch.bfloat16, torch.float16, torch.float32)[prefix]
    rope = ek.Rope2d((5, 8), head_dim, prefix_tokens=prefix, interleaved=prefix == 1).to(device)
    options = {"rope": rope, "positions": kept_of(2, 40, 18, device), "scale": 0.3, "causal": prefix == 2}
    assert_exact((2, prefix + 18, 1, head_dim), dtype, device, **options)


@pytest.mark.parametrize(
    ("tokens", "head_dim", "interleaved"), [(70, 64, True), (70, 88, False), (135, 64, False), (135, 32, True)]
)
def test_kept_tokens_of_several_blocks_are_as_exact_as_pytorch(each_plan, tokens, head_dim, interleaved):
    rope = ek.Rope2d((20, 30), head_dim, interleaved=interleaved).to(each_plan)
    options = {"rope": rope, "positions": kept_of(1, 600, tokens - 1, each_plan), "causal": not interleaved}
    assert_exact((1, tokens, 1, head_dim), torch.float16, each_plan, **options)


@pytest.mark.parametrize(("tokens", "causal"), [(1, False), (50, True), (77, False)])
def test_float32_is_as_exact_as_pytorch(device, tokens, causal):
    assert_exact((1, tokens, 1, 104), torch.float32, device, rope=rope_of(tokens, 104, device), causal=causal)


@pytest.mark.parametrize("scale", [-0.2, 3.0])
def test_any_scale_is_as_exact_as_pytorch(device, scale):
    rope = rope_of(33, 32, device)
    assert_exact((1, 33, 2, 32), torch.bfloat16, device, rope=rope, scale=scale)
    qkv = random(1, 33, 3, 2, 32, dtype=torch.bfloat16, device=device, grad=True)
    dout = random(1, 33, 2, 32, dtype=torch.bfloat16, device=device, seed=1)
    (packed,) = torch.autograd.grad(ek.attention_qkvpacked(qkv, rope=rope, scale=scale), qkv, dout)
    _, *separate = gradients(*qkv.unbind(2), dout=dout, rope=rope, scale=scale)
    assert torch.equal(packed, torch.stack(separate, 2))


@pytest.mark.parametrize(
    "id_type", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16], ids=str
)
def test_ids_of_any_integer_type(device, id_type):
    rope = ek.Rope2d((7, 9), 32).to(device)
    q, k, v, dout = (random(2, 17, 1, 32, dtype=torch.bfloat16, seed=s, device=device) for s in range(4))
    expected = gradients(q, k, v, dout=dout, rope=rope, positions=kept_of(2, 63, 16, device, torch.int64))
    actual = gradients(q, k, v, dout=dout, rope=rope, positions=kept_of(2, 63, 16, device, id_type))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_ids_outside_the_grid_count_as_the_nearest(device):
    rope = ek.Rope2d((3, 5), 32).to(device)
    inputs = [random(1, 5, 2, 32, dtype=torch.bfloat16, seed=s, device=device) for s in range(4)]
    wild = torch.tensor([[-1, 2**62, 15, -(2**62)]], device=device)
    near = torch.tensor([[0, 14, 14, 0]], device=device)
    pairs = zip(*(gradients(*inputs[:3], dout=inputs[3], rope=rope, positions=p) for p in (wild, near)), strict=True)
    assert all(torch.equal(a, e) for a, e in pairs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tokens", "head_dim", "dtype"), [(17, 64, torch.float32), (77, 88, torch.bfloat16)])
def test_lse_is_the_natural_logarithm_of_the_scaled_scores(device, tokens, head_dim, dtype, causal):
    rope = rope_of(tokens, head_dim, device)
    q, k, v = (random(1, tokens, 2, head_dim, dtype=dtype, seed=s, device=device) for s in range(3))
    tables = rope.row_table, rope.column_table, None, rope.prefix_tokens, True
    _, lse = OPS.attention(q, k, v, *tables, causal, 0.2)
    assert lse.dtype == torch.float32 and lse.shape == (1, 2, tokens) and lse.is_contiguous()
    q, k = (turned(x, rope).transpose(1, 2) for x in (q, k))
    scores = q.double() @ k.double().mT * 0.2
    peer = q.float() @ k.float().mT * 0.2
    if causal:
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)
        scores, peer = (x.masked_fill(later, -math.inf) for x in (scores, peer))
    numerics.assert_as_exact_as(lse, peer.logsumexp(-1), scores.logsumexp(-1), numerics.OUTPUTS)


def test_scores_that_grow_with_the_keys_do_not_overflow(device):
    """The largest score grows with every few keys, by far more than half holds the exponential of."""
    q, k, v = (random(1, 129, 1, 64, dtype=torch.float32, seed=s, device=device) for s in range(3))
    q, k = q.abs() + 1, k.abs() * torch.arange(129, device=device)[None, :, None, None] / 16
    q, k, v = (x.to(torch.float16) for x in (q, k, v))
    peer = by_torch(q, k, v, scale=1.0)
    oracle = by_softmax(q.double(), k.double(), v.double(), scale=1.0)
    numerics.assert_as_exact_as(ours(q, k, v, scale=1.0), peer, oracle, numerics.OUTPUTS)


# Keys that do not exist overflow; nobody looks at what they give.
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("tokens", [17, 150])
def test_scores_far_below_zero_are_as_exact_as_pytorch(each_plan, tokens):
    """What stands for a key that does not exist, a score of 0, is infinitely more than those that do."""
    q, k, v, dout = (random(1, tokens, 1, 64, seed=s, device=each_plan) for s in range(4))
    inputs = [x.to(torch.bfloat16) for x in (q.abs() + 4, -4 - k.abs() / 16, v)]
    _, *actual = gradients(*inputs, dout=dout.to(torch.bfloat16))
    for name, x, peer, oracle in zip(("dq", "dk", "dv"), actual, *by_others(inputs, dout), strict=True):
        numerics.assert_as_exact_as(x, peer, oracle, numerics.GRADIENTS, name)


@pytest.mark.parametrize(("tokens", "head_dim"), [(13, 40), (99, 64)])
def test_repeats_and_packed_and_separate_are_equal_bitwise(each_plan, tokens, head_dim):
    rope = rope_of(tokens, head_dim, each_plan, interleaved=tokens == 13)
    qkv = random(1, tokens, 3, 2, head_dim, dtype=torch.bfloat16, device=each_plan, grad=True)
    dout = random(1, tokens, 2, head_dim, dtype=torch.bfloat16, seed=1, device=each_plan)
    packed = ek.attention_qkvpacked(qkv, rope=rope)
    separate, *expected = gradients(*(x.clone() for x in qkv.unbind(2)), dout=dout, rope=rope)
    (dqkv,) = torch.autograd.grad(packed, qkv, dout)
    assert packed.is_contiguous() and torch.equal(packed, separate)
    assert dqkv.is_contiguous() and torch.equal(dqkv, torch.stack(expected, 2))


@pytest.mark.parametrize(("tokens", "head_dim", "causal"), [(1, 32, True), (17, 88, True), (70, 72, False)])
def test_neighbours_in_memory_are_neither_read_nor_written(each_plan, monkeypatch, tokens, head_dim, causal):
    inputs = [random(1, tokens, 2, head_dim, dtype=torch.bfloat16, seed=s, device=each_plan) for s in range(4)]
    rope = rope_of(tokens, head_dim, each_plan, interleaved=not causal)
    expected = gradients(*inputs[:3], dout=inputs[3], rope=rope, causal=causal)
    guarded, unguarded = [], torch.Tensor.new_empty

    def new_empty(like, shape, **how):
        if isinstance(shape, int):  # the interpreter's own
            return unguarded(like, shape, **how)
        memory = torch.full((math.prod(shape) + 128,), math.nan, dtype=how.get("dtype", like.dtype), device=like.device)
        guarded.append(memory)
        return memory[64:-64].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    actual = gradients(*map(in_nan, inputs[:3]), dout=in_nan(inputs[3]), rope=rope, causal=causal)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert len(guarded) >= 5 and all(m[:64].isnan().all() and m[-64:].isnan().all() for m in guarded)
    assert not any(m[64:-64].isnan().any() for m in guarded)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides_change_nothing(device, view):
    rope = ek.Rope2d((2, 2), 32).to(device)
    inputs = [random(2, 5, 1, 32, dtype=torch.bfloat16, seed=s, device=device) for s in range(4)]
    inputs = [view(x).contiguous() for x in inputs]
    expected = gradients(*inputs[:3], dout=inputs[3], rope=rope)
    for changed in range(4):  # one at a time: each has strides of its own
        q, k, v, dout = (view(x) if i == changed else x for i, x in enumerate(inputs))
        actual = gradients(q, k, v, dout=dout, rope=rope)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True)), changed


def test_the_backward_operator_takes_what_it_is_given(device):
    """A strided out and lse, and a dout of another dtype."""
    q, k, v, dout = (random(1, 9, 2, 32, dtype=torch.bfloat16, seed=s, device=device) for s in range(4))
    options = (None, None, None, 0, True, False, 0.2)
    out, lse = OPS.attention(q, k, v, *options)
    expected = OPS.attention_backward(dout, q, k, v, out, lse, *options)
    strided = torch.stack((out, out), 3)[:, :, :, 1], torch.stack((lse, lse), 3)[..., 0]
    actual = OPS.attention_backward(dout.float(), q, k, v, *strided, *options)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("head_dim", "dtype"), [(32, torch.float32), (88, torch.bfloat16), (40, torch.float16)])
def test_the_rotation_alone_is_as_exact_as_one_rounding_of_float32(device, monkeypatch, head_dim, dtype, interleaved):
    monkeypatch.setattr(native, "multiprocessors", lambda device: 1)  # few programs, which share heads unevenly
    rope = ek.Rope2d((5, 8), head_dim, prefix_tokens=2, interleaved=interleaved).to(device)
    packed = random(2, 37, 3, 3, head_dim, dtype=dtype, device=device)
    kept, dout = kept_of(2, 40, 35, device), random(2, 37, 3, head_dim, dtype=dtype, seed=1, device=device)

    def run(function, x, dout):
        x = x.detach().requires_grad_()
        y = function(x, rope, kept)
        return y.detach(), *torch.autograd.grad(y, x, dout)

    x = packed[:, :, 1]
    actual, peer, oracle = run(ek.apply_rope, x, dout), run(turned, x, dout), run(turned, x.double(), dout.double())
    for got, theirs, exact in zip(actual, peer, oracle, strict=True):
        assert got.is_contiguous() and got.dtype == dtype
        numerics.assert_as_exact_as(got, theirs, exact, numerics.OUTPUTS)
    assert torch.equal(actual[0][:, :2], x[:, :2])


def test_an_empty_batch_gives_an_empty_batch(each_plan):
    qkv = torch.zeros(0, 7, 3, 2, 32, requires_grad=True, device=each_plan, dtype=torch.bfloat16)
    out = ek.attention_qkvpacked(qkv, rope=ek.Rope2d((2, 3), 32).to(each_plan))
    out.sum().backward()
    assert out.shape == (0, 7, 2, 32) and qkv.grad.shape == qkv.shape
    assert ek.apply_rope(out, ek.Rope2d((2, 3), 32).to(each_plan)).shape == out.shape


@pytest.mark.parametrize(
    ("dtype", "scale", "sentence"),
    [
        (torch.float64, None, "take float32, bfloat16 and float16, not torch.float64"),
        (torch.float32, 0.0, "take a finite scale other than 0, not 0.0"),
        (torch.float32, math.nan, "take a finite scale other than 0, not nan"),
    ],
)
def test_refuses_in_a_sentence(triton_kernels, dtype, scale, sentence):
    x = torch.zeros(1, 3, 1, 32, dtype=dtype, device=triton_kernels)
    with pytest.raises(NotImplementedError, match=sentence):
        ours(x, x, x, scale=scale)
    table = torch.zeros(1, 8, 2, device=triton_kernels).expand(1 << 16, -1, -1)
    with pytest.raises(NotImplementedError, match="not 65536 x 65536"):
        OPS.apply_rope(x.float(), table, table, None, 0, True, False)


@pytest.mark.parametrize("head_dim", [4, 36, 256])
def test_rows_that_do_not_begin_at_16_bytes_are_not_turned(triton_kernels, head_dim):
    x = torch.zeros(1, 5, 2, head_dim, device=triton_kernels)
    with pytest.raises(NotImplementedError, match=f"turn head dimensions of up to 240 in steps of 8, not {head_dim}"):
        ek.apply_rope(x, ek.Rope2d(2, head_dim).to(triton_kernels))


@pytest.mark.parametrize("head_dim", [8, 136, 240])
def test_rows_of_other_lengths_are_turned_alone(triton_kernels, head_dim):
    x, rope = torch.randn(2, 5, 3, head_dim, device=triton_kernels), ek.Rope2d(2, head_dim).to(triton_kernels)
    found = ek.apply_rope(x, rope)
    with ek.using("reference"):
        torch.testing.assert_close(found, ek.apply_rope(x, rope))


def launches(gpu, tokens, head_dim, monkeypatch, dtype=torch.bfloat16, rotate=True, **options):
    """The kernels that forward and backward would launch on a GPU."""
    pretend(monkeypatch, gpu)
    rope = rope_of(tokens, head_dim, "cpu") if rotate else None
    inputs = [torch.zeros(1, tokens, 2, head_dim, dtype=dtype) for _ in range(4)]
    with ek.using("triton"), jit.recorded() as found:
        gradients(*inputs[:3], dout=inputs[3], rope=rope, **options)
    return [launch.kernel.__name__ for launch in found], found


def test_keys_are_turned_before_where_several_blocks_would_turn_them_again(monkeypatch):
    turning, alone = ["forward", "turn", "backward_queries", "backward_keys"], ["forward", "backward_keys"]
    assert launches(A100, 64, 64, monkeypatch)[0] == turning
    assert launches(A100, 99, 64, monkeypatch)[0] == ["turn", *turning]
    assert launches(H100, 128, 64, monkeypatch)[0] == alone
    assert launches(H100, 257, 64, monkeypatch)[0] == turning
    assert launches(H100, 129, 64, monkeypatch)[0] == ["forward", "backward_queries", "backward_keys"]
    assert launches(H100, 577, 64, monkeypatch)[0] == ["turn", *turning]
    assert launches(H100, 129, 88, monkeypatch)[0] == turning
    assert launches(A100, 577, 64, monkeypatch, rotate=False)[0] == ["forward", "backward_queries", "backward_keys"]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("head_dim", range(32, 129, 8))
def test_every_length_has_a_plan(monkeypatch, head_dim, gpu):
    for tokens in (*TOKENS, 2049, 40000):
        for dtype, rotate in ((torch.bfloat16, True), (torch.float16, False), (torch.float32, True)):
            if tokens == 40000 and (rotate or head_dim > 32):
                continue  # the grid would be as large
            for launch in launches(GPUS[gpu], tokens, head_dim, monkeypatch, dtype, rotate)[1]:
                plan = launch.constants
                if "KEYS" in plan:
                    assert launch.warps in (4, 8) and min(plan["KEYS"], plan["QUERIES"]) >= 16
                    assert not plan.get("WHOLE") or plan["KEYS"] >= tokens
                    # wgmma: 64 rows for each group of 4 warps
                    rows = plan["KEYS"] if "keys" in launch.kernel.__name__ else plan["QUERIES"]
                    assert dtype == torch.float32 or 16 * launch.warps == rows


@pytest.mark.parametrize("head_dim", range(32, 129, 8))
def test_no_more_than_a_fifth_of_the_channels_computed_is_padding(head_dim):
    from evakernels.ops.attention.triton_tiles import firsts, widths

    cuts, starts = widths(head_dim), firsts(head_dim)
    assert list(starts) == [sum(cuts[:i]) for i in range(len(cuts))] and sum(cuts) >= head_dim
    assert 5 * (sum(cuts) - head_dim) <= sum(cuts)
    assert all(width in (16, 32, 64, 128) for width in cuts)
    assert set(map(type, cuts)) == {int}
    assert plans.MOST_PATCHES < 2**31
