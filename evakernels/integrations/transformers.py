"""transformers' CLIP and SigLIP, and the EVA-CLIP models that come as code beside their weights (`trust_remote_code`).

The classes of remote code live in a module made at run time, and in copies of it: they are recognised by their names,
which begin with EvaCLIP, their attributes and the parameters of their forwards.
"""

import inspect
from typing import Any

from torch import nn

from evakernels.integrations import forwards
from evakernels.integrations.patch import Plan, Report, original
from evakernels.nn import bare
from evakernels.ops.attention import attention

__all__ = ["replace"]

EXPECTED = "a CLIP, SigLIP or EvaCLIP model of transformers"
FILES = tuple(f"transformers.models.{name}.modeling_{name}" for name in ("clip", "siglip"))
LAYERS = {
    "CLIPEncoderLayer": "self hidden_states attention_mask kwargs",
    "SiglipEncoderLayer": "self hidden_states attention_mask kwargs",
    "EvaCLIPEncoderLayer": "self hidden_states attention_mask causal_attention_mask output_attentions",
}
ATTENTIONS = {
    "CLIPAttention": "self hidden_states attention_mask kwargs",
    "SiglipAttention": "self hidden_states attention_mask kwargs",
    "EvaCLIPAttention": "self hidden_states attention_mask causal_attention_mask output_attentions",
}
MLPS = ("CLIPMLP", "SiglipMLP", "EvaCLIPMLP")


def replace(model: nn.Module) -> Report:
    """Let the CLIP, SigLIP and EvaCLIP parts of a transformers model be computed by this package.

    Outputs and gradients are those of the untouched model up to rounding. Calls with a padding mask, with dropout of
    attention weights or for the weights themselves are computed by the original attention.

    Args:
        model: a CLIPModel, CLIPVisionModel, CLIPTextModel (also WithProjection), SiglipModel or one of its towers, an
            EvaCLIPModel or one of its towers, or a model that contains one; float32, bfloat16 or float16, on any
            device, not on meta; not sharded or compiled yet.

    Returns:
        What was replaced, what was not and why.

    Raises:
        TypeError: there is nothing of CLIP, SigLIP or EvaCLIP in the model.
        ValueError: it was replaced before, is on meta, or has nothing that could be replaced.
    """
    plan = Plan("integrations.transformers", model)
    theirs = [(name, module) for name, module in plan.modules() if _is_theirs(module)]
    for name, module in theirs:
        kind = type(module).__name__
        expected = LAYERS.get(kind) or ATTENTIONS.get(kind)
        feeding = kind in LAYERS and not getattr(module, "post_layernorm", False)
        for child, norm in module.named_children():
            forwards.decide_norm(plan, f"{name}.{child}" if name else child, norm, feeding)
            if type(norm) is nn.MultiheadAttention:
                plan.leave(f"{name}.{child}", "its queries are not the tokens that it attends to")
        if expected and " ".join(inspect.signature(type(module).forward).parameters) != expected:
            plan.leave(name, f"the parameters of its forward are not those of the {kind} that is covered: {expected}")
        elif kind in LAYERS:
            _decide_layer(plan, name, module)
        elif kind in ATTENTIONS:
            _decide_attention(plan, name, module)
        elif kind in MLPS:
            plan.leave(name, "two matrix products and an activation: there is nothing to fuse")
    return plan.carry_out(EXPECTED)


def _is_theirs(module: nn.Module) -> bool:
    return type(module).__module__ in FILES or type(module).__name__.startswith("EvaCLIP")


def _decide_layer(plan: Plan, name: str, layer: Any) -> None:
    if not type(layer).__name__.startswith("EvaCLIP"):
        plan.replace(name, layer, "add_norm", forward=layer_forward)
    elif layer.post_layernorm:
        plan.replace(name, layer, "norm_add, twice", forward=eva_post_norm_layer_forward)
    else:
        plan.replace(name, layer, "add_norm", forward=eva_layer_forward)


def layer_forward(self, hidden_states, attention_mask=None, **kwargs):
    if not bare(self.layer_norm2):
        return original(self).forward(self, hidden_states, attention_mask, **kwargs)
    branch = self.self_attn(hidden_states=self.layer_norm1(hidden_states), attention_mask=attention_mask, **kwargs)[0]
    x, y = forwards.pre_norm_step(hidden_states, branch, self.layer_norm2)
    return x + self.mlp(y)


def eva_layer_forward(self, hidden_states, attention_mask, causal_attention_mask, output_attentions=False):
    masks = attention_mask, causal_attention_mask, output_attentions
    if not bare(self.layer_norm2):
        return original(self).forward(self, hidden_states, *masks)
    branch, weights = self.self_attn(self.layer_norm1(hidden_states), *masks)
    x, y = forwards.pre_norm_step(hidden_states, branch, self.layer_norm2)
    x = x + self.mlp(y)
    return (x, weights) if output_attentions else (x,)


def eva_post_norm_layer_forward(self, hidden_states, attention_mask, causal_attention_mask, output_attentions=False):
    masks = attention_mask, causal_attention_mask, output_attentions
    if not bare(self.layer_norm1, self.layer_norm2):
        return original(self).forward(self, hidden_states, *masks)
    branch, weights = self.self_attn(hidden_states, *masks)
    x = forwards.post_norm_step(hidden_states, branch, self.layer_norm1)
    x = forwards.post_norm_step(x, self.mlp(x), self.layer_norm2)
    return (x, weights) if output_attentions else (x,)


def _decide_attention(plan: Plan, name: str, attn: Any) -> None:
    remote = type(attn).__name__.startswith("EvaCLIP")
    given = None if remote else attn.config._attn_implementation
    if given == "eager":
        plan.leave(name, 'it is to give its weights: config._attn_implementation is "eager"; load it with "sdpa"')
    elif not remote and not _a_kernel(attn):
        served = '"sdpa", "flex_attention" and those of flash attention'
        plan.leave(name, f'config._attn_implementation is "{given}"; served are {served}')
    elif why := forwards.head_dim_reason(attn.head_dim):
        plan.leave(name, why)
    else:
        plan.replace(name, attn, "attention", forward=eva_attention_forward if remote else attention_forward)


def _a_kernel(attn: Any) -> bool:
    """Whether attention is to be one of transformers' kernels: not eager, nor a function that a user has registered."""
    given = attn.config._attn_implementation or "eager"
    return given in ("sdpa", "flex_attention") or "flash" in given


def attention_forward(self, hidden_states, attention_mask=None, **kwargs):
    drops = self.training and self.dropout > 0
    if attention_mask is not None or drops or not _a_kernel(self):
        return original(self).forward(self, hidden_states, attention_mask, **kwargs)
    return _attend(self, hidden_states, bool(kwargs.get("is_causal", self.is_causal))), None


def eva_attention_forward(
    self, hidden_states, attention_mask=None, causal_attention_mask=None, output_attentions=False
):
    if attention_mask is not None or output_attentions or (self.training and self.dropout > 0):
        return original(self).forward(self, hidden_states, attention_mask, causal_attention_mask, output_attentions)
    return _attend(self, hidden_states, causal_attention_mask is not None), None


def _attend(self, x, causal):
    # Three products, not one of joined weights: adapters (LoRA) and quantised layers are modules in their place.
    heads = (*x.shape[:2], -1, self.head_dim)
    q, k, v = (project(x).view(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
    return self.out_proj(attention(q, k, v, causal=causal, scale=self.scale).flatten(2))
