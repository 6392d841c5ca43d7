"""Published models, made narrow and shallow; every weight random, so that none can take another's place unnoticed."""

import torch

from evaclip.models import create_model
from evaclip.models.config import CONFIGS

PUBLISHED = [name for name in CONFIGS if "tiny" not in name]
VISION = {"layers": 2, "width": 64, "heads": 2, "drop_path": 0.0}
TEXT = {"layers": 2, "width": 64, "heads": 2, "context": 12}


def small(name, seed=0, *, vocabulary=96, **vision):
    """A model of two blocks in each tower, images of 2 x 2 patches, in evaluation mode."""
    size = 2 * CONFIGS[name].vision.patch
    model = create_model(name, vision=VISION | {"image_size": size} | vision, text=TEXT | {"vocabulary": vocabulary})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Activations near 1, norms near the identity, biases that matter.
            if parameter.dim() == 1 and key.endswith(("weight", "gamma_1", "gamma_2")):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise * (0.3 if parameter.dim() < 2 else 0.1))
    return model.eval()


def same(weights, other):
    """Whether two state dicts are equal, bit for bit."""
    return weights.keys() == other.keys() and all(
        weights[key].dtype == other[key].dtype and torch.equal(weights[key], other[key]) for key in weights
    )
