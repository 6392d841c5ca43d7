"""Recipes and the loop that runs them."""

from evaclip.train.recipe import Recipe, RecipeError, load_recipe
from evaclip.train.trainer import Trainer

__all__ = ["Recipe", "RecipeError", "Trainer", "load_recipe"]
