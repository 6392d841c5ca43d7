"""Floating-point operations of a model: two per multiply-add of its matrix products, and of nothing else."""

from evaclip.models.config import ClipConfig, TextConfig, VisionConfig


def vision_forward(config: VisionConfig, embed_dim: int, tokens: int) -> int:
    """FLOP of one image of `tokens` tokens, the class token counted."""
    products = 2 if config.mlp == "gelu" else 3
    patch = 2 * (tokens - 1) * config.channels * config.patch**2 * config.width
    weights = 4 * config.width**2 + products * config.width * config.mlp_width
    block = 2 * tokens * weights + 4 * tokens**2 * config.width
    return patch + config.layers * block + 2 * config.width * embed_dim


def text_forward(config: TextConfig, embed_dim: int) -> int:
    """FLOP of one caption, padded to the context; attention is counted in full, though it is causal."""
    weights = 4 * config.width**2 + 2 * config.width * config.mlp_width
    block = 2 * config.context * weights + 4 * config.context**2 * config.width
    return config.layers * block + 2 * config.width * embed_dim


def forward(config: ClipConfig, tokens: int, frames: int = 1) -> int:
    """FLOP of the forward pass of one sample: its image (or its frames) and its caption."""
    image = vision_forward(config.vision, config.embed_dim, tokens)
    return frames * image + text_forward(config.text, config.embed_dim)


def training(config: ClipConfig, tokens: int, frames: int = 1) -> int:
    """FLOP of a training step per sample: the forward pass and twice that for the backward pass.

    What MFU counts: nothing that is computed again, and not the loss, whose share depends on the batch.
    """
    return 3 * forward(config, tokens, frames)
