"""The EVA-CLIP training recipe: models, data, training, evaluation, on top of evakernels."""

from evaclip.models import create_model, list_models, load_checkpoint
from evaclip.run import load

__all__ = ["create_model", "list_models", "load", "load_checkpoint"]
