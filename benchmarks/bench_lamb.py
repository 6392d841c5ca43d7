"""The LAMB step on the parameters of EVA02-CLIP-B-16, and on a model of a hundred small tensors."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import harness
from evakernels import FusedLAMB

# fp32: gradient, parameter and moments are read, parameter and moments written; a global clip reads gradients twice.
BYTES, BYTES_CLIPPED = 28, 32
RATE = 1e-6  # small: all providers share the parameters
DEEPSPEED = {"bias_correction": "step_size", "trust_ratio_bounds": (0.01, 10.0), "adapt_excluded": True}


def shapes(
    *, width: int, hidden: int, layers: int, tokens: int, patch: int, text: int, text_layers: int, words: int,
    context: int, embed: int,
) -> list[tuple[str, tuple[int, ...]]]:  # fmt: skip
    """Names and shapes of the parameters of a CLIP with an EVA-02 vision tower."""

    def linear(name: str, out: int, into: int) -> list[tuple[str, tuple[int, ...]]]:
        return [(f"{name}.weight", (out, into)), (f"{name}.bias", (out,))]

    def norm(name: str, channels: int) -> list[tuple[str, tuple[int, ...]]]:
        return [(f"{name}.weight", (channels,)), (f"{name}.bias", (channels,))]

    result: list[tuple[str, tuple[int, ...]]] = [
        ("logit_scale", ()),
        ("visual.cls_token", (1, 1, width)),
        ("visual.pos_embed", (1, tokens, width)),
        ("visual.patch_embed.proj.weight", (width, 3, patch, patch)),
        ("visual.patch_embed.proj.bias", (width,)),
    ]
    for i in range(layers):
        block = f"visual.blocks.{i}"
        result += norm(f"{block}.norm1", width) + norm(f"{block}.norm2", width)
        result += [(f"{block}.attn.{name}_bias", (width,)) for name in "qv"]
        result += [(f"{block}.attn.{name}_proj.weight", (width, width)) for name in "qkv"]
        result += norm(f"{block}.attn.inner_attn_ln", width) + linear(f"{block}.attn.proj", width, width)
        result += linear(f"{block}.mlp.w1", hidden, width) + linear(f"{block}.mlp.w2", hidden, width)
        result += norm(f"{block}.mlp.ffn_ln", hidden) + linear(f"{block}.mlp.w3", width, hidden)
    result += norm("visual.norm", width) + linear("visual.head", embed, width)
    result += [
        ("text.positional_embedding", (context, text)),
        ("text.text_projection", (text, embed)),
        ("text.token_embedding.weight", (words, text)),
    ]
    for i in range(text_layers):
        block = f"text.transformer.resblocks.{i}"
        result += norm(f"{block}.ln_1", text) + norm(f"{block}.ln_2", text)
        result += [(f"{block}.attn.in_proj_weight", (3 * text, text)), (f"{block}.attn.in_proj_bias", (3 * text,))]
        result += linear(f"{block}.attn.out_proj", text, text)
        result += linear(f"{block}.mlp.c_fc", 4 * text, text) + linear(f"{block}.mlp.c_proj", text, 4 * text)
    return result + norm("text.ln_final", text)


BASE = shapes(
    width=768, hidden=2048, layers=12, tokens=197, patch=16, text=512, text_layers=12, words=49408, context=77,
    embed=512,
)  # fmt: skip
DIGITS = shapes(
    width=64, hidden=170, layers=3, tokens=17, patch=2, text=64, text_layers=2, words=128, context=16, embed=64,
)  # fmt: skip


def elements(model: list[tuple[str, tuple[int, ...]]]) -> int:
    return sum(torch.Size(shape).numel() for _, shape in model)


assert elements(BASE) == 149_691_137  # as published


def parameters(model: list[tuple[str, tuple[int, ...]]]) -> tuple[list[Tensor], list[Tensor]]:
    """Random parameters with gradients, those with weight decay and those without."""
    decayed, excluded = [], []
    for name, shape in model:
        p = torch.empty(shape, device=harness.device()).normal_(std=0.02).requires_grad_()
        p.grad = torch.empty_like(p).normal_(std=1e-3)
        table = name.endswith(("cls_token", "pos_embed", "positional_embedding"))
        (excluded if len(shape) <= 1 or table else decayed).append(p)
    return decayed, excluded


def providers(decayed: list[Tensor], excluded: list[Tensor], clip: float | None, quick: bool) -> harness.Providers:
    def stepping(build: Callable, **options) -> Callable[[], object]:
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": excluded, "weight_decay": 0.0}]
        return build(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6, **options).step

    result = harness.ours("lamb", lambda: stepping(FusedLAMB, max_grad_norm=clip))
    if quick:
        del result["evakernels, reference"]
    result["evakernels, DeepSpeed's rule"] = stepping(FusedLAMB, max_grad_norm=clip, **DEEPSPEED)
    timm = harness.peer("timm.optim.lamb")
    result["timm Lamb"] = timm if isinstance(timm, str) else stepping(timm.Lamb, max_grad_norm=clip)
    if not quick:
        if not isinstance(timm, str):
            result["timm Lamb, foreach"] = stepping(timm.Lamb, max_grad_norm=clip, foreach=True)
        result["evakernels, per group"] = stepping(FusedLAMB, max_grad_norm=clip, trust="group")
    if clip is None:
        result["torch AdamW, fused"] = stepping(torch.optim.AdamW, fused=True)
    apex = harness.peer("apex.optimizers")
    if not isinstance(apex, str) and harness.device().type == "cuda":
        result["apex FusedLAMB"] = stepping(apex.FusedLAMB, max_grad_norm=clip or 1e9)
    else:
        result["apex FusedLAMB"] = apex if isinstance(apex, str) else "it needs a GPU"
    return result


def rows(quick: bool) -> Iterator[dict]:
    """One case per model, with and without a limit on the norm of the gradients."""
    models = {"digits": DIGITS} if harness.emulated() else {"digits": DIGITS, "EVA02-CLIP-B-16": BASE}
    for name, model in models.items():
        decayed, excluded = parameters(model)
        for clip in (None,) if quick else (None, 1.0):
            yield from harness.compare(
                "lamb",
                f"{name}, {len(model)} tensors, {elements(model)} elements",
                torch.float32,
                "step" if clip is None else "step with clip",
                providers(decayed, excluded, clip, quick),
                bytes=elements(model) * (BYTES if clip is None else BYTES_CLIPPED),
                quick=quick,
                seconds=10.0 if model is BASE and not quick and harness.device().type == "cpu" else None,
            )
