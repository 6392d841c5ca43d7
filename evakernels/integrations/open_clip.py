"""open_clip's models and losses, and an optimizer for its training loop."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evakernels.integrations import forwards, timm
from evakernels.integrations.patch import Plan, Report, original
from evakernels.nn import bare, equal_shares
from evakernels.ops.attention import attention_qkvpacked
from evakernels.ops.contrastive import contrastive_loss, sigmoid_loss
from evakernels.ops.lamb import FusedLAMB
from evakernels.ops.tokens import gather_tokens

__all__ = ["optimizer", "replace"]

EXPECTED = "a model of open_clip.create_model, or an open_clip ClipLoss or SigLipLoss"


def replace(model: nn.Module, *, draw: timm.Draw | None = None) -> Report:
    """Let an open_clip model, or a loss of `open_clip.create_loss`, be computed by this package.

    Outputs and gradients are those of the untouched model up to rounding, with the same draws of the patches to keep
    unless `draw` is given. A loss keeps its gradients' convention, which depends on its flags.

    Args:
        model: a CLIP or CustomTextCLIP, a tower of one, or a ClipLoss or SigLipLoss; float32, bfloat16 or float16, on
            any device, not on meta; not sharded or compiled yet.
        draw: (batch, patches, keep, device) -> ids (batch, keep) of the patches to keep in training, instead of
            open_clip's and timm's draws from the default generator.

    Returns:
        What was replaced, what was not and why.

    Raises:
        TypeError: nothing in the model is open_clip's.
        ValueError: it was replaced before, is on meta, or has nothing that could be replaced.
        ModuleNotFoundError: open_clip, or timm which it needs, is not installed.
    """
    from open_clip import transformer as theirs
    from open_clip.hf_model import HFTextEncoder
    from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
    from open_clip.timm_model import TimmModel

    plan = Plan("integrations.open_clip", model)
    timm.decide(plan, draw)
    norms = (theirs.LayerNorm, theirs.LayerNormFp32)
    towers = _towers(plan)
    blocks: list[Any] = [block for _, block in plan.modules() if isinstance(block, theirs.ResidualAttentionBlock)]
    exact = [block for block in blocks if type(block) is theirs.ResidualAttentionBlock]
    feeding = {id(norm) for block in exact for norm in (block.ln_1, block.ln_2)}
    within = {id(block.attn) for block in blocks}
    for name, module in plan.modules():
        kind = type(module)
        if isinstance(module, norms):
            if why := forwards.norm_reason(module, *norms):
                plan.leave(name, why)
            else:
                inner = id(module) in feeding
                forward = forwards.inner_norm_forward if inner else forwards.same_dtype_norm_forward
                plan.replace(name, module, "layer_norm", forward=forward)
        elif kind is theirs.ResidualAttentionBlock:
            _decide_block(plan, name, module, norms, towers.get(id(module)))
        elif isinstance(module, theirs.ResidualAttentionBlock):
            plan.leave(name, f"a {kind.__name__} is not covered")
        elif kind is nn.MultiheadAttention and id(module) not in within:
            plan.leave(name, "its queries are not the tokens that it attends to")
        elif kind is theirs.Attention:
            plan.leave(name, "the attention of a CustomResidualAttentionBlock is not covered")
        elif kind is theirs.PatchDropout:
            plan.replace(name, module, "gather_tokens", forward=patch_dropout_forward)
            plan.add(name, module, "evakernels_draw", draw)
        elif kind is TimmModel and not timm.covers(module.trunk):  # type: ignore[arg-type]
            plan.leave(f"{name}.trunk" if name else "trunk", f"timm's {type(module.trunk).__name__} is not covered")
        elif kind is HFTextEncoder:
            plan.leave(name, "a text tower of transformers is not covered")
        elif kind in (ClipLoss, SigLipLoss, CoCaLoss, DistillClipLoss):
            _decide_loss(plan, name, module)
    return plan.carry_out(EXPECTED)


def optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.2,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    **options,
) -> FusedLAMB:
    """A `FusedLAMB` with the two groups of open_clip's training loop: without weight decay, and with it.

    Without are vectors and scalars, and what has "bn", "ln", "bias" or "logit_scale" in its name. The defaults are
    those of `open_clip_train` for ViT models. It stands where `open_clip_train/main.py` makes its AdamW; schedulers,
    GradScaler and checkpoints of the loop serve it as they are.

    Args:
        model: its parameters that require gradients are optimised.
        lr, weight_decay, betas, eps: as in `FusedLAMB`.
        options: the others of `FusedLAMB`, such as max_grad_norm.

    Raises:
        ValueError, TypeError: as `FusedLAMB`.
    """
    without: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            excluded = parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
            (without if excluded else decayed).append(parameter)
    groups = [{"params": without, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]
    return FusedLAMB(groups, lr=lr, betas=betas, eps=eps, **options)


def _towers(plan: Plan) -> dict[int, nn.Module]:
    """The tower that calls a block with its mask, by the block's id."""
    from open_clip import CLIP
    from open_clip.transformer import TextTransformer, VisionTransformer

    return {
        id(block): module
        for _, module in plan.modules()
        if type(module) in (CLIP, TextTransformer, VisionTransformer)
        for block in module.transformer.resblocks  # type: ignore[union-attr]
    }


def _decide_block(plan: Plan, name: str, block, norms: tuple[type, ...], tower) -> None:
    from open_clip.transformer import LayerScale

    methods = {}
    attention, step = _attention_reason(block.attn, tower), None
    if why := forwards.norm_reason(block.ln_2, *norms):
        step = f"of its norm: {why}"
    elif type(block.ls_1) not in (nn.Identity, LayerScale):
        step = f"its layer scale is a {type(block.ls_1).__name__}"
    if step:
        plan.leave(name, step)
    else:
        methods["forward"] = block_forward
    if not attention:
        methods["attention"] = attention_within
    if methods and not plan.replace(name, block, "its attention alone" if step else "add_norm", **methods):
        attention = attention or "its block is left"
    if attention:
        plan.leave(f"{name}.attn", attention)
    else:
        causal = getattr(tower, "attn_mask", None) is not None
        plan.note(f"{name}.attn", f"attention_qkvpacked{', causal' if causal else ''}")
        plan.add(name, block, "evakernels_tower", (tower,) if causal else ())


def _attention_reason(attn: nn.MultiheadAttention, tower) -> str | None:
    if tower is None:
        return "it is in no tower that is covered (CLIP, TextTransformer, VisionTransformer)"
    if getattr(tower, "cls_emb", None) is not None or getattr(tower, "use_pad_mask", False):
        return "its mask hides padding as well"
    mask = getattr(tower, "attn_mask", None)
    if mask is not None and not torch.equal(mask, torch.full_like(mask, float("-inf")).triu(1)):
        return "its mask is not the triangular one"
    if not attn.batch_first:
        return "it takes (tokens, batch, channels): batch_first is False"
    if attn.dropout > 0:
        return f"it drops attention weights (dropout {attn.dropout})"
    if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn:
        return "its keys and values are not projected as its queries are"
    return forwards.head_dim_reason(attn.head_dim)


def _decide_loss(plan: Plan, name: str, loss) -> None:
    from open_clip.loss import ClipLoss, SigLipLoss

    many = loss.world_size > 1
    if type(loss) is SigLipLoss:
        value = "; on every process the value is that of the whole batch" if many else ""
        plan.replace(name, loss, f"sigmoid_loss{value}", forward=sigmoid_loss_forward)
    elif type(loss) is not ClipLoss:
        plan.leave(name, f"a {type(loss).__name__} needs more than the contrastive loss of two features")
    elif many and loss.use_horovod:
        plan.leave(name, "its processes meet by Horovod; those of contrastive_loss meet by torch.distributed")
    elif many and loss.local_loss and not loss.gather_with_grad:
        plan.leave(name, "local_loss without gather_with_grad: its gradients are of no loss; give both, or neither")
    else:
        value = "; on every process the value is that of the whole batch" if many and loss.local_loss else ""
        plan.replace(name, loss, f"contrastive_loss{value}", forward=clip_loss_forward)


def attention_within(self, q_x, k_x=None, v_x=None, attn_mask=None):
    """The method `attention` of a ResidualAttentionBlock."""
    causal = attn_mask is not None and any(attn_mask is tower.attn_mask for tower in self.evakernels_tower)
    other = k_x is not None or v_x is not None or (attn_mask is not None and not causal)
    if other or self.attn.dropout > 0 or not bare(self.attn):
        return original(self).attention(self, q_x, k_x, v_x, attn_mask)
    qkv = F.linear(q_x, self.attn.in_proj_weight, self.attn.in_proj_bias)
    y = attention_qkvpacked(qkv.unflatten(-1, (3, self.attn.num_heads, -1)), causal=causal).flatten(2)
    return F.linear(y, self.attn.out_proj.weight, self.attn.out_proj.bias)


def block_forward(self, q_x, k_x=None, v_x=None, attn_mask=None):
    if k_x is not None or v_x is not None or not bare(self.ln_2) or forwards.altered(self.ls_1):
        return original(self).forward(self, q_x, k_x, v_x, attn_mask)
    branch = self.attention(self.ln_1(q_x), attn_mask=attn_mask)
    x, y = forwards.pre_norm_step(q_x, branch, self.ln_2, scale=getattr(self.ls_1, "gamma", None))
    return x + self.ls_2(self.mlp(y))


def patch_dropout_forward(self, x):
    if not self.training or self.prob == 0:
        return x
    prefix = int(self.exclude_first_token)
    kept = forwards.kept_patches(self.evakernels_draw, x, x.shape[1] - prefix, self.prob)
    return gather_tokens(x, kept, prefix_tokens=prefix)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.factor, None


def clip_loss_forward(self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False):
    features = image_features, text_features
    if self.world_size > 1 and not self.gather_with_grad:
        # Only what the other processes compute from these features has no gradient: averaged, a world_size-th is left.
        features = tuple(_ScaleGradient.apply(x, 1 / self.world_size) for x in features)
    loss = contrastive_loss(*features, logit_scale, **_processes(self, image_features))[0]
    if isinstance(logit_bias, Tensor):
        loss = loss + 0 * logit_bias.sum()  # the same for all logits, it changes nothing; DDP wants its gradient, 0
    return _returned(loss, features, output_dict)


def sigmoid_loss_forward(self, image_features, text_features, logit_scale, logit_bias, output_dict=False):
    features = image_features, text_features
    bias = 0.0 if logit_bias is None else logit_bias
    loss = sigmoid_loss(*features, logit_scale, bias, **_processes(self, image_features))
    return _returned(loss, features, output_dict)


def _processes(loss: nn.Module, features: Tensor) -> dict:
    return equal_shares(f"open_clip.{type(loss).__name__}", loss.world_size, features)  # type: ignore[arg-type]


def _returned(loss: Tensor, features: tuple[Tensor, ...], output_dict: bool) -> Tensor | dict[str, Tensor]:
    """In float32 under autocast, else in the dtype of the features, as open_clip's."""
    if not torch.is_autocast_enabled(loss.device.type):
        loss = loss.to(torch.result_type(*features))
    return {"contrastive_loss": loss} if output_dict else loss
