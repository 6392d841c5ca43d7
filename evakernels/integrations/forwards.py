"""Forwards, and parts of them, that several codebases' modules have in common."""

import torch
from torch import Tensor, nn

from evakernels.ops import checks
from evakernels.ops.attention import HEAD_DIMS
from evakernels.ops.norm import add_norm, layer_norm, norm_add

# What a plan tells of a module.
GELU = "two matrix products and a GELU: there is nothing to fuse"


def head_dim_reason(head_dim: int) -> str | None:
    """Why attention cannot serve this head dimension; None where it can."""
    if head_dim in HEAD_DIMS:
        return None
    return f"its head dimension is {head_dim}; attention serves {HEAD_DIMS[0]} to {HEAD_DIMS[-1]} in steps of 8"


def norm_reason(norm: nn.Module, *known: type) -> str | None:
    """Why a norm cannot be replaced, `known` being the classes that may be; None where it can."""
    if type(norm) not in (nn.LayerNorm, *known):
        return f"it is a {type(norm).__name__}; only LayerNorm is covered"
    if norm.weight is None:
        return "it has no weight"
    if len(norm.normalized_shape) != 1:  # type: ignore[arg-type]
        return f"it normalises {len(norm.normalized_shape)} dimensions, not the last alone"  # type: ignore[arg-type]
    return None


def inner_norm_forward(self, x: Tensor) -> Tensor:
    """LayerNorm whose output matrix products alone read: under autocast it has their dtype at once."""
    return layer_norm(x, self.weight, self.bias, self.eps)


def norm_forward(self, x: Tensor) -> Tensor:
    """LayerNorm with the output dtype of `torch.nn.LayerNorm`: autocast turns it to float32, but on CUDA alone."""
    if x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        x = x.float()
    return same_dtype_norm_forward(self, x)


def same_dtype_norm_forward(self, x: Tensor) -> Tensor:
    """LayerNorm whose output has the dtype of its input, under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        return layer_norm(x, self.weight, self.bias, self.eps)


def pre_norm_step(x: Tensor, branch: Tensor, norm: nn.Module, scale: Tensor | None, drop: Tensor | None):
    """x + drop * scale * branch, and its norm."""
    x = _promoted(x, branch, scale)
    return add_norm(x, branch, norm.weight, norm.bias, eps=norm.eps, layer_scale=scale, row_scale=drop)  # type: ignore


def post_norm_step(x: Tensor, branch: Tensor, norm: nn.Module, drop: Tensor | None) -> Tensor:
    """x + drop * norm(branch)."""
    x = _promoted(x, branch)
    return norm_add(x, branch, norm.weight, norm.bias, eps=norm.eps, row_scale=drop)  # type: ignore


def _promoted(x: Tensor, *others: Tensor | None) -> Tensor:
    """The residual in the dtype that adding the others to it gives."""
    dtype = x.dtype
    for other in others:
        if other is not None:
            dtype = torch.promote_types(dtype, other.dtype)
    return x.to(dtype)


def drop_path(branch: Tensor, rate: float, rescale: bool = True) -> Tensor:
    """One factor a sample, 0 or 1 / keep probability, from the draws that timm's `drop_path` makes."""
    keep = 1 - rate
    kept = branch.new_empty((len(branch), *[1] * (branch.dim() - 1))).bernoulli_(keep)
    kept = kept.flatten().to(checks.accumulator(kept.dtype))
    return kept / keep if rescale and keep > 0 else kept


def joined(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one Linear that computes what these do, one after the other."""
    weight = torch.cat([linear.weight for linear in linears])
    if all(linear.bias is None for linear in linears):
        return weight, None
    zeros = (weight.new_zeros(linear.out_features) for linear in linears)
    biases = [zero if linear.bias is None else linear.bias for linear, zero in zip(linears, zeros, strict=True)]
    return weight, torch.cat(biases)
