"""What both towers share: norms, the residual stream and how blocks pass it on, stochastic depth, initial values."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from evaclip.models.parts import part_of
from evakernels import add_norm, layer_norm, norm_add, rms_norm

Checkpointing = Literal["none", "block", "selective"]
# What selective checkpointing keeps the results of; what lies between them is bound by memory, and cheap to repeat.
EXPENSIVE = [
    *(torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default),
    *(torch.ops.evakernels.attention.default, torch.ops.evakernels.attention_qkvpacked.default),
]


class Norm(nn.Module):
    """LayerNorm, or with `rms` RMSNorm, which has no bias; alone, or fused with a residual step."""

    def __init__(self, width: int, eps: float, rms: bool = False):
        super().__init__()
        self.eps, self.rms = eps, rms
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = None if rms else nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width), normalised."""
        return rms_norm(x, self.weight, self.eps) if self.rms else layer_norm(x, self.weight, self.bias, self.eps)

    def after(self, stream: "Stream") -> tuple[Tensor, Tensor]:
        """The pre-norm step: the stream with its pending branch added, and the norm of that, in one pass."""
        x, branch, layer_scale, row_scale = stream
        if branch is None:
            return x, self(x)
        scales = {"layer_scale": layer_scale, "row_scale": row_scale}
        return add_norm(x, branch, self.weight, self.bias, eps=self.eps, rms=self.rms, **scales)

    def before(self, stream: "Stream") -> Tensor:
        """The res-post-norm step: x + row_scale * layer_scale * norm(branch), in one pass."""
        x, branch, layer_scale, row_scale = stream
        assert branch is not None, "there is no branch to normalise"
        scales = {"layer_scale": layer_scale, "row_scale": row_scale}
        return norm_add(x, branch, self.weight, self.bias, eps=self.eps, rms=self.rms, **scales)

    def reset_parameters(self) -> None:
        """The identity after normalisation."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Stream(NamedTuple):
    """The residual stream x + row_scale * layer_scale * branch whose last branch is not added yet.

    The addition waits for the norm that follows it, in the next sub-layer or the next block, so that both are one
    pass over memory.
    """

    x: Tensor  # (B, N, C)
    branch: Tensor | None = None  # (B, N, C), the output of the last sub-layer
    layer_scale: Tensor | None = None  # (C,)
    row_scale: Tensor | None = None  # (B,) float32: 0 or 1 / keep probability of each sample

    def sum(self) -> Tensor:
        """The stream with its pending branch added."""
        x, branch, layer_scale, row_scale = self
        if branch is None:
            return x
        if layer_scale is not None:
            branch = branch * layer_scale
        if row_scale is not None:
            branch = branch * row_scale[:, None, None]
        return (x + branch).to(x.dtype)

    def each(self, function: Callable[[Tensor], Tensor]) -> "Stream":
        """The stream of some of its tokens: `function` picks them from x and from the branch alike."""
        return self._replace(x=function(self.x), branch=None if self.branch is None else function(self.branch))


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, *args, checkpointing: Checkpointing) -> Stream:
    """Pass the residual stream through the blocks, `block(stream, *args) -> Stream`.

    With checkpointing a block keeps one tensor, its input with every branch added, and the backward pass computes
    the rest again, with the same random numbers. "selective" keeps results of matrix products and attention as well.
    """
    stream = Stream(x)
    selective = partial(create_selective_checkpoint_contexts, EXPENSIVE)
    context = selective if checkpointing == "selective" else noop_context_fn
    for block in blocks:
        if checkpointing != "none" and torch.is_grad_enabled():
            x = checkpoint(_added_up, block, stream.sum(), *args, use_reentrant=False, context_fn=context)
            stream = Stream(x)
        else:
            stream = block(stream, *args)
    return stream


def _added_up(block: Callable, x: Tensor, *args) -> Tensor:
    return block(Stream(x), *args).sum()


def drop_path_scale(x: Tensor, rate: float, training: bool) -> Tensor | None:
    """Stochastic depth as a scale of each sample's branch: (B,) float32, 0 or 1 / keep probability; None: no drop.

    Source: Huang et al., arXiv 1603.09382.
    """
    if not training or rate == 0:
        return None
    keep = torch.full((x.shape[0],), 1 - rate, device=x.device, dtype=torch.float32)
    return torch.bernoulli(keep) / keep


@torch.no_grad()
def init_normal(parameter: Tensor, std: float, truncated: bool = False) -> None:
    """Fill with a normal of mean 0, drawn in float32 whatever the dtype; `truncated` cuts it at -2 and 2."""
    draw = _undrawn(parameter)
    draw = nn.init.trunc_normal_(draw, std=std) if truncated else nn.init.normal_(draw, std=std)
    parameter.copy_(part_of(draw, parameter))


@torch.no_grad()
def init_uniform(parameter: Tensor, bound: float) -> None:
    """Fill evenly between -bound and bound, drawn in float32 whatever the dtype."""
    parameter.copy_(part_of(nn.init.uniform_(_undrawn(parameter), -bound, bound), parameter))


def _undrawn(parameter: Tensor) -> Tensor:
    """Room for all of a parameter's values: every process draws them all, so that they are those of one alone."""
    return torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)


def init_linear(linear: nn.Linear, std: float, truncated: bool = False) -> None:
    """A normal weight and a bias of zero."""
    init_normal(linear.weight, std, truncated)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def normalize(x: Tensor) -> Tensor:
    """Rows of length 1 in float32 (float64 for float64): half precision would cost the logits their digits."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
