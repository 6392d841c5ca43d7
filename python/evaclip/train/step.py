"""Loss and gradients of one batch, in one piece or, exactly the same, in micro-batches."""

import torch
from torch import Tensor

import evakernels as ek
from evaclip.models.clip import CLIP
from evaclip.train.recipe import Recipe


def forward_backward(model: CLIP, images: Tensor, ids: Tensor, kept: Tensor | None, recipe: Recipe) -> dict:
    """Accumulate the gradient of the contrastive loss of one batch into the parameters.

    A contrast is over the whole batch, so micro-batches need two passes: features of all without a graph, the loss
    on them, then each micro-batch again with the gradient of its features. Random numbers are replayed, so the
    result is the gradient of the undivided batch (Gao et al., arXiv 2101.06983).

    Returns:
        loss, image_to_text and text_to_image (in-batch top-1 accuracies), logit_scale: tensors without a graph.
    """
    parts = recipe.compute.micro_batches
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.compute.precision == "amp_bf16")

    def encode(images: Tensor, ids: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        with autocast:
            image, text, _ = model(images, ids, kept=kept)
        return image, text

    def loss_of(image: Tensor, text: Tensor) -> dict:
        fixed = recipe.loss.fixed_logit_scale
        scale = model.logit_scale.exp() if fixed is None else fixed
        loss, image_to_text, text_to_image = ek.contrastive_loss(
            image, text, scale, label_smoothing=recipe.loss.label_smoothing
        )
        loss.backward()
        metrics = {"loss": loss.detach(), "image_to_text": image_to_text, "text_to_image": text_to_image}
        return metrics | {"logit_scale": torch.as_tensor(scale).detach()}

    if parts == 1:
        return loss_of(*encode(images, ids, kept))

    dropped = [None] * parts if kept is None else kept.chunk(parts)
    micro = list(zip(images.chunk(parts), ids.chunk(parts), dropped, strict=True))
    states, features = [], []
    with torch.no_grad():
        for part in micro:
            states.append(random_state(images.device))
            features.append(encode(*part))
    image, text = (torch.cat(f).requires_grad_() for f in zip(*features, strict=True))
    metrics = loss_of(image, text)
    assert image.grad is not None and text.grad is not None
    gradients = zip(image.grad.chunk(parts), text.grad.chunk(parts), strict=True)
    for part, state, gradient in zip(micro, states, gradients, strict=True):
        set_random_state(state, images.device)
        torch.autograd.backward(encode(*part), gradient)
    return metrics


def random_state(device: torch.device) -> list[Tensor]:
    """State of the generators a step may draw from (drop path)."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    """Put the generators back to a state of `random_state`."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
