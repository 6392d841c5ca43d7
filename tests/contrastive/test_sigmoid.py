"""The sigmoid loss, streamed over tiles, against the dense formula."""

import numerics
import pytest
import torch
from contrastive.peers import agreeing_pairs as pairs
from contrastive.peers import dense_sigmoid as dense
from contrastive.peers import run_sigmoid as run
from torch.library import opcheck

import evakernels as ek
from evakernels.ops.contrastive import reference

OPS = torch.ops.evakernels
ALONE = "", None  # the group and the sizes of one process


@pytest.fixture(params=[20, 4096], ids=lambda t: f"tile{t}")
def tile(request, monkeypatch):
    monkeypatch.setattr(reference, "TILE", request.param)


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (117.3, -12.9), (1.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("b", [1, 33, 96])
def test_is_as_exact_as_the_dense_formula(b, dtype, scale, bias, tile):
    def widened(image, text, *scalars):
        return dense(image.float(), text.float(), *scalars)

    runs = []
    for seed in range(16):
        inputs = *pairs(b, dtype=dtype, seed=seed), scale, bias
        oracle = run(dense, torch.float64, *inputs)
        runs.append((run(ek.sigmoid_loss, dtype, *inputs), run(widened, dtype, *inputs), oracle))
    for i, name in enumerate(("loss", "dimage", "dtext", "dscale", "dbias")):
        columns = (torch.stack([x[i] for x in column]) for column in zip(*runs, strict=True))
        factor = numerics.OUTPUTS if name == "loss" else numerics.GRADIENTS
        numerics.assert_as_exact_as(*columns, factor, name)


def test_gradients_of_features_scale_and_bias(monkeypatch):
    scalars = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([3.0], -1.5)]
    for size in (4, 64):
        monkeypatch.setattr(reference, "TILE", size)
        assert torch.autograd.gradcheck(ek.sigmoid_loss, (*pairs(11, 5), *scalars))


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_alone_is_as_with_the_others(wanted, tile):
    inputs = [*pairs(30), *(torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (10.0, -5.0))]
    every = torch.autograd.grad(ek.sigmoid_loss(*inputs), inputs)
    some = [x if i == wanted else x.detach() for i, x in enumerate(inputs)]
    (alone,) = torch.autograd.grad(ek.sigmoid_loss(*some), some[wanted])
    torch.testing.assert_close(alone, every[wanted], rtol=1e-11, atol=1e-15)


def test_without_gradients_the_loss_is_the_same(tile):
    image, text = pairs(50, dtype=torch.bfloat16)
    with torch.no_grad():
        alone = ek.sigmoid_loss(image, text, 10.0, -10.0)
    assert torch.equal(alone, ek.sigmoid_loss(image, text, 10.0, -10.0).detach())


def test_an_empty_batch_has_no_loss(tile):
    image, text = (x[:0] for x in pairs(2))
    assert all(not x.any() for x in run(ek.sigmoid_loss, torch.float64, image, text, 10.0, -10.0))


def test_autocast_leaves_the_logits_in_float32_and_repeats_are_bitwise_equal(tile):
    inputs = *pairs(50, dtype=torch.float32), 10.0, -10.0
    plain = run(ek.sigmoid_loss, torch.float32, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, run(ek.sigmoid_loss, torch.float32, *inputs), plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [4, 16])
def test_ops_pass_opcheck(dtype, size, monkeypatch):
    monkeypatch.setattr(reference, "TILE", size)
    image, text = (x.detach() for x in pairs(9, 8, dtype))
    arguments = image, text, torch.tensor([10.0]), torch.tensor(-5.0)
    opcheck(OPS.sigmoid_forward.default, (*arguments, *ALONE))
    for wants in ((True, True), (True, False), (False, True)):
        opcheck(OPS.sigmoid_with_gradients.default, (*arguments, *ALONE, *wants))


@pytest.mark.parametrize(
    ("bias", "error", "sentence"),
    [
        (float("nan"), ValueError, "sigmoid_loss: logit_bias is nan; it must be finite"),
        (torch.zeros(3), ValueError, r"logit_bias has shape \(3,\); it must be a float or have one element"),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(bias, error, sentence):
    with pytest.raises(error, match=sentence):
        ek.sigmoid_loss(torch.ones(4, 3), torch.ones(4, 3), 1.0, bias)
