"""Starting from the weights of another model: of a tower alone, of another grid or patch size."""

import math
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from evaclip.models.checkpoint import _check_fit, _is_rotary_table, _read, _unwrap
from evaclip.models.clip import CLIP

# What a tower does not take over: its way into a joint space that another model does not share.
FRESH = ("head.weight", "head.bias", "text_projection")
# What a file may hold that no tower has: a masked image model's own, and a CLIP's temperature.
UNUSED = ("lm_head.weight", "lm_head.bias", "mask_token", "logit_scale")


def start_from(model: CLIP, path: str | Path, tower: Literal["visual", "text"] | None = None) -> list[str]:
    """Take over weights with native keys, those of all the model or of one tower; nothing is changed unless all fit.

    Positions of another grid and patch kernels of another size are interpolated (bicubic, not antialiased). A tower
    comes from a CLIP, whose other parts are ignored, or from a file of its own, as of a masked image model; its head or
    projection keeps its values, and so do attention's inner norms where the file has none.

    Returns:
        sentences about what was not taken over as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or a key is missing, unexpected or of another shape: all are listed.
    """
    path = Path(path)
    weights = {key: x for key, x in _unwrap(_read(path), path).items() if not _is_rotary_table(key)}
    target = dict((model if tower is None else getattr(model, tower)).state_dict(keep_vars=True))
    notes = []
    if tower is not None:
        weights = _of_tower(weights, tower)
        fresh = [key for key in target if key in FRESH]
        inner = [key for key in target if ".inner_attn_ln." in key]
        if not any(key in weights for key in inner):
            fresh += inner
        for key in fresh:
            del target[key]
        notes += [f"{path.name}: {', '.join(fresh[:3])}{', ...' if len(fresh) > 3 else ''} start anew"]
    prefix = "visual." if tower is None else ""
    for key, resize in ((prefix + "pos_embed", _grid), (prefix + "patch_embed.proj.weight", _kernel)):
        if key in weights and key in target and weights[key].shape != target[key].shape:
            was, weights[key] = tuple(weights[key].shape), resize(weights[key], target[key], model.visual.grid)
            notes += [f"{path.name}: {key} {was} interpolated to {tuple(weights[key].shape)}"]
    _check_fit(weights, target, path)
    with torch.no_grad():
        for key, parameter in target.items():
            parameter.copy_(weights[key])
    return notes


def _of_tower(weights: dict[str, Tensor], tower: str) -> dict[str, Tensor]:
    prefix, others = tower + ".", ("visual.", "text.")
    own = {key.removeprefix(prefix): x for key, x in weights.items() if key.startswith(prefix)}
    # OpenAI's files have the text tower's keys without a prefix; a masked image model's are the tower's.
    own = own or {key: x for key, x in weights.items() if not key.startswith(others)}
    return {key: x for key, x in own.items() if key not in (*FRESH, *UNUSED)}


def _grid(positions: Tensor, target: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, 1 + side^2, C) to the target's grid; the class token's position stays."""
    side = math.isqrt(max(0, positions.shape[1] - 1)) if positions.dim() == 3 else 0
    if side == 0 or side**2 != positions.shape[1] - 1 or positions.shape[2] != target.shape[2]:
        return positions  # of another width, or of no square: the check says so
    image = positions[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    image = F.interpolate(image, grid, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1].float(), image.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def _kernel(weight: Tensor, target: Tensor, grid: tuple[int, int]) -> Tensor:
    """(C, channels, p, p) to the target's p."""
    if weight.dim() != 4 or weight.shape[:2] != target.shape[:2]:
        return weight
    return F.interpolate(weight.float(), target.shape[2:], mode="bicubic", align_corners=False)
