"""The contrastive and the sigmoid loss, over tiles of the logits S = scale * image text' in plain PyTorch.

    contrastive   loss = mean_i (lse_j S_ij - S_ii) / 2 + mean_j (lse_i S_ij - S_jj) / 2
                  W = softmax over rows of S + softmax over columns of S - 2 on the diagonal,   dS = W / 2n
    sigmoid       loss = sum_ij softplus(-y_ij (S_ij + bias)) / n,   y = 1 on the diagonal, -1 elsewhere
                  W = sigmoid(S + bias), minus 1 on the diagonal,   dS = W / n
    both          dimage = scale * dS text,   dtext = scale * dS' image,   dscale = <image, dS text> = <text, dS' image>

One tile gives both directions, and nothing larger than a tile or the features is ever stored: the gradients compute the
tiles again. Logits, statistics and sums are float32 (float64 when a feature is); half precision is widened per tile.
`streamed` has what is around the tiles: chunks of texts, the other ranks, and the sums over all.

A log-sum-exp is kept as two numbers, the maximum and the sum of exp(S - maximum). Rounded to one it is up to 4e-6 off
where logits are near 100, the rows of W no longer sum to zero, and the gradients of nearly collinear or well separated
features are two to three times as far from the truth.
"""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evakernels.ops.contrastive import streamed
from evakernels.ops.contrastive.streamed import Side, Statistics, cross_entropies, widened

# Rows and columns of a tile. Two tiles (of 4 MiB each in float32) stay in a CPU's last cache between the passes over
# them; square ones have the whole diagonal of S in the tiles on the diagonal.
TILE = 1024


def contrastive_forward(image, text, scale, smoothing, row_mask, group, sizes):
    return streamed.contrastive_loss(TILES, image, text, scale, smoothing, row_mask, group, sizes)


def contrastive_with_gradients(image, text, scale, smoothing, row_mask, group, sizes, wants_image, wants_text):
    if group or len(image) > TILE:
        wants = wants_image, wants_text
        return streamed.contrastive_loss(TILES, image, text, scale, smoothing, row_mask, group, sizes, wants)
    return contrastive_of_a_tile(image, text, scale, smoothing, row_mask, wants_image, wants_text)


def sigmoid_forward(image, text, scale, bias, group, sizes):
    return streamed.sigmoid_loss(TILES, image, text, scale, bias, group, sizes)


def sigmoid_with_gradients(image, text, scale, bias, group, sizes, wants_image, wants_text):
    return streamed.sigmoid_loss(TILES, image, text, scale, bias, group, sizes, (wants_image, wants_text))


def chunk(ranks: int, features: Tensor) -> int:
    """How many texts of each rank to gather at once: a tile's, so that own pairs are in tiles on the diagonal. All of
    them where nothing is gathered."""
    return TILE if ranks > 1 else max(1, len(features))


class Tile(NamedTuple):
    row: int  # the number of its block of rows, and of its block of columns
    column: int
    rows: slice
    columns: slice
    image: Tensor  # (rows, D) and (columns, D), widened
    text: Tensor
    logits: Tensor  # to be overwritten at will: the next tile uses the same memory
    scratch: Tensor  # of the same shape
    ahead: int  # > 0 where its samples among the columns come after those among the rows, 0 on the diagonal, else < 0


def blocks(side: Side) -> list[tuple[slice, int]]:
    """A side cut into blocks of a tile's size, with the place of each in the whole batch."""
    return [
        (slice(segment.begin + start, segment.begin + min(start + TILE, segment.length)), segment.first + start)
        for segment in side.segments
        for start in range(0, segment.length, TILE)
    ]


def tiles(rows: Side, columns: Side, scale: Tensor) -> Iterator[Tile]:
    """Every tile of a block of the logits: the same in both passes, bit for bit."""
    logits = scratch = scale.new_empty(0)
    for i, (row, first_row) in enumerate(blocks(rows)):
        image = rows.features[row].to(scale.dtype)
        scaled = image * scale
        for j, (column, first_column) in enumerate(blocks(columns)):
            text = columns.features[column].to(scale.dtype)
            if logits.shape != (len(image), len(text)):
                logits, scratch = (scale.new_empty(len(image), len(text)) for _ in range(2))
            torch.mm(scaled, text.t(), out=logits)
            yield Tile(i, j, row, column, image, text, logits, scratch, first_column - first_row)


def positives(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """(b,): the diagonal of S, bit for bit as `tiles` has it."""
    sides = (Side(x, (streamed.Segment(0, len(x), 0),)) for x in (image, text))
    pairs = zip(*(blocks(side) for side in sides), strict=True)
    found = [
        torch.mm(image[rows].to(scale.dtype) * scale, text[columns].to(scale.dtype).t()).diagonal().clone()
        for (rows, _), (columns, _) in pairs
    ]
    return torch.cat([scale.new_empty(0), *found])


def statistics(rows: Side, columns: Side, scale: Tensor) -> tuple[Statistics, Statistics]:
    """Of the rows and of the columns of a block of S."""
    of_rows: list[Statistics | None] = [None] * len(blocks(rows))
    of_columns: list[Statistics | None] = [None] * len(blocks(columns))
    for tile in tiles(rows, columns, scale):
        row_positive, column_positive = rows.positive[tile.rows], columns.positive[tile.columns]
        if tile.ahead == 0:
            positive, rivals = _positive_and_rivals(tile.logits)
            maxima = torch.maximum(positive, rivals).unbind()
            beaten = (~hits(tile.logits, positive, rivals)).unbind()
        else:
            maxima = tile.logits.amax(1), tile.logits.amax(0)
            # Of equal logits the one of lowest index counts.
            as_large, larger = torch.ge, torch.gt
            first, second = (larger, as_large) if tile.ahead > 0 else (as_large, larger)
            beaten = first(maxima[0], row_positive), second(maxima[1], column_positive)
        for dim, found, place in ((1, of_rows, tile.row), (0, of_columns, tile.column)):
            maximum = maxima[1 - dim]
            total = torch.sub(tile.logits, maximum.unsqueeze(dim), out=tile.scratch).exp_().sum(dim)
            seen, before = Statistics(maximum, total, beaten[1 - dim].to(total.dtype)), found[place]
            found[place] = seen if before is None else seen.merge(before)
    return _together(of_rows, rows, scale), _together(of_columns, columns, scale)


def contrastive_gradients(
    rows: Side, columns: Side, scale: Tensor, smoothing: float, samples: int, share: float,
    dimage: Tensor | None, dtext: Tensor | None,
) -> None:  # fmt: skip
    """Add share * W text to dimage and share * W' image to dtext, where they are wanted."""
    for tile in tiles(rows, columns, scale):
        by_row, by_column = _exponentials(
            tile.logits, rows.maximum[tile.rows], columns.maximum[tile.columns], tile.scratch
        )
        totals = rows.total[tile.rows], columns.total[tile.columns]
        w = _weights(by_row, by_column, *totals, smoothing, samples, tile.ahead == 0)
        _add_products(w, tile, share, dimage, dtext)


def sigmoid_gradients(
    rows: Side, columns: Side, scale: Tensor, bias: Tensor, share: float, dimage: Tensor | None, dtext: Tensor | None
) -> Tensor:
    """As `contrastive_gradients`; returns, in float64, the sums of the losses and of W over the block."""
    loss, weight = (scale.new_zeros((), dtype=torch.float64) for _ in range(2))
    for tile in tiles(rows, columns, scale):
        z = tile.logits.add_(bias.to(scale.dtype).reshape(()))  # then -y (S + bias)
        if tile.ahead == 0:
            z.diagonal().neg_()
        loss += F.softplus(z, threshold=40.0).sum()  # beyond its default threshold, 20, it is 1e-10 off
        if dimage is None and dtext is None:
            continue
        w = z.sigmoid_()
        if tile.ahead == 0:
            w.diagonal().neg_()
        weight += w.sum()
        _add_products(w, tile, share, dimage, dtext)
    return torch.stack((loss, weight))


def contrastive_of_a_tile(image, text, scale, smoothing, row_mask, wants_image, wants_text):
    """One process's batch of at most TILE: S is one tile, and nothing is computed twice.

    The batches of a laptop's training take less than a millisecond, most of it calls: no more of them than needed.
    """
    b, kept, image, text = len(image), *streamed.kept_rows(row_mask, image, text)
    n, wide = len(image), widened(scale, image, text)
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
    loss = cross_entropies(Statistics(maximum, total, positive), positive).mean(dtype=torch.float64).to(wide.dtype)
    if smoothing:  # the mean of the positives minus that of S, which is the product of the mean features
        loss += smoothing * (positive.sum() / n - wide * (image.sum(0) / n).dot(text.sum(0) / n))
    w = _weights(by_row, by_column, total[0], total[1], smoothing, n, on_diagonal=True)
    dimage = torch.addmm(wide, w, text, beta=0, alpha=0.5 / n) if wants_image else wide.new_empty(0)
    dtext = torch.addmm(wide, w.t(), image, beta=0, alpha=0.5 / n) if wants_text else wide.new_empty(0)
    dscale = (image * dimage if wants_image else text * dtext).sum()
    dimage, dtext = (streamed.spread(x.mul_(wide), kept, b) for x in (dimage, dtext))
    return loss, accuracies, dimage, dtext, dscale.reshape(scale.shape)


def hits(logits: Tensor, positive: Tensor, rivals: Tensor) -> Tensor:
    """(2, n): whether each sample's own logit, `positive`, is the arg-max of its row and of its column of a tile on
    the diagonal; `rivals` (2, n) are the maxima without it."""
    hit = positive > rivals
    if not torch.equal(hit, positive >= rivals):  # of equal logits the one of lowest index counts
        own = torch.arange(len(positive), device=positive.device)
        hit = torch.stack((logits.argmax(1) == own, logits.argmax(0) == own))
    return hit


def _together(parts: list[Statistics | None], side: Side, scale: Tensor) -> Statistics:
    known = [part for part in parts if part is not None]
    if not known:
        return streamed.nothing(len(side.features), scale)
    return Statistics(*map(torch.cat, zip(*known, strict=True)))


def _add_products(w: Tensor, tile: Tile, share: float, dimage: Tensor | None, dtext: Tensor | None) -> None:
    """They are divided by 2n after the products: 1/n is rounded, and its error in W would not cancel."""
    if dimage is not None:
        dimage[tile.rows].addmm_(w, tile.text, alpha=share)
    if dtext is not None:
        dtext[tile.columns].addmm_(w.t(), tile.image, alpha=share)


def _exponentials(logits: Tensor, row_max: Tensor, column_max: Tensor, scratch: Tensor | None = None):
    by_row = torch.sub(logits, row_max.unsqueeze(1), out=scratch).exp_()
    return by_row, logits.sub_(column_max).exp_()


def _weights(by_row, by_column, row_sum, column_sum, smoothing, n, on_diagonal) -> Tensor:
    """Both softmaxes minus twice the labels: 1 - smoothing on the diagonal and smoothing / n everywhere."""
    w = by_row.div_(row_sum.unsqueeze(1)).addcdiv_(by_column, column_sum)
    if on_diagonal:
        w.diagonal().sub_(2 * (1 - smoothing))
    return w.sub_(2 * smoothing / n) if smoothing else w


def _positive_and_rivals(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal, and (2, n) the maxima of the rows and of the columns without it."""
    diagonal = logits.diagonal()
    positive = diagonal.clone()
    diagonal.fill_(-torch.inf)
    rivals = torch.stack((logits.amax(1), logits.amax(0)))
    diagonal.copy_(positive)
    return positive, rivals


TILES = sys.modules[__name__]
