"""The contrastive loss, streamed over tiles, against the dense formula."""

import itertools

import numerics
import pytest
import torch
from contrastive.peers import Largest, dense, pairs, run
from torch.library import opcheck

import evakernels as ek
from evakernels.ops.contrastive import reference

OPS = torch.ops.evakernels
ALONE = "", None  # the group and the sizes of one process


def streamed(image, text, scale, smoothing=0.0, mask=None):
    return ek.contrastive_loss(image, text, scale, label_smoothing=smoothing, row_mask=mask)


@pytest.fixture(params=[20, 4096], ids=lambda t: f"tile{t}")
def tile(request, monkeypatch):
    monkeypatch.setattr(reference, "TILE", request.param)
    return request.param


@pytest.mark.parametrize("kind", ["random", "collinear", "separated"])
@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("b", [33, 96])
def test_is_as_exact_as_dense_cross_entropy(b, smoothing, scale, kind, tile):
    runs = []
    for seed in range(16):  # one loss alone may be right by luck
        inputs = *pairs(b, dtype=torch.float32, seed=seed, kind=kind), scale, smoothing
        actual, peer = (run(f, torch.float32, *inputs) for f in (streamed, dense))
        runs.append((actual, peer, run(dense, torch.float64, *inputs)))
    for i, name in enumerate(("loss", "dscale", "dimage", "dtext")):
        columns = (torch.stack([x[i] for x in column]) for column in zip(*runs, strict=True))
        factor = numerics.OUTPUTS if name == "loss" else numerics.GRADIENTS
        numerics.assert_as_exact_as(*columns, factor, name)
    for actual, _, oracle in runs:
        # Between nearly equal logits rounding decides.
        assert kind == "collinear" or actual[4:] == [x.float() for x in oracle[4:]], "accuracies"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_pair_alone_has_neither_loss_nor_gradients(smoothing, tile):
    loss, *gradients, to_text, to_image = run(streamed, torch.float32, *pairs(1), 100.0, smoothing)
    assert to_text == to_image == 1
    assert loss.abs() <= smoothing * 1e-5 and all(x.abs().max() <= smoothing * 1e-4 for x in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["random", "collinear"])
def test_half_precision_features_have_float32_logits(dtype, kind, tile):
    inputs = *pairs(50, dtype=dtype, kind=kind), 100.0, 0.1

    def widened(image, text, *args):
        return dense(image.float(), text.float(), *args)

    actual, peer = (run(f, dtype, *inputs, dloss=2.0**14) for f in (streamed, widened))
    oracle = run(dense, torch.float64, *inputs, dloss=2.0**14)
    assert actual[0].dtype == torch.float32 and actual[2].dtype == actual[3].dtype == dtype
    for name, a, p, o in zip(("loss", "dscale", "dimage", "dtext"), actual, peer, oracle, strict=False):
        numerics.assert_as_exact_as(a, p, o, numerics.OUTPUTS if name == "loss" else numerics.GRADIENTS, name)


def test_float16_gradients_of_a_large_batch_do_not_vanish_before_the_loss_is_scaled():
    image, text = pairs(512, dtype=torch.float16, kind="separated")
    (small,) = torch.autograd.grad(streamed(image, text, 14.3)[0] * 2.0**16, image)
    exact = run(dense, torch.float64, image, text, 14.3, dloss=2.0**16)[2]
    torch.testing.assert_close(small.double(), exact, rtol=2**-10, atol=float(exact.abs().max()) * 2**-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_features_and_scale(smoothing, masked, monkeypatch):
    image, text = pairs(11, 5)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([i not in (0, 3, 4) for i in range(11)]) if masked else None
    for size in (4, 64):
        monkeypatch.setattr(reference, "TILE", size)
        assert torch.autograd.gradcheck(lambda *x: streamed(*x, smoothing, mask)[0], (image, text, scale))


def test_scale_gradient_is_that_of_either_tower(tile):
    image, text = pairs(40)
    scale = torch.tensor([30.0], dtype=torch.float64, requires_grad=True)
    dimage, dtext, dscale = torch.autograd.grad(streamed(image, text, scale, 0.1)[0], (image, text, scale))
    assert dscale.shape == (1,)
    torch.testing.assert_close(30.0 * dscale, (image * dimage).sum()[None], rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(30.0 * dscale, (text * dtext).sum()[None], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (2,), (0, 2), (1, 2)], ids=str)
def test_a_frozen_tower_or_scale_leaves_the_other_gradients_as_they_are(frozen, tile):
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    inputs = [*pairs(20), scale]
    every = torch.autograd.grad(streamed(*inputs)[0], inputs)
    some = [x.detach() if i in frozen else x for i, x in enumerate(inputs)]
    streamed(*some)[0].backward()
    for i, (x, expected) in enumerate(zip(inputs, every, strict=True)):
        assert (x.grad is None) if i in frozen else torch.allclose(x.grad, expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_masked_sample_is_as_if_it_were_not_in_the_batch(smoothing, tile):
    image, text = pairs(45)
    with torch.no_grad():
        image[5] = torch.nan  # whatever stands there
    mask = torch.rand(45, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[5] = False
    actual = run(streamed, torch.float64, image, text, 20.0, smoothing, mask)
    expected = run(streamed, torch.float64, image[mask], text[mask], 20.0, smoothing)
    for name, a, e in zip(("loss", "dscale", "dimage", "dtext", *["accuracy"] * 2), actual, expected, strict=True):
        if a.dim() == 2:
            assert not a[~mask].any(), name
            a = a[mask]
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-14, msg=name)
    assert torch.equal(streamed(image, text, 20.0, 0.0, mask)[0], streamed(image[mask], text[mask], 20.0)[0])


@pytest.mark.parametrize("b", [0, 30])
def test_without_a_sample_loss_and_gradients_are_zero(b, tile):
    image, text = pairs(30, dtype=torch.bfloat16)
    for x in run(streamed, torch.bfloat16, image[:b], text[:b], 20.0, 0.1, torch.zeros(b, dtype=torch.bool)):
        assert torch.equal(x, torch.zeros_like(x))
    assert all(x == 0 for x in streamed(image[:b].detach(), text[:b].detach(), 20.0, 0.1, torch.zeros(b) > 0))


def test_of_equal_logits_the_lowest_index_counts(tile):
    # Products of small integers are exact, so that equal logits are equal in every tile.
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        image, text = torch.randint(-1, 2, (2, 50, 3), generator=generator).float()
        for features in ((image, text), (image.clone().requires_grad_(), text)):
            assert streamed(*features, 1.0)[1:] == dense(image, text, 1.0)[1:]


def test_accuracies_take_no_gradient(tile):
    loss, *accuracies = streamed(*pairs(40), 20.0)
    assert loss.requires_grad and not any(a.requires_grad for a in accuracies)
    assert all(a.dtype == loss.dtype and a.shape == loss.shape == () for a in accuracies)


@pytest.mark.parametrize(("function", "b"), [("contrastive", 8192), ("contrastive", 1024), ("sigmoid", 8192)])
def test_nothing_larger_than_a_tile_or_the_features_is_ever_allocated(function, b, monkeypatch):
    largest, called = Largest(), []

    def watch(name):
        original = getattr(reference, name)

        def watched(*args):
            called.append(name)
            with largest:
                return original(*args)

        monkeypatch.setattr(reference, name, watched)

    for name in ("contrastive_forward", "contrastive_with_gradients", "sigmoid_with_gradients"):
        watch(name)
    image, text = (x.requires_grad_() for x in torch.randn(2, b, 16, dtype=torch.bfloat16) / 4)
    loss = streamed(image, text, 10.0, 0.1)[0] if function == "contrastive" else ek.sigmoid_loss(image, text, 10.0, 0.0)
    loss.backward()
    assert called and 0 < largest.elements <= max(reference.TILE**2, image.numel())


def masks(b):
    return None, torch.arange(b) % 3 > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_ops_pass_opcheck(dtype, masked, monkeypatch):
    image, text = pairs(9, 8, dtype=dtype, grad=False)
    scale, mask = torch.tensor([10.0]), masks(9)[masked]
    arguments = image, text, scale, 0.1, mask
    monkeypatch.setattr(reference, "TILE", 4)
    opcheck(OPS.contrastive_forward.default, (*arguments, *ALONE))
    for size, wants in itertools.product((4, 16), ((True, True), (True, False), (False, True))):
        monkeypatch.setattr(reference, "TILE", size)
        opcheck(OPS.contrastive_with_gradients.default, (*arguments, *ALONE, *wants))


@pytest.mark.parametrize(("backend", "size"), [("aot_eager", 4), ("aot_eager", 64), ("inductor", 4)])
def test_compiled_equals_eager_forward_and_backward(backend, size, monkeypatch):
    monkeypatch.setattr(reference, "TILE", size)
    torch._dynamo.reset()
    image, text = pairs(10)
    bias = scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(10) != 4

    def both(image, text, scale, bias):
        loss, to_text, _ = ek.contrastive_loss(image.sin(), text.sin(), scale.exp(), label_smoothing=0.1, row_mask=mask)
        return loss * 3 + ek.sigmoid_loss(image, text, scale.exp(), bias) + to_text

    inputs = image, text, scale, bias
    eager = torch.autograd.grad(both(*inputs), inputs)
    compiled = torch.compile(both, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*inputs), both(*inputs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), eager, rtol=1e-12, atol=1e-12)


def test_autocast_leaves_the_logits_in_float32(tile):
    image, text = pairs(40, dtype=torch.float32)
    plain = torch.autograd.grad(streamed(image, text, 50.0)[0], (image, text))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = streamed(image, text, 50.0)[0]
        cast = torch.autograd.grad(loss, (image, text))
    assert loss.dtype == torch.float32 and all(map(torch.equal, plain, cast))


def test_repeats_are_bitwise_equal(tile):
    inputs = *pairs(200, dtype=torch.bfloat16), torch.tensor(50.0, requires_grad=True)

    def once():
        loss, *accuracies = streamed(*inputs, 0.1)
        return loss, *accuracies, *torch.autograd.grad(loss, inputs)

    first = once()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, once(), strict=True))


def test_strided_features_and_mixed_dtypes_have_gradients_of_their_own_layout_and_dtype(tile):
    image, text = pairs(40, dtype=torch.float32, grad=False)
    image, text = image.t().contiguous().t().requires_grad_(), text.bfloat16().requires_grad_()
    dimage, dtext = torch.autograd.grad(streamed(image, text, 10.0)[0], (image, text))
    expected = run(dense, torch.float64, image, text, 10.0)
    assert dimage.is_contiguous() and dtext.dtype == torch.bfloat16
    torch.testing.assert_close(dimage.double(), expected[2], rtol=1e-4, atol=1e-7)


def test_second_derivative_raises(tile):
    image, text = pairs(40)
    (dimage,) = torch.autograd.grad(streamed(image, text, 10.0)[0].square(), image, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dimage.sum().backward()


X = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "sentence"),
    [
        ((X[0], X[0], 1.0), {}, ValueError, r"image_features has shape \(3,\), text_features \(3,\); both must be"),
        ((X, X[:2], 1.0), {}, ValueError, r"image_features has shape \(4, 3\), text_features \(2, 3\); both must be"),
        ((X.int(), X, 1.0), {}, TypeError, "image_features has dtype torch.int32; allowed"),
        ((X, X, 0.0), {}, ValueError, "logit_scale is 0.0; it must be positive"),
        ((X, X, float("inf")), {}, ValueError, "logit_scale is inf; it must be finite"),
        ((X, X, torch.ones(2)), {}, ValueError, r"logit_scale has shape \(2,\); it must be a float or have one"),
        ((X, X, torch.tensor(1)), {}, TypeError, "logit_scale has dtype torch.int64; allowed"),
        ((X, X, 1.0), {"label_smoothing": 1.0}, ValueError, "label_smoothing is 1.0; allowed is 0 <="),
        (
            (X, X, 1.0),
            {"row_mask": torch.ones(4)},
            TypeError,
            "row_mask has dtype torch.float32; it must be torch.bool",
        ),
        ((X, X, 1.0), {"row_mask": torch.ones(3) > 0}, ValueError, r"row_mask has shape \(3,\), expected \(4,\)"),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(arguments, options, error, sentence):
    with pytest.raises(error, match=sentence):
        ek.contrastive_loss(*arguments, **options)


def test_a_group_of_one_process_is_no_group():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        assert torch.equal(ek.contrastive_loss(X, X, 1.0, group=group)[0], ek.contrastive_loss(X, X, 1.0)[0])
        assert torch.equal(ek.sigmoid_loss(X, X, 1.0, 0.0, group=group), ek.sigmoid_loss(X, X, 1.0, 0.0))
    finally:
        torch.distributed.destroy_process_group()
