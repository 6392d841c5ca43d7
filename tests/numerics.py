"""How exact an implementation must be: no worse than PyTorch's own best operator, up to a small factor.

The oracle is the float64 reference. `error(actual) <= factor * error(PyTorch's operator in the same dtype)`, with a
floor of one unit in the last place of the largest value, for the maximum and for the root mean square alike.
"""

import torch
from torch import Tensor

OUTPUTS, GRADIENTS = 2.0, 3.0  # the factors


def assert_as_exact_as(actual: Tensor, peer: Tensor, oracle: Tensor, factor: float, what: str = "result") -> None:
    """Assert that `actual` is at most `factor` times as far from `oracle` (float64) as `peer` is."""
    assert actual.shape == oracle.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    # The peer may compute in a wider dtype than it is asked about: what counts is its error after rounding.
    peer = peer.to(actual.dtype)
    ulp = torch.finfo(actual.dtype).eps * oracle.abs().max()
    mine, theirs = (actual.double() - oracle).abs(), (peer.double() - oracle).abs()
    for name, reduce, floor in (
        ("maximum", torch.max, ulp),
        ("root mean square", lambda e: e.square().mean().sqrt(), ulp / 4),
    ):
        bound = torch.maximum(factor * reduce(theirs), floor)
        assert reduce(mine) <= bound, f"{what}: {name} error {reduce(mine):.3e} exceeds {bound:.3e}"
