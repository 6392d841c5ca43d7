"""The LAMB step on a CPU, from PyTorch's fused AdamW kernel.

That kernel computes p (1 - lr wd) - lr/c1 m / (sqrt(v)/sqrt(c2) + eps) in one pass that also updates m and v.
With a copy of p in the place of the parameter, lr = -1 and decay wd - 1 it leaves u = wd p + m/c1 / (..) there,
with no difference of nearly equal numbers; with t = infinity both corrections are 1. A group that is not
adapted (and so not decayed) takes the kernel's own step.

Tensors are cut into pieces that stay in the last-level cache from the copy to the norms. Where all of a ratio's
pieces fit into a scratch buffer, u waits there for its norm; larger ones compute u a second time, from m and v.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from evakernels.ops.checks import accumulator

PIECE = 1 << 19  # elements
SMALL = 1 << 15  # elements up to which pieces go together
KEPT = 1 << 22  # elements whose update is kept until its norm is known
ENDLESS = torch.tensor(math.inf)  # the step at which nothing is left to correct


class Piece(NamedTuple):
    """A part of one tensor, its weights flat; the places of tensor and trust ratio in the group."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    size: int
    tensor: int
    ratio: int
    shared: int  # how many elements share the ratio, at most


class Rule(NamedTuple):
    """A group's options, the number of its last step for each tensor, and the rate of learning that follows."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    low: float
    high: float
    factor: float  # of the gradients
    steps: list[Tensor]  # that the moments are corrected for
    ts: list[float]  # the same, or none
    rates: list[float]


def refuses(op: str, *args) -> str | None:
    """The scratch buffers have one dtype."""
    dtypes = {str(moment.dtype).removeprefix("torch.") for moment in args[2]}
    return f"it takes moments of one dtype, not {' and '.join(sorted(dtypes))}" if len(dtypes) > 1 else None


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
    like = exp_avgs[0]
    factor = 1.0 if grad_scale is None else 1 / grad_scale.item()
    grads = [g.contiguous() for g in grads]
    total, used = like.new_empty(0), []
    if max_grad_norm is not None:
        norm = _norm(grads) * factor
        factor *= max_grad_norm / norm if norm > max_grad_norm else 1.0
        total = like.new_tensor(norm)
    if found_inf is not None and found_inf.item() != 0:
        return total, like.new_zeros(2)

    torch._foreach_add_(steps, torch.ones(()))  # a number would be made a tensor once per step
    ts = torch.stack(steps).tolist()
    in_order = iter(masters)
    weights = [p.contiguous() if accumulator(p.dtype) == p.dtype else next(in_order) for p in params]
    scratch, scaled = like.new_empty(KEPT), like.new_empty(PIECE)
    first = 0
    for k, (size, lr) in enumerate(zip(sizes, lrs.tolist(), strict=True)):
        group = slice(first, first + size)
        first += size
        counted, numbers, rates = steps[group], ts[group], [lr] * size
        if bias_correction == "step_size":
            rates = [lr * math.sqrt(1 - beta2s[k] ** t) / (1 - beta1s[k] ** t) for t in numbers]
        if bias_correction != "update":
            counted, numbers = [ENDLESS] * size, [math.inf] * size
        rule = Rule(
            *(beta1s[k], beta2s[k], epss[k], weight_decays[k], lows[k], highs[k], factor),
            *(counted, numbers, rates),
        )
        tensors = list(zip(weights[group], grads[group], exp_avgs[group], exp_avg_sqs[group], strict=True))
        if adapts[k]:
            used += _adapted(_cut(tensors, slices), rule, scratch, scaled)
        else:
            _plain(_cut(tensors, 0), rule, scaled)
    changed = [i for i, p in enumerate(params) if weights[i] is not p]
    if changed:
        torch._foreach_copy_([params[i] for i in changed], [weights[i] for i in changed])
    return total, like.new_tensor([min(used), max(used)] if used else [0.0, 0.0])


def _norm(grads: list[Tensor]) -> float:
    flat = [grad.view(-1) for grad in grads if grad.numel() > SMALL]
    if small := [grad for grad in grads if grad.numel() <= SMALL]:
        flat.append(_flatten_dense_tensors(small))
    pieces = (piece for tensor in flat for piece in tensor.split(PIECE))
    wide = (piece.to(accumulator(piece.dtype)) for piece in pieces)
    return math.sqrt(sum([torch.dot(piece, piece).item() for piece in wide]))


def _cut(tensors: list[tuple[Tensor, Tensor, Tensor, Tensor]], slices: int) -> Iterator[Piece]:
    """Cut one group's tensors after PIECE elements and at the borders of slices."""
    numels = [weight.numel() for weight, *_ in tensors]
    length = -(-sum(numels) // slices) if slices else 0
    position = 0  # in the flattened group
    for i, (whole, numel) in enumerate(zip(tensors, numels, strict=True)):
        if not slices and 0 < numel <= PIECE:
            # The kernel does not ask for shapes, and a view costs a microsecond.
            weight, grad, exp_avg, exp_avg_sq = whole
            yield Piece(weight.view(-1), grad, exp_avg, exp_avg_sq, numel, i, i, numel)
            continue
        sizes, ratios, left = [], [], numel
        while left:
            ratio = position // length if slices else i
            size = min(left, PIECE, (ratio + 1) * length - position) if slices else min(left, PIECE)
            sizes.append(size)
            ratios.append(ratio)
            left -= size
            position += size
        cut = zip(*(torch.split_with_sizes(tensor.view(-1), sizes) for tensor in whole), strict=True)
        for (weight, grad, exp_avg, exp_avg_sq), size, ratio in zip(cut, sizes, ratios, strict=True):
            yield Piece(weight, grad, exp_avg, exp_avg_sq, size, i, ratio, length or numel)


def _runs(pieces: Iterable[Piece]) -> Iterator[tuple[list[Piece], int]]:
    """Pieces of whole ratios, small ones together and large ones alone; and how many elements they have."""
    run: list[Piece] = []
    elements = 0
    for piece in pieces:
        if run and piece.ratio != run[-1].ratio and elements + piece.shared > PIECE:
            yield run, elements
            run, elements = [], 0
        run.append(piece)
        elements += piece.size
    if run:
        yield run, elements


def _batches(pieces: Iterable[Piece], rule: Rule) -> Iterator[tuple[list[Piece], int]]:
    """Large pieces alone, consecutive small ones at the same step together; and how many elements they have."""
    batch: list[Piece] = []
    elements = 0
    for piece in pieces:
        if batch and (
            max(piece.size, batch[-1].size) > SMALL
            or elements + piece.size > PIECE
            or rule.ts[piece.tensor] != rule.ts[batch[-1].tensor]
        ):
            yield batch, elements
            batch, elements = [], 0
        batch.append(piece)
        elements += piece.size
    if batch:
        yield batch, elements


def _joins(batch: list[Piece]) -> bool:
    """Whether a batch is joined into one tensor: the kernel wakes all threads for each tensor it is given."""
    return len(batch) > 1 and torch.get_num_threads() > 1


def _plain(pieces: Iterable[Piece], rule: Rule, scaled: Tensor) -> None:
    """Step a group without trust ratios, whose decay is 0."""
    for batch, _ in _batches(pieces, rule):
        weights, rate = [piece.weight for piece in batch], rule.rates[batch[0].tensor]
        if _joins(batch):
            joined = torch.cat(weights)
            _adam([joined], batch, rule, rate, 0.0, scaled)
            torch._foreach_copy_(weights, torch.split_with_sizes(joined, [piece.size for piece in batch]))
        else:
            _adam(weights, batch, rule, rate, 0.0, scaled)


def _adapted(pieces: Iterable[Piece], rule: Rule, scratch: Tensor, scaled: Tensor) -> list[float]:
    """Step a group with trust ratios, and return them."""
    used: list[float] = []
    for run, elements in _runs(pieces):
        kept = elements <= KEPT
        squares: dict[int, list[float]] = {piece.ratio: [0.0, 0.0] for piece in run}
        waiting: list[Tensor] = []
        offset = 0
        for batch, size in _batches(run, rule):
            joined = scratch[offset : offset + size]
            us = torch.split_with_sizes(joined, [piece.size for piece in batch])
            torch._foreach_copy_(us, [piece.weight for piece in batch])
            _adam([joined] if _joins(batch) else us, batch, rule, -1.0, rule.weight_decay - 1, scaled)
            for piece, u in zip(batch, us, strict=True):
                square = squares[piece.ratio]
                square[0] += torch.dot(piece.weight, piece.weight).item()
                square[1] += torch.dot(u, u).item()
            if kept:
                waiting += us
                offset += size
        ratios = {ratio: _ratio(square[0], square[1], rule) for ratio, square in squares.items()}
        used += [ratios[ratio] for ratio, (weight, update) in squares.items() if weight > 0 and update > 0]
        for i, piece in enumerate(run):
            rate = rule.rates[piece.tensor] * ratios[piece.ratio]
            if kept:
                piece.weight.add_(waiting[i], alpha=-rate)
            else:
                _again(piece, rule, rate, scratch)
    return used


def _adam(targets, batch: list[Piece], rule: Rule, lr: float, decay: float, scaled: Tensor) -> None:
    """PyTorch's fused AdamW on a batch with `targets` as its parameters, one for each piece or one for all."""
    grads = [piece.grad for piece in batch]
    moments = [piece.exp_avg for piece in batch], [piece.exp_avg_sq for piece in batch]
    steps = [rule.steps[piece.tensor] for piece in batch]
    m, v = moments
    joined = len(targets) < len(batch)
    if joined:
        grads, m, v = ([_flatten_dense_tensors(tensors)] for tensors in (grads, m, v))
        steps = steps[:1]
    if rule.factor != 1 or any([grad.dtype != scaled.dtype for grad in grads]):
        grads = _scaled(grads, rule.factor, scaled)
    torch._fused_adamw_(
        *(targets, grads, m, v, [], steps),
        lr=lr,
        beta1=rule.beta1,
        beta2=rule.beta2,
        weight_decay=decay,
        eps=rule.eps,
        amsgrad=False,
        maximize=False,
    )
    if joined:
        for old, new in zip(moments, (m, v), strict=True):
            torch._foreach_copy_(old, _unflatten_dense_tensors(new[0], old))


def _scaled(grads: list[Tensor], factor: float, scratch: Tensor) -> list[Tensor]:
    """Gradients times a factor, flat, in the dtype of the scratch buffer."""
    sizes = [grad.numel() for grad in grads]
    flat, own = _flatten_dense_tensors(grads), scratch[: sum(sizes)]
    # A product is rounded to the dtype of its factors: narrow gradients are widened first.
    torch.mul(flat, factor, out=own) if flat.dtype == own.dtype else own.copy_(flat).mul_(factor)
    return list(torch.split_with_sizes(own, sizes))


def _again(piece: Piece, rule: Rule, rate: float, scratch: Tensor) -> None:
    """Compute the update from the moments once more, with the corrections taken out of the root, and subtract it."""
    t = rule.ts[piece.tensor]
    c1, root = 1 - rule.beta1**t, math.sqrt(1 - rule.beta2**t)
    denominator = torch.sqrt(piece.exp_avg_sq, out=scratch[: piece.size]).add_(rule.eps * root)
    if rule.weight_decay:
        piece.weight.mul_(1 - rate * rule.weight_decay)
    piece.weight.addcdiv_(piece.exp_avg, denominator, value=-rate * root / c1)


def _ratio(weight: float, update: float, rule: Rule) -> float:
    """The trust ratio from sums of squares."""
    if weight > 0 and update > 0:
        return min(max(math.sqrt(weight / update), rule.low), rule.high)
    return 1.0
