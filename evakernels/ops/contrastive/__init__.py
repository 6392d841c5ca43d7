"""The contrastive losses of image-text training, without ever holding the matrix of logits."""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evakernels.dispatch import define
from evakernels.ops import checks
from evakernels.ops.contrastive import reference


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    group: "torch.distributed.ProcessGroup | None" = None,
    label_smoothing: float = 0.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """CLIP's loss, the mean of the two cross-entropies over a batch of pairs, in memory linear in the batch.

    Args:
        image_features, text_features: (b, D), row i of one belongs to row i of the other; float32, bfloat16, float16
            (float64 on the CPU), each its own. Autocast leaves them as they are: logits are float32.
        logit_scale: what the cosines are multiplied with (already exponentiated), a positive float or a tensor of one
            element, which then takes a gradient.
        group: None or a group of one process; this version does not share a batch among several.
        label_smoothing: in [0, 1), as in `torch.nn.functional.cross_entropy`.
        row_mask: (b,) bool; False takes a sample out of the batch, image and text: it is in no mean, it is nobody's
            negative, and its gradients are zero. Where all are False, or b is 0, the loss is 0.

    Returns:
        The loss, float32 (float64 where a feature is), and without gradient the accuracies: the share of images whose
        best text, and of texts whose best image, is their own; of equal logits the one of lowest index counts.

    Raises:
        ValueError, TypeError: a shape, device, dtype or value does not fit.
        NotImplementedError: the group has more than one process.

    Source: Radford et al., arXiv 2103.00020; the tiles after Inf-CL, arXiv 2410.17243.
    """
    scale = _check("contrastive_loss", image_features, text_features, logit_scale, group)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"contrastive_loss: label_smoothing is {label_smoothing}; allowed is 0 <= label_smoothing < 1")
    if row_mask is not None:
        if row_mask.dtype != torch.bool:
            raise TypeError(f"contrastive_loss: row_mask has dtype {row_mask.dtype}; it must be torch.bool")
        checks.shape("contrastive_loss", "row_mask", row_mask, (len(image_features),), "one value per sample")
        checks.same_device("contrastive_loss", image_features, row_mask=row_mask)
    arguments = image_features, text_features, scale, float(label_smoothing), row_mask
    if not checks.needs_grad(image_features, text_features, scale):
        loss, accuracies, _, _ = _contrastive_forward(*arguments)
    elif len(image_features) <= reference.TILE:
        loss, accuracies = _ContrastiveLossOfATile.apply(*arguments)
    else:
        loss, accuracies = _ContrastiveLoss.apply(*arguments)
    return loss, *accuracies.unbind()


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """SigLIP's loss, the logistic loss of all pairs over the batch size, in memory linear in the batch.

    Args:
        image_features, text_features: (b, D), row i of one belongs to row i of the other; float32, bfloat16, float16
            (float64 on the CPU), each its own. Autocast leaves them as they are: logits are float32.
        logit_scale: what the cosines are multiplied with (already exponentiated), a positive float or a tensor of one
            element, which then takes a gradient.
        logit_bias: added to every logit, a float or a tensor of one element, which then takes a gradient.
        group: None or a group of one process; this version does not share a batch among several.

    Returns:
        The loss, float32 (float64 where a feature is); 0 where b is 0.

    Raises:
        ValueError, TypeError: a shape, device, dtype or value does not fit.
        NotImplementedError: the group has more than one process.

    Source: Zhai et al., arXiv 2303.15343.
    """
    scale = _check("sigmoid_loss", image_features, text_features, logit_scale, group)
    bias = _scalar("sigmoid_loss", "logit_bias", logit_bias, image_features)
    if checks.needs_grad(image_features, text_features, scale, bias):
        return _SigmoidLoss.apply(image_features, text_features, scale, bias)
    return _sigmoid_forward(image_features, text_features, scale, bias)


def _check(function: str, image: Tensor, text: Tensor, scale: Tensor | float, group) -> Tensor:
    checks.floating(function, image_features=image, text_features=text)
    if image.dim() != 2 or image.shape != text.shape:
        raise ValueError(
            f"{function}: image_features has shape {tuple(image.shape)}, text_features {tuple(text.shape)};"
            " both must be (batch, width), one row per pair"
        )
    checks.same_device(function, image, text_features=text)
    if not isinstance(scale, Tensor) and not scale > 0:
        raise ValueError(f"{function}: logit_scale is {scale}; it must be positive (exponentiate the parameter first)")
    if group is not None and group.size() > 1:
        raise NotImplementedError(
            f"{function}: the group has {group.size()} processes, but this version computes the loss of one process's"
            " batch; pass group=None for that, or gather the features first"
        )
    return _scalar(function, "logit_scale", scale, image)


def _scalar(function: str, name: str, value: Tensor | float, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        if not math.isfinite(value):
            raise ValueError(f"{function}: {name} is {value}; it must be finite")
        return torch.full((), value, dtype=checks.accumulator(like.dtype), device=like.device)
    checks.floating(function, **{name: value})
    checks.same_device(function, like, **{name: value})
    if value.numel() != 1:
        raise ValueError(f"{function}: {name} has shape {tuple(value.shape)}; it must be a float or have one element")
    return value


class _ContrastiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, smoothing, row_mask):
        loss, accuracies, row_stats, column_stats = _contrastive_forward(image, text, scale, smoothing, row_mask)
        ctx.save_for_backward(image, text, scale, row_mask, row_stats, column_stats)
        ctx.smoothing = smoothing
        ctx.mark_non_differentiable(accuracies)
        return loss, accuracies

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _):
        image, text, scale, row_mask, row_stats, column_stats = ctx.saved_tensors
        gradients = _contrastive_backward(
            *(dloss, image, text, scale, ctx.smoothing, row_mask, row_stats, column_stats),
            *_wanted(ctx.needs_input_grad),
        )
        return *_given(gradients, ctx.needs_input_grad), None, None


class _ContrastiveLossOfATile(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, smoothing, row_mask):
        loss, accuracies, *gradients = _contrastive_with_gradients(
            image, text, scale, smoothing, row_mask, *_wanted(ctx.needs_input_grad)
        )
        ctx.save_for_backward(*gradients)
        ctx.dtypes = image.dtype, text.dtype, scale.dtype
        ctx.mark_non_differentiable(accuracies)
        return loss, accuracies

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _):
        return *_times(dloss, ctx), None, None


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, bias):
        loss, *gradients = _sigmoid_with_gradients(image, text, scale, bias, *_wanted(ctx.needs_input_grad))
        ctx.save_for_backward(*gradients)
        ctx.dtypes = image.dtype, text.dtype, scale.dtype, bias.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        return _times(dloss, ctx)


def _times(dloss: Tensor, ctx) -> tuple[Tensor | None, ...]:
    """The gradients that were ready, float32 until now: in half precision they might have vanished without dloss."""
    gradients = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    return tuple((dloss * gradient).to(dtype) if needed else None for gradient, dtype, needed in gradients)


def _wanted(needs: tuple[bool, ...]) -> tuple[bool, bool]:
    """Which tower's gradient to compute: a frozen one's is left out, but that of the scale comes from either."""
    return needs[0] or not needs[1], needs[1]


def _given(gradients: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=False))


def _acc(image: Tensor, text: Tensor) -> torch.dtype:
    return checks.accumulator(torch.promote_types(image.dtype, text.dtype))


def _loss(image: Tensor, text: Tensor) -> Tensor:
    return image.new_empty((), dtype=_acc(image, text))


def _loss_and_accuracies(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    return _loss(image, text), image.new_empty(2, dtype=_acc(image, text))


def _gradients(
    image: Tensor, text: Tensor, wants_image: bool, wants_text: bool, *scalars: Tensor
) -> tuple[Tensor, ...]:
    acc = _acc(image, text)
    wanted = image if wants_image else None, text if wants_text else None, *scalars
    return tuple(image.new_empty(0 if x is None else x.shape, dtype=acc) for x in wanted)


# The statistics, (2, b), are the maximum of each row (column) of the logits and the sum of exp(logit - maximum).
# A feature gradient that is not wanted comes back empty; at least one must be wanted.
_contrastive_forward = define(
    "contrastive",
    "contrastive_forward(Tensor image, Tensor text, Tensor scale, float smoothing, Tensor? row_mask)"
    " -> (Tensor loss, Tensor accuracies, Tensor row_stats, Tensor column_stats)",
    lambda image, text, scale, smoothing, row_mask: (
        *_loss_and_accuracies(image, text),
        *(image.new_empty(2, len(image), dtype=_acc(image, text)) for _ in range(2)),
    ),
)
_contrastive_backward = define(
    "contrastive",
    "contrastive_backward(Tensor dloss, Tensor image, Tensor text, Tensor scale, float smoothing, Tensor? row_mask,"
    " Tensor row_stats, Tensor column_stats, bool wants_image, bool wants_text)"
    " -> (Tensor dimage, Tensor dtext, Tensor dscale)",
    lambda dloss, image, text, scale, smoothing, row_mask, row_stats, column_stats, wants_image, wants_text: (
        image.new_empty(image.shape if wants_image else 0),
        text.new_empty(text.shape if wants_text else 0),
        scale.new_empty(scale.shape),
    ),
)
# With the loss, its gradients for dloss = 1, not yet rounded to the dtypes of the features.
_contrastive_with_gradients = define(
    "contrastive",
    "contrastive_with_gradients(Tensor image, Tensor text, Tensor scale, float smoothing, Tensor? row_mask,"
    " bool wants_image, bool wants_text)"
    " -> (Tensor loss, Tensor accuracies, Tensor dimage, Tensor dtext, Tensor dscale)",
    lambda image, text, scale, smoothing, row_mask, wants_image, wants_text: (
        *_loss_and_accuracies(image, text),
        *_gradients(image, text, wants_image, wants_text, scale),
    ),
)
_sigmoid_forward = define(
    "contrastive",
    "sigmoid_forward(Tensor image, Tensor text, Tensor scale, Tensor bias) -> Tensor loss",
    lambda image, text, scale, bias: _loss(image, text),
)
_sigmoid_with_gradients = define(
    "contrastive",
    "sigmoid_with_gradients(Tensor image, Tensor text, Tensor scale, Tensor bias, bool wants_image, bool wants_text)"
    " -> (Tensor loss, Tensor dimage, Tensor dtext, Tensor dscale, Tensor dbias)",
    lambda image, text, scale, bias, wants_image, wants_text: (
        _loss(image, text),
        *_gradients(image, text, wants_image, wants_text, scale, bias),
    ),
)
