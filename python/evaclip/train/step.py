"""Loss and gradients of one batch, in one piece or, exactly the same, in micro-batches."""

import contextlib

import torch
from torch import Tensor, nn

import evakernels as ek
from evaclip.train.parallel import unsynchronized
from evaclip.train.ranks import Ranks
from evaclip.train.recipe import Recipe

ALONE = Ranks()


def forward_backward(
    model: nn.Module,
    images: Tensor,
    ids: Tensor,
    kept: Tensor | None,
    recipe: Recipe,
    ranks: Ranks = ALONE,
    loss_scale: float = 1.0,
) -> dict:
    """Accumulate the gradient of the contrastive loss of one batch, times `loss_scale`, into the parameters.

    A contrast is over the whole batch, so micro-batches need two passes: features of all without a graph, the loss
    on them, then each micro-batch again with the gradient of its features. Random numbers are replayed, so the
    result is the gradient of the undivided batch (Gao et al., arXiv 2101.06983).

    Args:
        model: of `CLIP`'s forward, as `parallel.spread` returns it.
        images, ids, kept: this process's share of the batch; of several processes all must call.

    Returns:
        loss, image_to_text and text_to_image (in-batch top-1 accuracies), logit_scale: tensors without a graph, of the
        whole batch.
    """
    compute = recipe.compute
    parts = compute.micro_batches
    autocast = torch.autocast(images.device.type, compute.half or torch.bfloat16, enabled=compute.autocasts)

    def encode(images: Tensor, ids: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        with autocast:
            return model(images, ids, kept=kept)

    def loss_of(image: Tensor, text: Tensor, scale: Tensor) -> dict:
        fixed = recipe.loss.fixed_logit_scale
        loss, image_to_text, text_to_image = ek.contrastive_loss(
            image,
            text,
            scale if fixed is None else fixed,
            group=ranks.group,
            batch_sizes=ranks.sizes(recipe.data.batch_size),
            label_smoothing=recipe.loss.label_smoothing,
        )
        (loss * loss_scale).backward()
        metrics = {"loss": loss.detach(), "image_to_text": image_to_text, "text_to_image": text_to_image}
        return metrics | {"logit_scale": torch.as_tensor(scale if fixed is None else fixed).detach()}

    if parts == 1:
        return loss_of(*encode(images, ids, kept))

    dropped = [None] * parts if kept is None else kept.tensor_split(parts)
    micro = list(zip(images.tensor_split(parts), ids.tensor_split(parts), dropped, strict=True))
    states, features = [], []
    with torch.no_grad():
        for part in micro:
            states.append(random_state(images.device))
            features.append(encode(*part))
    image, text = (torch.cat(f).requires_grad_() for f in list(zip(*features, strict=True))[:2])
    scale = features[0][2].requires_grad_()
    metrics = loss_of(image, text, scale)
    assert image.grad is not None and text.grad is not None
    gradients = zip(image.grad.tensor_split(parts), text.grad.tensor_split(parts), strict=True)
    for i, (part, state, gradient) in enumerate(zip(micro, states, gradients, strict=True)):
        last = i == parts - 1
        set_random_state(state, images.device)
        # Only the last backward pass sums over processes; that of the scale, one for the whole batch, goes along.
        with contextlib.nullcontext() if last else unsynchronized(model):
            *outputs, out_scale = encode(*part)
            takes = last and scale.grad is not None and out_scale.requires_grad
            torch.autograd.backward(
                [*outputs, out_scale] if takes else outputs, [*gradient, scale.grad] if takes else [*gradient]
            )
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
