"""The contrastive loss by Triton's kernels, against the dense formula."""

import itertools

import numerics
import pytest
import shapes
import torch
from contrastive.peers import Largest, dense, in_half_precision, pairs, run
from torch.library import opcheck

import evakernels as ek
from evakernels.ops.contrastive import reference, streamed
from evakernels.ops.contrastive.streamed import Segment, Side

triton = pytest.importorskip("evakernels.ops.contrastive.triton", reason="triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, in the interpreter

OPS = torch.ops.evakernels
ALONE = "", None
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = "loss", "dscale", "dimage", "dtext"


def on(device):
    """The loss on a device, of inputs on the CPU and with results there."""

    def loss(image, text, scale, smoothing=0.0, mask=None):
        found = ek.contrastive_loss(
            *(x.to(device) for x in (image, text, scale)),
            label_smoothing=smoothing,
            row_mask=None if mask is None else mask.to(device),
        )
        return tuple(x.cpu() for x in found)

    return loss


def peer(dtype):
    return dense if dtype == torch.float32 else in_half_precision


def assert_as_exact(device, dtype, inputs):
    """One loss alone may be right by luck: `inputs` are several, and their results are judged together."""
    runs = []
    for one in inputs:
        actual, theirs = (run(f, dtype, *one, dloss=2.0**14) for f in (on(device), peer(dtype)))
        runs.append((actual, theirs, run(dense, torch.float64, *one, dloss=2.0**14)))
        assert actual[0].dtype == torch.float32 and actual[2].dtype == actual[3].dtype == dtype
    for i, name in enumerate(NAMES):
        columns = (torch.stack([x[i] for x in column]) for column in zip(*runs, strict=True))
        factor = numerics.OUTPUTS if name == "loss" else numerics.GRADIENTS
        numerics.assert_as_exact_as(*columns, factor, name)


@pytest.mark.parametrize("kind", ["random", "collinear", "separated"])
@pytest.mark.parametrize(("scale", "smoothing"), [(14.3, 0.1), (100.0, 0.0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_exact_as_cross_entropy(dtype, scale, smoothing, kind, device):
    seeds = 8 if dtype == torch.float32 else 3
    assert_as_exact(
        device, dtype, [(*pairs(50, dtype=dtype, seed=s, kind=kind), scale, smoothing) for s in range(seeds)]
    )


@pytest.mark.parametrize("kind", ["random", "collinear", "separated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_exact_over_many_tiles_and_chunks(dtype, kind, device, small_tiles):
    seeds = range(8 if dtype == torch.float32 else 1)  # a loss is one number: it is right by luck
    assert_as_exact(device, dtype, [(*pairs(45, dtype=dtype, seed=s, kind=kind), 30.0, 0.1) for s in seeds])


@pytest.mark.parametrize("kind", ["collinear", "separated"])
def test_what_rounding_costs_is_no_more_than_that_of_the_result(kind, device):
    """The gradients in bfloat16 are as near as those of float32 logits and weights, which are rounded at the end."""
    for dtype in (torch.bfloat16, torch.float16):
        inputs = *pairs(60, 32, dtype=dtype, kind=kind), 20.0, 0.1

        def widened(image, text, *args):
            return dense(image.float(), text.float(), *args)

        actual, theirs = (run(f, dtype, *inputs, dloss=2.0**10) for f in (on(device), widened))
        oracle = run(dense, torch.float64, *inputs, dloss=2.0**10)
        for i in (2, 3):
            numerics.assert_as_exact_as(actual[i], theirs[i], oracle[i], 1.5, NAMES[i])


@pytest.mark.parametrize("b", shapes.TOKENS)
def test_every_batch_size(b, device):
    inputs = *pairs(b, dtype=torch.bfloat16, kind="separated"), 10.0
    oracle = run(dense, torch.float64, *inputs)
    if b > 200:  # the loss alone
        loss, *accuracies = on(device)(*(x.detach() for x in inputs[:2]), torch.tensor(10.0))
        actual = [loss, None, None, None, *accuracies]
    else:
        actual = run(on(device), torch.bfloat16, *inputs)
    theirs = run(in_half_precision, torch.bfloat16, *inputs)
    assert actual[4:] == [x.float() for x in oracle[4:]]
    for name, *found in zip(NAMES, actual, theirs, oracle, strict=False):
        if found[0] is not None:
            numerics.assert_as_exact_as(*found, numerics.OUTPUTS if name == "loss" else numerics.GRADIENTS, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 20, 61, 64, 96, 640])
def test_every_width(width, dtype, device, small_tiles):
    seeds = range(8 if dtype == torch.float32 else 1)
    assert_as_exact(device, dtype, [(*pairs(34, width, dtype=dtype, seed=s), 10.0) for s in seeds])


def test_of_equal_logits_the_lowest_index_counts(device, tile):
    # Products of small integers are exact, so that equal logits are equal in every tile.
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        image, text = torch.randint(-1, 2, (2, 90, 3), generator=generator).to(dtype)
        assert on(device)(image, text, torch.tensor(1.0))[1:] == dense(image.float(), text.float(), 1.0)[1:]


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (2,)], ids=str)
def test_a_frozen_tower_or_scale_leaves_the_other_gradients_as_they_are(frozen, device, small_tiles):
    inputs = [*pairs(45, dtype=torch.bfloat16), torch.tensor(20.0, requires_grad=True)]
    every = torch.autograd.grad(on(device)(*inputs, 0.1)[0], inputs)
    some = [x.detach() if i in frozen else x for i, x in enumerate(inputs)]
    found = torch.autograd.grad(on(device)(*some, 0.1)[0], [x for x in some if x.requires_grad])
    for x, expected in zip(found, (g for i, g in enumerate(every) if i not in frozen), strict=True):
        assert torch.equal(x, expected) if x.dim() else (x - expected).abs() < 1e-3 * expected.abs()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_masked_sample_is_as_if_it_were_not_in_the_batch(smoothing, device, tile):
    image, text = pairs(45, dtype=torch.float16)
    with torch.no_grad():
        image[5] = torch.nan  # whatever stands there
    mask = torch.rand(45, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[5] = False
    actual = run(on(device), torch.float16, image, text, 20.0, smoothing, mask)
    expected = run(on(device), torch.float16, image[mask], text[mask], 20.0, smoothing)
    for a, e in zip(actual, expected, strict=True):
        assert a.dim() < 2 or not a[~mask].any()
        assert torch.equal(a[mask] if a.dim() == 2 else a, e)


@pytest.mark.parametrize("b", [0, 30])
def test_without_a_sample_loss_and_gradients_are_zero(b, device):
    image, text = pairs(30, dtype=torch.bfloat16)
    for x in run(on(device), torch.bfloat16, image[:b], text[:b], 20.0, 0.1, torch.zeros(b, dtype=torch.bool)):
        assert torch.equal(x, torch.zeros_like(x))


def test_one_pair_alone_has_neither_loss_nor_gradients(device):
    for dtype in DTYPES:
        loss, *gradients, to_text, to_image = run(on(device), dtype, *pairs(1, dtype=dtype), 100.0)
        assert to_text == to_image == 1
        assert loss == 0 and not any(x.any() for x in gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_are_bitwise_equal_wherever_memory_was(dtype, device, tile, guarded):
    """Between canaries nothing is read that is not there, nor written; what nobody has written yet is NaN too."""
    inputs = *pairs(50, 20, dtype=dtype), 50.0, 0.1
    plain = run(on(device), dtype, *inputs)
    guarded(True)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        between_canaries = run(on(device), dtype, *inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, plain, between_canaries))
    assert all(map(torch.equal, plain, run(on(device), dtype, *inputs)))


@pytest.mark.parametrize(
    ("image_dtype", "text_dtype"), [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)]
)
def test_strided_features_of_two_dtypes_have_gradients_of_their_own(image_dtype, text_dtype, device):
    image, text = pairs(40, dtype=torch.float32, grad=False)
    image = image.t().contiguous().t().to(image_dtype).requires_grad_()
    text = text.repeat(1, 2)[:, :24].to(text_dtype).requires_grad_()
    dimage, dtext = torch.autograd.grad(on(device)(image, text, torch.tensor(10.0))[0], (image, text))
    expected = run(dense, torch.float64, image, text, 10.0)
    assert dimage.is_contiguous() and (dimage.dtype, dtext.dtype) == (image_dtype, text_dtype)
    for actual, exact in ((dimage, expected[2]), (dtext, expected[3])):
        half = actual.dtype != torch.float32
        torch.testing.assert_close(actual.double(), exact, rtol=1e-2 if half else 1e-4, atol=1e-4 if half else 1e-7)


def test_ops_pass_opcheck(device):
    image, text = (x.to(device) for x in pairs(9, 12, dtype=torch.bfloat16, grad=False))
    mask = torch.arange(9, device=device) % 3 > 0
    arguments = image, text, torch.tensor([10.0], device=device), 0.1, mask
    opcheck(OPS.contrastive_forward.default, (*arguments, *ALONE))
    opcheck(OPS.contrastive_with_gradients.default, (*arguments, *ALONE, False, True))


def test_float64_is_refused_in_words(triton_kernels):
    with pytest.raises(NotImplementedError, match=r"kernels take float32, .* not torch.float64"):
        ek.contrastive_loss(*(x.to(triton_kernels) for x in pairs(3)), 1.0)


# Samples that are rows and columns: of several ranks, of equal shares and of unequal ones.
SIDES = {
    "one rank": ([(0, 70)], [(0, 70)]),
    "a chunk that has no own pair": ([(0, 40)], [(100, 30)]),
    "own pairs in the middle": ([(40, 40)], [(0, 20), (40, 20), (80, 20), (120, 20)]),
    "a grid": ([(0, 20), (20, 20)], [(20, 20), (60, 20), (100, 20)]),
    "unequal shares": ([(33, 19), (52, 31)], [(0, 7), (41, 9), (60, 0), (83, 30)]),
}


def sides(kind, dtype, device):
    generator = torch.Generator().manual_seed(3)
    batch = torch.randint(-2, 3, (2, 200, 16), generator=generator).to(dtype) / 8  # whose products are exact
    batch[1, ::3] = batch[1, 1]  # texts that occur often: equal logits
    image, text = batch.to(device)
    positive = 9.0 * (image.double() * text.double()).sum(1)
    found = []
    for features, segments in zip((image, text), SIDES[kind], strict=True):
        begins = itertools.accumulate((n for _, n in segments), initial=0)
        named = tuple(Segment(begin, n, first) for begin, (first, n) in zip(begins, segments, strict=False))
        parts = [torch.cat([x[first : first + n] for first, n in segments]) for x in (features, positive)]
        found.append(Side(parts[0], named, parts[1].float()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", SIDES)
def test_tiles_of_several_ranks_are_those_of_the_formula(kind, dtype, device, tile):
    rows, columns = sides(kind, dtype, device)
    scale, bias = torch.tensor([9.0, -3.0], device=device)
    image, text = rows.features.double(), columns.features.double()
    logits, (i, j) = 9.0 * image @ text.t(), (side.places().long() for side in (rows, columns))
    own = i[:, None] == j
    found = triton.statistics(rows, columns, scale)
    for dim, side, actual in ((1, rows, found[0]), (0, columns, found[1])):
        positive, place, other = (
            side.positive.unsqueeze(dim),
            (i, j)[1 - dim].unsqueeze(dim),
            (i, j)[dim].unsqueeze(1 - dim),
        )
        beaten = ~own & ((logits > positive) | ((logits == positive) & (other < place)))
        maximum = logits.amax(dim)
        assert torch.equal(actual.maximum.double(), maximum)
        torch.testing.assert_close(
            actual.total.double(), (logits - maximum.unsqueeze(dim)).exp().sum(dim), rtol=1e-6, atol=0
        )
        assert torch.equal(actual.beaten > 0, beaten.any(dim))

    # Statistics over more than this block of S.
    rows, columns = (
        side._replace(maximum=x.maximum + 1, total=x.total * 3) for side, x in zip((rows, columns), found, strict=True)
    )
    by_row, by_column = (
        (logits - x.maximum.double().unsqueeze(dim)).exp() / x.total.double().unsqueeze(dim)
        for dim, x in ((1, rows), (0, columns))
    )
    rows = rows._replace(middle=torch.tensor(2.0, device=device))
    z = logits - 3.0
    losses = torch.nn.functional.softplus(torch.where(own, -z, z), threshold=100).sum()
    close = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-5}
    for sigmoid, w in ((False, by_row + by_column - 0.2 / 200 - 1.8 * own), (True, z.sigmoid() - own.double())):
        gradients = [torch.ones(side.features.shape, device=device) for side in (rows, columns)]
        if not sigmoid:
            product = triton.contrastive_gradients(rows, columns, scale, 0.1, 200, 0.5, *gradients)
            torch.testing.assert_close(product, 0.5 * (w * (logits - 2.0)).sum(), rtol=1e-5, atol=1e-5)
        else:
            sums = triton.sigmoid_gradients(rows, columns, scale, bias, 0.5, *gradients)
            torch.testing.assert_close(sums, torch.stack((losses, w.sum())), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients[0].double(), 1 + 0.5 * w @ text, **close)
        torch.testing.assert_close(gradients[1].double(), 1 + 0.5 * w.t() @ image, **close)


def test_places_are_those_of_the_segments():
    for _, columns in (sides(kind, torch.float32, torch.device("cpu")) for kind in SIDES):
        expected = [s.first + k for s in columns.segments for k in range(s.length)]
        places = columns.places()
        assert places.dtype == torch.int32 and places.tolist() == expected


def test_a_rank_without_images_sees_nothing(device):
    rows, columns = sides("one rank", torch.float32, device)
    rows = Side(rows.features[:0], (Segment(0, 0, 0),), rows.positive[:0])
    of_rows, of_columns = triton.statistics(rows, columns, torch.tensor(9.0, device=device))
    assert not len(of_rows.maximum)
    assert (of_columns.maximum == -torch.inf).all() and not of_columns.total.any() and not of_columns.beaten.any()


def test_weights_and_chunks_stay_within_their_bytes():
    features = torch.empty(1, dtype=torch.bfloat16)
    assert triton.chunk(1, features) == triton.COLUMNS
    for ranks in (3, 64, 100):
        assert triton.chunk(ranks, features) % 128 == 0 and triton.chunk(ranks, features) * ranks <= triton.COLUMNS
    for itemsize, capability in itertools.product((2, 4), ((8, 0), (9, 0))):
        tile = triton.config(itemsize, capability)
        for rows, columns in ((1, 1), (100, 77), (32768, 16384), (11000, 16384), (4096, 16384)):
            height, pitch = triton.weights_at_a_time(rows, columns, itemsize, tile)
            assert height == rows or height % tile.rows == 0
            assert pitch >= columns and pitch % 64 == 0
            assert height * pitch * itemsize <= triton.BYTES


@pytest.mark.parametrize("loss", ["contrastive", "sigmoid"])
def test_nothing_larger_than_the_weights_and_the_features_is_ever_allocated(loss, monkeypatch):
    """W is of the stated bytes; statistics of tiles are one part in 128 of the logits of a chunk."""
    monkeypatch.setattr(triton, "BYTES", 1 << 20)
    monkeypatch.setattr(triton, "COLUMNS", 1024)
    monkeypatch.setattr(triton, "_add_product", lambda out, a, b, alpha: None)  # on a CPU it widens
    b, largest = 8192, Largest()
    image, text = torch.zeros(2, b, 16, dtype=torch.bfloat16)
    scalars = torch.ones(2)
    with triton.jit.recorded(), largest:
        if loss == "contrastive":
            triton.contrastive_with_gradients(image, text, scalars[0], 0.1, None, *ALONE, True, True)
        else:
            triton.sigmoid_with_gradients(image, text, *scalars, *ALONE, True, True)
    statistics = 3 * b * triton.COLUMNS // 128
    assert 0 < largest.elements <= max(image.numel(), triton.BYTES // 2, statistics)


@pytest.mark.gpu
def test_the_host_never_waits():
    image, text = (x.cuda() for x in pairs(600, dtype=torch.bfloat16))
    scale, bias = (torch.tensor(x, device="cuda", requires_grad=True) for x in (10.0, -5.0))
    with ek.using("triton"):
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            try:
                loss = ek.contrastive_loss(image, text, scale, label_smoothing=0.1)[0]
                (loss + ek.sigmoid_loss(image, text, scale, bias)).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("ranks", [4, 6])
def test_one_of_many_ranks_is_as_the_reference(ranks, device, tile):
    from benchmarks.simulated import one_of

    image, text = (x.to(device) for x in pairs(40, 16, dtype=torch.float32, grad=False))
    scale, bias = torch.tensor([20.0, -5.0], device=device)
    found = []
    for tiles in (triton, reference):
        lay = streamed.laid_out(one_of(ranks), [40] * ranks, 40, image)
        found.append([*streamed.contrastive(tiles, image, text, scale, 0.1, lay, (True, True))])
        lay = streamed.laid_out(one_of(ranks), [40] * ranks, 40, image)
        found[-1] += streamed.sigmoid(tiles, image, text, scale, bias, lay, (True, True))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
