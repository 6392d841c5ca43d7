"""timm's `Eva` and `VisionTransformer`, also inside other models, such as open_clip's."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evakernels.integrations import forwards
from evakernels.integrations.patch import Plan, Report, original, taken
from evakernels.nn import bare, joined, swiglu_mlp
from evakernels.ops.attention import Rope2d, attention_qkvpacked
from evakernels.ops.swiglu import swiglu, swiglu_norm
from evakernels.ops.tokens import gather_tokens

__all__ = ["replace"]

EXPECTED = "an Eva or VisionTransformer of timm, such as timm.create_model('eva02_base_patch16_clip_224')"
Draw = Callable[[int, int, int, torch.device], Tensor]


def replace(model: nn.Module, *, draw: Draw | None = None) -> Report:
    """Let every `Eva` and `VisionTransformer` of timm in a model, or a model that is one, be computed by this package.

    Outputs and gradients are those of the untouched model up to rounding, with the same draws of stochastic depth and,
    unless `draw` is given, of the patches to keep.

    Args:
        model: float32, bfloat16 or float16, on any device, not on meta; not sharded or compiled yet.
        draw: (batch, patches, keep, device) -> ids (batch, keep) of the patches to keep in training, instead of timm's
            draw from the default generator: `evakernels.sample_kept_tokens` with a seed and an offset of the step.

    Returns:
        What was replaced, what was not and why.

    Raises:
        TypeError: there is no such model in it.
        ValueError: it was replaced before, is on meta, or has nothing that could be replaced.
        ModuleNotFoundError: timm is not installed.
    """
    plan = Plan("integrations.timm", model)
    decide(plan, draw)
    return plan.carry_out(EXPECTED)


def decide(plan: Plan, draw: Draw | None = None) -> None:
    """Plan what to replace in every tower of the plan's model that `covers` knows."""
    for name, module in plan.modules():
        if covers(module):
            _decide(plan, name, module, draw)


def covers(module: nn.Module) -> bool:
    """Whether it is exactly one of timm's models that are covered."""
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    return type(module) in (Eva, VisionTransformer)


def _decide(plan: Plan, prefix: str, model: Any, draw: Draw | None) -> None:
    from timm import layers
    from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
    from timm.models.vision_transformer import Block

    modules = [(".".join(filter(None, (prefix, name))), module) for name, module in model.named_modules()]
    blocks = [module for _, module in modules if type(module) in (EvaBlock, EvaBlockPostNorm, Block)]
    feeding = {id(norm) for block in blocks for norm in _feeding_products(block, type(block) is not EvaBlockPostNorm)}
    kinds = EvaAttention, layers.AttentionRope, layers.Attention
    attentions = {name: module for name, module in modules if type(module) in kinds}
    reasons = {name: _attention_reason(module) for name, module in attentions.items()}
    known: dict[int, tuple[type, ...]] = {id(block): (EvaBlock, EvaBlockPostNorm, Block) for block in model.blocks}
    known |= {id(block.attn): kinds for block in blocks}
    # Blocks and attentions that do with the tables of angles what they like.
    unknown = {name for name, module in modules if id(module) in known and type(module) not in known[id(module)]}
    patched = {name for name, module in modules if id(module) in known and taken(module, "forward")}
    why: str | None
    rope = None
    if getattr(model, "rope", None) is not None and attentions:
        rope, why = _rope(model.rope, next(iter(attentions.values())))
        failing = next((name for name, _ in modules if reasons.get(name) or name in unknown | patched), None)
        if rope is not None and failing:
            rope, why = None, f"{failing}, which is not replaced, needs its tables"
        rope_name = f"{prefix}.rope" if prefix else "rope"
        if rope is None:
            plan.leave(rope_name, str(why))
            reasons = {name: reason or f"its angles cannot be taken over: {why}" for name, reason in reasons.items()}
        else:
            plan.replace(rope_name, model.rope, "patch ids instead of tables", get_embed=rope_get_embed)
            plan.add(rope_name, model.rope, "evakernels_rope", rope)

    for name, module in modules:
        kind = type(module)
        if isinstance(module, nn.LayerNorm | layers.RmsNorm):
            if why := forwards.norm_reason(module, layers.LayerNorm):
                plan.leave(name, why)
            elif id(module) in feeding or getattr(module, "_fast_norm", False):
                plan.replace(name, module, "layer_norm", forward=forwards.inner_norm_forward)
            else:
                plan.replace(name, module, "layer_norm", forward=forwards.norm_forward)
        elif kind in kinds:
            if why := reasons[name]:
                plan.leave(name, why)
            else:
                by = f"attention_qkvpacked{', rotary embedding included' if rope else ''}"
                plain = kind is layers.Attention
                plan.replace(name, module, by, forward=plain_attention_forward if plain else attention_forward)
                if rope is not None:
                    plan.add(name, module, "evakernels_rope", rope)
        elif kind in (EvaBlock, EvaBlockPostNorm, Block):
            if why := _block_reason(module, layers.LayerNorm, kind is EvaBlockPostNorm):
                plan.leave(name, why)
            elif kind is EvaBlockPostNorm:
                plan.replace(name, module, "norm_add, twice", forward=post_norm_block_forward)
            else:
                plan.replace(name, module, "add_norm", forward=block_forward if kind is EvaBlock else vit_block_forward)
        elif kind in (layers.SwiGLU, layers.GluMlp):
            norm = "" if type(module.norm) is nn.Identity else "_norm"
            packed = kind is layers.GluMlp
            if why := _gated_reason(module, layers.LayerNorm):
                plan.leave(name, why)
            elif packed:
                plan.replace(name, module, f"swiglu{norm}", forward=packed_swiglu_forward)
            else:
                plan.replace(name, module, f"swiglu{norm}_packed", forward=swiglu_forward)
        elif kind in (layers.PatchDropout, layers.PatchDropoutWithIndices):
            alone = kind is layers.PatchDropout
            forward = patch_dropout_alone_forward if alone else patch_dropout_forward
            plan.replace(name, module, "gather_tokens", forward=forward)
            plan.add(name, module, "evakernels_draw", draw)
        elif kind is layers.Mlp:
            plan.leave(name, forwards.GELU)
        elif kind is layers.AttentionPoolLatent:
            plan.leave(name, "its queries are not the tokens that it attends to")
        elif name in unknown:
            plan.leave(name, f"a {kind.__name__} is not covered")


def _feeding_products(block, pre_norm: bool) -> Iterator[nn.Module | None]:
    """Its norms whose outputs nothing but matrix products reads."""
    if pre_norm:
        yield from (block.norm1, block.norm2)
    if getattr(block.attn, "gate", None) is None:
        yield getattr(block.attn, "norm", None)
    yield getattr(block.mlp, "norm", None)


def _attention_reason(attn) -> str | None:
    if why := taken(attn, "forward"):
        return why
    if getattr(attn, "num_kv_groups", 1) > 1:
        return f"{attn.num_kv_groups} heads of queries share one of keys and values"
    if type(attn.q_norm) is not nn.Identity or type(attn.k_norm) is not nn.Identity:
        return "its queries and keys are normalised"
    if getattr(attn, "gate", None) is not None:
        return "its output is gated"
    if attn.attn_drop.p > 0:
        return f"it drops attention weights (attn_drop {attn.attn_drop.p})"
    return forwards.head_dim_reason(attn.head_dim)


def _block_reason(block, known: type, post: bool) -> str | None:
    from timm.layers import DropPath, LayerScale

    for norm in (block.norm1, block.norm2) if post else (block.norm2,):
        if why := forwards.norm_reason(norm, known):
            return f"of its norm: {why}"
    for drop in (block.drop_path1, block.drop_path2):
        if type(drop) not in (nn.Identity, DropPath):
            return f"its drop path is a {type(drop).__name__}"
    if type(scale := getattr(block, "ls1", None)) not in (type(None), nn.Identity, LayerScale):
        return f"its layer scale is a {type(scale).__name__}"
    return None


def _gated_reason(mlp, known: type) -> str | None:
    if type(mlp.act) is not nn.SiLU:
        return f"its gate goes through {type(mlp.act).__name__}, not SiLU"
    if mlp.drop1.p > 0:
        return f"it drops hidden units (rate {mlp.drop1.p})"
    if getattr(mlp, "chunk_dim", -1) != -1:
        return "it is a convolution"
    why = None if type(mlp.norm) is nn.Identity else forwards.norm_reason(mlp.norm, known)
    return f"of its norm: {why}" if why else None


def _rope(rope, attn) -> tuple[Rope2d | None, str]:
    """The Rope2d that turns by the same angles as a rope module of timm's; None and the reason where there is none."""
    from timm.layers import RotaryEmbeddingCat

    if type(rope) is not RotaryEmbeddingCat:
        return None, f"it is a {type(rope).__name__}; only RotaryEmbeddingCat is covered"
    if rope.pos_embed is None:
        return None, "its grid changes with the image (dynamic_img_size)"
    if getattr(rope, "aug_active", False):
        return None, "its coordinates are augmented in training"
    if attn.head_dim % 4:
        return None, f"the head dimension is {attn.head_dim}; rows and columns need a multiple of 4"
    # The tables decide: whatever the other options mean, their angles are those of Rope2d, or they are not.
    reference = rope.ref_feat_shape[0] if rope.ref_feat_shape is not None else None
    options = {"prefix_tokens": attn.num_prefix_tokens, "interleaved": not attn.rotate_half}
    mine = Rope2d(tuple(rope.feat_shape), attn.head_dim, theta=rope.temperature, reference_grid=reference, **options)
    mine = mine.to(rope.pos_embed.device)
    table, theirs = _table(mine), rope.pos_embed.float()
    # timm rounds an angle to float32 before its sine, so that 24 rows are an error of 24 * eps; tables may be narrower.
    tolerance = max(1e-5, torch.finfo(rope.pos_embed.dtype).eps)
    if table.shape != theirs.shape or not torch.allclose(table, theirs, rtol=0, atol=tolerance):
        return None, "its angles are not those of Rope2d (offset, order of the axes, or layout)"
    return mine, ""


def _table(rope: Rope2d) -> Tensor:
    """timm's table of a Rope2d: for every patch the sines of all channels, then the cosines."""
    (height, width), pairs = rope.grid, rope.row_table.shape[1]
    rows = rope.row_table[:, None].expand(height, width, pairs, 2)
    angles = torch.cat((rows, rope.column_table.expand(height, width, pairs, 2)), 2).flatten(0, 1)
    cos, sin = (x.repeat_interleave(2, -1) if rope.interleaved else torch.cat((x, x), -1) for x in angles.unbind(-1))
    return torch.cat((sin, cos), -1)


def rope_get_embed(self, shape=None, dtype=None) -> Tensor:
    """The ids of the patches, (N, 1): timm passes on, gathers and reshapes them as it would the rows of the table."""
    height, width = self.evakernels_rope.grid
    if tuple(self.feat_shape) != (height, width):
        raise RuntimeError(
            f"evakernels.integrations.timm: the grid was {height} x {width} at replace() and is"
            f" {self.feat_shape[0]} x {self.feat_shape[1]} now; call undo() before, and replace() after, set_input_size"
        )
    return torch.arange(height * width, device=self.evakernels_rope.row_table.device)[:, None]


def attention_forward(self, x, rope=None, attn_mask=None, is_causal=False):
    linears = (self.qkv,) if self.qkv is not None else (self.q_proj, self.k_proj, self.v_proj)
    ids = rope if rope is not None and not rope.is_floating_point() else None
    tables = rope is not None and ids is None
    if attn_mask is not None or tables or self.attn_drop.p > 0 or not bare(*linears):
        if ids is not None:
            rope = _table(self.evakernels_rope)[ids[..., 0]]
        given = {"rope": rope, "attn_mask": attn_mask, "is_causal": is_causal or None}
        return original(self).forward(self, x, **{name: value for name, value in given.items() if value is not None})
    if getattr(self, "q_bias", None) is not None:  # of EvaAttention
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
    else:
        qkv = F.linear(x, *joined(*linears))
    qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
    rotation = None if ids is None else self.evakernels_rope
    positions = ids.flatten(1) if ids is not None and ids.dim() > 2 else None  # (B, 1, K, 1) where patches were dropped
    y = attention_qkvpacked(qkv, rope=rotation, positions=positions, causal=is_causal).flatten(2)
    return self.proj_drop(self.proj(self.norm(y)))


def plain_attention_forward(self, x, attn_mask=None, is_causal=False):
    return attention_forward(self, x, None, attn_mask, is_causal)


def block_forward(self, x, *args, **kwargs):
    if not bare(self.norm2) or forwards.altered(self.drop_path1):
        return original(self).forward(self, x, *args, **kwargs)
    branch = self.attn(self.norm1(x), *args, **kwargs)
    x, y = forwards.pre_norm_step(x, branch, self.norm2, scale=self.gamma_1, drop=_drop(self.drop_path1, branch))
    branch = self.mlp(y)
    return x + self.drop_path2(branch if self.gamma_2 is None else self.gamma_2 * branch)


def vit_block_forward(self, x, *args, **kwargs):
    if not bare(self.norm2) or forwards.altered(self.ls1, self.drop_path1):
        return original(self).forward(self, x, *args, **kwargs)
    branch = self.attn(self.norm1(x), *args, **kwargs)
    scale = getattr(self.ls1, "gamma", None)
    x, y = forwards.pre_norm_step(x, branch, self.norm2, scale=scale, drop=_drop(self.drop_path1, branch))
    return x + self.drop_path2(self.ls2(self.mlp(y)))


def post_norm_block_forward(self, x, *args, **kwargs):
    if not bare(self.norm1, self.norm2) or forwards.altered(self.drop_path1, self.drop_path2):
        return original(self).forward(self, x, *args, **kwargs)
    branch = self.attn(x, *args, **kwargs)
    x = forwards.post_norm_step(x, branch, self.norm1, drop=_drop(self.drop_path1, branch))
    branch = self.mlp(x)
    return forwards.post_norm_step(x, branch, self.norm2, drop=_drop(self.drop_path2, branch))


def _drop(module: nn.Module, branch: Tensor) -> Tensor | None:
    if type(module) is nn.Identity or not module.training or module.drop_prob == 0:
        return None
    return forwards.drop_path(branch, module.drop_prob, module.scale_by_keep)  # type: ignore[arg-type]


def swiglu_forward(self, x):
    norm = None if type(self.norm) is nn.Identity else self.norm
    if self.drop1.p > 0 or not bare(self.fc1_g, self.fc1_x, self.fc2, *(() if norm is None else (norm,))):
        return original(self).forward(self, x)
    return self.drop2(swiglu_mlp(x, self.fc1_g, self.fc1_x, norm, self.fc2))


def packed_swiglu_forward(self, x):
    norm = None if type(self.norm) is nn.Identity else self.norm
    if self.drop1.p > 0 or (norm is not None and not bare(norm)):
        return original(self).forward(self, x)
    gate, up = self.fc1(x).chunk(2, -1)
    if self.gate_last:
        gate, up = up, gate
    y = swiglu(gate, up) if norm is None else swiglu_norm(gate, up, norm.weight, norm.bias, norm.eps)
    return self.drop2(self.fc2(y))


def patch_dropout_forward(self, x):
    if not self.training or self.prob == 0:
        return x, None
    patches = x.shape[1] - self.num_prefix_tokens
    keep = max(1, int(patches * (1 - self.prob)))
    if self.evakernels_draw is not None:
        kept = self.evakernels_draw(len(x), patches, keep, x.device).long()  # timm gathers with them
    else:
        kept = torch.randn(len(x), patches, device=x.device).argsort(-1)[:, :keep]
        if self.ordered:
            kept = kept.sort(-1).values
    return gather_tokens(x, kept, prefix_tokens=self.num_prefix_tokens), kept


def patch_dropout_alone_forward(self, x):
    return patch_dropout_forward(self, x)[0]
