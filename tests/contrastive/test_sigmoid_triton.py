"""The sigmoid loss by Triton's kernels, against the dense formula."""

import numerics
import pytest
import torch
from contrastive.peers import agreeing_pairs, dense_sigmoid, run_sigmoid, sigmoid_in_half_precision
from torch.library import opcheck

import evakernels as ek

triton = pytest.importorskip("evakernels.ops.contrastive.triton", reason="triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, in the interpreter

OPS = torch.ops.evakernels
ALONE = "", None
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on(device):
    """The loss on a device, of inputs on the CPU and with its result there."""
    return lambda *inputs: ek.sigmoid_loss(*(x.to(device) for x in inputs)).cpu()


def assert_as_exact(device, dtype, inputs):
    peer = dense_sigmoid if dtype == torch.float32 else sigmoid_in_half_precision
    runs = []
    for one in inputs:
        actual, theirs = (run_sigmoid(f, dtype, *one) for f in (on(device), peer))
        runs.append((actual, theirs, run_sigmoid(dense_sigmoid, torch.float64, *one)))
        assert actual[0].dtype == torch.float32 and actual[1].dtype == actual[2].dtype == dtype
    for i, name in enumerate(("loss", "dimage", "dtext", "dscale", "dbias")):
        columns = (torch.stack([x[i] for x in column]) for column in zip(*runs, strict=True))
        factor = numerics.OUTPUTS if name == "loss" else numerics.GRADIENTS
        numerics.assert_as_exact_as(*columns, factor, name)


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (117.3, -12.9), (1.0, 0.0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", [1, 33, 50])
def test_is_as_exact_as_the_dense_formula(b, dtype, scale, bias, device):
    seeds = range(8 if dtype == torch.float32 else 4)
    assert_as_exact(device, dtype, [(*agreeing_pairs(b, dtype=dtype, seed=s), scale, bias) for s in seeds])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [61, 96])
def test_is_as_exact_over_many_tiles_and_chunks(dtype, width, device, small_tiles):
    assert_as_exact(device, dtype, [(*agreeing_pairs(90, width, dtype=dtype), 10.0, -5.0)])


def test_a_small_loss_keeps_its_digits(device):
    """Far from every decision each pair adds only exp(-20) or less to the loss, which 1 + exp(-20) would not show."""
    for dtype in DTYPES:
        image = text = torch.eye(16, dtype=dtype)
        loss = on(device)(image, text, torch.tensor(40.0), torch.tensor(-20.0))
        exact = dense_sigmoid(image.double(), text.double(), 40.0, -20.0)
        assert abs(loss.double() - exact) <= 1e-6 * exact


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_alone_is_as_with_the_others(wanted, device, small_tiles):
    inputs = [*agreeing_pairs(45, dtype=torch.bfloat16)]
    inputs += [torch.tensor(x, requires_grad=True) for x in (10.0, -5.0)]
    every = torch.autograd.grad(on(device)(*inputs), inputs)
    some = [x if i == wanted else x.detach() for i, x in enumerate(inputs)]
    (alone,) = torch.autograd.grad(on(device)(*some), some[wanted])
    assert torch.equal(alone, every[wanted])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_gradients_the_loss_is_the_same(dtype, device, tile):
    inputs = *agreeing_pairs(50, dtype=dtype), torch.tensor(10.0), torch.tensor(-10.0)
    with torch.no_grad():
        alone = on(device)(*inputs)
    assert torch.equal(alone, on(device)(*inputs).detach())


def test_an_empty_batch_has_no_loss(device):
    image, text = (x[:0] for x in agreeing_pairs(2, dtype=torch.float16))
    assert all(not x.any() for x in run_sigmoid(on(device), torch.float16, image, text, 10.0, -10.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_are_bitwise_equal_wherever_memory_was(dtype, device, tile, guarded):
    """Between canaries nothing is read that is not there, nor written; what nobody has written yet is NaN too."""
    inputs = *agreeing_pairs(50, 20, dtype=dtype), 10.0, -5.0
    plain = run_sigmoid(on(device), dtype, *inputs)
    guarded(True)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        between_canaries = run_sigmoid(on(device), dtype, *inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, plain, between_canaries))
    assert all(map(torch.equal, plain, run_sigmoid(on(device), dtype, *inputs)))


def test_ops_pass_opcheck(device):
    image, text = (x.detach().to(device) for x in agreeing_pairs(9, 12, torch.float32))
    arguments = image, text, torch.tensor([10.0], device=device), torch.tensor(-5.0, device=device)
    opcheck(OPS.sigmoid_forward.default, (*arguments, *ALONE))
    for wants in ((True, True), (True, False)):
        opcheck(OPS.sigmoid_with_gradients.default, (*arguments, *ALONE, *wants))


def test_float64_is_refused_in_words(triton_kernels):
    with pytest.raises(NotImplementedError, match=r"kernels take float32, .* not torch.float64"):
        ek.sigmoid_loss(*(x.to(triton_kernels) for x in agreeing_pairs(3)), 1.0, 0.0)
