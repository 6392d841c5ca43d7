"""The LAMB step on DTensors, of which each rank has a part: three phases with a packed all-reduce after the first two.

    1  |p|^2 by trust ratio, |g|^2, found_inf: what this rank has of each
    2  g, m, v and u, which is kept; |u|^2 by trust ratio
    3  p = p - rate r u

A sum runs over the mesh dimensions that shard its tensors. Tensors of one trust ratio may be sharded differently, or
not at all: each ratio has a sum (a cell) for each set of process groups that its tensors are spread over. Every
process group takes its cells in one buffer. Formulas are those of `reference`, in `torch._foreach_*` on any device.
Nothing is read back to the host.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from evakernels.ops.checks import accumulator
from evakernels.ops.lamb import layout
from evakernels.ops.lamb.reference import ends


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
    """`torch.ops.evakernels.lamb_step` on tensors and DTensors; where nothing is divided, that op on their parts."""
    wholes = params
    params, grads, exp_avgs, exp_avg_sqs, masters = (
        [layout.local(t) for t in tensors] for tensors in (params, grads, exp_avgs, exp_avg_sqs, masters)
    )
    device = params[0].device
    places = tuple(map(layout.place_of, wholes, params))
    limited, scaled = max_grad_norm is not None, found_inf is not None
    plan = layout.plan(places, tuple(sizes), tuple(adapts), slices, limited, scaled, device, dist.get_rank())
    if not plan.groups:
        return torch.ops.evakernels.lamb_step.default(
            *(params, grads, exp_avgs, exp_avg_sqs, masters, steps, sizes, lrs, beta1s, beta2s, epss),
            *(weight_decays, lows, highs, adapts, bias_correction, slices, max_grad_norm, grad_scale, found_inf),
        )
    groups = [wholes[i].device_mesh.get_group(dim) for i, dim in plan.groups]  # type: ignore[attr-defined]
    in_order = iter(masters)
    weights = [p if accumulator(p.dtype) == p.dtype else next(in_order) for p in params]
    vector = functools.partial(_vector, device=device)
    owners = [k for k, size in enumerate(sizes) for _ in range(size)]

    # 1
    cells = plan.cells.numel()
    squares = [_added(_squares(_cut(weights, plan, plan.adapted), device)[plan.by_cell], plan.cells)]
    if limited:
        squares.append(_added(_squares(grads, device)[plan.by_set], plan.sets))
    if found_inf is not None:
        squares.append(found_inf.reshape(1).double())
    sums = _all_reduced(torch.cat(squares), groups, plan.first)
    weight_squares = _added(sums[:cells], plan.ratios)
    skip = None if found_inf is None else sums[-1] != 0
    factor = None if grad_scale is None else 1 / grad_scale.reshape(()).double()
    total = exp_avgs[0].new_empty(0)
    if max_grad_norm is not None:
        norm = sums[cells : cells + plan.sets.numel()].sum().sqrt()
        norm = norm if factor is None else norm * factor
        clip = torch.where(norm > max_grad_norm, max_grad_norm / norm, 1.0)
        factor = clip if factor is None else clip * factor
        total = norm.to(exp_avgs[0].dtype)

    # 2
    ts = torch.stack(steps).double() + 1
    c1, c2 = (1 - vector(tuple(betas))[plan.group_of_tensor] ** ts for betas in (beta1s, beta2s))
    stretch, shift = (c1 / c2.sqrt()).unbind(), (vector(tuple(epss))[plan.group_of_tensor] * c1).unbind()
    updates: list[Tensor] = [None] * len(params)  # type: ignore[list-item]
    for batch in plan.batches:
        m, v, p = ([tensors[i] for i in batch] for tensors in (exp_avgs, exp_avg_sqs, weights))
        g = [grads[i].to(weights[i].dtype) for i in batch]
        if factor is not None:
            wide = any(x.dtype == torch.float64 for x in g)
            g = torch._foreach_mul(g, factor if wide else factor.float())  # type: ignore[assignment]
        of = [owners[i] for i in batch]
        with _unless(skip, m), _unless(skip, v):
            torch._foreach_lerp_(m, g, [1 - beta1s[k] for k in of])
            torch._foreach_mul_(v, [beta2s[k] for k in of])
            torch._foreach_addcmul_(v, g, g, scalars=[1 - beta2s[k] for k in of])
            # m / c1 / (sqrt(v) / sqrt(c2) + eps) with the corrections taken into the denominator
            roots = torch._foreach_sqrt(v)
            if bias_correction == "update":
                torch._foreach_mul_(roots, [stretch[i] for i in batch])
                torch._foreach_add_(roots, [shift[i] for i in batch])
            else:
                torch._foreach_add_(roots, [epss[k] for k in of])
            us = torch._foreach_div(m, roots)
        torch._foreach_add_(us, torch._foreach_mul(p, [weight_decays[k] for k in of]))
        for i, u in zip(batch, us, strict=True):
            updates[i] = u
    update_squares = _added(_squares(_cut(updates, plan, plan.adapted), device)[plan.by_cell], plan.cells)
    update_squares = _added(_all_reduced(update_squares, groups, plan.second), plan.ratios)

    # 3
    low, high = (vector(tuple(bounds))[plan.group_of_ratio] for bounds in (lows, highs))
    ratios = (weight_squares / update_squares).sqrt().clamp(low, high)
    ratios = ratios.where((weight_squares > 0) & (update_squares > 0), math.nan)
    found = ends(ratios, skip).to(exp_avgs[0].dtype)
    ratios = ratios.where(~ratios.isnan(), 1.0)
    rates = lrs.to(device, non_blocking=True)[plan.group_of_tensor]
    if bias_correction == "step_size":
        rates = rates * c2.sqrt() / c1
    rates = rates[plan.tensor_of_piece] * torch.cat((ratios, ratios.new_ones(1)))[plan.ratio_of_piece]
    torch._foreach_mul_(_cut(updates, plan, range(len(updates))), list(rates.unbind()))
    if skip is not None:
        for u in updates:
            u.masked_fill_(skip, 0)  # p - 0 is p, bit for bit
    torch._foreach_sub_(weights, updates)
    counted = torch.ones_like(steps[0]) if skip is None else (~skip).to(steps[0].dtype)
    torch._foreach_add_(steps, [counted] * len(steps))
    if rounded := [i for i, p in enumerate(params) if weights[i] is not p]:  # of masters that a skip leaves: the same
        torch._foreach_copy_([params[i] for i in rounded], [weights[i] for i in rounded])
    return total, found


@functools.lru_cache(maxsize=64)
def _vector(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


def _cut(tensors: list[Tensor], plan: layout.Plan, which: Iterable[int]) -> list[Tensor]:
    """The pieces of some tensors, in order; flat."""
    cut: list[Tensor] = []
    for i in which:
        flat = tensors[i].reshape(-1)
        cut += [flat] if len(plan.pieces[i]) == 1 else flat.split_with_sizes(plan.pieces[i])
    return cut


def _squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of squares of each tensor that is not empty."""
    tensors = [t for t in tensors if t.numel()]
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(tensors, 2, torch.float64)).square()


def _added(values: Tensor, counts: Tensor) -> Tensor:
    """Sums over runs of values, of the lengths in `counts`; in one order, so that replicas agree bit for bit."""
    return torch.segment_reduce(values, "sum", lengths=counts, unsafe=True, initial=0)


def _all_reduced(values: Tensor, groups: list, where: list[Tensor]) -> Tensor:
    for group, which in zip(groups, where, strict=True):
        if which.numel():
            packed = values[which]
            dist.all_reduce(packed, group=group)
            values[which] = packed
    return values


@contextmanager
def _unless(skip: Tensor | None, tensors: list[Tensor]) -> Iterator[None]:
    """Undo what is written to the tensors where `skip` is true on the device."""
    before = [] if skip is None else [t.clone() for t in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=False):
        torch.where(skip, old, tensor, out=tensor)  # type: ignore[arg-type]
