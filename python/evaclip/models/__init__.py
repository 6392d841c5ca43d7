"""The models of EVA-CLIP, thin: their arithmetic is PyTorch's matrix products and evakernels."""

from evaclip.models.clip import CLIP
from evaclip.models.config import ClipConfig, TextConfig, VisionConfig
from evaclip.models.registry import configure, create_model, list_models
from evaclip.weights.load import LoadReport, load_checkpoint

__all__ = [
    "CLIP",
    "ClipConfig",
    "LoadReport",
    "TextConfig",
    "VisionConfig",
    "configure",
    "create_model",
    "list_models",
    "load_checkpoint",
]
