"""The contrastive losses of image-text training, without ever holding the matrix of logits."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evakernels.dispatch import define
from evakernels.ops import checks


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    group: "torch.distributed.ProcessGroup | None" = None,
    batch_sizes: Sequence[int] | None = None,
    label_smoothing: float = 0.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """CLIP's loss, the mean of the two cross-entropies over a batch of pairs, in memory linear in the batch.

    Args:
        image_features, text_features: (b, D), row i of one belongs to row i of the other; float32, bfloat16, float16
            (float64 on the CPU), each its own. Autocast leaves them as they are: logits are float32.
        logit_scale: what the cosines are multiplied with (already exponentiated), a positive float or a tensor of one
            element, which then takes a gradient.
        group: the processes whose samples together are the batch, each with features of its own of the same width and
            dtypes; None is this process alone. All of them must call, with the same options. The loss is that of the
            whole batch, the same on all; gradients are group.size() times this process's share of those of the loss,
            so that averaging them, as DDP and FSDP do, makes them exact.
        batch_sizes: how many samples each process of the group has, where every process knows it; otherwise they ask
            each other, for which a GPU's host has to wait.
        label_smoothing: in [0, 1), as in `torch.nn.functional.cross_entropy`.
        row_mask: (b,) bool; False takes a sample out of the batch, image and text: it is in no mean, it is nobody's
            negative, and its gradients are zero. Where all are False, or b is 0, the loss is 0. `batch_sizes` must be
            left out beside it.

    Returns:
        The loss, float32 (float64 where a feature is), and without gradient the accuracies: the share of images whose
        best text, and of texts whose best image, is their own; of equal logits the one of lowest index counts.

    Raises:
        ValueError, TypeError: a shape, device, dtype or value does not fit.
    Source: Radford et al., arXiv 2103.00020; tiles after Inf-CL, arXiv 2410.17243.
    """
    scale = _check("contrastive_loss", image_features, text_features, logit_scale)
    ranks = _ranks("contrastive_loss", group, batch_sizes, len(image_features))
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"contrastive_loss: label_smoothing is {label_smoothing}; allowed is 0 <= label_smoothing < 1")
    if row_mask is not None:
        if row_mask.dtype != torch.bool:
            raise TypeError(f"contrastive_loss: row_mask has dtype {row_mask.dtype}; it must be torch.bool")
        checks.shape("contrastive_loss", "row_mask", row_mask, (len(image_features),), "one value per sample")
        checks.same_device("contrastive_loss", image_features, row_mask=row_mask)
        if batch_sizes is not None:
            raise ValueError(
                "contrastive_loss: batch_sizes and row_mask are both given; a mask changes the sizes, so"
                " leave batch_sizes out"
            )
    arguments = image_features, text_features, scale, float(label_smoothing), row_mask, *ranks
    needs_grad = checks.needs_grad(image_features, text_features, scale)
    loss, accuracies = (_ContrastiveLoss.apply if needs_grad else _contrastive_forward)(*arguments)
    return loss, *accuracies.unbind()


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    group: "torch.distributed.ProcessGroup | None" = None,
    batch_sizes: Sequence[int] | None = None,
) -> Tensor:
    """SigLIP's loss, the logistic loss of all pairs over the batch size, in memory linear in the batch.

    Args:
        image_features, text_features: (b, D), row i of one belongs to row i of the other; float32, bfloat16, float16
            (float64 on the CPU), each its own. Autocast leaves them as they are: logits are float32.
        logit_scale: what the cosines are multiplied with (already exponentiated), a positive float or a tensor of one
            element, which then takes a gradient.
        logit_bias: added to every logit, a float or a tensor of one element, which then takes a gradient.
        group: the processes whose samples together are the batch, each with features of its own of the same width and
            dtypes; None is this process alone. All of them must call, with the same options. The loss is that of the
            whole batch, the same on all; gradients are group.size() times this process's share of those of the loss,
            so that averaging them, as DDP and FSDP do, makes them exact.
        batch_sizes: how many samples each process of the group has, where every process knows it; otherwise they ask
            each other, for which a GPU's host has to wait.

    Returns:
        The loss, float32 (float64 where a feature is); 0 where b is 0.

    Raises:
        ValueError, TypeError: a shape, device, dtype or value does not fit.
    Source: Zhai et al., arXiv 2303.15343.
    """
    scale = _check("sigmoid_loss", image_features, text_features, logit_scale)
    bias = _scalar("sigmoid_loss", "logit_bias", logit_bias, image_features)
    ranks = _ranks("sigmoid_loss", group, batch_sizes, len(image_features))
    needs_grad = checks.needs_grad(image_features, text_features, scale, bias)
    return (_SigmoidLoss.apply if needs_grad else _sigmoid_forward)(image_features, text_features, scale, bias, *ranks)


def _check(function: str, image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    checks.floating(function, image_features=image, text_features=text)
    if image.dim() != 2 or image.shape != text.shape:
        raise ValueError(
            f"{function}: image_features has shape {tuple(image.shape)}, text_features {tuple(text.shape)};"
            " both must be (batch, width), one row per pair"
        )
    checks.same_device(function, image, text_features=text)
    if not isinstance(scale, Tensor) and not scale > 0:
        raise ValueError(f"{function}: logit_scale is {scale}; it must be positive (exponentiate the parameter first)")
    return _scalar(function, "logit_scale", scale, image)


def _ranks(function: str, group, sizes: Sequence[int] | None, b: int) -> tuple[str, list[int] | None]:
    """The name of the group, "" for this process alone, and the sizes as a list."""
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    if rank < 0:
        raise ValueError(f"{function}: this process is not in the group that was given; only its members may call")
    if sizes is not None and (len(sizes) != size or sizes[rank] != b):
        raise ValueError(
            f"{function}: batch_sizes is {list(sizes)}, but the group has {size} processes, and this one (rank {rank})"
            f" has {b} samples; give the number of samples of each process"
        )
    return "" if size == 1 else group.group_name, None if sizes is None or size == 1 else list(sizes)


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
    def forward(ctx, image, text, scale, *options):
        loss, accuracies, *gradients = _contrastive_with_gradients(
            image, text, scale, *options, *_wanted(ctx.needs_input_grad)
        )
        ctx.save_for_backward(*gradients)
        ctx.dtypes = image.dtype, text.dtype, scale.dtype
        ctx.mark_non_differentiable(accuracies)
        return loss, accuracies

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _):
        return *_times(dloss, ctx), None, None, None, None


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, bias, *ranks):
        loss, *gradients = _sigmoid_with_gradients(image, text, scale, bias, *ranks, *_wanted(ctx.needs_input_grad))
        ctx.save_for_backward(*gradients)
        ctx.dtypes = image.dtype, text.dtype, scale.dtype, bias.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        return *_times(dloss, ctx), None, None


def _times(dloss: Tensor, ctx) -> tuple[Tensor | None, ...]:
    """The gradients that were ready, float32 until now: in half precision they might have vanished without dloss."""
    gradients = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    return tuple((dloss * gradient).to(dtype) if needed else None for gradient, dtype, needed in gradients)


def _wanted(needs: tuple[bool, ...]) -> tuple[bool, bool]:
    """Which tower's gradient to compute: a frozen one's is left out, but that of the scale comes from either."""
    return needs[0] or not needs[1], needs[1]


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


# `group` is a process group's name, "" for this process alone; `sizes`, how many samples each of its ranks has, where
# they are known. Ops with gradients give them for dloss = 1, not yet rounded to the dtypes of the features. One that is
# not wanted comes back empty; at least one must be wanted.
_contrastive_forward = define(
    "contrastive",
    "contrastive_forward(Tensor image, Tensor text, Tensor scale, float smoothing, Tensor? row_mask, str group,"
    " int[]? sizes) -> (Tensor loss, Tensor accuracies)",
    lambda image, text, scale, smoothing, row_mask, group, sizes: _loss_and_accuracies(image, text),
)
_contrastive_with_gradients = define(
    "contrastive",
    "contrastive_with_gradients(Tensor image, Tensor text, Tensor scale, float smoothing, Tensor? row_mask, str group,"
    " int[]? sizes, bool wants_image, bool wants_text)"
    " -> (Tensor loss, Tensor accuracies, Tensor dimage, Tensor dtext, Tensor dscale)",
    lambda image, text, scale, smoothing, row_mask, group, sizes, wants_image, wants_text: (
        *_loss_and_accuracies(image, text),
        *_gradients(image, text, wants_image, wants_text, scale),
    ),
)
_sigmoid_forward = define(
    "contrastive",
    "sigmoid_forward(Tensor image, Tensor text, Tensor scale, Tensor bias, str group, int[]? sizes) -> Tensor loss",
    lambda image, text, scale, bias, group, sizes: _loss(image, text),
)
_sigmoid_with_gradients = define(
    "contrastive",
    "sigmoid_with_gradients(Tensor image, Tensor text, Tensor scale, Tensor bias, str group, int[]? sizes,"
    " bool wants_image, bool wants_text) -> (Tensor loss, Tensor dimage, Tensor dtext, Tensor dscale, Tensor dbias)",
    lambda image, text, scale, bias, group, sizes, wants_image, wants_text: (
        _loss(image, text),
        *_gradients(image, text, wants_image, wants_text, scale, bias),
    ),
)
