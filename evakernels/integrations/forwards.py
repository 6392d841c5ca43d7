"""Forwards, and parts of them, that several codebases' modules have in common."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from evakernels.integrations.patch import Plan
from evakernels.nn import LayerNorm, hooked
from evakernels.ops import checks
from evakernels.ops.attention import HEAD_DIMS
from evakernels.ops.norm import add_norm, layer_norm, norm_add, rms_norm

# What a plan tells of a module.
GELU = "two matrix products and a GELU: there is nothing to fuse"


def head_dim_reason(head_dim: int) -> str | None:
    """Why attention cannot serve this head dimension; None where it can."""
    if head_dim in HEAD_DIMS:
        return None
    return f"its head dimension is {head_dim}; attention serves {HEAD_DIMS[0]} to {HEAD_DIMS[-1]} in steps of 8"


def norm_reason(norm: nn.Module, *known: type) -> str | None:
    """Why a norm cannot be replaced, `known` being the classes that may be; None where it can."""
    if type(norm) not in (nn.LayerNorm, LayerNorm, *known):
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


def t5_norm_forward(self, hidden_states: Tensor) -> Tensor:
    """T5's RMSNorm (shinji's, EVA-CLIP's remote code): its output has the dtype of weights in half precision, else
    that of weight times input. It is rounded once, at the end; theirs before the weight as well."""
    dtype = self.weight.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        dtype = torch.promote_types(dtype, hidden_states.dtype)
        hidden_states = hidden_states.to(dtype)
    with torch.autocast(hidden_states.device.type, enabled=False):
        return rms_norm(hidden_states, self.weight, self.variance_epsilon).to(dtype)


def inner_t5_norm_forward(self, hidden_states: Tensor) -> Tensor:
    """T5's RMSNorm whose output matrix products alone read: under autocast it has their dtype at once."""
    if not checks.autocast_enabled(hidden_states.device.type):
        return t5_norm_forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def apex_rms_norm_forward(self, input: Tensor) -> Tensor:
    """apex's FusedRMSNorm, whose output has autocast's dtype."""
    return rms_norm(input, self.weight, self.eps)


def decide_norm(plan: Plan, name: str, norm: nn.Module, feeding: bool) -> None:
    """Plan what to do with a LayerNorm or RMSNorm of PyTorch, EVA-CLIP, apex or T5, told by the name of its class;
    with any other module do nothing. `feeding`: matrix products alone read its output."""
    kind = type(norm).__name__
    if kind in ("RMSnorm", "RMSNorm") and hasattr(norm, "variance_epsilon"):
        plan.replace(name, norm, "rms_norm", forward=inner_t5_norm_forward if feeding else t5_norm_forward)
    elif type(norm) is nn.LayerNorm or kind in ("FusedLayerNorm", "FusedRMSNorm", "LayerNorm", "LayerNormFp32"):
        if why := norm_reason(norm, type(norm)):
            plan.leave(name, why)
        elif kind == "FusedRMSNorm":
            plan.replace(name, norm, "rms_norm", forward=apex_rms_norm_forward)
        elif feeding or kind == "FusedLayerNorm":  # apex's gives autocast's dtype wherever it stands
            plan.replace(name, norm, "layer_norm", forward=inner_norm_forward)
        else:
            keeps = type(norm) is not nn.LayerNorm
            plan.replace(name, norm, "layer_norm", forward=same_dtype_norm_forward if keeps else norm_forward)
    elif isinstance(norm, nn.LayerNorm | nn.RMSNorm) and (why := norm_reason(norm)):
        plan.leave(name, why)


def pre_norm_step(
    x: Tensor, branch: Tensor, norm: nn.Module, *, scale: Tensor | None = None, drop: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x + drop * scale * branch, and its norm."""
    x = _promoted(x, branch, scale)
    return add_norm(x, branch, **_affine(norm), layer_scale=scale, row_scale=drop)


def post_norm_step(
    x: Tensor, branch: Tensor, norm: nn.Module, *, scale: Tensor | None = None, drop: Tensor | None = None
) -> Tensor:
    """x + drop * scale * norm(branch)."""
    affine = _affine(norm)
    x = _promoted(x, branch, scale, affine["weight"] if affine["rms"] else None)
    return norm_add(x, branch, **affine, layer_scale=scale, row_scale=drop)


def _affine(norm: Any) -> dict[str, Any]:
    """Weights and eps of a LayerNorm, or of an RMSNorm: it has no bias, not even None."""
    rms = not hasattr(norm, "bias")
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return {"weight": norm.weight, "bias": None if rms else norm.bias, "eps": eps, "rms": rms}


def _promoted(x: Tensor, *others: Tensor | None) -> Tensor:
    """The residual in the dtype that adding the others to it gives."""
    dtype = x.dtype
    for other in others:
        if other is not None:
            dtype = torch.promote_types(dtype, other.dtype)
    return x.to(dtype)


def altered(*modules: nn.Module) -> bool:
    """Whether one of these layer scales or drop paths, whose numbers are read, was hooked or exchanged for another."""
    for module in modules:
        known = type(module) is nn.Identity or hasattr(module, "gamma") or hasattr(module, "drop_prob")
        if not known or hooked(module):
            return True
    return False


def drop_path(branch: Tensor, rate: float, rescale: bool = True) -> Tensor:
    """One factor a sample, 0 or 1 / keep probability, from the draws that timm's `drop_path` makes."""
    keep = 1 - rate
    kept = branch.new_empty((len(branch), *[1] * (branch.dim() - 1))).bernoulli_(keep)
    kept = kept.flatten().to(checks.accumulator(kept.dtype))
    return kept / keep if rescale and keep > 0 else kept


def kept_patches(draw: Callable | None, x: Tensor, patches: int, rate: float) -> Tensor:
    """(batch, keep) ids of the patches to keep, by `draw`, or on the CPU as open_clip and EVA-CLIP's code draw them."""
    keep = max(1, int(patches * (1 - rate)))
    if draw is not None:
        return draw(len(x), patches, keep, x.device)
    return torch.randn(len(x), patches).topk(keep).indices.to(x.device)
