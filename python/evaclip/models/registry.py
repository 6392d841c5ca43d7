"""Models by name."""

import difflib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from evaclip.models.clip import CLIP
from evaclip.models.config import ALIASES, CONFIGS, ClipConfig, TextConfig, VisionConfig
from evaclip.weights.load import load_checkpoint


def list_models() -> list[str]:
    """Every name that `create_model` knows, published models first."""
    return [*CONFIGS, *ALIASES]


def create_model(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
) -> CLIP:
    """Build a model, with the weights of a checkpoint or with initial values from torch's generator.

    Args:
        name: one of `list_models()`.
        checkpoint: a file for `load_checkpoint`.
        device: "meta" builds the shapes alone: call `to_empty(device=...)` and `reset_parameters()` later.
        dtype: of the parameters, float32 by default; `logit_scale` is float32 always.
        vision, text: fields of `VisionConfig` and `TextConfig` to override, as {"layers": 2, "width": 256, "heads": 2}.

    Returns:
        the model, in training mode.

    Raises:
        ValueError: no such model or field (the nearest are named), fields that do not go together, or a checkpoint
            that does not fit.
    """
    config = configure(name, vision=vision, text=text)
    device = torch.get_default_device() if device is None else torch.device(device)
    # Built without memory first: values are then drawn, or read, once, on their device and in their dtype.
    with torch.device("meta"):
        model = CLIP(config)
    for tower in (model.visual, model.text):
        tower.to(dtype=dtype)
    if device.type == "meta" and checkpoint is None:
        return model
    model.to_empty(device=device)
    if checkpoint is None:
        model.reset_parameters()
    else:
        load_checkpoint(model, checkpoint)
    return model


def configure(name: str, *, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> ClipConfig:
    """The configuration of a model by name, with fields of its towers overridden; errors as `create_model`."""
    name = ALIASES.get(name, name)
    if name not in CONFIGS:
        raise ValueError(f"no model is called {name!r}{_nearest(name, list_models())}; `evaclip models` lists them all")
    config = CONFIGS[name]
    return replace(config, vision=_override(config.vision, "vision", vision), text=_override(config.text, "text", text))


def _override(tower: VisionConfig | TextConfig, which: str, changes: dict[str, Any] | None) -> Any:
    known = [field.name for field in fields(tower)]
    for key, value in (changes or {}).items():
        if key not in known:
            raise ValueError(f"the {which} tower has no field {key!r}{_nearest(key, known)}; it has {', '.join(known)}")
        default = getattr(tower, key)
        kind = type(default)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if key == "image_size":  # a side, or height and width
            kind, sides = int, value if isinstance(value, list | tuple) and len(value) == 2 else (value,)
            fits = all(type(side) is int for side in sides)
        if not fits and default is not None:
            raise ValueError(f"the {which} tower's {key} is {value!r}; it must be of type {kind.__name__}")
    return replace(tower, **(changes or {}))


def _nearest(word: str, known: list[str]) -> str:
    """The question " (did you mean ...?)", or nothing; case does not count, nor whether a dash is an underscore."""
    plain = {one.casefold().replace("_", "-"): one for one in known}
    matches = difflib.get_close_matches(word.casefold().replace("_", "-"), plain, n=3, cutoff=0.5)
    return f" (did you mean {', '.join(repr(plain[match]) for match in matches)}?)" if matches else ""
