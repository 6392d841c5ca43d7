"""The original EVA-CLIP code (`eva_clip`): rei's, for models up to 5B, and shinji's, for 8B and 18B; and its loss.

That code is no package with a name to import, and copies of it abound: modules are recognised by the names of their
classes, their attributes and the parameters of their methods.

Beyond speed, a replaced vision tower hands the ids of the kept patches to each block as an argument, where the original
reads an environment variable RoPE and exchanges `rope.forward` at every step: two forwards before a backward,
recomputation and `torch.compile` work, whatever the variable says. It embeds no patch that is dropped, and checkpoints
without re-entrance, with or without xformers.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evakernels.integrations import forwards
from evakernels.integrations.patch import Plan, Replaced, Report, original, taken
from evakernels.nn import ClipLoss as _ClipLoss
from evakernels.nn import bare, equal_shares, swiglu_mlp
from evakernels.ops.attention import Rope2d, attention_qkvpacked
from evakernels.ops.contrastive import contrastive_loss
from evakernels.ops.tokens import gather_tokens, patchify

__all__ = ["ClipLoss", "replace"]

EXPECTED = "a CustomCLIP or CLIP of eva_clip, or a tower of one"
Draw = Callable[[int, int, int, torch.device], Tensor]
# By class: its attributes, and of its methods the parameters.
BLOCK = "norm1 attn drop_path norm2 mlp gamma_1 gamma_2 postnorm", {"forward": "self x rel_pos_bias attn_mask"}
ATTENTION = (
    "num_heads scale subln q_bias v_bias relative_position_bias_table attn_drop inner_attn_ln proj proj_drop xattn"
    " xattn_drop rope",
    {"forward": "self x rel_pos_bias attn_mask"},
)
TEXT_ATTENTION = (
    "num_heads in_proj_weight in_proj_bias logit_scale head_scale scale attn_drop out_proj out_drop xattn xattn_drop",
    {"forward": "self x attn_mask"},
)
TEXT_BLOCK = (
    "ln_1 attn ls_1 ln_2 mlp ls_2 xattn",
    {"forward": "self x attn_mask", "attention": "self x attn_mask"},
)
TOWER = (
    "patch_embed cls_token pos_embed pos_drop patch_dropout rope rel_pos_bias blocks norm fc_norm grad_checkpointing",
    {"forward_features": "self x return_all_features"},
)
PATCH_EMBED = "proj img_size num_patches", {"forward": "self x kwargs"}
SWIGLU = "w1 w2 w3 act ffn_ln drop", {"forward": "self x"}


class ClipLoss(_ClipLoss):
    """EVA-CLIP's `ClipLoss`, by `evakernels.contrastive_loss`.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: as in `evakernels.nn.ClipLoss`.
        smoothing: of the labels, in [0, 1).

    Raises:
        ValueError: as `evakernels.nn.ClipLoss`; or `smoothing` is out of its range.

    Source: github.com/baaivision/EVA, `eva_clip.loss.ClipLoss`.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        if not 0 <= smoothing < 1:
            raise ValueError(f"eva.ClipLoss: smoothing is {smoothing}; allowed is 0 <= smoothing < 1")
        self.smoothing = smoothing

    def forward(  # type: ignore[override]  # it takes and returns what EVA's does, not open_clip's
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of (b, D) features and {"i2t": accuracy, "t2i": accuracy}: of the whole batch, on every process."""
        processes = equal_shares("eva.ClipLoss", self.world_size, image_features)
        loss, i2t, t2i = contrastive_loss(
            image_features, text_features, logit_scale, label_smoothing=self.smoothing, **processes
        )
        return loss, {"i2t": i2t, "t2i": t2i}


def replace(model: nn.Module, *, draw: Draw | None = None) -> Report:
    """Let a model of the original EVA-CLIP code be computed by this package.

    Outputs and gradients are those of the untouched model up to rounding, with the same draws of stochastic depth and,
    unless `draw` is given, of the patches to keep.

    Args:
        model: a CustomCLIP or CLIP, an EVAVisionTransformer or a TextTransformer; float32, bfloat16 or float16, on any
            device, not on meta; not sharded or compiled yet.
        draw: (batch, patches, keep, device) -> ids (batch, keep) of the patches to keep in training, instead of the
            original's draw on the CPU: `evakernels.sample_kept_tokens` with a seed and an offset of the step.

    Returns:
        What was replaced, what was not and why.

    Raises:
        TypeError: nothing in the model is eva_clip's.
        ValueError: it was replaced before, is on meta, or has nothing that could be replaced.
    """
    plan = Plan("integrations.eva", model)
    modules = [(name, m) for name, m in plan.modules() if type(m).__module__.partition(".")[0] not in OTHERS]

    def every(*known: Any) -> list[Any]:
        return [module for _, module in modules if _is(module, *known)]

    blocks, text_blocks = every("Block", *BLOCK), every("ResidualAttentionBlock", *TEXT_BLOCK)
    towers, attentions = every("EVAVisionTransformer", *TOWER), every("Attention", *ATTENTION)
    feeding = {id(norm) for block in blocks for norm in _feeding_products(block)}
    feeding |= {id(norm) for block in text_blocks for norm in (block.ln_1, block.ln_2)}
    biased = {id(block.attn) for tower in towers if tower.rel_pos_bias is not None for block in tower.blocks}
    ropes = {id(rope): _rope(rope) for rope in (attn.rope for attn in attentions) if rope is not None}
    why = {id(attn): _attention_reason(attn, ropes, id(attn) in biased) for attn in attentions}
    why_towers = {id(tower): _tower_reason(tower, why) for tower in towers}
    # Where the original tower goes on to exchange `rope.forward`, every attention has to go on calling it.
    replaced = {id(block.attn) for tower in towers if not why_towers[id(tower)] for block in tower.blocks}
    for attn in attentions:
        if attn.rope is not None and id(attn) not in replaced:
            why[id(attn)] = why[id(attn)] or "its tower, which is not replaced, gives the ids of patches to its rope"
    masks = {id(block): m for _, m in modules for block in _masked_blocks(m)}
    homes = [m for _, m in modules if type(m).__name__ in (*KNOWN, *WITH_NORMS)]
    norms = {id(child) for home in homes for child in home.children()}
    for name, module in modules:
        kind = type(module).__name__
        if _is(module, "EVAVisionTransformer", *TOWER):
            _decide_tower(plan, name, module, why_towers[id(module)], draw)
        elif _is(module, "Block", *BLOCK):
            plan.replace(name, module, "norm_add, twice" if module.postnorm else "add_norm", forward=block_forward)
        elif id(module) in why:
            _decide_attention(plan, name, module, why[id(module)], ropes)
        elif _is(module, "SwiGLU", *SWIGLU):
            _decide_swiglu(plan, name, module)
        elif _is(module, "ResidualAttentionBlock", *TEXT_BLOCK):
            _decide_text_block(plan, name, module, masks.get(id(module)))
        elif _is(module, "Attention", *TEXT_ATTENTION):
            _decide_text_attention(plan, name, module)
        elif kind in UNCOVERED:
            plan.leave(name, UNCOVERED[kind])
        elif kind in KNOWN:
            plan.leave(name, f"its attributes, or the parameters of its methods, are not those of eva_clip's {kind}")
        elif id(module) in norms:
            forwards.decide_norm(plan, name, module, id(module) in feeding)
    return plan.carry_out(EXPECTED)


OTHERS = ("timm", "open_clip", "transformers", "torchvision")  # they have classes of the same names
KNOWN = ("EVAVisionTransformer", "Block", "Attention", "SwiGLU", "ResidualAttentionBlock")
WITH_NORMS = ("TextTransformer", "CLIP", "VisionTransformer", "CustomResidualAttentionBlock")
UNCOVERED = {
    "Mlp": forwards.GELU,
    "CustomResidualAttentionBlock": "cosine and cross attention are not covered",
    "RelativePositionBias": "relative position bias is not covered",
}


def _is(module: Any, name: str, attributes: str, methods: dict[str, str]) -> bool:
    """Whether a module is what the original means by this name."""

    def parameters(method: str) -> str:
        return " ".join(inspect.signature(getattr(type(module), method)).parameters)

    return (
        type(module).__name__ == name
        and all(hasattr(module, attribute) for attribute in attributes.split())
        and all(hasattr(type(module), m) and parameters(m) == expected for m, expected in methods.items())
    )


# Vision


def _feeding_products(block: Any) -> list[nn.Module]:
    """Its norms whose outputs nothing but matrix products reads."""
    inner = [norm for norm in (getattr(block.attn, "inner_attn_ln", None), getattr(block.mlp, "ffn_ln", None)) if norm]
    return inner if block.postnorm else [*inner, block.norm1, block.norm2]


def _tower_reason(tower: Any, why: dict[int, str | None]) -> str | None:
    if patched := taken(tower, "forward_features"):
        return patched
    dropout = tower.patch_dropout
    if type(dropout) is nn.Identity:
        return None
    if not getattr(dropout, "exclude_first_token", False):
        return "its patch_dropout may drop the class token"
    for number, block in enumerate(tower.blocks if tower.rope is not None else ()):
        if not _is(block, "Block", *BLOCK) or taken(block, "forward"):
            return f"it drops patches, and blocks.{number} is not known to take their ids"
        if why.get(id(block.attn), "it is not known"):
            return f"it drops patches, and blocks.{number}.attn, which cannot be replaced, would not take their ids"
    return None


def _decide_tower(plan: Plan, name: str, tower: Any, why: str | None, draw: Draw | None) -> None:
    if why:
        plan.leave(name, why)
        return
    prefix = f"{name}." if name else ""
    plan.replace(name, tower, "patch ids as an argument", forward_features=forward_features)
    plan.add(name, tower, "evakernels_draw", draw)
    if type(tower.patch_dropout) is not nn.Identity:
        plan.note(f"{prefix}patch_dropout", "gather_tokens")
    if _is(tower.patch_embed, "PatchEmbed", *PATCH_EMBED):
        embed = tower.patch_embed
        plan.replace(f"{prefix}patch_embed", embed, "patchify, of kept patches", forward=patch_embed_forward)


def forward_features(self: Any, x, return_all_features=False):
    kept = _kept(self, x)
    if kept is None:
        x = self.patch_embed(x)
    else:
        known = isinstance(self.patch_embed, Replaced)
        x = self.patch_embed(x, kept=kept) if known else gather_tokens(self.patch_embed(x), kept, prefix_tokens=0)
    x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1)
    if self.pos_embed is not None:
        x = x + (self.pos_embed if kept is None else gather_tokens(self.pos_embed.expand(len(x), -1, -1), kept))
    x = self.pos_drop(x)
    bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
    # Without a rotary embedding a token's place is of no account.
    arguments = (bias, None) if kept is None or self.rope is None else (bias, None, kept)
    for block in self.blocks:
        x = checkpoint(block, x, *arguments, use_reentrant=False) if self.grad_checkpointing else block(x, *arguments)
    if return_all_features:
        return x
    if self.fc_norm is not None:
        return self.fc_norm(self.norm(x).mean(1))
    # Only the class token goes on; but whoever hooked the norm means all of them.
    return self.norm(x[:, 0]) if bare(self.norm) else self.norm(x)[:, 0]


def _kept(tower, images: Tensor) -> Tensor | None:
    """(batch, keep) ids of the patches to keep; None for all."""
    rate = getattr(tower.patch_dropout, "prob", 0.0)
    if not tower.patch_dropout.training or rate == 0:
        return None
    return forwards.kept_patches(tower.evakernels_draw, images, tower.patch_embed.num_patches, rate)


def patch_embed_forward(self, x, kept=None, **kwargs):
    proj = self.proj
    if kept is None:
        return original(self).forward(self, x, **kwargs)
    if not bare(proj):
        return gather_tokens(original(self).forward(self, x, **kwargs), kept, prefix_tokens=0)
    if tuple(x.shape[2:]) != tuple(self.img_size):
        raise ValueError(f"the images are {tuple(x.shape[2:])}; this model takes {tuple(self.img_size)}")
    rows, columns = proj.kernel_size
    return F.linear(patchify(x, (rows, columns), kept), proj.weight.flatten(1), proj.bias)


def block_forward(self, x, rel_pos_bias=None, attn_mask=None, kept=None):
    ids = {} if kept is None else {"kept": kept}
    options = {"rel_pos_bias": rel_pos_bias, "attn_mask": attn_mask, **ids}
    if self.postnorm:
        for norm, gamma, branch in (
            (self.norm1, self.gamma_1, lambda y: self.attn(y, **options)),
            (self.norm2, self.gamma_2, self.mlp),
        ):
            y = branch(x)
            if bare(norm) and not forwards.altered(self.drop_path):
                x = forwards.post_norm_step(x, y, norm, scale=gamma, drop=_drop(self.drop_path, y))
            else:
                x = x + self.drop_path(_scaled(norm(y), gamma))
        return x
    branch = self.attn(self.norm1(x), **options)
    if bare(self.norm2) and not forwards.altered(self.drop_path):
        x, y = forwards.pre_norm_step(x, branch, self.norm2, scale=self.gamma_1, drop=_drop(self.drop_path, branch))
    else:
        x = x + self.drop_path(_scaled(branch, self.gamma_1))
        y = self.norm2(x)
    return x + self.drop_path(_scaled(self.mlp(y), self.gamma_2))


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else gamma * branch


def _drop(module: Any, branch: Tensor) -> Tensor | None:
    rate = getattr(module, "drop_prob", None)
    return forwards.drop_path(branch, rate) if rate and module.training else None


def _decide_attention(plan: Plan, name: str, attn: Any, why: str | None, ropes: dict[int, Rope2d | str]) -> None:
    if why:
        plan.leave(name, why)
        return
    rotary = "" if attn.rope is None else ", rotary embedding included"
    plan.replace(name, attn, f"attention_qkvpacked{rotary}", forward=attention_forward)
    plan.add(name, attn, "evakernels_rope", None if attn.rope is None else ropes[id(attn.rope)])


def _attention_reason(attn: Any, ropes: dict[int, Rope2d | str], biased: bool) -> str | None:
    if why := taken(attn, "forward"):
        return why
    if attn.relative_position_bias_table is not None or (biased and not attn.xattn):
        return "relative position bias is not covered"
    if attn.attn_drop.p > 0 or attn.xattn_drop > 0:
        return f"it drops attention weights (attn_drop {attn.attn_drop.p})"
    width = len(attn.q_proj.weight) if attn.subln else len(attn.qkv.weight) // 3
    rope = None if attn.rope is None else ropes[id(attn.rope)]
    return rope if isinstance(rope, str) else forwards.head_dim_reason(width // attn.num_heads)


def _rope(rope: Any) -> Rope2d | str:
    """The Rope2d that turns by the tables of a VisionRotaryEmbeddingFast, or why there is none."""
    if not hasattr(rope, "freqs_cos") or rope.freqs_cos.dim() != 2:
        return f"its rope is a {type(rope).__name__}; VisionRotaryEmbeddingFast is covered"
    cos, sin = rope.freqs_cos.detach().double().cpu(), rope.freqs_sin.detach().double().cpu()
    channels, side = cos.shape[1], math.isqrt(len(cos))
    reference = 16
    if side > 1 and side**2 == len(cos) and channels % 4 == 0:
        # From one row to the next the slowest pair of channels turns by this, far from a full turn.
        slowest, last = 10000.0 ** (4 / channels - 1), channels // 2 - 1
        reference = round(float(torch.atan2(sin[side, last], cos[side, last])) / slowest * side)
    if side**2 == len(cos) and channels % 4 == 0 and reference > 0:
        made = Rope2d(side, channels, reference_grid=reference).to(rope.freqs_cos.device)
        rows, columns = made.row_table.cpu()[:, None], made.column_table.cpu()[None]
        pairs = torch.cat((rows.expand(-1, side, -1, -1), columns.expand(side, -1, -1, -1)), 2).flatten(0, 1).double()
        # Theirs are rounded to float32 before the cosine, so that 24 rows are an error of 24 * eps; some are narrower.
        tolerance = max(1e-5, torch.finfo(rope.freqs_cos.dtype).eps)
        if (pairs.repeat_interleave(2, 1) - torch.stack((cos, sin), -1)).abs().max() <= tolerance:
            return made
    return "its angles are not those of Rope2d (theta 10000, a square grid, a whole reference grid)"


def attention_forward(self, x, rel_pos_bias=None, attn_mask=None, kept=None):
    biased = not self.xattn and (rel_pos_bias is not None or attn_mask is not None)  # which xattn ignores
    if biased or self.attn_drop.p > 0 or self.xattn_drop > 0:
        if kept is not None:
            raise NotImplementedError(
                "eva_clip's Attention: a mask or bias beside dropped patches is not covered, nor is dropout of"
                " attention weights; leave it out, or call undo()"
            )
        return original(self).forward(self, x, rel_pos_bias, attn_mask)
    # The original, too, reads these weights and calls no projection.
    weights = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight) if self.subln else (self.qkv.weight,)
    bias = None if self.q_bias is None else torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
    qkv = F.linear(x, torch.cat(weights) if self.subln else weights[0], bias).unflatten(-1, (3, self.num_heads, -1))
    y = attention_qkvpacked(qkv, rope=self.evakernels_rope, positions=kept, scale=self.scale).flatten(2)
    return self.proj_drop(self.proj(self.inner_attn_ln(y)))


def _decide_swiglu(plan: Plan, name: str, mlp: Any) -> None:
    normed = type(mlp.ffn_ln) is not nn.Identity
    if type(mlp.act) is not nn.SiLU:
        plan.leave(name, f"its gate goes through {type(mlp.act).__name__}, not SiLU")
    elif normed and type(mlp.ffn_ln).__name__ not in ("FusedLayerNorm", "LayerNorm"):
        plan.leave(name, f"its ffn_ln is a {type(mlp.ffn_ln).__name__}; only LayerNorm is covered")
    else:
        plan.replace(name, mlp, f"swiglu{'_norm' if normed else ''}_packed", forward=swiglu_forward)


def swiglu_forward(self, x):
    norm = None if type(self.ffn_ln) is nn.Identity else self.ffn_ln
    if not bare(self.w1, self.w2, self.w3, *(() if norm is None else (norm,))):
        return original(self).forward(self, x)
    return self.drop(swiglu_mlp(x, self.w1, self.w2, norm, self.w3))


# Text


def _masked_blocks(module: Any) -> list[nn.Module]:
    """The blocks that a module gives its own `attn_mask`: a TextTransformer, or a CLIP with a text tower's parts."""
    blocks = getattr(getattr(module, "transformer", None), "resblocks", ())
    return list(blocks) if hasattr(module, "attn_mask") else []


def _decide_text_block(plan: Plan, name: str, block: Any, tower: Any) -> None:
    if type(block.attn) is not nn.MultiheadAttention:
        plan.replace(name, block, "add_norm", forward=text_block_forward)
        return
    mask = getattr(tower, "attn_mask", None)
    if why := _multihead_reason(block.attn, mask):
        plan.leave(f"{name}.attn", why)
        plan.replace(name, block, "add_norm", forward=text_block_forward)
        return
    if not plan.replace(name, block, "add_norm", forward=text_block_forward, attention=text_block_attention):
        plan.leave(f"{name}.attn", "its block is left")
        return
    plan.note(f"{name}.attn", f"attention_qkvpacked{'' if mask is None else ', causal'}")
    # In a tuple: a module by itself would become a child of its child.
    plan.add(name, block, "evakernels_tower", () if mask is None else (tower,))


def _multihead_reason(attn: nn.MultiheadAttention, mask: Tensor | None) -> str | None:
    if mask is not None and not torch.equal(mask, torch.full_like(mask, -math.inf).triu(1)):
        return "its mask is not the triangular one"
    if attn.dropout > 0:
        return f"it drops attention weights (dropout {attn.dropout})"
    if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn:
        return "its keys and values are not projected as its queries are"
    return (
        "it takes (batch, tokens, channels): batch_first is True"
        if attn.batch_first
        else (forwards.head_dim_reason(attn.head_dim))
    )


def text_block_forward(self, x, attn_mask=None):
    branch = self.attention(self.ln_1(x), attn_mask=attn_mask)
    if bare(self.ln_2):
        x, y = forwards.pre_norm_step(x, self.ls_1(branch), self.ln_2)
    else:
        x = x + self.ls_1(branch)
        y = self.ln_2(x)
    return x + self.ls_2(self.mlp(y))


def text_block_attention(self, x, attn_mask=None):
    attn = self.attn
    causal = attn_mask is not None and any(_same(attn_mask, tower.attn_mask) for tower in self.evakernels_tower)
    if (attn_mask is not None and not causal) or attn.dropout > 0 or not bare(attn):
        return original(self).attention(self, x, attn_mask)
    y = _attend(x, attn.in_proj_weight, attn.in_proj_bias, attn.num_heads, causal, None)
    return F.linear(y, attn.out_proj.weight, attn.out_proj.bias)


def _same(mask: Tensor, own: Tensor) -> bool:
    """Whether a mask is the tower's own; a re-entrant checkpoint hands over another tensor of the same memory."""
    return mask is own or (not torch.compiler.is_compiling() and mask.data_ptr() == own.data_ptr())


def _attend(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, causal: bool, scale: float | None) -> Tensor:
    """(tokens, batch, channels), as text towers have it, to the input of the output projection."""
    qkv = F.linear(x, weight, bias).unflatten(-1, (3, heads, -1)).transpose(0, 1)
    return attention_qkvpacked(qkv, causal=causal, scale=scale).flatten(2).transpose(0, 1)


def _decide_text_attention(plan: Plan, name: str, attn: Any) -> None:
    if not attn.xattn:
        plan.leave(name, "without xattn it is not covered")
    elif attn.logit_scale is not None or attn.head_scale is not None:
        plan.leave(name, "cosine attention and scaled heads are not covered")
    elif attn.xattn_drop > 0:
        plan.leave(name, f"it drops attention weights (attn_drop {attn.xattn_drop})")
    elif why := forwards.head_dim_reason(attn.in_proj_weight.shape[1] // attn.num_heads):
        plan.leave(name, why)
    else:
        plan.replace(name, attn, "attention_qkvpacked, causal where masked", forward=text_attention_forward)


def text_attention_forward(self, x, attn_mask=None):
    if self.xattn_drop > 0:
        return original(self).forward(self, x, attn_mask)
    causal = attn_mask is not None  # any mask, as the original: with xattn it stands for the triangular one
    y = _attend(x, self.in_proj_weight, self.in_proj_bias, self.num_heads, causal, self.scale)
    return self.out_drop(self.out_proj(y))
