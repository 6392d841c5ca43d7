"""The model of a recipe, and the weights it starts from."""

from typing import Literal

import torch

from evaclip.models import create_model, load_checkpoint
from evaclip.models.clip import CLIP
from evaclip.train.parallel import shard
from evaclip.train.ranks import ALONE, Ranks
from evaclip.train.recipe import Model, Recipe, RecipeError

# The fields of `Model` that name weights, and the tower they are for, in the order they are read.
CHECKPOINTS: dict[str, Literal["visual", "text"] | None] = {
    "checkpoint": None,
    "image_checkpoint": "visual",
    "text_checkpoint": "text",
}


def build_model(recipe: Recipe, device: str | torch.device, ranks: Ranks = ALONE) -> CLIP:
    """A recipe's model on a device, in the dtype it is trained in, with initial values; sharded, if it is to be."""
    model, compute, device = recipe.model, recipe.compute, torch.device(device)
    dtype = None if compute.autocasts else compute.half
    # Sharded without memory first: a whole one may be more than a GPU holds.
    built = create_model(model.name, device="meta", dtype=dtype, vision=model.vision, text=model.text)
    shard(built, compute, ranks, device)
    if device.type != "meta":
        built.to_empty(device=device).reset_parameters()
    return built


def start(model: CLIP, recipe: Model) -> list[str]:
    """Take over the weights a recipe starts from.

    Returns:
        a sentence about each source: what was read of it, what was not, and what starts anew.

    Raises:
        RecipeError: a source is missing.
        ValueError: a source does not fit.
    """
    notes = []
    for key, part in CHECKPOINTS.items():
        path = getattr(recipe, key)
        if path is None:
            continue
        try:
            # What a tower alone does not take over: its way into a joint space that another model does not share.
            skip = () if part is None else ("visual.head", "text.text_projection")
            notes.append(str(load_checkpoint(model, path, part=part, resize="eva", skip=skip)))
        except FileNotFoundError as error:
            option = key.replace("_", "-")
            raise RecipeError(
                f"model.{key} is {path!r}: {error}; give yours as --model.{option} PATH, or start from random values "
                f"with --model.{option} None"
            ) from None
    return notes
