"""`evaclip train RECIPE --print`: every field of a recipe as TOML, and what follows from them as comments."""

import dataclasses
import json
import math
from textwrap import wrap
from typing import Any

from evaclip.models.clip import CLIP
from evaclip.models.config import VisionConfig
from evaclip.train.model import build_model
from evaclip.train.optim import parameter_groups
from evaclip.train.recipe import Data, Recipe, Stage


def resolved(recipe: Recipe) -> str:
    """The recipe with every field, which `load_recipe` reads back equal, under a summary in comments."""
    model = build_model(recipe, "meta")
    if recipe.loss.fixed_logit_scale is not None:
        model.logit_scale.requires_grad_(False)
    vision, text = (sum(p.numel() for p in tower.parameters()) for tower in (model.visual, model.text))
    batch, steps = recipe.data.batch_size, recipe.steps
    lines = [
        f"{recipe.model.name}: {vision:,} parameters of the vision tower, {text:,} of the text tower",
        f"{steps:,} steps of {batch:,} samples: {steps * batch:,} samples; {recipe.schedule.warmup:,} steps of warm-up",
        *(_stage(i, stage, model.config.vision) for i, stage in enumerate(recipe.stages(), start=1)),
        *_learning_rates(model, recipe),
    ]
    lines = [part for line in lines for part in wrap(line, 116, subsequent_indent="    ")]
    values = dataclasses.asdict(recipe)
    if recipe.data.mixture and recipe.data.source == Data.source:
        del values["data"]["source"]  # which a mixture takes the place of
    return "".join(f"# {line}\n" for line in lines) + "\n" + to_toml(values)


def _stage(number: int, stage: Stage, vision: VisionConfig) -> str:
    where = ", ".join(f"{part.source} x {part.weight:g}" for part in stage.data.mixture) or stage.data.source
    seen = f"{vision.tokens(stage.data.patch_drop)} of {vision.tokens()} tokens"
    if stage.tail:
        seen += f", all of them in the last {stage.tail:,} steps"
    if stage.micro_batches > 1:
        seen += f"; {stage.micro_batches} micro-batches"
    kind = f"videos of {stage.frames} frames" if stage.kind == "video" else "images"
    return f"phase {number}, steps {stage.first:,} to {stage.end - 1:,}: {kind} of {where}; {seen}"


def _learning_rates(model: CLIP, recipe: Recipe) -> list[str]:
    """Peak learning rates from the embeddings up, and what LAMB's trust ratio runs over."""
    groups = parameter_groups(model, recipe.optimizer)
    of = {id(p): group for group in groups for p in group["params"]}
    lines = []
    for name, tower in (("vision", model.visual), ("text", model.text)):
        rates = sorted({of[id(p)]["initial_lr"] * of[id(p)]["lr_scale"] for p in tower.parameters()})
        lines.append(f"peak learning rates, {name}, embeddings to head: {', '.join(f'{rate:.2e}' for rate in rates)}")
    scale, fixed = recipe.optimizer.logit_scale_lr, recipe.loss.fixed_logit_scale
    lines.append(f"logit_scale: {f'fixed at {fixed:g}' if fixed is not None else f'{scale:.2e}'}")
    if recipe.optimizer.name == "lamb":
        sizes = [sum(p.numel() for p in group["params"]) for group in groups]
        trust = recipe.optimizer.trust
        ratios = len(sizes) if trust == "group" else sum(len(group["params"]) for group in groups)
        if not isinstance(trust, str):
            ratios = sum(math.ceil(size / math.ceil(size / trust[1])) for size in sizes)
        lines.append(f"{len(groups)} groups of parameters, {ratios:,} trust ratios")
    return lines


def to_toml(values: dict[str, Any], table: str = "") -> str:
    """A dictionary as TOML: values first, then tables; None is left out."""
    tables, rows = [], []
    for key, value in values.items():
        nested = isinstance(value, list | tuple) and value and all(isinstance(v, dict) for v in value)
        if isinstance(value, dict) and not table:
            tables.append(f"\n[{key}]\n{to_toml(value, key)}")
        elif nested and not table:
            tables += [f"\n[[{key}]]\n{to_toml(v, key)}" for v in value]
        elif value is not None:
            rows.append(f"{key} = {_value(value)}\n")
    return "".join(rows + tables)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_value(v)}" for key, v in value.items() if v is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    # JSON's strings and booleans are TOML's; so are Python's numbers.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)
