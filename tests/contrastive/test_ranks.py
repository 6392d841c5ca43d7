"""The losses of a batch that many processes share: exact after averaging, whatever each of them has."""

import distributed
import pytest
import torch
import torch.nn.functional as F
from contrastive import workers

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
