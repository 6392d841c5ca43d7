"""The contrastive and the sigmoid loss, streamed over tiles of the logits S = scale * image text' in plain PyTorch.

    contrastive   loss = mean_i (lse_j S_ij - S_ii) / 2 + mean_j (lse_i S_ij - S_jj) / 2
                  W = softmax over rows of S + softmax over columns of S - 2 on the diagonal,   dS = W / 2n
    sigmoid       loss = sum_ij softplus(-y_ij (S_ij + bias)) / n,   y = 1 on the diagonal, -1 elsewhere
                  W = sigmoid(S + bias), minus 1 on the diagonal,   dS = W / n
    both          dimage = scale * dS text,   dtext = scale * dS' image,   dscale = <image, dS text> = <text, dS' image>

One tile gives both directions, and nothing larger than a tile or the features is ever stored: backward computes the
tiles again. Logits, statistics and sums are float32 (float64 when a feature is); half precision is widened per tile.

A log-sum-exp is kept as two numbers, the maximum and the sum of exp(S - maximum). Rounded to one it is up to 4e-6 off
where logits are near 100, the rows of W no longer sum to zero, and the gradients of nearly collinear or well separated
features are two to three times as far from the truth.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evakernels.ops.checks import accumulator

# Rows and columns of a tile. Two tiles (of 4 MiB each in float32) stay in a CPU's last cache between the passes over
# them; square ones have the whole diagonal of S in the tiles on the diagonal.
TILE = 1024


class Tile(NamedTuple):
    rows: slice
    columns: slice
    image: Tensor  # (rows, D) and (columns, D), widened
    text: Tensor
    logits: Tensor  # to be overwritten at will: the next tile uses the same memory
    scratch: Tensor  # of the same shape

    @property
    def on_diagonal(self) -> bool:
        return self.rows == self.columns


def tiles(image: Tensor, text: Tensor, scale: Tensor) -> Iterator[Tile]:
    """Every tile of the logits, column blocks innermost: the same in forward and backward, bit for bit."""
    logits = scratch = scale.new_empty(0)
    for rows in blocks(len(image)):
        image_block = image[rows].to(scale.dtype)
        scaled = image_block * scale
        for columns in blocks(len(text)):
            text_block = text[columns].to(scale.dtype)
            shape = len(image_block), len(text_block)
            if logits.shape != shape:
                logits, scratch = scale.new_empty(shape), scale.new_empty(shape)
            torch.mm(scaled, text_block.t(), out=logits)
            yield Tile(rows, columns, image_block, text_block, logits, scratch)


def blocks(n: int) -> list[slice]:
    return [slice(start, min(start + TILE, n)) for start in range(0, n, TILE)]


def hits(logits: Tensor, positive: Tensor, rivals: Tensor) -> Tensor:
    """(2, n): whether each sample's own logit, `positive`, is the arg-max of its row and of its column of a tile on
    the diagonal; `rivals` (2, n) are the maxima without it."""
    hit = positive > rivals
    if not torch.equal(hit, positive >= rivals):  # of equal logits the one of lowest index counts
        own = torch.arange(len(positive), device=positive.device)
        hit = torch.stack((logits.argmax(1) == own, logits.argmax(0) == own))
    return hit


class Running:
    """Log-sum-exp and arg-max of a block of rows (dim 1) or columns (dim 0) of S over the tiles seen so far."""

    def __init__(self, dim: int):
        self.dim = dim
        self.maximum: Any = None  # tensors, from the first tile on
        self.total: Any = None
        self.positive: Any = None  # from the tile on the diagonal on
        self.hit: Any = None

    def see(self, tile: Tile, rival: Tensor, positive: Tensor | None = None, hit: Tensor | None = None) -> None:
        """Take in a tile: its maximum along `dim` without the diagonal, and where there is one, that and `hits`."""
        before = self.maximum
        if positive is not None:
            self.positive, self.hit = positive, hit if before is None else hit & (positive > before)
            rival = torch.maximum(positive, rival)
        elif self.positive is not None:
            self.hit = self.hit & (self.positive >= rival)
        self.maximum = rival if before is None else torch.maximum(before, rival)
        total = torch.sub(tile.logits, self.maximum.unsqueeze(self.dim), out=tile.scratch).exp_().sum(self.dim)
        self.total = total if before is None else total + self.total * (before - self.maximum).exp_()

    def stats(self) -> Tensor:
        return torch.stack((self.maximum, self.total))


def contrastive_forward(image: Tensor, text: Tensor, scale: Tensor, smoothing: float, row_mask: Tensor | None):
    b, kept, image, text = len(image), *_kept(row_mask, image, text)
    n, scale = len(image), _wide(scale, image, text)
    if n == 0:
        return scale.new_zeros(()), *(scale.new_zeros(shape) for shape in (2, (2, b), (2, b)))
    rows, columns = [Running(1) for _ in blocks(n)], [Running(0) for _ in blocks(n)]
    for tile in tiles(image, text, scale):
        row, column = rows[tile.rows.start // TILE], columns[tile.columns.start // TILE]
        if tile.on_diagonal:
            positive, rivals = _positive_and_rivals(tile.logits)
            hit = hits(tile.logits, positive, rivals)
            row.see(tile, rivals[0], positive, hit[0])
            column.see(tile, rivals[1], positive, hit[1])
        else:
            row.see(tile, tile.logits.amax(1))
            column.see(tile, tile.logits.amax(0))
    losses = torch.cat([_cross_entropies(block.maximum, block.positive, block.total) for block in rows + columns])
    loss = losses.mean(dtype=torch.float64).to(scale.dtype)
    if smoothing:
        loss += smoothing * _positives_over_mean(sum(block.positive.sum() for block in rows), image, text, scale)
    accuracies = torch.stack([torch.cat([block.hit for block in side]) for side in (rows, columns)])
    stats = (torch.cat([block.stats() for block in side], 1) for side in (rows, columns))
    return loss, accuracies.mean(1, dtype=loss.dtype), *(_spread(s, kept, b, 1) for s in stats)


def contrastive_backward(
    dloss, image, text, scale, smoothing, row_mask, row_stats, column_stats, wants_image, wants_text
):
    b, kept, image, text = len(image), *_kept(row_mask, image, text)
    if kept is not None:
        row_stats, column_stats = row_stats[:, kept], column_stats[:, kept]
    (row_max, row_sum), (column_max, column_sum) = row_stats, column_stats
    n, wide = len(image), _wide(scale, image, text)

    def weights(tile: Tile) -> Tensor:
        rows, columns = tile.rows, tile.columns
        by_row, by_column = _exponentials(tile.logits, row_max[rows], column_max[columns], tile.scratch)
        return _weights(by_row, by_column, row_sum[rows], column_sum[columns], smoothing, n, tile.on_diagonal)

    dimage, dtext, dscale = _gradients(0.5 / max(n, 1), image, text, wide, weights, wants_image, wants_text)
    return (
        _spread(dimage.mul_(dloss).to(image.dtype), kept, b, 0),
        _spread(dtext.mul_(dloss).to(text.dtype), kept, b, 0),
        (dloss * dscale).to(scale.dtype).reshape(scale.shape),
    )


def contrastive_with_gradients(image, text, scale, smoothing, row_mask, wants_image, wants_text):
    """A batch of at most TILE: S is one tile, its gradients are ready with the loss, and nothing is computed twice.

    The batches of a laptop's training take less than a millisecond, most of it calls: no more of them than needed.
    """
    b, kept, image, text = len(image), *_kept(row_mask, image, text)
    n, wide = len(image), _wide(scale, image, text)
    image, text = image.to(wide.dtype), text.to(wide.dtype)
    if n == 0:
        zeros = (
            wide.new_zeros((b, x.shape[1]) if wants else 0) for x, wants in ((image, wants_image), (text, wants_text))
        )
        return wide.new_zeros(()), wide.new_zeros(2), *zeros, wide.new_zeros(scale.shape)
    logits = torch.mm(image * wide, text.t())
    positive, rivals = _positive_and_rivals(logits)
    accuracies = hits(logits, positive, rivals).mean(1, dtype=logits.dtype)
    maximum = torch.maximum(positive, rivals)
    by_row, by_column = _exponentials(logits, maximum[0], maximum[1])
    total = torch.stack((by_row.sum(1), by_column.sum(0)))
    loss = _cross_entropies(maximum, positive, total).mean(dtype=torch.float64).to(wide.dtype)
    if smoothing:
        loss += smoothing * _positives_over_mean(positive.sum(), image, text, wide)
    w = _weights(by_row, by_column, total[0], total[1], smoothing, n, on_diagonal=True)
    dimage = torch.addmm(wide, w, text, beta=0, alpha=0.5 / n) if wants_image else wide.new_empty(0)
    dtext = torch.addmm(wide, w.t(), image, beta=0, alpha=0.5 / n) if wants_text else wide.new_empty(0)
    dscale = (image * dimage if wants_image else text * dtext).sum()
    dimage, dtext = _spread(dimage.mul_(wide), kept, b, 0), _spread(dtext.mul_(wide), kept, b, 0)
    return loss, accuracies, dimage, dtext, dscale.reshape(scale.shape)


def sigmoid_forward(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    wide = _wide(scale, image, text)
    loss = wide.new_zeros((), dtype=torch.float64)
    for tile in tiles(image, text, wide):
        loss += _softplus(_sigmoid_argument(tile, bias))
    return (loss / max(len(image), 1)).to(wide.dtype)


def sigmoid_with_gradients(image, text, scale, bias, wants_image, wants_text):
    """Without a normaliser the gradients of a tile are ready with its loss: nothing is computed twice."""
    n, wide = max(len(image), 1), _wide(scale, image, text)
    loss, dbias = (wide.new_zeros((), dtype=torch.float64) for _ in range(2))  # sums of many tiles

    def weights(tile: Tile) -> Tensor:
        z = _sigmoid_argument(tile, bias)
        loss.add_(_softplus(z))
        w = z.sigmoid_()
        if tile.on_diagonal:
            w.diagonal().neg_()
        dbias.add_(w.sum())
        return w

    dimage, dtext, dscale = _gradients(1 / n, image, text, wide, weights, wants_image, wants_text)
    loss, dbias = ((x / n).to(wide.dtype) for x in (loss, dbias))
    return loss, dimage, dtext, dscale.reshape(scale.shape), dbias.reshape(bias.shape)


def _positives_over_mean(positives: Tensor, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The mean of the positives minus that of S: what smoothed labels add to the loss, and it needs no tile."""
    image_mean, text_mean = (features.sum(0, dtype=scale.dtype) / len(features) for features in (image, text))
    return positives / len(image) - scale * image_mean.dot(text_mean)


def _cross_entropies(maximum: Tensor, positive: Tensor, total: Tensor) -> Tensor:
    return (maximum - positive) + total.log()  # in this order a small loss keeps its digits beside large logits


def _exponentials(logits: Tensor, row_max: Tensor, column_max: Tensor, scratch: Tensor | None = None):
    by_row = torch.sub(logits, row_max.unsqueeze(1), out=scratch).exp_()
    return by_row, logits.sub_(column_max).exp_()


def _weights(by_row, by_column, row_sum, column_sum, smoothing, n, on_diagonal) -> Tensor:
    """Both softmaxes minus twice the labels: 1 - smoothing on the diagonal and smoothing / n everywhere.

    They are divided by 2n after the products with the features: 1/n is rounded, and its error would not cancel.
    """
    w = by_row.div_(row_sum.unsqueeze(1)).addcdiv_(by_column, column_sum)
    if on_diagonal:
        w.diagonal().sub_(2 * (1 - smoothing))
    return w.sub_(2 * smoothing / n) if smoothing else w


def _sigmoid_argument(tile: Tile, bias: Tensor) -> Tensor:
    """-y (S + bias)"""
    z = tile.logits.add_(bias.to(tile.logits.dtype).reshape(()))
    if tile.on_diagonal:
        z.diagonal().neg_()
    return z


def _softplus(z: Tensor) -> Tensor:
    return F.softplus(z, threshold=40.0).sum()  # beyond its default threshold, 20, it is 1e-10 off


def _positive_and_rivals(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal, and (2, n) the maxima of the rows and of the columns without it."""
    diagonal = logits.diagonal()
    positive = diagonal.clone()
    diagonal.fill_(-torch.inf)
    rivals = torch.stack((logits.amax(1), logits.amax(0)))
    diagonal.copy_(positive)
    return positive, rivals


def _gradients(share, image, text, scale, weights, wants_image, wants_text) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of image, text and scale that dS = share * W makes, W being `weights(tile)` tile by tile."""
    dimage = scale.new_zeros(image.shape if wants_image else 0)
    dtext = scale.new_zeros(text.shape if wants_text else 0)
    for tile in tiles(image, text, scale):
        w = weights(tile)
        if wants_image:
            dimage[tile.rows].addmm_(w, tile.text, alpha=share)
        if wants_text:
            dtext[tile.columns].addmm_(w.t(), tile.image, alpha=share)
    features, gradient = (image, dimage) if wants_image else (text, dtext)
    dscale = (features.to(scale.dtype) * gradient).sum()
    return dimage.mul_(scale), dtext.mul_(scale), dscale


def _wide(scalar: Tensor, image: Tensor, text: Tensor) -> Tensor:
    """A one-element tensor without dimensions, in the dtype of the logits."""
    return scalar.to(accumulator(torch.promote_types(image.dtype, text.dtype))).reshape(())


def _kept(row_mask: Tensor | None, image: Tensor, text: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """The samples that the mask keeps, as if the others were not in the batch, and their places in it."""
    if row_mask is None:
        return None, image, text
    kept = row_mask.nonzero().squeeze(1)
    return kept, image[kept], text[kept]


def _spread(x: Tensor, kept: Tensor | None, b: int, dim: int) -> Tensor:
    """Back to the whole batch, zero where it was masked; a gradient that was not wanted is empty and stays so."""
    if kept is None or x.dim() == 1:
        return x
    shape = list(x.shape)
    shape[dim] = b
    return x.new_zeros(shape).index_copy_(dim, kept, x)
