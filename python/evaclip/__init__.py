"""The EVA-CLIP training recipe: models, data, training, evaluation, on top of evakernels."""

from evaclip.models import create_model, list_models, load_checkpoint
from evaclip.run import load
from evaclip.weights.convert import convert
from evaclip.weights.export import export

__all__ = ["convert", "create_model", "export", "list_models", "load", "load_checkpoint"]
