"""Token dropping: which patches are drawn, keeping their tokens, cutting them out of the image."""

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

import evakernels as ek
from evakernels.ops.tokens import reference

OPS = torch.ops.evakernels
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}  # of float64, where only the order of operations may differ


def normal(*shape, seed=0, grad=True):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_(grad)


def philox_in_python(counter, key):
    """Philox4x32-10 in Python's integers, of any size."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for step in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        left, right = (k0 + step * 0x9E3779B9) % 2**32, (k1 + step * 0xBB67AE85) % 2**32
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ left, b % 2**32, (a >> 32) ^ c3 ^ right, a % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_vectors_published_with_random123(counter, key, words):
    assert philox_in_python(counter, key) == words
    assert tuple(int(w) for w in reference.philox(tuple(torch.tensor([c]) for c in counter), key)) == words


def drawn_in_python(row, patches, keep, seed):
    words = []
    for block in range(-(-patches // 4)):
        words += philox_in_python((block, 0, row % 2**32, row >> 32), (seed % 2**32, seed >> 32))
    return sorted(patch for _, patch in sorted(zip(words, range(patches), strict=False))[:keep])


@pytest.mark.parametrize("patches", [1, 3, 16, 49, 196])
@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (1, 2**32 - 2), (2**63 - 1, 2**63 - 5), (2**40 + 9, 12345)])
def test_draws_the_documented_ids(patches, seed, offset):
    keep = max(1, patches // 2)
    kept = ek.sample_kept_tokens(4, patches, keep, seed=seed, offset=offset)
    assert (kept.dtype, kept.shape) == (torch.int16, (4, keep))
    assert kept.tolist() == [drawn_in_python(offset + r, patches, keep, seed) for r in range(4)]


def test_golden_ids():
    kept = ek.sample_kept_tokens(2, 196, 12, seed=20260101, offset=1000)
    assert kept.tolist() == [
        [3, 34, 45, 58, 95, 119, 137, 139, 145, 148, 162, 182],
        [2, 4, 27, 43, 93, 110, 111, 120, 133, 134, 157, 192],
    ]


def test_of_equal_keys_the_lower_ids_are_kept():
    keys = torch.tensor([[7, 3, 7, 7, 0xFFFFFFFF], [0xFFFFFFFF] * 5])
    assert reference.smallest(keys, 3).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert reference.smallest(keys, 2).tolist() == [[0, 1], [0, 1]]


def test_every_subset_is_equally_likely():
    draws, patches, keep = 20000, 6, 3
    kept = ek.sample_kept_tokens(draws, patches, keep, seed=5).tolist()
    subsets = {subset: 0 for subset in combinations(range(patches), keep)}
    for ids in kept:
        subsets[tuple(ids)] += 1
    expected = draws / len(subsets)
    chi_square = sum((count - expected) ** 2 / expected for count in subsets.values())
    assert 5.4 < chi_square < 43.8  # the 0.1 % quantiles of 19 degrees of freedom, on either side


def test_every_patch_of_an_image_is_equally_likely():
    draws, patches, keep = 4000, 196, 98
    counts = torch.bincount(ek.sample_kept_tokens(draws, patches, keep, seed=6).long().flatten(), minlength=patches)
    variance = draws * 0.25 * patches / (patches - 1)  # the counts sum to a constant
    chi_square = float(((counts - draws / 2) ** 2).sum() / variance)
    assert 140 < chi_square < 261  # the 0.1 % quantiles of 195 degrees of freedom


def test_ids_depend_on_the_global_index_and_not_on_the_micro_batch():
    whole = ek.sample_kept_tokens(8, 50, 20, seed=3, offset=2**32 - 5)
    parts = [ek.sample_kept_tokens(n, 50, 20, seed=3, offset=2**32 - 5 + first) for first, n in ((0, 3), (3, 5))]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole, ek.sample_kept_tokens(8, 50, 20, seed=3, offset=torch.tensor([2**32 - 5])))
    assert torch.equal(whole, ek.sample_kept_tokens(8, 50, 20, seed=3, offset=torch.tensor(2**32 - 5), device="cpu"))
    assert len({tuple(ids) for ids in whole.tolist()}) == 8
    assert not torch.equal(whole, ek.sample_kept_tokens(8, 50, 20, seed=4, offset=2**32 - 5))


def test_extremes_of_the_ranges_are_drawn():
    assert ek.sample_kept_tokens(2, 7, 7, seed=0).tolist() == [list(range(7))] * 2
    assert ek.sample_kept_tokens(0, 7, 2, seed=0).shape == (0, 2)
    kept = ek.sample_kept_tokens(1, 32767, 32767, seed=0)
    assert torch.equal(kept[0], torch.arange(32767, dtype=torch.int16))


def test_ids_lie_on_the_device_asked_for():
    with FakeTensorMode():
        assert ek.sample_kept_tokens(2, 9, 4, seed=0, device="cuda").device.type == "cuda"
        offset = torch.zeros(1, dtype=torch.int64, device="cuda")
        assert ek.sample_kept_tokens(2, 9, 4, seed=0, offset=offset).device.type == "cuda"


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_gather_keeps_prefix_and_patches_in_the_order_given(prefix, dtype):
    x = normal(2, prefix + 5, 4)
    kept = torch.tensor([[4, 0, 2], [1, 3, 0]], dtype=dtype)
    y = ek.gather_tokens(x, kept, prefix_tokens=prefix)
    rows = [[*range(prefix), *(prefix + i for i in ids)] for ids in kept.tolist()]
    assert torch.equal(y, torch.stack([sample[ids] for sample, ids in zip(x, rows, strict=True)]))
    dy = normal(*y.shape, seed=1, grad=False)
    expected = torch.zeros_like(x)
    for sample, ids in enumerate(rows):
        expected[sample, ids] = dy[sample]
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], expected)


def test_gather_takes_any_strides_and_dtypes():
    x, kept = normal(2, 6, 4, grad=False), torch.tensor([[2, 0, 4], [1, 3, 2]])
    expected = ek.gather_tokens(x, kept)
    strided = ek.gather_tokens(x.transpose(1, 2).contiguous().transpose(1, 2), kept.T.contiguous().T)
    assert torch.equal(strided, expected) and strided.is_contiguous()
    assert torch.equal(ek.gather_tokens(x.bfloat16(), kept), expected.bfloat16())
    dy = normal(4, 4, 2, grad=False).permute(2, 0, 1)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(ek.gather_tokens(leaf, kept), leaf, dy)
    assert dx.is_contiguous() and torch.equal(dx[1, 4], dy[1, 2])


def test_patch_size_may_differ_by_axis_and_rows_are_those_of_unfold():
    images = normal(2, 3, 6, 20)
    for patch in (2, (3, 5), (6, 20)):
        rows = ek.patchify(images, patch)
        assert torch.equal(rows, F.unfold(images, patch, stride=patch).transpose(1, 2)) and rows.is_contiguous()


def test_patchify_and_a_product_are_the_patch_embedding():
    images, weight, bias = normal(2, 3, 8, 12), normal(10, 3, 4, 4, seed=1), normal(10, seed=2)
    embedded = F.conv2d(images, weight, bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ek.patchify(images, 4) @ weight.flatten(1).T + bias, embedded, **ROUNDING)
    kept = torch.tensor([[5, 0, 2], [1, 4, 3]], dtype=torch.int16)
    torch.testing.assert_close(
        ek.patchify(images, 4, kept) @ weight.flatten(1).T + bias,
        ek.gather_tokens(embedded, kept, prefix_tokens=0),
        **ROUNDING,
    )


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_patchify_of_kept_patches_neither_depends_on_nor_trains_the_dropped(dtype):
    kept = torch.tensor([[5, 0], [1, 4]], dtype=dtype)
    mask = torch.ones(2, 6, dtype=torch.bool).scatter_(1, kept.long(), False).view(2, 1, 2, 3)
    dropped = mask.repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = normal(2, 3, 8, 12).detach().masked_fill(dropped, math.nan).requires_grad_()
    rows = ek.patchify(images, 4, kept)
    assert torch.isfinite(rows).all()
    (gradient,) = torch.autograd.grad(rows.square().sum() / 2, images)
    assert torch.equal(gradient, images.detach().masked_fill(dropped, 0))


def test_patchify_takes_any_strides_and_bytes():
    images, kept = normal(2, 3, 8, 12, grad=False), torch.tensor([[5, 0], [1, 4]])
    last = images.to(memory_format=torch.channels_last)
    assert torch.equal(ek.patchify(last, 4, kept), ek.patchify(images, 4, kept))
    assert torch.equal(ek.patchify(last, 4), ek.patchify(images, 4))
    pixels = (images * 50).to(torch.uint8)
    assert torch.equal(ek.patchify(pixels, 4, kept).double(), ek.patchify(pixels.double(), 4, kept))


def test_gradients():
    kept = torch.tensor([[2, 0, 3], [1, 3, 0]])
    assert torch.autograd.gradcheck(lambda x: ek.gather_tokens(x, kept, prefix_tokens=2), normal(2, 6, 3))
    assert torch.autograd.gradcheck(lambda x: ek.patchify(x, (2, 3), kept), normal(2, 2, 4, 6))
    assert torch.autograd.gradcheck(lambda x: ek.patchify(x, (2, 3)), normal(2, 2, 4, 6))


def test_second_derivative_raises():
    x = normal(2, 6, 3)
    (dx,) = torch.autograd.grad(ek.gather_tokens(x, torch.tensor([[0], [1]])).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_repeats_are_bitwise_equal():
    x = normal(16, 197, 32)

    def once():
        y = ek.gather_tokens(x, ek.sample_kept_tokens(16, 196, 98, seed=1))
        return y, *torch.autograd.grad(y.sin().sum(), x)

    first = once()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, once(), strict=True))


def test_ops_pass_opcheck():
    x, images = normal(2, 7, 3, grad=False), normal(2, 2, 4, 9, grad=False)
    kept = torch.tensor([[2, 0, 5], [1, 3, 0]], dtype=torch.int16)
    opcheck(OPS.sample_kept_tokens.default, (torch.device("cpu"), 3, 9, 4, 7, torch.tensor([5])))
    opcheck(OPS.gather_tokens.default, (x, kept, 1))
    opcheck(OPS.gather_tokens_backward.default, (OPS.gather_tokens(x, kept, 1), kept, 1, 7))
    for ids in (None, kept):
        opcheck(OPS.patchify.default, (images, 2, 3, ids))
        opcheck(OPS.patchify_backward.default, (OPS.patchify(images, 2, 3, ids), 2, 3, ids, 4, 9))


def all_three(images, offset):
    kept = ek.sample_kept_tokens(2, 6, 3, seed=1, offset=offset)
    rows = ek.patchify(images, (2, 3), kept)
    tokens = F.pad(ek.patchify(images, (2, 3)), (0, 0, 1, 0))
    return (rows * ek.gather_tokens(tokens, kept)[:, 1:]).sin()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager_forward_and_backward(backend):
    images = normal(2, 2, 4, 9)
    compiled = torch.compile(all_three, fullgraph=True, backend=backend)
    for offset in (torch.tensor([4]), torch.tensor([5])):
        eager = all_three(images, offset)
        actual = compiled(images, offset)
        torch.testing.assert_close(actual, eager, **ROUNDING)
        gradients = [torch.autograd.grad(y.sum(), images) for y in (actual, eager)]
        torch.testing.assert_close(*gradients, **ROUNDING)


def test_compiled_draws_take_seed_and_offset_as_numbers():
    compiled = torch.compile(ek.sample_kept_tokens, fullgraph=True, backend="aot_eager")
    for seed, offset in ((1, 0), (2, 4), (3, 9)):
        expected = ek.sample_kept_tokens(3, 20, 5, seed=seed, offset=offset)
        assert torch.equal(compiled(3, 20, 5, seed=seed, offset=offset, device="cpu"), expected)


X, IMAGES = torch.ones(2, 5, 3), torch.ones(2, 3, 4, 4)


@pytest.mark.parametrize("bad", [-1, 4, 2**31], ids=str)
def test_ids_outside_the_image_raise(bad):
    kept = torch.tensor([[0, 1], [2, bad]])
    for call in (lambda: ek.gather_tokens(X, kept), lambda: ek.patchify(IMAGES, 2, kept)):
        with pytest.raises(ValueError, match=rf"kept\[1, 1\] is {bad}; ids must lie between 0 and 3"):
            call()


def test_ids_given_twice_raise_in_the_backward_pass():
    kept = torch.tensor([[0, 1], [2, 2]])
    for function, x in ((ek.gather_tokens, X), (lambda x, k: ek.patchify(x, 2, k), IMAGES)):
        y = function(x.clone().requires_grad_(), kept)
        with pytest.raises(ValueError, match=r"kept\[1\] holds an id twice"):
            y.sum().backward()


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: ek.sample_kept_tokens(2, 4, 5, seed=0), ValueError, "patches 4, keep 5; needed are"),
        (lambda: ek.sample_kept_tokens(2, 4, 0, seed=0), ValueError, "keep 0; needed are"),
        (lambda: ek.sample_kept_tokens(-1, 4, 1, seed=0), ValueError, "batch is -1"),
        (lambda: ek.sample_kept_tokens(2, 32768, 5, seed=0), ValueError, "patches <= 32767"),
        (lambda: ek.sample_kept_tokens(2, 4, 2, seed=-1), ValueError, "seed is -1; it must lie between"),
        (lambda: ek.sample_kept_tokens(2, 4, 2, seed=2**63), ValueError, "seed is 9223372036854775808"),
        (lambda: ek.sample_kept_tokens(2, 4, 2, seed=0, offset=-1), ValueError, "offset is -1"),
        (lambda: ek.sample_kept_tokens(2, 4, 2, seed=0, offset=torch.tensor([-1])), ValueError, "offset is -1"),
        (lambda: ek.sample_kept_tokens(2, 4, 2, seed=0, offset=torch.ones(2)), TypeError, "one-element int64"),
        (lambda: ek.gather_tokens(X[0], torch.ones(2, 2).long()), ValueError, r"x has shape \(5, 3\)"),
        (lambda: ek.gather_tokens(X, torch.ones(2, 2)), TypeError, "kept has dtype torch.float32"),
        (lambda: ek.gather_tokens(X, torch.ones(2, 2).bool()), TypeError, "kept has dtype torch.bool"),
        (lambda: ek.gather_tokens(X, torch.ones(3, 2).long()), ValueError, r"\(3, 2\), expected \(2, at most 4\)"),
        (lambda: ek.gather_tokens(X, torch.ones(2, 5).long()), ValueError, r"\(2, 5\), expected \(2, at most 4\)"),
        (lambda: ek.gather_tokens(X, torch.ones(2, 2).long(), prefix_tokens=6), ValueError, "prefix_tokens is 6"),
        (lambda: ek.patchify(IMAGES, 3), ValueError, "a patch is 3 x 3; images must be"),
        (lambda: ek.patchify(IMAGES, (2, 0)), ValueError, "a patch is 2 x 0"),
        (lambda: ek.patchify(IMAGES[0], 2), ValueError, r"images have shape \(3, 4, 4\)"),
        (lambda: ek.patchify(IMAGES, 2, torch.ones(2).long()), ValueError, r"kept has shape \(2,\)"),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()
