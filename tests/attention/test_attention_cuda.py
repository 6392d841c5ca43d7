"""The CUDA kernels of attention through the public functions, emulated and on a GPU."""

import itertools
import math

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

OPS = torch.ops.evakernels
DTYPES = (torch.bfloat16, torch.float16)
A100, H200, SMALL = 163 << 10, 227 << 10, 99 << 10  # shared memory that a block may have


# Every kernel at every length; batch and heads are small where the emulator would take long.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_is_as_exact_as_pytorch(kernels, tokens, head_dim, dtype):
    batch, heads = (2, 3) if tokens < 60 else (1, 2) if tokens < 150 else (1, 1)
    assert_exact((batch, tokens, heads, head_dim), dtype, kernels, rope=rope_of(tokens, head_dim, kernels))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", [1, 16, 33, 77, 130, 200])
def test_causal_is_as_exact_as_pytorch(kernels, tokens, head_dim):
    assert_exact((1, tokens, 2, head_dim), torch.bfloat16, kernels, causal=True)


@pytest.mark.parametrize("tokens", [300, 577])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_and_causal_is_as_exact_as_pytorch(kernels, head_dim, tokens):
    assert_exact((1, tokens, 1, head_dim), torch.float16, kernels, causal=True, scale=0.2)


@pytest.mark.parametrize(("dtype", "causal"), [(torch.bfloat16, False), (torch.float16, True)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_kept_tokens_and_both_orders_of_pairs_are_as_exact_as_pytorch(
    kernels, head_dim, prefix, interleaved, dtype, causal
):
    rope = ek.Rope2d((5, 8), head_dim, prefix_tokens=prefix, interleaved=interleaved).to(kernels)
    options = {"rope": rope, "positions": kept_of(2, 40, 20, kernels), "scale": 0.3, "causal": causal}
    assert_exact((2, prefix + 20, 3, head_dim), dtype, kernels, **options)


@pytest.mark.parametrize("interleaved", [True, False])
def test_kept_tokens_of_a_long_head_are_as_exact_as_pytorch(kernels, interleaved):
    rope = ek.Rope2d((20, 30), 64, interleaved=interleaved).to(kernels)
    assert_exact((1, 421, 1, 64), torch.bfloat16, kernels, rope=rope, positions=kept_of(1, 600, 420, kernels))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tokens", "head_dim"), [(129, 88), (200, 64), (257, 64), (257, 88)])
def test_little_shared_memory_is_as_exact_as_pytorch(kernels, monkeypatch, tokens, head_dim, causal):
    """Streamed keys, several passes and the second backward kernel, with samples and heads that differ."""
    monkeypatch.setattr(native, "shared_memory", lambda device: SMALL)
    rope = ek.Rope2d((18, 16), head_dim, interleaved=not causal).to(kernels)
    options = {"rope": rope, "positions": kept_of(2, 288, tokens - 1, kernels), "causal": causal}
    assert_exact((2, tokens, 2, head_dim), torch.bfloat16, kernels, **options)


@pytest.mark.parametrize("id_type", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_ids_of_any_integer_type(kernels, id_type):
    rope = ek.Rope2d((7, 9), 64).to(kernels)
    q, k, v, dout = (random(2, 32, 2, 64, dtype=torch.bfloat16, seed=s, device=kernels) for s in range(4))
    expected = gradients(q, k, v, dout=dout, rope=rope, positions=kept_of(2, 63, 31, kernels, torch.int64))
    actual = gradients(q, k, v, dout=dout, rope=rope, positions=kept_of(2, 63, 31, kernels, id_type))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_ids_outside_the_grid_count_as_the_nearest(kernels):
    rope = ek.Rope2d((3, 5), 32).to(kernels)
    inputs = [random(1, 5, 2, 32, dtype=torch.bfloat16, seed=s, device=kernels) for s in range(4)]
    wild = torch.tensor([[-1, 2**62, 15, -(2**62)]], device=kernels)
    near = torch.tensor([[0, 14, 14, 0]], device=kernels)
    pairs = zip(*(gradients(*inputs[:3], dout=inputs[3], rope=rope, positions=p) for p in (wild, near)), strict=True)
    assert all(torch.equal(a, e) for a, e in pairs)


def test_rotation_is_timms(kernels):
    layers = pytest.importorskip("timm.layers")
    embed = layers.RotaryEmbeddingCat(64, in_pixels=False, feat_shape=[6, 9], ref_feat_shape=[16, 16]).get_embed()
    q, k, v = (random(2, 55, 3, 64, dtype=torch.bfloat16, seed=s, device=kernels) for s in range(3))

    def timms(x):
        x = x.float()
        patches = layers.apply_rot_embed_cat(x[:, 1:].transpose(1, 2), embed.to(x.device)).transpose(1, 2)
        return torch.cat((x[:, :1], patches), 1).to(torch.bfloat16)

    actual = ours(q, k, v, ek.Rope2d((6, 9), 64).to(kernels))
    peer = by_torch(timms(q), timms(k), v)
    oracle = by_softmax(timms(q).double(), timms(k).double(), v.double())
    numerics.assert_as_exact_as(actual, peer, oracle, numerics.OUTPUTS)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "head_dim"), [(17, 64), (77, 88), (129, 128)])
def test_lse_is_the_natural_logarithm_of_the_scaled_scores(kernels, tokens, head_dim, dtype, causal):
    rope = rope_of(tokens, head_dim, kernels)
    q, k, v = (random(2, tokens, 2, head_dim, dtype=dtype, seed=s, device=kernels) for s in range(3))
    tables = rope.row_table, rope.column_table, None, rope.prefix_tokens, True
    _, lse = OPS.attention(q, k, v, *tables, causal, 0.2)
    assert lse.dtype == torch.float32 and lse.shape == (2, 2, tokens) and lse.is_contiguous()
    q, k = (turned(x, rope).transpose(1, 2) for x in (q, k))
    scores = q.double() @ k.double().mT * 0.2
    peer = q.float() @ k.float().mT * 0.2
    if causal:
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=kernels).triu(1)
        scores, peer = (x.masked_fill(later, -math.inf) for x in (scores, peer))
    numerics.assert_as_exact_as(lse, peer.logsumexp(-1), scores.logsumexp(-1), numerics.OUTPUTS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_that_grow_with_the_keys_do_not_overflow(kernels, dtype):
    """The largest score grows with every few keys, by far more than half holds the exponential of."""
    q, k, v = (random(1, 129, 1, 64, dtype=torch.float32, seed=s, device=kernels) for s in range(3))
    q, k = q.abs() + 1, k.abs() * torch.arange(129, device=kernels)[None, :, None, None] / 16
    q, k, v = (x.to(dtype) for x in (q, k, v))
    peer = by_torch(q, k, v, scale=1.0)
    oracle = by_softmax(q.double(), k.double(), v.double(), scale=1.0)
    numerics.assert_as_exact_as(ours(q, k, v, scale=1.0), peer, oracle, numerics.OUTPUTS)


@pytest.mark.parametrize(("tokens", "head_dim"), [(17, 64), (421, 88)])
def test_scores_far_below_zero_are_as_exact_as_pytorch(kernels, tokens, head_dim):
    """What stands for a key that does not exist, a score of 0, is infinitely more than those that do."""
    q, k, v, dout = (random(1, tokens, 1, head_dim, seed=s, device=kernels) for s in range(4))
    inputs = [x.to(torch.bfloat16) for x in (q.abs() + 4, -4 - k.abs() / 16, v)]
    _, *actual = gradients(*inputs, dout=dout.to(torch.bfloat16))
    for name, x, peer, oracle in zip(("dq", "dk", "dv"), actual, *by_others(inputs, dout), strict=True):
        numerics.assert_as_exact_as(x, peer, oracle, numerics.GRADIENTS, name)


# Of each way through the kernels: keys resident or streamed, one pass, several, or a kernel for dq.
WAYS = [(7, 32, False), (17, 64, True), (129, 64, False), (129, 128, True), (257, 64, False), (257, 88, True),
        (421, 128, False)]  # fmt: skip


@pytest.mark.parametrize(("tokens", "head_dim", "causal"), WAYS)
def test_every_order_of_threads_gives_the_same_bits(emulated, monkeypatch, tokens, head_dim, causal):
    monkeypatch.setitem(native.loaded, "cpu", emulated)
    inputs = [random(1, tokens, 2, head_dim, dtype=torch.bfloat16, seed=s) for s in range(4)]
    rope = rope_of(tokens, head_dim, "cpu")
    emulated.bank_conflicts()

    def run(seed):
        monkeypatch.setenv("EMU_SEED", str(seed))
        with ek.using("cuda"):
            return gradients(*inputs[:3], dout=inputs[3], rope=rope, causal=causal)

    first = run(0)
    assert all(torch.equal(a, b) for seed in (1, 2, 3) for a, b in zip(first, run(seed), strict=True))
    assert emulated.bank_conflicts() == 0


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_no_bank_of_shared_memory_is_met_twice(emulated, monkeypatch, head_dim):
    monkeypatch.setitem(native.loaded, "cpu", emulated)
    inputs = [random(1, 50, 1, head_dim, dtype=torch.bfloat16, seed=s) for s in range(4)]
    emulated.bank_conflicts()
    with ek.using("cuda"):
        gradients(*inputs[:3], dout=inputs[3], rope=rope_of(50, head_dim, "cpu"))
    assert emulated.bank_conflicts() == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "head_dim", "causal"), WAYS)
def test_repeats_give_the_same_bits(tokens, head_dim, causal):
    inputs = [random(8, tokens, 16, head_dim, dtype=torch.bfloat16, seed=s, device="cuda") for s in range(4)]
    rope = rope_of(tokens, head_dim, "cuda")
    with ek.using("cuda"):
        first = gradients(*inputs[:3], dout=inputs[3], rope=rope, causal=causal)
        for _ in range(50):
            again = gradients(*inputs[:3], dout=inputs[3], rope=rope, causal=causal)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("head_dim", [64, 88])
@pytest.mark.parametrize("tokens", [13, 129])
def test_packed_equals_separate_bitwise(kernels, tokens, head_dim):
    rope = rope_of(tokens, head_dim, kernels)
    qkv = random(2, tokens, 3, 2, head_dim, dtype=torch.bfloat16, device=kernels, grad=True)
    dout = random(2, tokens, 2, head_dim, dtype=torch.bfloat16, seed=1, device=kernels)
    packed = ek.attention_qkvpacked(qkv, rope=rope)
    separate, *expected = gradients(*(x.clone() for x in qkv.unbind(2)), dout=dout, rope=rope)
    (dqkv,) = torch.autograd.grad(packed, qkv, dout)
    assert packed.is_contiguous() and torch.equal(packed, separate)
    assert dqkv.is_contiguous() and torch.equal(dqkv, torch.stack(expected, 2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 32), (17, 64), (129, 88), (197, 64), (320, 128)])
def test_neighbours_in_memory_are_neither_read_nor_written(kernels, monkeypatch, tokens, head_dim, causal):
    inputs = [random(2, tokens, 2, head_dim, dtype=torch.bfloat16, seed=s, device=kernels) for s in range(4)]
    rope = rope_of(tokens, head_dim, kernels)
    expected = gradients(*inputs[:3], dout=inputs[3], rope=rope, causal=causal)
    guarded = []

    def new_empty(like, shape, **how):
        memory = torch.full((math.prod(shape) + 128,), math.nan, dtype=how.get("dtype", like.dtype), device=like.device)
        guarded.append(memory)
        return memory[64:-64].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    actual = gradients(*map(in_nan, inputs[:3]), dout=in_nan(inputs[3]), rope=rope, causal=causal)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert len(guarded) == 5 and all(m[:64].isnan().all() and m[-64:].isnan().all() for m in guarded)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides_change_nothing(kernels, view):
    rope = ek.Rope2d((3, 4), 64).to(kernels)
    inputs = [random(2, 13, 3, 64, dtype=torch.bfloat16, seed=s, device=kernels) for s in range(4)]
    inputs = [view(x).contiguous() for x in inputs]
    expected = gradients(*inputs[:3], dout=inputs[3], rope=rope)
    for changed in range(4):  # one at a time: each has strides of its own
        q, k, v, dout = (view(x) if i == changed else x for i, x in enumerate(inputs))
        actual = gradients(q, k, v, dout=dout, rope=rope)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True)), changed


@pytest.mark.parametrize("rotate", [False, True])
def test_an_unused_head_of_a_block_does_nothing(kernels, rotate):
    rope = ek.Rope2d(3, 64).to(kernels) if rotate else None
    for heads in (1, 5):
        assert_exact((2, 10, heads, 64), torch.bfloat16, kernels, rope=rope)


def test_more_samples_than_a_grid_takes(kernels):
    """Of the emulator's grids, which take three."""
    rope = ek.Rope2d((5, 8), 64).to(kernels)
    for tokens in (21, 421):
        if tokens > 40:
            rope = ek.Rope2d((20, 30), 64).to(kernels)
        positions = kept_of(4, rope.grid[0] * rope.grid[1], tokens - 1, kernels)
        assert_exact((4, tokens, 1, 64), torch.bfloat16, kernels, rope=rope, positions=positions)


@pytest.mark.gpu
def test_more_samples_than_a_gpus_grid_takes():
    q, k, v, dout = (random(65537, 2, 1, 32, dtype=torch.bfloat16, seed=s, device="cuda") for s in range(4))
    with ek.using("cuda"):
        whole = gradients(q, k, v, dout=dout)
        last = gradients(q[65530:], k[65530:], v[65530:], dout=dout[65530:])
    assert all(torch.equal(a[65530:], b) for a, b in zip(whole, last, strict=True))


def test_saved_for_backward_is_the_log_sum_exp_beyond_inputs_and_output(kernels):
    rope = ek.Rope2d((8, 8), 64).to(kernels)
    qkv = random(2, 65, 3, 2, 64, dtype=torch.bfloat16, device=kernels, grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = ek.attention_qkvpacked(qkv, rope=rope)
    own = [x for x in saved if x.data_ptr() not in (qkv.data_ptr(), out.data_ptr())]
    tables = [rope.row_table.data_ptr(), rope.column_table.data_ptr()]
    assert [x.shape for x in own if x.data_ptr() not in tables] == [(2, 2, 65)]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "scale", "sentence"),
    [
        (torch.float32, 64, None, "take bfloat16 and float16, not torch.float32; give it one of these, or run under"),
        (torch.bfloat16, 40, None, "take head dimensions 32, 64, .* not 40"),
        (torch.bfloat16, 64, -1.0, "take a positive scale, not -1.0"),
    ],
)
def test_what_is_not_served_is_said(kernels, dtype, head_dim, scale, sentence):
    long = torch.zeros(1, 7169, 1, 32, dtype=torch.bfloat16, device=kernels)
    with pytest.raises(NotImplementedError, match="take up to 7168 tokens, not 7169"):
        ours(long, long, long)
    x = torch.zeros(1, 3, 1, head_dim, dtype=dtype, device=kernels)
    with pytest.raises(NotImplementedError, match=sentence):
        ours(x, x, x, scale=scale)


@pytest.fixture
def launched(emulated, monkeypatch):
    """Threads and shared memory of the blocks that would be launched: forward, and backward."""
    monkeypatch.setitem(native.loaded, "cpu", emulated)

    def launched(tokens, head_dim, shared_memory):
        monkeypatch.setattr(native, "shared_memory", lambda device: shared_memory)
        q, k, v, out = torch.zeros(4, 1, tokens, 3, head_dim, dtype=torch.bfloat16)
        options = (None, None, None, 0, True, False, 1.0)
        with ek.using("cuda"):
            forward = emulated.launches(lambda: OPS.attention(q, k, v, *options))
            lse = torch.zeros(1, 3, tokens)
            backward = emulated.launches(lambda: OPS.attention_backward(out, q, k, v, out, lse, *options))
        return [launch[1:] for launch in forward], [launch[1:] for launch in backward]

    return launched


@pytest.mark.parametrize("shared_memory", [SMALL, A100, H200])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_length_has_a_launch_that_fits(launched, head_dim, shared_memory):
    bounds = (  # of the threads of a block: forward, by keys, by queries
        *(384 + 128 * (head_dim == 72), 512 if head_dim <= 64 else 384 if head_dim <= 112 else 256, 384),
    )
    for tokens in (*TOKENS, 1025, 2049, 7168):
        launches = itertools.chain(*launched(tokens, head_dim, shared_memory))
        for (threads, shared), bound in zip(launches, bounds, strict=False):
            assert 32 <= threads <= bound and shared <= shared_memory, tokens


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_keys_and_values_stay_in_shared_memory_where_they_fit(launched, head_dim):
    queries = 32 if head_dim <= 64 else 16  # of a warp
    for shared_memory in (A100, H200):
        for tokens in (77, 99, 129, 197, 257, *((289,) if head_dim <= 112 else ())):
            ((threads, shared),), _ = launched(tokens, head_dim, shared_memory)
            rows = 2 * -(-tokens // 16) * 16 + threads // 32 * queries
            assert shared == rows * head_dim * 2, (tokens, shared_memory)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_five_products_a_tile_where_one_block_holds_a_head(launched, head_dim):
    """A second kernel for dq is a second launch."""
    for tokens in (50, 77, 99, 129, *((197, 257) if head_dim <= 72 else ()), *((289,) if head_dim <= 64 else ())):
        assert len(launched(tokens, head_dim, A100)[1]) == 1, tokens
    assert len(launched(257, head_dim, H200)[1]) == 1
    assert len(launched(2049, head_dim, H200)[1]) == 2


@pytest.mark.gpu
def test_a_graph_is_captured_and_replayed():
    rope = ek.Rope2d(16, 64).cuda()
    qkv = random(4, 129, 3, 16, 64, dtype=torch.bfloat16, device="cuda", grad=True)
    kept, dout = kept_of(4, 256, 128, "cuda"), random(4, 129, 16, 64, dtype=torch.bfloat16, seed=1, device="cuda")

    def step():
        out = ek.attention_qkvpacked(qkv, rope=rope, positions=kept)
        return out.detach(), *torch.autograd.grad(out, qkv, dout)

    with ek.using("cuda"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            qkv.copy_(random(4, 129, 3, 16, 64, dtype=torch.bfloat16, seed=2))
        kept.copy_(kept.flip(1))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
