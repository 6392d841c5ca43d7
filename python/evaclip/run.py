"""A run's folder as a thing to use: the model it trained, its tokenizer and its image transform."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from evaclip.data.preprocess import ImageTransform, image_transform
from evaclip.data.tokenizer import get_tokenizer
from evaclip.models.clip import CLIP
from evaclip.train import checkpoint
from evaclip.train.model import build_model
from evaclip.train.recipe import load_recipe
from evaclip.weights.export import exported
from evaclip.weights.load import load_checkpoint


class Loaded(NamedTuple):
    """What `load` returns; unpacks as model, tokenizer, preprocess."""

    model: CLIP
    tokenizer: Callable[[list[str]], Tensor]
    preprocess: ImageTransform


def load(path: str | Path, *, device: str | torch.device = "cpu") -> Loaded:
    """The model of a run, ready to encode, with the tokenizer and the image transform it was trained for.

    Args:
        path: a folder that `evaclip train` wrote, or one of its checkpoints; or one that `evaclip export` wrote.
        device: where the model goes.

    Returns:
        model (in eval mode), tokenizer (list of str -> ids), preprocess (PIL image -> (C, H, W)).

    Raises:
        CheckpointError: nothing to load there.
    """
    if (published := exported(Path(path))) is not None:
        config, tokenizer = published
        with torch.device("meta"):
            model = CLIP(config)
        load_checkpoint(model.to_empty(device=device), path)
    else:
        folder = checkpoint.latest(Path(path))
        recipe = load_recipe(str(folder / "recipe.json"))
        model, tokenizer = build_model(recipe, device), recipe.data.tokenizer
        load_checkpoint(model, folder)
    vision = model.config.vision
    return Loaded(
        model.eval(),
        get_tokenizer(tokenizer, model.config.text.context),
        image_transform(vision.image_size, mode="crop", channels=vision.channels),
    )
