"""The Triton kernels of the norms: as exact as PyTorch, the same bits at every run, and inside their tensors."""

import math

import guards
import numerics
import pytest
import torch
import torch.nn.functional as F
from norm import peers
from norm.peers import FUNCTIONS, MIXED, PAIRS, arguments, assert_exact, results
from norm.test_norm import pass_opcheck
from shapes import ROW_LENGTHS

import evakernels as ek

rows = pytest.importorskip("evakernels.ops.rows", reason="triton is not installed")
jit = pytest.importorskip("evakernels.jit")

OPS = torch.ops.evakernels
FLOAT, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def outputs(monkeypatch):
    yield from guards.guarded(monkeypatch)


@pytest.mark.parametrize("width", ROW_LENGTHS)
def test_is_as_exact_as_pytorch_at_every_row_length(width, triton_kernels):
    assert_exact("layer_norm", arguments((3, 1, width), BF16, BF16, triton_kernels, scales=False))


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize(("wide", "narrow"), [*PAIRS, *MIXED], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_as_exact_as_pytorch_in_every_dtype(name, wide, narrow, scales, triton_kernels):
    assert_exact(name, arguments((3, 11, 96), wide, narrow, triton_kernels, scales))


def test_a_branch_may_be_wider_than_the_residual(triton_kernels):
    assert_exact("norm_add", arguments((3, 11, 96), BF16, FLOAT, triton_kernels, scales=True))


@pytest.mark.parametrize(
    ("name", "width", "scales"),
    [
        ("norm_add", 4097, False),  # the weight is not kept
        ("add_norm", 4097, True),  # the row is cut in two
        ("norm_add_rms", 5120, True),
        ("norm_add", 9001, True),  # in three
        ("add_norm", 9001, False),
        ("rms_norm", 16384, False),
    ],
)
def test_long_rows(name, width, scales, triton_kernels):
    assert_exact(name, arguments((3, 1, width), FLOAT, FLOAT, triton_kernels, scales))


@pytest.mark.parametrize("width", [1, 15, 16, 17, 512, 513, 1024, 1025])
def test_edges_of_tiles(width, triton_kernels):
    for name in ("layer_norm", "add_norm"):
        assert_exact(name, arguments((3, 5, width), FLOAT, FLOAT, triton_kernels, scales=True))


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_row_scales_go_by_samples_in_tiles_of_many(samples, triton_kernels):
    for name in ("add_norm", "norm_add"):
        assert_exact(name, arguments((samples, 23, 24), FLOAT, FLOAT, triton_kernels, scales=True))


def test_weights_have_a_dtype_of_their_own(triton_kernels):
    peers.assert_weights_keep_their_dtypes(triton_kernels)


@pytest.mark.parametrize("name", ["add_norm", "norm_add"])
def test_many_rows_repeat_bit_for_bit(name, triton_kernels):
    a = arguments((3, 19, 262), FLOAT, BF16, triton_kernels, scales=True)
    peers.assert_repeats(name, a, runs=2)
    assert_exact(name, a)


def test_statistics_are_those_of_what_is_normalised(triton_kernels):
    """With an eps that counts; add_norm normalises its sum as it is stored."""
    a = arguments((2, 3, 170), BF16, BF16, triton_kernels, scales=False, weights=FLOAT)
    residual, branch, weight, bias = (a[name].detach() for name in ("residual", "branch", "weight", "bias"))
    total, y, mean, rstd = OPS.add_norm(residual, branch, weight, bias, 0.1, False, None, None, FLOAT)
    var, expected = torch.var_mean(total.double(), -1, correction=0)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (var + 0.1).rsqrt(), rtol=1e-6, atol=0)
    peer, oracle = (F.layer_norm(total.to(d), (170,), weight.to(d), bias.to(d), 0.1) for d in (FLOAT, torch.float64))
    numerics.assert_as_exact_as(y, peer, oracle, numerics.OUTPUTS, "y")
    _, mean, rstd = OPS.norm(total, weight, None, 0.1, True, FLOAT)
    expected = (total.double().square().mean(-1) + 0.1).rsqrt()
    torch.testing.assert_close(rstd.double(), expected, rtol=1e-6, atol=0)
    assert mean.shape == (0,)


def test_any_strides_are_served(triton_kernels):
    peers.assert_any_strides_are_served(triton_kernels)


def test_a_branch_is_added_unrounded(triton_kernels):
    """A float32 branch does not take autocast's dtype before it is added; the compiled kernels refuse it."""
    x, branch = torch.ones(1, 8, device=triton_kernels), torch.full((1, 8), 2**-9, device=triton_kernels)
    weight = torch.ones(8, device=triton_kernels)
    with torch.autocast(triton_kernels.type, BF16):
        total, y = ek.add_norm(x, branch, weight, eps=1e-6)
    assert (total == 1 + 2**-9).all() and y.dtype == BF16


def test_one_row_of_nan_stays_alone(triton_kernels):
    """Narrow rows share a tile."""
    a = arguments((3, 5, 20), FLOAT, FLOAT, triton_kernels, scales=False)
    clean = results(FUNCTIONS["add_norm"], a)
    with torch.no_grad():
        a["branch"][1, 2, 3] = math.nan
    (total, y), gradients = results(FUNCTIONS["add_norm"], a)
    assert y[1, 2].isnan().all()
    for dirty, plain in zip((total, y, *gradients[:2]), (*clean[0], *clean[1][:2]), strict=True):
        others = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14]
        assert torch.equal(dirty.reshape(15, 20)[others], plain.reshape(15, 20)[others])


@pytest.mark.parametrize(("rms", "layer_scale"), [(False, True), (True, False)])
def test_ops_pass_opcheck(rms, layer_scale, triton_kernels, outputs):
    if triton_kernels.type != "cpu":
        pytest.skip("these tensors are on the CPU")
    outputs.on = False
    pass_opcheck(rms, layer_scale, FLOAT)


def test_no_rows(triton_kernels):
    peers.assert_no_rows_are_served(triton_kernels)


def test_refusals_name_the_reason(triton_kernels):
    x = torch.randn(2, 8, device=triton_kernels)
    with pytest.raises(NotImplementedError, match=r"triton: its kernels take float32, .* not torch\.float64"):
        ek.layer_norm(x.double(), x[0].double())
    long = torch.randn(1, 16385, device=triton_kernels)
    with pytest.raises(
        NotImplementedError, match=r"triton: its kernels take rows of up to 16384 elements, .* not 16385"
    ):
        ek.layer_norm(long, long[0])


def launches(call):
    with jit.recorded() as record, ek.using("triton"):
        call()
    return [launch._replace(grid=None, arguments=()) for launch in record]


def test_no_number_of_rows_recompiles(triton_kernels):
    def step(batch, tokens):
        a = arguments((batch, tokens, 96), FLOAT, BF16, triton_kernels, scales=False)
        a["layer_scale"], a["row_scale"] = a["weight"], torch.ones(batch, device=triton_kernels)
        return launches(lambda: results(FUNCTIONS["add_norm"], a))

    assert step(1, 7) == step(3, 50) == step(200, 1) and len(step(1, 7)) == 3


@pytest.mark.parametrize("width", [1, 9, 64, 768, 1009, 1024, 1408, 1792, 2730, 4096, 5120, 8193, 16384])
def test_tiles_cover_every_row_within_registers(width):
    for count in (1, 63, 5000):
        tile = rows.forward_tiles(count, width)
        assert tile.columns >= width and tile.grid[0] * tile.rows >= count and tile.grid[1] == 1
        assert tile.rows * tile.columns <= 16 * 32 * tile.warps and tile.warps <= 32
        tile = rows.backward_tiles(count, width, 8192, 4, 108, 163 << 10)
        assert tile.grid[1] * tile.columns >= width and tile.rows * tile.columns <= 16 * 32 * tile.warps
        assert tile.warps <= 16 and 1 <= tile.grid[0] <= -(-count // tile.rows)


@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("column_bytes", [4, 12, 20])
def test_programs_of_a_multiprocessor_share_its_memory(column_bytes, shared):
    for width in (64, 1024, 2048, 4096, 8192):
        tile = rows.backward_tiles(1 << 20, width, 8192, column_bytes, 108, shared)
        together = tile.grid[0] // 108
        assert together * tile.warps == 16
        assert (
            together * ((tile.stages - 1) * column_bytes + 4) * tile.rows * tile.columns <= shared or tile.stages == 1
        )
    assert [rows.backward_tiles(9, 8192, 8192, b, 108, 99 << 10).stages for b in (4, 20)] == [3, 1]
