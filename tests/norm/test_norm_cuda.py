"""The compiled norm kernels: as exact as PyTorch, the same bits at every run, and inside their tensors."""

import pytest
import torch
from norm import peers
from norm.peers import FUNCTIONS, MIXED, PAIRS, arguments, assert_exact
from shapes import ROW_LENGTHS

import evakernels as ek


@pytest.mark.parametrize("width", ROW_LENGTHS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_as_exact_as_pytorch_at_every_row_length(name, width, kernels):
    assert_exact(name, arguments((3, 2, width), torch.bfloat16, torch.bfloat16, kernels, scales=False))


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize(("wide", "narrow"), [*PAIRS, *MIXED], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_as_exact_as_pytorch_in_every_dtype(name, wide, narrow, scales, kernels):
    for width in (9, 96, 770, 5126):
        assert_exact(name, arguments((3, 11, width), wide, narrow, kernels, scales))


@pytest.mark.parametrize("width", [1, 7, 8, 255, 256, 257, 1009, 5112, 5113, 5120, 5121])
@pytest.mark.parametrize("name", ["layer_norm", "add_norm"])
def test_edges_of_windows_warps_and_plans(name, width, kernels):
    assert_exact(name, arguments((3, 5, width), torch.float32, torch.float32, kernels, scales=True))


def test_weights_have_a_dtype_of_their_own(kernels):
    peers.assert_weights_keep_their_dtypes(kernels)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_many_rows_repeat_bit_for_bit_in_every_thread_order(name, kernels, monkeypatch):
    a = arguments((3, 71, 262), torch.float32, torch.bfloat16, kernels, scales=True)
    peers.assert_repeats(name, a, lambda run: monkeypatch.setenv("EMU_SEED", str(run)))
    assert_exact(name, a)


def test_strided_and_unaligned_inputs_are_copied(kernels):
    peers.assert_any_strides_are_served(kernels)


def test_neighbours_in_memory_are_untouched(kernels):
    """Rows of 9 elements share their windows: what one row stores must not reach into the next."""
    for rows in (1, 2, 3, 300):
        x = torch.randn(rows, 9, device=kernels)
        whole = ek.layer_norm(x, torch.ones(9, device=kernels))
        alone = torch.stack([ek.layer_norm(row[None], torch.ones(9, device=kernels))[0] for row in x])
        torch.testing.assert_close(whole, alone, rtol=1e-6, atol=1e-6)


def test_no_rows(kernels):
    peers.assert_no_rows_are_served(kernels)


def test_refusals_name_the_reason(kernels):
    x = torch.randn(2, 8, device=kernels)
    with pytest.raises(NotImplementedError, match=r"cuda: its kernels take float32, .* not torch\.float64"):
        ek.layer_norm(x.double(), x[0].double())
    with pytest.raises(NotImplementedError, match=r"cuda: its kernels compute torch\.float32 beside"):
        ek.norm_add(x.bfloat16(), x, x[0], eps=1e-6)
    with (
        torch.autocast(kernels.type, torch.bfloat16),
        pytest.raises(NotImplementedError, match=r"cuda: its kernels do not round a branch of torch\.float32"),
    ):
        ek.add_norm(x, x, x[0], eps=1e-6)
    long = torch.randn(1, 60000, device=kernels, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"cuda: its backward kernels take rows of up to \d+ elements"):
        ek.layer_norm(long, long[0].detach()).sum().backward()
