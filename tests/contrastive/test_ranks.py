"""The losses of a batch that many processes share: exact after averaging, whatever each of them has."""

import itertools

import distributed
import pytest
import torch
import torch.nn.functional as F
from contrastive import simulated, workers

from benchmarks.simulated import OneOfMany, one_of
from evakernels.ops.contrastive import ranks, reference, streamed
from evakernels.ops.contrastive.ranks import Grid

SIZES = {1: [7], 2: [6, 6], 3: [5, 9, 2], 4: [4, 0, 7, 3], 8: [3, 1, 0, 6, 2, 2, 5, 4]}


def whole(which, samples, dtype, mask=None, label_smoothing=0.0):
    """Loss, accuracies and gradients of the whole batch by the dense formula, in float64."""
    image, text = (x.to(dtype).double().requires_grad_() for x in workers.batch(samples))
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (20.0, -5.0))
    mask = torch.ones(samples, dtype=torch.bool) if mask is None else mask
    logits = scale * image[mask] @ text[mask].t()
    own = torch.arange(len(logits))
    if which == "sigmoid":
        labels = 2 * torch.eye(samples, dtype=torch.float64) - 1
        outputs = [-F.logsigmoid(labels * (logits + bias)).sum() / samples]
    else:
        both = (logits, logits.t())
        outputs = [sum(F.cross_entropy(x, own, label_smoothing=label_smoothing) for x in both) / 2]
        outputs += [(x.argmax(1) == own).double().mean() for x in both]
    inputs = [image, text, scale] + [bias] * (which == "sigmoid")
    return [x.detach() for x in outputs], list(torch.autograd.grad(outputs[0] * 3, inputs))


def assert_exact(results, expected, sizes, precision, frozen=()):
    outputs, gradients = expected
    world = len(sizes)
    for found, _ in results:  # the same values on every rank, bit for bit
        assert all(map(torch.equal, found, results[0][0]))
    for x, y in zip(results[0][0], outputs, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=precision, atol=precision)
    for i, expected_gradient in enumerate(gradients):
        parts = [gradients[i] for _, gradients in results]
        if i in frozen:
            assert parts == [None] * world
            continue
        if i < 2:  # each rank has `world` times its share of the gradient of the whole
            assert [len(part) for part in parts] == sizes
            mean = torch.cat([part.double() for part in parts]) / world
        else:
            mean = torch.stack([part.double() for part in parts]).mean(0)
        bound = precision * float(expected_gradient.abs().max())
        torch.testing.assert_close(mean, expected_gradient, rtol=precision, atol=bound, msg=f"gradient {i}")


@pytest.mark.parametrize("world", SIZES)
def test_the_average_over_ranks_is_the_gradient_of_the_whole_batch(world):
    sizes = SIZES[world]
    mask = torch.arange(sum(sizes)) % 3 > 0
    # Tiles of 2 make several chunks; `line` 1 makes a grid of two dimensions of 4 and of 8 processes.
    cases = [
        ("contrastive", torch.float64, {"tile": 1024, "known": False}),
        ("contrastive", torch.float64, {"tile": 2, "known": True, "label_smoothing": 0.1}),
        ("contrastive", torch.float64, {"tile": 2, "known": False, "label_smoothing": 0.1, "mask": mask}),
        ("contrastive", torch.float64, {"tile": 2, "known": True, "line": 1}),
        ("contrastive", torch.bfloat16, {"tile": 2, "known": True}),
        ("contrastive", torch.float64, {"tile": 2, "known": True, "frozen": (0,)}),
        ("contrastive", torch.float64, {"tile": 2, "known": True, "frozen": (1,)}),
        ("contrastive", torch.float64, {"tile": 2, "known": True, "frozen": (0, 1)}),
        ("contrastive", torch.float64, {"tile": 1024, "known": False, "mask": mask & False}),
        ("sigmoid", torch.float64, {"tile": 1024, "known": False}),
        ("sigmoid", torch.float64, {"tile": 2, "known": True}),
        ("sigmoid", torch.float64, {"tile": 2, "known": True, "line": 1}),
        ("sigmoid", torch.float16, {"tile": 2, "known": True, "frozen": (1,)}),
    ]
    results = distributed.run(
        workers.losses, world, sizes, [(which, dtype, options) for which, dtype, options in cases]
    )
    for i, (which, dtype, options) in enumerate(cases):
        formula = {k: v for k, v in options.items() if k in ("mask", "label_smoothing")}
        if "mask" in options and not options["mask"].any():
            assert all(not x.any() for outputs, gradients in (r[i] for r in results) for x in (*outputs, *gradients))
            continue
        expected = whole(which, sum(sizes), dtype, **formula)
        precision = 1e-11 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
        assert_exact([r[i] for r in results], expected, sizes, precision, options.get("frozen", ()))


@pytest.mark.parametrize("how", ["ddp", "fsdp2", "compiled", "two passes"])
def test_training_in_two_processes_has_the_gradients_of_the_whole_batch(how):
    sizes = [5, 3]
    expected = workers.whole_batch_gradients(sum(sizes))
    for gradients in distributed.run(workers.trained, 2, how, sizes):
        for actual, exact in zip(gradients, expected, strict=True):
            torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-13)


# The table of docs/contrastive.md: after DDP's averaging, the multiples of the exact gradient.
CONVENTIONS = [
    ("ours", {}, 1, 1),
    ("ClipLoss", {}, 1 / 4, 1),
    ("ClipLoss", {"gather_with_grad": True}, 1, 1),
    ("ClipLoss", {"local_loss": True}, None, 1),
    ("ClipLoss", {"local_loss": True, "gather_with_grad": True}, 1, 1),
    ("SigLipLoss", {"dist_impl": "bidir"}, 1, 1),
    ("SigLipLoss", {"dist_impl": "shift"}, 1, 1),
    ("SigLipLoss", {"dist_impl": "reduce"}, 1, 1),
    ("SigLipLoss", {"dist_impl": "gather"}, 1, 1),
    ("replaced ClipLoss", {}, 1 / 4, 1),
    ("replaced ClipLoss", {"gather_with_grad": True}, 1, 1),
    ("replaced ClipLoss", {"local_loss": True, "gather_with_grad": True}, 1, 1),
    ("replaced SigLipLoss", {}, 1, 1),
]


def test_the_table_of_conventions_is_true():
    cases = [(name, flags) for name, flags, _, _ in CONVENTIONS]
    for found in distributed.run(workers.factors, 4, [6] * 4, cases):
        for (name, flags, encoders, scale), numbers in zip(CONVENTIONS, found, strict=True):
            factor, residual, of_scale, of_value = numbers
            what = f"{name} {flags}: {factor:.4f}, {residual:.2e}, {of_scale:.4f}, {of_value:.4f}"
            assert (of_scale, of_value) == pytest.approx((scale, 1), rel=1e-6), what
            if encoders is None:  # no multiple: the wrong direction
                assert residual > 0.05, what
            else:
                assert factor == pytest.approx(encoders, rel=1e-6) and residual < 1e-6, what


@pytest.mark.parametrize(("size", "grid"), [(64, (64, 1)), (72, (9, 8)), (96, (12, 8)), (67, (67, 1))])
def test_more_ranks_than_64_form_a_grid_with_the_same_results(size, grid, monkeypatch):
    assert ranks.shape(size) == grid
    monkeypatch.setattr(reference, "TILE", 2)
    monkeypatch.setattr(streamed, "CHECK_SCALE", True)
    sizes = [(r * 5) % 4 for r in range(size)]  # unequal, some empty
    image, text = workers.batch(sum(sizes))
    scale, bias = torch.tensor(20.0, dtype=torch.float64), torch.tensor(-5.0, dtype=torch.float64)

    def rank(grid, r):
        mine = image.split(sizes)[r], text.split(sizes)[r], scale
        lay = streamed.laid_out(grid, sizes, sizes[r], image)
        contrastive = streamed.contrastive(reference, *mine, 0.1, lay, (True, True))
        return contrastive, streamed.sigmoid(reference, *mine, bias, lay, (True, True))

    results = simulated.run(size, rank)
    for i, (which, options, outputs) in enumerate((("contrastive", {"label_smoothing": 0.1}, 2), ("sigmoid", {}, 1))):
        found = [([r[i][0], *(r[i][1] if outputs == 2 else [])], [3 * x for x in r[i][outputs:]]) for r in results]
        assert_exact(found, whole(which, sum(sizes), torch.float64, **options), sizes, 1e-11)


class Traced(OneOfMany):
    """Writes down when a collective is issued and when it is waited for."""

    def __init__(self, events, *args):
        super().__init__(*args)
        self.events = events

    def traced(self, name, wait):
        self.events.append(f"issue {name}")
        return lambda: (self.events.append(f"wait {name}"), wait())

    def all_gather(self, out, x):
        name = "texts" if x.dim() == 2 and x.shape[1] > 1 else "other"
        return self.traced(name, super().all_gather(out, x))

    def reduce_scatter(self, out, x):
        return self.traced("gradients", super().reduce_scatter(out, x))


@pytest.mark.parametrize("which", ["contrastive", "sigmoid"])
def test_collectives_are_under_way_while_chunks_are_computed(which, monkeypatch):
    events = []
    monkeypatch.setattr(reference, "TILE", 2)
    for name in ("statistics", "contrastive_gradients", "sigmoid_gradients"):
        monkeypatch.setattr(reference, name, computed(getattr(reference, name), name, events))
    image, text = workers.batch(8)
    lay = streamed.laid_out(Grid(OneOfMany(3), OneOfMany(1), Traced(events, 3)), [8] * 3, 8, image)
    scalars = torch.tensor([20.0, -5.0], dtype=torch.float64)
    if which == "contrastive":
        streamed.contrastive(reference, image, text, scalars[0], 0.0, lay, (True, True))
    else:
        streamed.sigmoid(reference, image, text, *scalars, lay, (True, True))
    events = [e for e in events if "other" not in e]
    gathers, compute = ["issue texts", "wait texts"], "statistics" if which == "contrastive" else "sigmoid_gradients"
    forward = [*gathers[:1], *[*gathers, compute] * 3, gathers[1], compute]
    sends = ["issue gradients", *["G", "wait gradients", "issue gradients"] * 3, "wait gradients"]
    if which == "contrastive":
        assert events == [*forward, *(e.replace("G", "contrastive_gradients") for e in ["G", *sends])]
    else:
        assert [e for e in events if "gradients" not in e or e == compute] == forward
        assert [e for e in events if "texts" not in e] == [e.replace("G", compute) for e in ["G", *sends]]


def computed(function, name, events):
    def wrapped(*args):
        events.append(name)
        return function(*args)

    return wrapped


def peak(function):
    """The most bytes that tensors made inside hold at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(n for _, n in changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("b", "ranks", "width"), [(1024, 4, 64), (512, 16, 128), (2048, 1, 64)])
def test_peak_memory_is_that_of_the_formula(b, ranks, width, dtype, monkeypatch):
    """The formula of docs/contrastive.md."""
    monkeypatch.setattr(reference, "TILE", 256)
    monkeypatch.setattr(streamed, "ROWS", 256)
    image, text = torch.randn(2, b, width).to(dtype) / 8
    scalars = torch.tensor([10.0, -5.0])
    lay = streamed.laid_out(one_of(ranks), [b] * ranks, b, image)
    wants = True, True
    batch, chunk, tile, several = b * ranks, 256, 256, ranks > 1
    gradients = 2 * 4 * b * width + several * 2 * 4 * ranks * chunk * width
    tiles, widened = 4 * tile**2, 5 * 4 * tile * width
    statistics = 8 * 4 * (batch + b)
    texts, two_chunks = (several * dtype.itemsize * n * width for n in (batch, 2 * ranks * chunk))
    for bound, function in (
        (
            texts + gradients + 2 * tiles + widened + statistics,
            lambda: streamed.contrastive(reference, image, text, scalars[0], 0.0, lay, wants),
        ),
        (
            two_chunks + gradients + 3 * tiles + widened,
            lambda: streamed.sigmoid(reference, image, text, *scalars, lay, wants),
        ),
    ):
        assert 0.75 * bound <= peak(function) <= bound + 1024
