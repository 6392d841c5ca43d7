"""Zero-shot classification: the class whose description is nearest to the image.

Source: Radford et al., arXiv 2103.00020, section 3.1; the protocol is CLIP-benchmark's.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from evaclip.evaluate.features import Tokenizer, encode_images, encode_texts, scores
from evaclip.evaluate.templates import TEMPLATES, check
from evaclip.models.blocks import normalize


def classifier(
    model: Any,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    *,
    batch_size: int = 256,
) -> Tensor:
    """One unit vector per class: the mean over the templates of normalised text features, normalised again.

    Args:
        model: has `encode_text`.
        tokenizer: from a list of texts to ids.
        class_names: what replaces {} in the templates.
        templates: sentences with {}.
        batch_size: texts encoded at once.

    Returns:
        (E, classes) float32, on the model's device.

    Raises:
        ValueError: no class or template, a template without {}, features that are not finite.
    """
    if not class_names or not templates:
        raise ValueError(f"classifier: {len(class_names)} classes and {len(templates)} templates; give one at least")
    for template in templates:
        check(template, "classifier")
    at_once = max(1, batch_size // len(templates))
    columns = []
    for start in range(0, len(class_names), at_once):
        names = class_names[start : start + at_once]
        texts = [template.replace("{}", name) for name in names for template in templates]
        features = encode_texts(model, tokenizer, texts, batch_size=batch_size)
        columns.append(normalize(features.unflatten(0, (len(names), len(templates))).mean(1)))
    return torch.cat(columns).T.contiguous()


def zero_shot(
    model: Any,
    tokenizer: Tokenizer,
    images: Iterable[tuple[Tensor, Tensor]],
    class_names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    *,
    batch_size: int = 256,
) -> dict[str, float]:
    """Classify images by the names of the classes alone.

    Args:
        model: has `encode_image` and `encode_text`.
        tokenizer: from a list of texts to ids.
        images: batches of images (b, C, H, W) and labels (b,), such as `ImageFolder.batches` gives.
        class_names, templates: see `classifier`.
        batch_size: texts encoded at once.

    Returns:
        top1, top5 (with 5 classes or more) and mean_per_class_recall (of the classes that occur) as shares of 1, and
        the number of samples. Of equal scores, the lower class counts as the higher one, as in the published protocol.

    Raises:
        ValueError: no images, a label that is no class, features that are not finite; as `classifier`.
    """
    descriptions = classifier(model, tokenizer, class_names, templates, batch_size=batch_size).T
    classes = len(class_names)
    counts, first, five = (torch.zeros(classes, dtype=torch.long) for _ in range(3))
    for pixels, labels in images:
        labels = labels.cpu()
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"zero_shot: labels {int(labels.min())} to {int(labels.max())} for {classes} classes")
        order = scores(encode_images(model, [pixels]), descriptions).sort(dim=1, descending=True, stable=True).indices
        hits = order[:, :5].cpu() == labels[:, None]
        counts += labels.bincount(minlength=classes)
        first += labels[hits[:, 0]].bincount(minlength=classes)
        five += labels[hits.any(1)].bincount(minlength=classes)
    samples = int(counts.sum())
    if not samples:
        raise ValueError("zero_shot: no images were given")
    present = counts > 0
    result = {"top1": int(first.sum()) / samples}
    if classes >= 5:
        result["top5"] = int(five.sum()) / samples
    result["mean_per_class_recall"] = float((first[present].double() / counts[present]).mean())
    return result | {"samples": samples}
