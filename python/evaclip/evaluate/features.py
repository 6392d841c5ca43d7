"""Normalised features of images and texts, in evaluation mode and without a graph."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from evaclip.models.blocks import normalize

Tokenizer = Callable[[list[str]], Tensor]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode under `torch.inference_mode`; each of its modules gets its mode back."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    before = [module.training for module in modules]
    try:
        if modules:
            model.eval()
        with torch.inference_mode():
            yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


def encode_images(model: Any, images: Iterable[Tensor]) -> Tensor:
    """Unit-length features of batches of images.

    Args:
        model: has `encode_image`.
        images: batches (b, C, H, W), moved to the device and the dtype of the model's parameters.

    Returns:
        (n, E) float32 (float64 where the model's features are), on the model's device.

    Raises:
        ValueError: no images, or features that are not finite.
    """
    device, dtype = _placement(model)
    with evaluating(model):
        parts = [_unit(model.encode_image(batch.to(device, dtype)), "image") for batch in images]
    if not parts:
        raise ValueError("encode_images: no batch of images was given")
    return torch.cat(parts)


def encode_texts(model: Any, tokenizer: Tokenizer, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
    """Unit-length features of texts.

    Returns:
        (n, E) float32 (float64 where the model's features are), on the model's device.

    Raises:
        ValueError: no texts, or features that are not finite.
    """
    if not texts:
        raise ValueError("encode_texts: no text was given")
    device, _ = _placement(model)
    with evaluating(model):
        starts = range(0, len(texts), batch_size)
        ids = (tokenizer(list(texts[start : start + batch_size])) for start in starts)
        return torch.cat([_unit(model.encode_text(batch.to(device)), "text") for batch in ids])


def scores(features: Tensor, others: Tensor) -> Tensor:
    """Inner products (n, m) of features (n, E) and (m, E), in their own dtype even under autocast."""
    with torch.autocast(features.device.type, enabled=False):
        return features @ others.T


def _unit(features: Tensor, what: str) -> Tensor:
    if not torch.isfinite(features).all():  # a comparison with NaN is false, which a recall would take for a hit
        raise ValueError(f"the model's {what} features are not finite; its weights are broken or a dtype overflows")
    return normalize(features)


def _placement(model: Any) -> tuple[torch.device | None, torch.dtype | None]:
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    first = next((p for p in parameters if p.is_floating_point()), None)
    return (None, None) if first is None else (first.device, first.dtype)
