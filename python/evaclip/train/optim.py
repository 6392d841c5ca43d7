"""Parameter groups with layer decay, the schedule, and the optimizer of a recipe.

Source: EVA-CLIP `rei/training/{optim,scheduler}.py`.
"""

import math
import re

import torch

import evakernels as ek
from evaclip.models.clip import CLIP
from evaclip.train import recipe as recipes

_EMBEDDINGS = ("patch_embed", "pos_embed", "cls_token", "mask_token", "positional_embedding", "token_embedding")
_NO_DECAY = ("visual.pos_embed", "visual.cls_token", "text.positional_embedding", "logit_scale")


def parameter_groups(model: CLIP, recipe: recipes.Optimizer) -> list[dict]:
    """Groups by tower, layer and weight decay; each has `initial_lr` and `lr_scale` = decay^(layers above it).

    Parameters that require no gradient are left out.
    """
    peak = {"visual": recipe.visual_lr, "text": recipe.text_lr, "other": recipe.logit_scale_lr}
    decay = {"visual": recipe.visual_layer_decay, "text": recipe.text_layer_decay, "other": 1.0}
    depth = {"visual": len(model.visual.blocks), "text": len(model.text.transformer.resblocks), "other": 0}
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tower = name.split(".", 1)[0] if name.startswith(("visual.", "text.")) else "other"
        scale = decay[tower] ** (depth[tower] + 1 - layer_id(name, depth[tower]))
        decayed = not (parameter.ndim <= 1 or name.endswith(".bias") or name in _NO_DECAY)
        group = groups.setdefault(
            (tower, scale, decayed),
            {
                "params": [],
                "initial_lr": peak[tower],
                "lr_scale": scale,
                "weight_decay": recipe.weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def layer_id(name: str, layers: int) -> int:
    """0 for the embeddings, i + 1 for block i, layers + 1 for what follows the blocks."""
    if any(part in name for part in _EMBEDDINGS):
        return 0
    block = re.search(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else layers + 1


def warmup_cosine(step: int, schedule: recipes.Schedule) -> float:
    """The share of the peak learning rate at a step: linear warm-up, then a cosine to zero."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    progress = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Write lr = peak * share * lr_scale into every group."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share * group["lr_scale"]


def build_optimizer(model: CLIP, recipe: recipes.Optimizer, *, capturable: bool = False) -> torch.optim.Optimizer:
    """The recipe's optimizer over `parameter_groups`; `capturable`: its step may be captured in a CUDA graph."""
    groups = parameter_groups(model, recipe)
    if recipe.name == "adamw":
        if any(p.dtype != torch.float32 for group in groups for p in group["params"]):
            raise recipes.RecipeError(
                "optimizer.name is 'adamw' and weights are bfloat16 or float16, but AdamW keeps no float32 masters; "
                "use 'lamb', or compute.precision 'amp_bf16' or 'amp_fp16'"
            )
        options = {"lr": recipe.logit_scale_lr, "betas": recipe.betas, "eps": recipe.eps}
        return torch.optim.AdamW(groups, **options, fused=True, capturable=capturable)  # type: ignore[arg-type]
    return ek.FusedLAMB(
        groups,
        lr=recipe.logit_scale_lr,
        betas=recipe.betas,
        eps=recipe.eps,
        trust=recipe.trust,
        trust_ratio_bounds=recipe.trust_ratio_bounds,
        adapt_excluded=recipe.adapt_excluded,
        bias_correction=None if recipe.bias_correction == "none" else recipe.bias_correction,
        capturable=capturable,
    )
