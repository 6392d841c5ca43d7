"""The LAMB step by its formula, tensor by tensor, in plain PyTorch.

    g = gradient / grad_scale, times max_grad_norm / G where the norm G of all gradients exceeds max_grad_norm
    m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2,   t = t + 1
    c1 = 1 - beta1^t,   c2 = 1 - beta2^t
    bias_correction   u                                                   rate
      "update"        m / c1 / (sqrt(v) / sqrt(c2) + eps) + wd p          lr
      "step_size"     m / (sqrt(v) + eps) + wd p                          lr sqrt(c2) / c1
      "none"          m / (sqrt(v) + eps) + wd p                          lr
    r = clamp(|p| / |u|, low, high), 1 where either norm is 0 (there is none) or the group is not adapted
    p = p - rate r u

|.| runs over a tensor, or over one of `slices` equal slices of the group's flattened tensors (zeros pad the last).
Nothing is read back to the host: where `found_inf` is not 0, every result is replaced by what was there before.
Moments and masters are float32 (float64 for float64 parameters), norms float64.
"""

import math

import torch
from torch import Tensor

from evakernels.ops.checks import accumulator


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
    skip = None if found_inf is None else found_inf != 0
    in_order = iter(masters)
    weights = [p if accumulator(p.dtype) == p.dtype else next(in_order) for p in params]
    factor = 1.0 if grad_scale is None else 1 / grad_scale.double()
    total = exp_avgs[0].new_empty(0)
    if max_grad_norm is not None:
        norm = _norm(torch.stack([_norm(g) for g in grads])) * factor
        factor = torch.where(norm > max_grad_norm, max_grad_norm / norm, 1.0) * factor
        total = norm.to(exp_avgs[0].dtype)

    first, used = 0, []
    for k, size in enumerate(sizes):
        group = range(first, first + size)
        first += size
        updates, rates = [], []
        for i in group:
            _replace(steps[i], steps[i] + 1, skip)
            t = steps[i].double()
            c1, c2 = 1 - beta1s[k] ** t, 1 - beta2s[k] ** t
            g = grads[i].to(weights[i].dtype) * factor
            m = beta1s[k] * exp_avgs[i] + (1 - beta1s[k]) * g
            v = beta2s[k] * exp_avg_sqs[i] + (1 - beta2s[k]) * g * g
            mean, root = (m / c1, v.sqrt() / c2.sqrt()) if bias_correction == "update" else (m, v.sqrt())
            u = mean / (root + epss[k])
            updates.append((u + weight_decays[k] * weights[i]).to(weights[i].dtype))
            rates.append(lrs[k] * c2.sqrt() / c1 if bias_correction == "step_size" else lrs[k])
            _replace(exp_avgs[i], m, skip)
            _replace(exp_avg_sqs[i], v, skip)
        old = [weights[i] for i in group]
        ratios: list = [torch.ones(())] * size
        if adapts[k]:
            ratios = _ratios(old, updates, slices, lows[k], highs[k])
            used += [ratio.reshape(-1) for ratio in ratios]
        for i, u, rate, ratio in zip(group, updates, rates, ratios, strict=True):
            _replace(weights[i], weights[i] - rate * torch.where(ratio.isnan(), 1.0, ratio) * u, skip)
            if weights[i] is not params[i]:
                _replace(params[i], weights[i], skip)
    return total, ends(torch.cat(used) if used else exp_avgs[0].new_empty(0), found_inf).to(exp_avgs[0].dtype)


def ends(ratios: Tensor, found_inf: Tensor | None) -> Tensor:
    """The smallest and the largest of the ratios that are not NaN; 0 where none is left or the step is skipped."""
    none = torch.cat((ratios.isnan(), ratios.new_ones(1, dtype=torch.bool)))
    low, high = (torch.cat((ratios, ratios.new_zeros(1))).where(~none, end) for end in (math.inf, -math.inf))
    found = torch.stack((low.amin(), high.amax()))
    return found.where(~none.all() if found_inf is None else ~none.all() & (found_inf == 0), 0.0)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64)


def _ratios(weights: list[Tensor], updates: list[Tensor], slices: int, low: float, high: float) -> list[Tensor]:
    """One trust ratio per tensor, or one per element where slices cut through tensors; NaN: none."""
    if not slices:
        return [_ratio(_norm(p), _norm(u), low, high) for p, u in zip(weights, updates, strict=True)]
    numels = [p.numel() for p in weights]
    length = -(-sum(numels) // slices)

    def norms(tensors: list[Tensor]) -> Tensor:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        padded = torch.nn.functional.pad(flat, (0, slices * length - flat.numel()))
        return torch.linalg.vector_norm(padded.view(slices, length), dim=1, dtype=torch.float64)

    ratios = _ratio(norms(weights), norms(updates), low, high).to(weights[0].dtype)
    per_element = ratios[:, None].expand(slices, length).reshape(-1)[: sum(numels)]
    return [r.view(p.shape) for r, p in zip(per_element.split(numels), weights, strict=True)]


def _ratio(weight: Tensor, update: Tensor, low: float, high: float) -> Tensor:
    return torch.where((weight > 0) & (update > 0), (weight / update).clamp(low, high), math.nan)


def _replace(old: Tensor, new: Tensor, skip: Tensor | None) -> None:
    old.copy_(new if skip is None else torch.where(skip, old, new.to(old.dtype)))
