"""Retrieval: the caption of an image among all captions, and the image of a caption among all images."""

import torch
from torch import Tensor

from evaclip.evaluate.features import scores
from evaclip.models.blocks import normalize

AT = (1, 5, 10)


def retrieval(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor, *, scores_at_once: int = 2**24
) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions, by cosine similarity.

    An image counts as found at k if the best of its captions has fewer than k captions of other images at or above its
    score; a caption, if its image has fewer than k other images at or above. So equal scores count against the model,
    and one that maps everything to one point finds nothing.

    Args:
        image_features: (n, E), any length.
        text_features: (m, E); an image may have several texts.
        image_of_text: (m,) integer, the index of the image of each text.
        scores_at_once: the most scores to hold; the (n, m) matrix never exists. At least one row is held.

    Returns:
        image_to_text@1, @5, @10, text_to_image@1, @5, @10 and mean_recall, the mean of the six, as shares of 1;
        the numbers of images and texts.

    Raises:
        ValueError: shapes do not fit, an index is no image, an image has no text, or features are not finite.
    """
    _check(image_features, text_features, image_of_text)
    images, texts = normalize(image_features), normalize(text_features)
    owner = image_of_text.to(images.device, torch.long)
    found = (
        _ranks_of_images(images, texts, owner, scores_at_once // len(texts)),
        _ranks_of_texts(images, texts, owner, scores_at_once // len(images)),
    )
    result = {
        f"{direction}@{k}": float((ranks < k).double().mean())
        for direction, ranks in zip(("image_to_text", "text_to_image"), found, strict=True)
        for k in AT
    }
    mean = sum(result.values()) / len(result)
    return result | {"mean_recall": mean, "images": len(images), "texts": len(texts)}


def _ranks_of_images(images: Tensor, texts: Tensor, owner: Tensor, rows: int) -> Tensor:
    """For each image, how many texts of other images score no lower than the best of its own."""
    ranks = []
    everyone = torch.arange(len(images), device=images.device)
    for part, ids in _chunks(rows, images, everyone):
        score, own = scores(part, texts), owner == ids[:, None]
        best = score.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        ranks.append(((score >= best) & ~own).sum(1))
    return torch.cat(ranks)


def _ranks_of_texts(images: Tensor, texts: Tensor, owner: Tensor, rows: int) -> Tensor:
    """For each text, how many other images score no lower than its own."""
    ranks = []
    for part, ids in _chunks(rows, texts, owner):
        score = scores(part, images)
        ranks.append((score >= score.gather(1, ids[:, None])).sum(1) - 1)
    return torch.cat(ranks)


def _chunks(rows: int, *tensors: Tensor):
    return zip(*(tensor.split(max(1, rows)) for tensor in tensors), strict=True)


def _check(images: Tensor, texts: Tensor, owner: Tensor) -> None:
    if images.dim() != 2 or texts.dim() != 2 or images.shape[1] != texts.shape[1] or not len(images):
        raise ValueError(
            f"retrieval: image features {tuple(images.shape)} and text features {tuple(texts.shape)}; "
            "(n, E) and (m, E) with n of 1 or more are needed"
        )
    if owner.shape != texts.shape[:1] or owner.is_floating_point():
        raise ValueError(
            f"retrieval: image_of_text is {owner.dtype} {tuple(owner.shape)}; one integer for each of the "
            f"{len(texts)} texts is needed"
        )
    if len(owner) and not 0 <= int(owner.min()) <= int(owner.max()) < len(images):
        raise ValueError(
            f"retrieval: image_of_text lies between {int(owner.min())} and {int(owner.max())}, but there are "
            f"{len(images)} images"
        )
    without = int((owner.bincount(minlength=len(images)) == 0).sum())
    if without:
        raise ValueError(f"retrieval: {without} of {len(images)} images have no text; leave them out")
    if not (torch.isfinite(images).all() and torch.isfinite(texts).all()):
        raise ValueError("retrieval: features are not finite; a comparison with NaN would count as a hit")
