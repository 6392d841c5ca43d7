"""The CUDA kernels of token dropping against the reference, bit for bit."""

import math
from itertools import product

import pytest
import torch

import evakernels as ek
from evakernels import native
from evakernels.ops.tokens import reference

OPS = torch.ops.evakernels
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int64)
ID_TYPES = (torch.int16, torch.int32, torch.int64, torch.uint8, torch.int8)
FILL = 0xA5


@pytest.fixture(autouse=True)
def outputs(monkeypatch):
    """Outputs are allocated full of a pattern and between guards, which must outlive the test.

    `outputs.guard` is a guard's number of elements: with 1, an output is aligned to its element alone.
    """

    class Outputs:
        def __init__(self):
            self.guard, self.guarded = 64, []

        def new_empty(self, like, shape, dtype=None, device=None):
            dtype = like.dtype if dtype is None else dtype
            guard, size = self.guard * dtype.itemsize, math.prod(shape) * dtype.itemsize
            memory = torch.full((size + 2 * guard,), FILL, dtype=torch.uint8, device=device or like.device)
            self.guarded.append((memory, guard))
            return memory[guard : guard + size].view(dtype).view(shape)

    outputs = Outputs()
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda like, shape, **how: outputs.new_empty(like, shape, **how))
    yield outputs
    for memory, guard in outputs.guarded:
        assert (memory[:guard] == FILL).all() and (memory[-guard:] == FILL).all(), "written outside the output"


def numbers(shape, dtype, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100
    return x.to(torch.int64).to(dtype) if dtype in (torch.uint8, torch.int64) else x.to(dtype)


def some_ids(batch, patches, keep, dtype=torch.int64, seed=0):
    """Unique in each row, in any order."""
    noise = torch.rand(batch, patches, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(1)[:, :keep].to(dtype)


def assert_same(actual, expected):
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape) and actual.is_contiguous()
    assert torch.equal(actual.cpu(), expected)


def check_draw(device, batch, patches, keep, seed=0, offset=0):
    kept = ek.sample_kept_tokens(batch, patches, keep, seed=seed, offset=offset, device=device)
    expected = reference.sample_kept_tokens(CPU, batch, patches, keep, seed, torch.tensor([offset]))
    assert_same(kept, expected)


@pytest.mark.parametrize("patches", [1, 2, 3, 5, 31, 33, 49, 127, 128, 129, 196, 256, 576, 577, 1024, 1025, 4096, 4097])
def test_draws_the_ids_of_the_reference(kernels, patches):
    wide = [(0, 0), (1, 12345), (20260101, 2**32 - 2), (2**40 + 9, 2**33 + 7), (2**63 - 1, 2**63 - 4)]
    for i, keep in enumerate(sorted({1, (patches + 3) // 4, (patches + 1) // 2, max(1, patches - 1), patches})):
        seed, offset = wide[i]
        check_draw(kernels, 3, patches, keep, seed, offset)


@pytest.mark.parametrize("patches", [37, 64])
def test_every_count_is_drawn(kernels, patches):
    for keep in range(1, patches + 1):
        check_draw(kernels, 2, patches, keep, seed=keep, offset=7 * keep)


@pytest.mark.parametrize("keep", [1, 12345, 32766, 32767])
def test_the_most_patches_are_drawn(kernels, keep):
    check_draw(kernels, 2, 32767, keep, seed=3, offset=2**32 - 1)


# Samples of seed 0 in which two patches have the same key: the keep-th smallest, and the next. The ids tell them apart:
# by their low byte, by their high byte, and beyond the patches whose keys a thread holds.
TIES = [(196, 106, 86895, (90, 127)), (1024, 532, 1359, (327, 849)), (9000, 5030, 49, (5656, 8556))]


@pytest.mark.parametrize(("patches", "keep", "offset", "ids"), TIES)
def test_of_equal_keys_the_lower_id_is_kept(kernels, patches, keep, offset, ids):
    words = reference.philox(tuple(torch.tensor([[i // 4, 0, offset, 0] for i in ids]).T), (0, 0))
    keys = [int(words[i % 4][place]) for place, i in enumerate(ids)]
    assert keys[0] == keys[1]
    kept = ek.sample_kept_tokens(2, patches, keep, seed=0, offset=offset, device=kernels)[0].tolist()
    assert ids[0] in kept and ids[1] not in kept
    for count in (keep - 1, keep, keep + 1):
        check_draw(kernels, 2, patches, count, 0, offset)


def test_the_kernel_reads_an_offset_on_its_device(kernels):
    for value in (0, 2**32 - 2, 2**63 - 4):
        offset = torch.tensor([value], device=kernels)
        kept = offset.new_empty((3, 98), dtype=torch.int16)
        native.call("sample_kept_tokens", kept, kept, offset, 0, 5, 3, 196, 98)
        expected = reference.sample_kept_tokens(CPU, 3, 196, 98, 5, torch.tensor([value]))
        assert_same(kept, expected)
        assert_same(ek.sample_kept_tokens(3, 196, 98, seed=5, offset=offset), expected)
        assert_same(ek.sample_kept_tokens(3, 196, 98, seed=5, offset=torch.tensor(value), device=kernels), expected)


@pytest.mark.gpu
def test_a_replayed_graph_draws_new_ids():
    offset = torch.zeros(1, dtype=torch.int64, device="cuda")
    with ek.using("cuda"):
        ek.sample_kept_tokens(8, 196, 98, seed=1, offset=offset)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = ek.sample_kept_tokens(8, 196, 98, seed=1, offset=offset)
            offset += 8
    for step in range(3):
        graph.replay()
        assert_same(kept, reference.sample_kept_tokens(CPU, 8, 196, 98, 1, torch.tensor([8 * step])))


@pytest.mark.parametrize("offset", [-1, 2**63 - 2])
def test_an_offset_out_of_range_raises(kernels, offset):
    with pytest.raises(ValueError, match=rf"offset is {offset}; it must lie between 0 and 2\^63 - 1 - 2"):
        ek.sample_kept_tokens(2, 9, 4, seed=0, offset=torch.tensor([offset]), device=kernels)


def check_gather(device, x, kept, prefix):
    """Forward, and backward of the output. `x` and `kept` are on the CPU, and are moved with their strides."""
    tokens = x.shape[1]
    y = OPS.gather_tokens(moved(x, device), moved(kept, device), prefix)
    assert_same(y, reference.gather_tokens(x, kept, prefix))
    dx = OPS.gather_tokens_backward(y, moved(kept, device), prefix, tokens)
    assert_same(dx, reference.gather_tokens_backward(y.cpu(), kept, prefix, tokens))


def moved(x, device):
    """On the device, with the strides and the alignment of `x`."""
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return memory.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.parametrize("guard", [64, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 7, 8, 63, 64, 768])
def test_gather_moves_every_dtype_and_row_length(kernels, outputs, channels, dtype, guard):
    outputs.guard = guard
    for prefix, id_type in zip((0, 1, 2, 1, 2), ID_TYPES, strict=True):
        x = numbers((3, 14, channels), dtype, seed=prefix)
        for keep in (1, 6, 14 - prefix):
            check_gather(kernels, x, some_ids(3, 14 - prefix, keep, id_type, seed=keep), prefix)


@pytest.mark.parametrize(("tokens", "keep"), [(64, 32), (65, 33), (197, 98), (257, 256), (578, 100)])
def test_gather_moves_many_tokens(kernels, tokens, keep):
    for prefix in (0, 1):
        check_gather(kernels, numbers((2, tokens, 24), torch.bfloat16), some_ids(2, tokens - prefix, keep), prefix)
    check_gather(kernels, numbers((1, 2500, 2), torch.bfloat16), some_ids(1, 2499, 700, torch.int16), 1)


def test_gather_takes_any_strides(kernels):
    packed, kept = numbers((4, 3, 12, 40), torch.bfloat16), some_ids(3, 11, 5)
    for x in (
        packed[0, :, :, 8:32],  # aligned rows
        packed[1, :, :, 3:30],  # aligned to one element
        packed[:3, 0, :, 2:],  # aligned to four bytes
        numbers((12, 3, 40), torch.bfloat16).transpose(0, 1),
        packed[0, :1].expand(3, 12, 40),
        packed[0].transpose(1, 2).contiguous().transpose(1, 2),  # the last dimension has a stride
        packed[0, :, :, 5:6],
    ):
        check_gather(kernels, x, kept, 1)
        check_gather(kernels, x, kept.T.contiguous().T, 1)
        dy = moved(x[:, :6], kernels)
        dx = OPS.gather_tokens_backward(dy, moved(kept, kernels), 1, 12)
        assert_same(dx, reference.gather_tokens_backward(x[:, :6], kept, 1, 12))


WRONG = [[-1, 2, 100], [0, 127, -128], [3, -5, 9]]
NEAREST = [[0, 2, 9], [0, 9, 0], [3, 0, 9]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_ids_outside_the_image_are_clamped(kernels, dtype):
    wrong, nearest = torch.tensor(WRONG, dtype=dtype), torch.tensor(NEAREST)
    if dtype == torch.int64:
        wrong[0, 2], wrong[0, 0] = 2**40 + 3, -(2**62)
    if dtype == torch.int32:
        wrong[0, 2], wrong[0, 0] = 2**31 - 1, -(2**31)
    x, images = numbers((3, 12, 5), torch.float32), numbers((3, 2, 4, 15), torch.float32)
    y = OPS.gather_tokens(x.to(kernels), wrong.to(kernels), 2)
    assert_same(y, reference.gather_tokens(x, nearest, 2))
    rows = OPS.patchify(images.to(kernels), 2, 3, wrong.to(kernels))
    assert_same(rows, reference.patchify(images, 2, 3, nearest))
    # Of the places of an id the last counts.
    dx, dimages = torch.zeros(3, 12, 5), torch.zeros(3, 2, 4, 15)
    dx[:, :2] = y.cpu()[:, :2]
    for sample, place in product(range(3), range(3)):
        token = int(nearest[sample, place])
        dx[sample, 2 + token] = -y.cpu()[sample, 2 + place] * (1 + place)
        top, left = 2 * (token // 5), 3 * (token % 5)
        patch = -rows.cpu()[sample, place] * (1 + place)
        dimages[sample, :, top : top + 2, left : left + 3] = patch.view(2, 2, 3)
    dy = torch.cat([y[:, :2], *(-y[:, 2 + k : 3 + k] * (1 + k) for k in range(3))], 1)
    assert_same(OPS.gather_tokens_backward(dy, wrong.to(kernels), 2, 12), dx)
    drows = torch.cat([-rows[:, k : k + 1] * (1 + k) for k in range(3)], 1)
    assert_same(OPS.patchify_backward(drows, 2, 3, wrong.to(kernels), 4, 15), dimages)


def check_patchify(device, images, patch, kept):
    rows, columns = patch
    ids = kept if kept is None else moved(kept, device)
    y = OPS.patchify(moved(images, device), rows, columns, ids)
    assert_same(y, reference.patchify(images, rows, columns, kept))
    size = images.shape[2:]
    dimages = OPS.patchify_backward(y, rows, columns, ids, *size)
    assert_same(dimages, reference.patchify_backward(y.cpu(), rows, columns, kept, *size))


@pytest.mark.parametrize("guard", [64, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("patch", [(1, 1), (2, 2), (3, 5), (14, 14), (16, 16), (2, 150)], ids=str)
def test_patchify_cuts_every_dtype_and_patch(kernels, outputs, patch, dtype, guard):
    outputs.guard = guard
    for channels, id_type in zip((1, 2, 3), ID_TYPES, strict=False):
        images = numbers((2, channels, 2 * patch[0], 4 * patch[1]), dtype, seed=channels)
        for kept in (None, some_ids(2, 8, 1, id_type), some_ids(2, 8, 5, id_type), some_ids(2, 8, 8, torch.int8)):
            check_patchify(kernels, images, patch, kept)


@pytest.mark.parametrize("width", [256, 257, 600])
def test_patchify_cuts_wide_images(kernels, width):
    images = numbers((2, 2, 3, 2 * width), torch.bfloat16)
    for kept in (None, some_ids(2, 3 * width, width, torch.int32)):
        check_patchify(kernels, images, (1, 2), kept)


def test_patchify_takes_any_strides(kernels):
    larger, kept = numbers((3, 4, 40, 50), torch.float32), some_ids(3, 12, 5)
    for images in (
        larger[:, :3, 2:30, 4:46],
        larger[:, 1:, :28, 3:45],
        larger[:, ::2, :28, :42],
        larger[:1, :, :28, :42].expand(3, 4, 28, 42),
        larger[:, :, :28, :42].contiguous(memory_format=torch.channels_last),
    ):
        for ids in (None, kept, kept.T.contiguous().T):
            check_patchify(kernels, images, (14, 7), ids)
    for dy in (numbers((3, 12, 40), torch.bfloat16)[:, :5, 3:27], numbers((24, 5, 3), torch.bfloat16).permute(2, 1, 0)):
        dimages = OPS.patchify_backward(moved(dy, kernels), 3, 4, moved(kept, kernels), 9, 16)
        assert_same(dimages, reference.patchify_backward(dy, 3, 4, kept, 9, 16))


def test_nothing_to_do_is_done(kernels):
    empty = torch.empty(2, 0, dtype=torch.int16)
    check_draw(kernels, 0, 9, 4)
    for x, kept, prefix in (
        (numbers((0, 9, 8), torch.float32), torch.empty(0, 3, dtype=torch.int64), 1),
        (numbers((2, 9, 0), torch.float32), some_ids(2, 8, 3), 1),
        (numbers((2, 9, 8), torch.float32), empty, 1),
        (numbers((2, 9, 8), torch.float32), empty, 0),
        (numbers((2, 3, 8), torch.float32), empty, 3),
        (numbers((2, 0, 8), torch.float32), empty, 0),
    ):
        check_gather(kernels, x, kept, prefix)
    check_patchify(kernels, numbers((2, 3, 4, 6), torch.float32), (2, 3), empty)
    for shape in ((0, 3, 4, 6), (2, 0, 4, 6), (2, 3, 0, 6), (2, 3, 4, 0)):
        y = OPS.patchify(numbers(shape, torch.float32).to(kernels), 2, 3, None)
        assert y.numel() == 0 and OPS.patchify_backward(y, 2, 3, None, *shape[2:]).shape[2:] == shape[2:]


def test_gradients_flow_through_the_kernels(kernels):
    images = numbers((2, 3, 28, 42), torch.float32).to(kernels).requires_grad_()
    kept = ek.sample_kept_tokens(2, 6, 3, seed=1, device=kernels)
    rows = ek.gather_tokens(ek.patchify(images, 14, kept), torch.tensor([[1], [0]], device=kernels), prefix_tokens=1)
    (gradient,) = torch.autograd.grad(rows.square().sum() / 2, images)
    mask = torch.zeros(2, 6)
    for sample, extra in enumerate((1, 0)):
        mask[sample, kept[sample, [0, 1 + extra]].long().cpu()] = 1
    pixels = mask.view(2, 1, 2, 3).repeat_interleave(14, 2).repeat_interleave(14, 3)
    assert torch.equal(gradient.cpu(), images.detach().cpu() * pixels)


def test_repeats_are_bitwise_equal_in_any_order_of_threads(kernels, monkeypatch):
    x, images = numbers((2, 66, 24), torch.bfloat16), numbers((2, 3, 8, 12), torch.float32)
    twice = torch.tensor([[3, 1, 3, 3], [0, 5, 5, 0]], dtype=torch.int32)

    def once():
        kept = [ek.sample_kept_tokens(2, n, n // 2, seed=4, device=kernels) for n in (65, 577, 4500)]
        y = OPS.gather_tokens(x.to(kernels), kept[0], 1)
        rows = OPS.patchify(images.to(kernels), 4, 4, twice.to(kernels))
        return (
            *kept,
            y,
            OPS.gather_tokens_backward(y, kept[0], 1, 66),
            OPS.gather_tokens_backward(y[:, :5], twice.to(kernels), 1, 66),
            rows,
            OPS.patchify_backward(rows, 4, 4, twice.to(kernels), 8, 12),
        )

    monkeypatch.setenv("EMU_SEED", "0")
    first = once()
    for seed in ("0", "1", "2", "3"):
        monkeypatch.setenv("EMU_SEED", seed)
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))
