"""Modules with the state-dict keys of the field, computed by this package's functions."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from evakernels.ops.attention import Rope2d, attention_qkvpacked
from evakernels.ops.contrastive import contrastive_loss, sigmoid_loss
from evakernels.ops.norm import layer_norm, rms_norm
from evakernels.ops.swiglu import swiglu, swiglu_norm_packed
from evakernels.ops.tokens import gather_tokens, sample_kept_tokens

__all__ = ["Attention", "ClipLoss", "LayerNorm", "RMSNorm", "SigLipLoss", "SwiGLU", "TokenDrop"]

ALIGNMENT = 8  # elements: 16 bytes in half precision, which matrix products want their rows to be multiples of


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension, by `evakernels.layer_norm`; also as timm's `norm_layer`.

    Under autocast the result has autocast's dtype, where PyTorch's is float32.

    Args:
        normalized_shape: C, or (C,).
        eps: added to the variance; vision transformers' 1e-6, where PyTorch's default is 1e-5.
        elementwise_affine: whether there are a weight and a bias; without them PyTorch's kernel computes it.
        bias: whether there is one beside the weight.
        device, dtype: of both.

    Raises:
        ValueError: `normalized_shape` names more than the last dimension.
    """

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        _last_dimension("LayerNorm", self.normalized_shape)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., C) over C."""
        return layer_norm(x, self.weight, self.bias, self.eps) if self.elementwise_affine else super().forward(x)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last dimension, by `evakernels.rms_norm`.

    Under autocast the result has autocast's dtype, where PyTorch's is float32.

    Args:
        normalized_shape: C, or (C,).
        eps: added to the mean square; None is PyTorch's default, the input's machine epsilon.
        elementwise_affine: whether there is a weight; without it PyTorch's kernel computes it.
        device, dtype: of the weight.

    Raises:
        ValueError: `normalized_shape` names more than the last dimension.
    """

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        eps: float | None = 1e-6,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        _last_dimension("RMSNorm", self.normalized_shape)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., C) over C."""
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return rms_norm(x, self.weight, eps) if self.elementwise_affine else super().forward(x)


def _last_dimension(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 1:
        raise ValueError(
            f"nn.{name}: normalized_shape is {tuple(shape)}; only the last dimension can be normalised: pass its size"
        )


class SwiGLU(nn.Module):
    """EVA-02's MLP: w3(ffn_ln(silu(w1 x) * w2 x)), w1 and w2 run as one matrix product.

    Keys: `w1`, `w2`, `w3` (`.weight`, `.bias`) and, with `norm`, `ffn_ln` (`.weight`, `.bias`). Parameters keep their
    published shapes; at the call they are padded with zeros to a multiple of 8, so that a width of 2730 runs aligned.
    Layers that were hooked or exchanged (adapters, pruned or quantised ones) are called one by one instead.

    Args:
        in_features: C.
        hidden_features: F.
        out_features: C where None.
        norm: whether a LayerNorm follows the product.
        eps: of that LayerNorm.
        device, dtype: of the parameters.

    Source: Fang et al., EVA-02, arXiv 2303.11331, section 2.1.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        norm: bool = True,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.w1 = nn.Linear(in_features, hidden_features, **place)
        self.w2 = nn.Linear(in_features, hidden_features, **place)
        self.ffn_ln = LayerNorm(hidden_features, eps=eps, **place) if norm else None
        self.w3 = nn.Linear(hidden_features, in_features if out_features is None else out_features, **place)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., out_features)."""
        norm = self.ffn_ln
        if bare(self.w1, self.w2, self.w3) and (norm is None or bare(norm)):
            return swiglu_mlp(x, self.w1, self.w2, norm, self.w3)
        hidden = swiglu(self.w1(x), self.w2(x))
        return self.w3(hidden if norm is None else norm(hidden))


def bare(*modules: nn.Module) -> bool:
    """Whether a forward may read the weights of these modules instead of calling them.

    That is: each is exactly a `Linear`, `Conv2d` or `MultiheadAttention` of `torch.nn` or a `LayerNorm` from here, or
    was replaced by `integrations`, and has no hooks and no `forward` of its own. Adapters, quantised layers,
    parametrizations and sharding fail this.
    """
    for module in modules:
        kind = type(module)
        if kind not in _PLAIN and not hasattr(kind, "_evakernels_original"):
            return False
        if hooked(module):
            return False
    return True


def hooked(module: nn.Module) -> bool:
    """Whether a call of this module does more than its class says: it has hooks, or a `forward` of its own."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__  # offloading and some adapters go about it so


_PLAIN = (nn.Linear, nn.Conv2d, nn.MultiheadAttention, LayerNorm)


def swiglu_mlp(x: Tensor, gate: nn.Linear, up: nn.Linear, norm: nn.LayerNorm | None, down: nn.Linear) -> Tensor:
    """down(norm(silu(gate(x)) * up(x))); `gate` and `up` are one matrix product, padded to a multiple of 8."""
    width = gate.out_features
    padding = -width % ALIGNMENT
    back = F.pad(down.weight, (0, padding)) if padding else down.weight
    weights = (norm.weight, norm.bias, norm.eps) if norm is not None else (None, None)
    hidden = swiglu_norm_packed(F.linear(x, *joined(gate, up, padding=padding)), *weights, width=width)
    return F.linear(hidden, back, down.bias)


def joined(*linears: nn.Linear, padding: int = 0) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one Linear that computes what these do, one after the other, with so many zeros after each."""
    if len(linears) == 1 and not padding:
        return linears[0].weight, linears[0].bias
    has_bias = any(linear.bias is not None for linear in linears)
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for linear in linears:
        pad = [linear.weight.new_zeros(padding, linear.in_features)] if padding else []
        weights += [linear.weight, *pad]
        if has_bias:
            bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
            biases += [bias, *(zeros[:, 0] for zeros in pad)]
    return torch.cat(weights), torch.cat(biases) if has_bias else None


class Attention(nn.Module):
    """EVA's self-attention; q, k and v come from one matrix product, whichever way their weights are stored.

    Keys: `qkv.weight` when fused, else `q_proj.weight`, `k_proj.weight`, `v_proj.weight`; `q_bias` and `v_bias` with
    `qkv_bias` (k has none); `inner_attn_ln` (`.weight`, `.bias`) with `inner_norm`; `proj` (`.weight`, `.bias`).
    Projections that were hooked or exchanged are called one by one instead.

    Args:
        dim: C, a multiple of `num_heads`; C / num_heads from 32 to 128 in steps of 8.
        num_heads: H.
        qkv_fused: whether q, k and v are stored as one weight (EVA-01) or as three (EVA-02).
        qkv_bias: whether q and v have a bias.
        inner_norm: whether a LayerNorm comes before the output projection.
        rope: the rotary embedding of q and k; one module may serve every block.
        causal: token n sees tokens 0 to n.
        eps: of the inner LayerNorm.
        device, dtype: of the parameters.

    Raises:
        ValueError: `dim` is no multiple of `num_heads`.

    Source: Sun et al., EVA-CLIP, arXiv 2303.15389; Fang et al., EVA-02, arXiv 2303.11331.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_fused: bool,
        qkv_bias: bool,
        inner_norm: bool,
        rope: Rope2d | None = None,
        causal: bool = False,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"nn.Attention: dim is {dim} and num_heads {num_heads}; dim must be a multiple of it")
        self.num_heads, self.qkv_fused, self.causal = num_heads, qkv_fused, causal
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        if qkv_fused:
            self.qkv = nn.Linear(dim, 3 * dim, bias=False, **place)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False, **place) for _ in range(3))
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim, **place)) if qkv_bias else None for _ in range(2))
        self.inner_attn_ln = LayerNorm(dim, eps=eps, **place) if inner_norm else None
        self.proj = nn.Linear(dim, dim, **place)
        self.rope = rope

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Attend within each sample of (B, N, C).

        `positions` (B, N - P) are the patch ids of the tokens after the prefix, under token dropping; without a rotary
        embedding a token's place is of no account, and neither are they.
        """
        projections = (self.qkv,) if self.qkv_fused else (self.q_proj, self.k_proj, self.v_proj)
        own = None
        if self.q_bias is not None and self.v_bias is not None:
            own = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if bare(*projections):
            weight, bias = joined(*projections)
            if own is not None:
                bias = own if bias is None else bias + own
            qkv = F.linear(x, weight, bias)
        else:
            qkv = torch.cat([projection(x) for projection in projections], -1)
            qkv = qkv if own is None else qkv + own.to(qkv.dtype)
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        positions = None if self.rope is None else positions
        y = attention_qkvpacked(qkv, rope=self.rope, positions=positions, causal=self.causal).flatten(2)
        return self.proj(y if self.inner_attn_ln is None else self.inner_attn_ln(y))


class TokenDrop(nn.Module):
    """Drop a share of the patch tokens in training (FLIP, EVA's PatchDropout); it has no parameters.

    Args:
        rate: the share of patches to drop, 0 <= rate < 1; max(1, int(patches * (1 - rate))) are kept.
        prefix_tokens: P, the tokens in front that are always kept.

    Raises:
        ValueError: `rate` is out of its range.

    Source: Li et al., Scaling Language-Image Pre-training via Masking (FLIP), arXiv 2212.00794.
    """

    def __init__(self, rate: float, prefix_tokens: int = 1) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"nn.TokenDrop: rate is {rate}; allowed is 0 <= rate < 1")
        self.rate, self.prefix_tokens = rate, prefix_tokens

    def forward(self, x: Tensor, *, seed: int, offset: int | Tensor) -> tuple[Tensor, Tensor | None]:
        """Drop from (B, P + patches, C); returns what is left and, ascending, the (B, K) int16 ids of its patches.

        In eval mode, or with rate 0, x and None. `seed` and `offset` are those of `sample_kept_tokens`; a new step
        needs a new offset (the number of samples seen) or seed.
        """
        if not self.training or self.rate == 0:
            return x, None
        patches = x.shape[1] - self.prefix_tokens
        keep = max(1, int(patches * (1 - self.rate)))
        kept = sample_kept_tokens(x.shape[0], patches, keep, seed=seed, offset=offset, device=x.device)
        return gather_tokens(x, kept, prefix_tokens=self.prefix_tokens), kept

    def extra_repr(self) -> str:
        return f"rate={self.rate}, prefix_tokens={self.prefix_tokens}"


class ClipLoss(nn.Module):
    """open_clip's `ClipLoss`, by `evakernels.contrastive_loss`.

    Args:
        local_loss, gather_with_grad, cache_labels: accepted as open_clip's, without effect: the loss is that of the
            whole batch, and gradients averaged over the processes are exact, as open_clip's are with gather_with_grad.
        rank, world_size: above one process those of `torch.distributed`'s default group, which must be initialised when
            the loss is first computed; every process has as many samples.
        use_horovod: must be False.

    Raises:
        ValueError: `use_horovod` is True, or the default group is not initialised or of another size.

    Source: Radford et al., arXiv 2103.00020; github.com/mlfoundations/open_clip, `open_clip.loss.ClipLoss`.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("nn.ClipLoss: use_horovod is True; it must be False (processes meet by torch.distributed)")
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of (b, D) features, or {"contrastive_loss": loss}.

        `logit_bias`, the same for all logits, changes neither the loss nor a gradient; its own is 0.
        """
        processes = equal_shares("nn.ClipLoss", self.world_size, image_features)
        loss = contrastive_loss(image_features, text_features, logit_scale, **processes)[0]
        if isinstance(logit_bias, Tensor):
            loss = loss + 0 * logit_bias.sum()  # DDP wants the gradient of every parameter
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """open_clip's `SigLipLoss`, by `evakernels.sigmoid_loss`.

    Args:
        cache_labels, dist_impl: accepted as open_clip's, without effect.
        rank, world_size: as of `ClipLoss`.

    Raises:
        ValueError: the default group is not initialised or of another size.

    Source: Zhai et al., arXiv 2303.15343; github.com/mlfoundations/open_clip, `open_clip.loss.SigLipLoss`.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:
        super().__init__()
        self.cache_labels, self.rank, self.world_size, self.dist_impl = cache_labels, rank, world_size, dist_impl

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of (b, D) features, the same on all processes, or {"contrastive_loss": loss}."""
        processes = equal_shares("nn.SigLipLoss", self.world_size, image_features)
        bias = 0.0 if logit_bias is None else logit_bias
        loss = sigmoid_loss(image_features, text_features, logit_scale, bias, **processes)
        return {"contrastive_loss": loss} if output_dict else loss


def equal_shares(function: str, world_size: int, features: Tensor) -> dict[str, Any]:
    """The arguments `group` and `batch_sizes` for `torch.distributed`'s default group, or none for one process.

    The group must have so many processes, each with as many samples.
    """
    if world_size == 1:
        return {}
    size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0
    if size != world_size:
        found = f"it has {size} processes" if size else "it is not initialised"
        raise ValueError(
            f"{function}: world_size is {world_size}, but of torch.distributed's default group {found}; call"
            " torch.distributed.init_process_group first, and give its size"
        )
    return {"group": dist.group.WORLD, "batch_sizes": [len(features)] * world_size}
