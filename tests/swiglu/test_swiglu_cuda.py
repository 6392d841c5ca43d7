"""The compiled SwiGLU kernels: as exact as PyTorch in any layout, the same bits at every run, inside their tensors."""

import guards
import pytest
import torch
from shapes import ROW_LENGTHS
from swiglu import peers
from swiglu.peers import BF16, FLOAT, HALF, OPS, check, check_packed, enough

import evakernels as ek
from evakernels import native


@pytest.fixture(autouse=True)
def outputs(monkeypatch):
    yield from guards.guarded(monkeypatch)


@pytest.mark.parametrize("norm", [0, 2])
@pytest.mark.parametrize("width", ROW_LENGTHS)
def test_is_as_exact_as_pytorch_at_every_row_length(width, norm, kernels):
    if norm and width > (native.shared_memory(kernels) - 1024) // 8:
        pytest.skip("the column sums of so long a row do not fit this GPU's shared memory")
    for rows in (1, 3):
        check(kernels, rows, width, BF16, norm)


@pytest.mark.parametrize("norm", [0, 1, 2])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_is_as_exact_as_pytorch_in_every_dtype(dtype, norm, kernels):
    for width in (96, 170, 1009, 5126):
        check(kernels, (3, 41 if width < 1000 else 5), width, dtype, norm)
    check_packed(kernels, (3, 41), 170, 176, dtype, norm)


@pytest.mark.parametrize("norm", [0, 2])
@pytest.mark.parametrize("width", [1, 7, 8, 9, 255, 256, 257, 264, 5112, 5113, 5114, 5120, 5121])
def test_edges_of_windows_warps_and_plans(width, norm, kernels):
    check(kernels, enough(width), width, FLOAT, norm)


def test_weights_have_a_dtype_of_their_own(kernels):
    peers.assert_weights_keep_their_dtypes(kernels)


@pytest.mark.parametrize(
    ("width", "padded"), [(2730, 2736), (1, 8), (5, 24), (7, 7), (8, 8), (9, 13), (170, 171), (520, 776), (5114, 5128)]
)
def test_packed_and_padded(width, padded, kernels):
    for norm in (0, 1, 2):
        check_packed(kernels, enough(width), width, padded, BF16 if width > 1000 else FLOAT, norm)


@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, BF16), (3, BF16), (33, BF16), (33, FLOAT), ((3, 71), BF16), ((3, 71), FLOAT)], ids=str
)
def test_any_number_of_rows(rows, dtype, kernels):
    check(kernels, rows, 262, dtype)
    check_packed(kernels, rows, 262, 264, dtype)
    check_packed(kernels, rows, 203, 205, dtype)


@pytest.mark.parametrize("guard", [64, 3])
@pytest.mark.parametrize(
    ("rows", "width", "dtype"), [(5, 64, BF16), (33, 170, FLOAT), (33, 256, FLOAT), (5, 5122, HALF)], ids=str
)
def test_every_layout_in_memory(rows, width, dtype, guard, kernels, outputs):
    outputs.guard = guard
    peers.assert_every_layout_is_served(rows, width, dtype, kernels)


def test_an_expanded_gradient_is_served(kernels):
    peers.assert_an_expanded_gradient_is_served(kernels)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_statistics_are_those_of_the_product(dtype, kernels):
    peers.assert_statistics_are_those_of_the_product(dtype, kernels)


@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_saturated_gates(dtype, kernels):
    peers.assert_saturated_gates_are_exact(dtype, kernels)


def test_one_row_of_nan_stays_alone(kernels):
    peers.assert_one_row_of_nan_stays_alone(kernels)


@pytest.mark.parametrize("width", [43, 262, 5122])
def test_repeats_bit_for_bit_in_every_thread_order(width, kernels, monkeypatch):
    peers.assert_repeats(
        7 if width > 5000 else 213, width, kernels, lambda run: monkeypatch.setenv("EMU_SEED", str(run))
    )


@pytest.mark.parametrize("weights", [0, 1, 2])
def test_ops_pass_opcheck(weights, kernels, outputs):
    outputs.on = False
    peers.assert_ops_pass_opcheck(weights, kernels)


def test_no_rows(kernels):
    peers.assert_no_rows_are_served(kernels)


def test_refusals_name_the_reason(kernels):
    x = torch.randn(2, 8, device=kernels)
    with pytest.raises(NotImplementedError, match=r"cuda: its kernels take float32, bfloat16 and float16, not"):
        ek.swiglu(x.double(), x.double())
    with pytest.raises(NotImplementedError, match=r"cuda: its kernels take gate and up of one dtype, not"):
        OPS.swiglu(x, x.bfloat16(), None, None, 1e-6)
    long = torch.ones(1, 40000, device=kernels, requires_grad=True)
    y = ek.swiglu_norm(long, long, long[0], None)
    with pytest.raises(NotImplementedError, match=r"cuda: its backward kernels take rows of up to \d+ elements"):
        y.sum().backward()
    ek.swiglu(long, long).sum().backward()
