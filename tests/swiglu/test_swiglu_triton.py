"""The Triton kernels of SwiGLU: as exact as PyTorch in any layout, the same bits at every run, inside their tensors."""

import guards
import pytest
import torch
from shapes import ROW_LENGTHS
from swiglu import peers
from swiglu.peers import BF16, FLOAT, HALF, OPS, check, check_packed

import evakernels as ek

jit = pytest.importorskip("evakernels.jit", reason="triton is not installed")


@pytest.fixture(autouse=True)
def outputs(monkeypatch):
    yield from guards.guarded(monkeypatch)


@pytest.mark.parametrize("norm", [0, 2])
@pytest.mark.parametrize("width", ROW_LENGTHS)
def test_is_as_exact_as_pytorch_at_every_row_length(width, norm, triton_kernels):
    check(triton_kernels, 3, width, BF16, norm)


@pytest.mark.parametrize("norm", [0, 1, 2])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_is_as_exact_as_pytorch_in_every_dtype(dtype, norm, triton_kernels):
    for width in (96, 170):
        check(triton_kernels, (3, 11), width, dtype, norm)
    check_packed(triton_kernels, (3, 11), 170, 176, dtype, norm)


@pytest.mark.parametrize("norm", [0, 2])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 256, 257, 1024, 1025, 4097, 8193, 16384])
def test_edges_of_tiles(width, norm, triton_kernels):
    check(triton_kernels, min(40, max(2, 8000 // width)), width, FLOAT, norm)


def test_weights_have_a_dtype_of_their_own(triton_kernels):
    peers.assert_weights_keep_their_dtypes(triton_kernels)


@pytest.mark.parametrize(
    ("width", "padded"), [(2730, 2736), (1, 8), (5, 24), (7, 7), (8, 8), (9, 13), (170, 171), (520, 776), (4090, 4104)]
)
def test_packed_and_padded(width, padded, triton_kernels):
    for norm in (0, 1, 2):
        check_packed(
            triton_kernels, min(40, max(2, 8000 // width)), width, padded, BF16 if width > 1000 else FLOAT, norm
        )


@pytest.mark.parametrize("rows", [1, 3, (3, 11)])
def test_any_number_of_rows(rows, triton_kernels):
    check(triton_kernels, rows, 262, BF16)
    check_packed(triton_kernels, rows, 203, 205, FLOAT)


@pytest.mark.parametrize(("rows", "width", "dtype"), [(5, 64, BF16), (9, 170, FLOAT), (2, 1100, HALF)], ids=str)
def test_every_layout_in_memory(rows, width, dtype, triton_kernels):
    peers.assert_every_layout_is_served(rows, width, dtype, triton_kernels)


def test_outputs_need_no_alignment(triton_kernels, outputs):
    outputs.guard = 3
    check(triton_kernels, 5, 64, BF16)
    check_packed(triton_kernels, 5, 60, 64, BF16)


def test_an_expanded_gradient_is_served(triton_kernels):
    peers.assert_an_expanded_gradient_is_served(triton_kernels)


def test_gate_and_up_may_differ_in_dtype(triton_kernels):
    """As the reference allows; the public function does not."""
    (gate, up, weight, bias), dy = peers.arguments(5, 40, BF16)
    gate, up, weight, bias, dy = (t.to(triton_kernels) for t in (gate, up.float(), weight, bias, dy))
    y, mean, rstd = OPS.swiglu(gate, up, weight, bias, 1e-6)
    gradients = OPS.swiglu_backward(dy, gate, up, weight, mean, rstd, True)
    alike = OPS.swiglu_backward(dy, gate, up.to(BF16), weight, mean, rstd, True)
    assert [t.dtype for t in (y, *gradients)] == [BF16, BF16, FLOAT, BF16, BF16]
    for mixed, plain in zip(gradients, alike, strict=True):
        assert torch.equal(mixed.to(BF16), plain)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_statistics_are_those_of_the_product(dtype, triton_kernels):
    peers.assert_statistics_are_those_of_the_product(dtype, triton_kernels)


@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_saturated_gates(dtype, triton_kernels):
    peers.assert_saturated_gates_are_exact(dtype, triton_kernels)


def test_one_row_of_nan_stays_alone(triton_kernels):
    peers.assert_one_row_of_nan_stays_alone(triton_kernels)


@pytest.mark.parametrize("width", [43, 262])
def test_repeats_bit_for_bit(width, triton_kernels):
    peers.assert_repeats(61, width, triton_kernels, runs=2)


@pytest.mark.parametrize("weights", [0, 2])
def test_ops_pass_opcheck(weights, triton_kernels, outputs):
    outputs.on = False
    peers.assert_ops_pass_opcheck(weights, triton_kernels)


def test_no_rows(triton_kernels):
    peers.assert_no_rows_are_served(triton_kernels)


def test_refusals_name_the_reason(triton_kernels):
    x = torch.randn(2, 8, device=triton_kernels)
    with pytest.raises(NotImplementedError, match=r"triton: its kernels take float32, bfloat16 and float16, not"):
        ek.swiglu(x.double(), x.double())
    long = torch.ones(1, 16392, device=triton_kernels, requires_grad=True)
    for call in (
        lambda: ek.swiglu_norm(long, long, long[0], None),
        lambda: ek.swiglu_norm_packed(long.repeat(1, 2), torch.ones_like(long[0, 8:]), None, width=16384),
    ):
        with pytest.raises(
            NotImplementedError, match=r"triton: its kernels take rows of up to 16384 elements, .* 16392"
        ):
            call()
    ek.swiglu(long, long).sum().backward()  # which sums up nothing over a row


def test_no_number_of_rows_recompiles(triton_kernels):
    """Nor another pitch of the same alignment."""

    def launches(rows, pitch):
        weight = torch.ones(40, device=triton_kernels)
        with jit.recorded() as record:
            gate, up, dy = (torch.zeros(rows, pitch, device=triton_kernels)[:, :40] for _ in range(3))
            mean = torch.zeros(rows, device=triton_kernels)
            OPS.swiglu(gate, up, weight, weight, 1e-6)
            OPS.swiglu_backward(dy, gate, up, weight, mean, mean, True)
        return [launch._replace(grid=None, arguments=()) for launch in record]

    assert launches(1, 40) == launches(50, 48) == launches(2000, 72) and len(launches(1, 40)) == 3
