"""One step: loss and gradients of a batch, in one piece or, exactly the same, in micro-batches; then the optimizer."""

import contextlib
import math

import torch
from torch import Tensor, nn

import evakernels as ek
from evaclip.data.preprocess import normalized
from evaclip.models.clip import CLIP
from evaclip.train.parallel import averaged, grad_norm, unsynchronized
from evaclip.train.ranks import ALONE, Ranks
from evaclip.train.recipe import Recipe

CLIP_EPS = 1e-6  # added to the norm that is held against its limit, as PyTorch and DeepSpeed do


class Step:
    """An optimizer step, all of it on the device: nothing is read back, so that the host never waits within a step.

    Args:
        model: whose logit scale is held within its limits.
        forward: the module to call, as `parallel.spread` returns it.
        optimizer: over the model's parameters; it must serve GradScaler, as fused optimizers do.
    """

    def __init__(
        self, model: CLIP, forward: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, ranks: Ranks = ALONE
    ):
        self.model, self.forward, self.optimizer, self.recipe, self.ranks = model, forward, optimizer, recipe, ranks
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(
        self,
        images: Tensor,
        ids: Tensor,
        kept: Tensor | None,
        loss_scale: float | Tensor = 1.0,
        micro_batches: int | None = None,
    ) -> dict:
        """Take the step; a loss or a gradient norm that is not finite leaves weights and optimizer as they were.

        The logit scale is held within its limits in any case. Arguments are those of `forward_backward`.

        Returns:
            what `forward_backward` returns; grad_norm, before it is clipped; trust_ratio_min and trust_ratio_max, where
            the optimizer has any: tensors without a graph.
        """
        recipe, optimizer = self.recipe, self.optimizer
        metrics = forward_backward(self.forward, images, ids, kept, recipe, self.ranks, loss_scale, micro_batches)
        averaged(self.model, recipe.compute, self.ranks)
        norm = metrics["grad_norm"] = grad_norm(self.parameters) / loss_scale
        excess = (norm + CLIP_EPS) / (recipe.optimizer.clip_grad_norm or math.inf)
        finite = metrics["loss"].isfinite() & norm.isfinite()
        # The optimizer divides: it does so in float32, where small float16 gradients keep their digits, and needs no
        # pass over memory of its own.
        optimizer.grad_scale = loss_scale * excess.clamp(min=1)  # type: ignore[attr-defined]
        optimizer.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]
        optimizer.step()
        if recipe.loss.fixed_logit_scale is None:
            with torch.no_grad():
                self.model.logit_scale.clamp_(0, math.log(recipe.loss.max_logit_scale))
        optimizer.zero_grad(set_to_none=True)
        ratios = getattr(optimizer, "trust_ratios", None)
        if ratios is not None:
            metrics["trust_ratio_min"], metrics["trust_ratio_max"] = ratios.unbind()
        return metrics


def forward_backward(
    model: nn.Module,
    images: Tensor,
    ids: Tensor,
    kept: Tensor | None,
    recipe: Recipe,
    ranks: Ranks = ALONE,
    loss_scale: float | Tensor = 1.0,
    micro_batches: int | None = None,
) -> dict:
    """Accumulate the gradient of the contrastive loss of one batch, times `loss_scale`, into the parameters.

    A contrast is over the whole batch, so micro-batches need two passes: features of all without a graph, the loss
    on them, then each micro-batch again with the gradient of its features. Random numbers are replayed, so the
    result is the gradient of the undivided batch (Gao et al., arXiv 2101.06983).

    Args:
        model: of `CLIP`'s forward, as `parallel.spread` returns it.
        images, ids, kept: this process's share of the batch, images normalised or uint8; of several processes all must
            call.
        micro_batches: by default the recipe's `compute.micro_batches`.

    Returns:
        loss, image_to_text and text_to_image (in-batch top-1 accuracies), logit_scale: tensors without a graph, of the
        whole batch.
    """
    compute = recipe.compute
    parts = compute.micro_batches if micro_batches is None else micro_batches
    autocast = torch.autocast(images.device.type, compute.half or torch.bfloat16, enabled=compute.autocasts)

    def encode(images: Tensor, ids: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if images.dtype == torch.uint8:  # here, that no more of the batch is held as float32 than is encoded at once
            images = normalized(images)
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
        return metrics | {"logit_scale": scale.detach() if fixed is None else torch.full_like(scale, fixed)}

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
        # Only the last backward pass sums over processes, where they have whole models; the gradient of the scale, one
        # for the whole batch, goes along.
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
