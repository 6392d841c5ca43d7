"""LAMB in Python numbers: what every implementation must give in float64."""

import copy
import math
from itertools import chain

import torch

DEEPSPEED = {"bias_correction": "step_size", "trust_ratio_bounds": (0.01, 10.0), "adapt_excluded": True}
PLAIN = {"bias_correction": None, "adapt_excluded": True}
RULES = {"update": {}, "step_size": DEEPSPEED, "none": PLAIN}


def random(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_hand(
    groups, grads, *, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, max_grad_norm=None, trust_ratio_bounds=None,
    adapt_excluded=False, bias_correction="update", trust="parameter",
):  # fmt: skip
    """The same in Python numbers, over flat lists: one list of numbers per parameter, as the groups have them."""
    values = [[p.detach().double().flatten().tolist() for p in group["params"]] for group in groups]
    ms = [[[0.0] * len(p) for p in group] for group in values]
    vs = copy.deepcopy(ms)
    for t, of_step in enumerate(grads, 1):
        flat = iter(g.double().flatten().tolist() for g in of_step)
        gs = [[next(flat) for _ in group] for group in values]
        norm = math.sqrt(sum(x * x for group in gs for g in group for x in g))
        clip = max_grad_norm / norm if max_grad_norm and norm > max_grad_norm else 1.0
        c1, c2 = 1 - betas[0] ** t, 1 - betas[1] ** t
        rate = lr * math.sqrt(c2) / c1 if bias_correction == "step_size" else lr
        if bias_correction != "update":
            c1 = c2 = 1.0
        for k, group in enumerate(values):
            decay = groups[k]["weight_decay"]
            us = []
            for i, p in enumerate(group):
                g = [clip * x for x in gs[k][i]]
                ms[k][i] = [betas[0] * m + (1 - betas[0]) * x for m, x in zip(ms[k][i], g, strict=True)]
                vs[k][i] = [betas[1] * v + (1 - betas[1]) * x * x for v, x in zip(vs[k][i], g, strict=True)]
                us.append(
                    [
                        m / c1 / (math.sqrt(v / c2) + eps) + decay * w
                        for m, v, w in zip(ms[k][i], vs[k][i], p, strict=True)
                    ]
                )
            ratios = by_hand_ratios(group, us, trust, trust_ratio_bounds)
            if not adapt_excluded and decay == 0:
                ratios = [[1.0] * len(p) for p in group]
            values[k] = [
                [w - rate * r * x for w, r, x in zip(p, ratio, u, strict=True)]
                for p, ratio, u in zip(group, ratios, us, strict=True)
            ]
    return [p for group in values for p in group]


def by_hand_ratios(group, us, trust, bounds):
    """The ratio of every element."""

    def ratio(w, u):
        w, u = math.sqrt(sum(x * x for x in w)), math.sqrt(sum(x * x for x in u))
        r = w / u if w > 0 and u > 0 else 1.0
        return min(max(r, bounds[0]), bounds[1]) if bounds and w > 0 and u > 0 else r

    if trust == "parameter":
        return [[ratio(w, u)] * len(w) for w, u in zip(group, us, strict=True)]
    slices = 1 if trust == "group" else trust[1]
    w, u = list(chain(*group)), list(chain(*us))
    elements = len(w)
    while len(w) % slices:
        w, u = [*w, 0.0], [*u, 0.0]
    length = len(w) // slices
    flat = []
    for k in range(slices):
        flat += [ratio(w[k * length : (k + 1) * length], u[k * length : (k + 1) * length])] * length
    flat = iter(flat[:elements])
    return [[next(flat) for _ in p] for p in group]


def assert_equal_to(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.flatten(), torch.tensor(e, dtype=torch.float64), rtol=1e-12, atol=1e-13)
