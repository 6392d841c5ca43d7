"""The LAMB step in CUDA.

Addresses, options and the order of work are written into a table in the device's memory at every step, by the arguments
of a kernel: nothing that a step needs outlives it, gradients may lie elsewhere each time, and a captured CUDA graph
keeps what it was given.
"""

import functools
import math
from array import array
from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from evakernels import native
from evakernels.ops.lamb.reference import ends

CHUNK = 4096  # elements that a block works on, or a multiple
MOST = 2048  # chunks of a trust ratio before they grow longer: each block reads the partial sums of its ratio
RULE = 10  # numbers of a LambRule
LOW_WORD = 0xFFFFFFFF
CORRECTIONS = ("none", "update", "step_size")  # LambCorrection


class Plan(NamedTuple):
    """The order of work; it depends on sizes alone."""

    pieces: array  # words of the LambPieces
    bounds: array  # of the batches, in chunks; first those without trust ratio
    tensors: int  # how many pieces there are
    plain: int  # how many of them, the first ones, have no trust ratio


def refuses(op: str, *args) -> str | None:
    params, grads, exp_avgs, exp_avg_sqs, masters, steps = args[:6]
    lrs, (grad_scale, found_inf) = args[7], args[-2:]
    device = exp_avgs[0].device
    if why := native.refusal("lamb", device.type):
        return why
    state = [*exp_avgs, *exp_avg_sqs, *masters, *steps]
    if wrong := _names({t.dtype for t in (*params, *grads)} - native.DTYPES.keys()):
        return f"it takes parameters and gradients in float32, bfloat16 and float16, not {wrong}"
    if wrong := _names({t.dtype for t in state} - {torch.float32}):
        return f"it takes moments, masters and steps in float32, not {wrong}"
    if not all([t.is_contiguous() for t in state]):
        return "it takes contiguous moments, masters and steps; call .contiguous() on them"
    scalars = [t for t in (grad_scale, found_inf, None if _on_host(lrs) else lrs) if t is not None]
    if wrong := _names({t.device for t in (*params, *grads, *state, *scalars)} - {device}):
        return f"all tensors must be on {device} (lrs may be on the CPU), but some are on {wrong}"
    return None


def lamb_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    sizes: list[int],
    lrs: Tensor,
    beta1s: list[float],
    beta2s: list[float],
    epss: list[float],
    weight_decays: list[float],
    lows: list[float],
    highs: list[float],
    adapts: list[bool],
    bias_correction: str,
    slices: int,
    max_grad_norm: float | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> tuple[Tensor, Tensor]:
    device = exp_avgs[0].device
    # A tensor with another layout than that of its moments is copied, and a parameter copied back.
    grads = [g.contiguous() for g in grads]
    targets = [p.contiguous() for p in params]
    numels = tuple([p.numel() for p in params])
    plan = _plan(numels, tuple(sizes), tuple(adapts), slices, _batch(device))

    # A LambTensor for each. By columns, because an optimizer waits for this loop.
    dtypes = [p.dtype for p in params]
    in_order = iter(masters)
    weights = [p if d == torch.float32 else next(in_order) for p, d in zip(targets, dtypes, strict=True)]
    rounded = [0 if d == torch.float32 else p.data_ptr() for p, d in zip(targets, dtypes, strict=True)]
    owners = chain.from_iterable([k] * size for k, size in enumerate(sizes))
    codes = [
        k | native.DTYPES[g.dtype] << 32 | native.DTYPES[d] << 48 for k, g, d in zip(owners, grads, dtypes, strict=True)
    ]
    pointers = [map(Tensor.data_ptr, tensors) for tensors in (weights, grads, exp_avgs, exp_avg_sqs, steps)]
    columns = zip(pointers[0], rounded, *pointers[1:], codes, strict=True)
    words = array("q", chain.from_iterable(columns))
    on_host = _on_host(lrs)
    rates = lrs.tolist() if on_host else [0.0] * len(sizes)
    options = zip(rates, beta1s, beta2s, epss, weight_decays, lows, highs, strict=True)
    words.frombytes(array("d", chain.from_iterable(options)).tobytes())
    words.extend(plan.pieces)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    total = new() if max_grad_norm is not None else new(0)
    table, partials = new(len(words), dtype=torch.int64), new(plan.bounds[-1], 2)
    native.call(
        "lamb_step",
        device,
        words.buffer_info()[0],
        len(params),
        len(sizes),
        plan.tensors,
        plan.bounds.buffer_info()[0],
        len(plan.bounds) - 1,
        CORRECTIONS.index(bias_correction),
        max_grad_norm or 0.0,
        None if on_host else lrs.double().contiguous(),
        None if grad_scale is None else grad_scale.float(),
        None if found_inf is None else found_inf.float(),
        total,
        table,
        new(len(params), RULE),
        partials,
        new(),
        touches=(*weights, *targets, *grads, *exp_avgs, *exp_avg_sqs, *steps),
    )
    for p, target in zip(params, targets, strict=True):
        if target is not p:
            p.copy_(target)
    return total, _ends(table, partials[plan.bounds[0] :], plan, len(params), len(sizes), found_inf)


def _ends(table: Tensor, partials: Tensor, plan: Plan, params: int, groups: int, found_inf: Tensor | None) -> Tensor:
    """The smallest and the largest trust ratio, formed as the kernel forms them; all that is read is in its table."""
    tensors, options, pieces = table.split((7 * params, 7 * groups, 5 * plan.tensors))
    tensors, options, pieces = tensors.view(-1, 7), options.view(-1, 7), pieces.view(-1, 5)[plan.plain :]
    first_chunk, begin, end = pieces[:, 0] & LOW_WORD, pieces[:, 3] >> 32, pieces[:, 4]
    counts = torch.where(first_chunk == begin, end - begin, 0)  # each ratio at its first piece
    squares = torch.segment_reduce(partials.double(), "sum", lengths=counts, unsafe=True, initial=0)
    owners = tensors[pieces[:, 0] >> 32, 6] & LOW_WORD
    lows, highs = options.view(torch.float64)[owners, 5:].unbind(1)
    ratios = torch.minimum(torch.maximum((squares[:, 0] / squares[:, 1]).sqrt(), lows), highs)
    return ends(ratios.where((squares > 0).all(1), math.nan), found_inf).float()


def _on_host(lrs: Tensor) -> bool:
    """Whether the learning rates go into the table; those on the device are read there."""
    return lrs.device.type == "cpu"


@functools.cache
def _batch(device: torch.device) -> int:
    """How many elements of p, m and v take half of the level 2 cache; the other half is for gradients and writes."""
    if device.type != "cuda":
        return 1 << 15  # emulated: several batches in a small test
    return torch.cuda.get_device_properties(device).L2_cache_size // 2 // (3 * 4)


@functools.lru_cache(maxsize=64)
def _plan(numels: tuple[int, ...], sizes: tuple[int, ...], adapts: tuple[bool, ...], slices: int, batch: int) -> Plan:
    """Cut tensors at the borders of slices, and each trust ratio into chunks; join ratios up to `batch` elements."""
    pieces = array("q")
    chunks = 0

    def add(ratio: list[tuple[int, int, int]]) -> int:
        """Append the pieces (tensor, first, size) of a ratio, and return how many elements it has."""
        nonlocal chunks
        elements = sum(size for *_, size in ratio)
        length = CHUNK * max(1, -(-elements // (CHUNK * MOST)))
        counts = [-(-size // length) for *_, size in ratio]
        begin, end = chunks, chunks + sum(counts)
        for (tensor, first, size), count in zip(ratio, counts, strict=True):
            pieces.extend((chunks | tensor << 32, first, size, length | begin << 32, end))
            chunks += count
        return elements

    groups, first = [], 0
    for size, adapted in zip(sizes, adapts, strict=True):
        tensors = [(i, 0, numels[i]) for i in range(first, first + size) if numels[i]]
        groups.append((adapted, [[t] for t in tensors] if not (slices and adapted) else _slices(tensors, slices)))
        first += size
    for ratio in chain.from_iterable(ratios for adapted, ratios in groups if not adapted):
        add(ratio)
    bounds, elements = array("i", [chunks]), 0
    plain = len(pieces) // 5
    for ratio in chain.from_iterable(ratios for adapted, ratios in groups if adapted):
        before, size = chunks, add(ratio)
        if elements and elements + size > batch:
            bounds.append(before)
            elements = 0
        elements += size
    if elements:
        bounds.append(chunks)
    return Plan(pieces, bounds, len(pieces) // 5, plain)


def _slices(tensors: list[tuple[int, int, int]], slices: int) -> list[list[tuple[int, int, int]]]:
    """Cut tensors, one after another, into slices of equal length; the last may be shorter, and empty ones drop out."""
    length = -(-sum(size for *_, size in tensors) // slices)
    cut: list[list[tuple[int, int, int]]] = []
    left = 0  # of the last slice
    for tensor, _, size in tensors:
        first = 0
        while first < size:
            if not left:
                cut.append([])
                left = length
            taken = min(left, size - first)
            cut[-1].append((tensor, first, taken))
            first += taken
            left -= taken
    return cut


def _names(things: Iterable) -> str:
    return " and ".join(sorted(str(thing).removeprefix("torch.") for thing in things))
