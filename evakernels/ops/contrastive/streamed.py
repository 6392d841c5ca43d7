"""Both losses over the batch of many ranks, its matrix of logits S seen once per pass and never stored.

A rank keeps its images; the texts of all ranks pass by in chunks, each gathered while the one before is computed:

    contrastive   1. chunk by chunk: maximum and sum of exponentials of each row and column of S, and whether a sample's
                     own logit is beaten; those of columns are incomplete until all ranks have seen them (two
                     reductions of B numbers)
                  2. chunk by chunk again: the weights W, dimage += W text, dtext = W' image, which goes home by a
                     reduce-scatter while the next chunk is computed
    sigmoid       no normaliser, so that loss and gradients of a chunk are ready together

FLOP per rank, with b of B samples: 8 b B D (6 for the sigmoid loss). The gradients are computed with the loss, so that
backward has no collective, and nothing but the gradients is kept for it.

What computes a chunk are four functions of a module `tiles` (`reference`, `triton`): `positives`, `statistics`,
`contrastive_gradients`, `sigmoid_gradients`, and the size of a chunk, `chunk`. Where it has a true `RETURNS_PRODUCT`,
`contrastive_gradients` returns <dS, S - rows.middle>, and the sum over all ranks is <dS, S>, because that of dS is 0:
the gradient of the scale is made of it. Elsewhere it is made of <image, dimage>.
"""

from collections.abc import Iterator
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evakernels.ops.checks import accumulator
from evakernels.ops.contrastive.ranks import Grid, Line, Wait, grid

# Whether to compute the gradient of the scale from the texts too, and raise where the two differ: for tests.
CHECK_SCALE = False

ROWS = 2048  # rows of features that are multiplied by their gradients at once


class Segment(NamedTuple):
    """Consecutive samples of one rank."""

    begin: int  # in the features of a side
    length: int
    first: int  # in the whole batch


class Side(NamedTuple):
    """Rows (images) or columns (texts) of a block of S."""

    features: Tensor  # (n, D)
    segments: tuple[Segment, ...]
    positive: Any = None  # (n,) each sample's own logit
    maximum: Any = None  # (n,) of the whole row (column) of S, and the sum of exp(S - maximum): in the second pass
    total: Any = None
    middle: Any = None  # the mean of all samples' own logits, where `tiles` has a RETURNS_PRODUCT

    def places(self) -> Tensor:
        """(n,) int32: where in the whole batch each sample is."""
        parts, device = self.segments, self.features.device
        step = parts[1].first - parts[0].first if len(parts) > 1 else 0
        if all(s.length == parts[0].length and s.first == parts[0].first + k * step for k, s in enumerate(parts)):
            # As it mostly is; computed where it is needed, it spares the host a copy that may wait.
            first = torch.arange(len(parts), dtype=torch.int32, device=device).mul_(step).add_(parts[0].first)
            return (first[:, None] + torch.arange(parts[0].length, dtype=torch.int32, device=device)).flatten()
        places = [torch.arange(s.first, s.first + s.length, dtype=torch.int32) for s in parts]
        return torch.cat(places).to(device, non_blocking=True)


class Statistics(NamedTuple):
    """Of rows or columns, over the part of S that was seen."""

    maximum: Tensor
    total: Tensor  # of exp(S - maximum)
    beaten: Tensor  # 0 where no logit is larger than the sample's own, and none of lower index as large

    def merge(self, other: "Statistics") -> "Statistics":
        """Of both parts together; `other` may have seen nothing."""
        maximum = torch.maximum(self.maximum, other.maximum)
        total = self.total * (self.maximum - maximum).exp_()
        return Statistics(
            maximum, total.addcmul_(other.total, (other.maximum - maximum).exp_()), self.beaten + other.beaten
        )

    def over(self, line: Line) -> "Statistics":
        """Of all ranks of a line together."""
        if line.size == 1:
            return self
        maximum = self.maximum.clone()
        line.maximum(maximum)()
        sums = torch.stack((self.total * (self.maximum - maximum).exp_(), self.beaten))
        line.sum(sums)()
        return Statistics(maximum, *sums.unbind())


class Layout:
    """Which samples are rows and which columns on this rank."""

    def __init__(self, ranks: Grid, sizes: list[int]):
        self.rows, self.columns, self.everyone = ranks.rows, ranks.columns, ranks.everyone
        first = [0, *accumulate(sizes)]
        q, me = self.rows.size, self.everyone.rank
        row = range(me // q * q, me // q * q + q)
        column = range(me % q, len(sizes), q)
        self.samples, self.longest = first[-1], max(sizes)
        self.row_sizes, self.column_sizes = [sizes[r] for r in row], [sizes[r] for r in column]
        self.row_first, self.column_first = first[row[0]], [first[r] for r in column]
        begin = first[me] - self.row_first
        self.own = slice(begin, begin + sizes[me])  # among the rows


def laid_out(ranks: Grid, sizes: list[int] | None, b: int, on: Tensor) -> Layout:
    """The layout where each rank has `sizes` samples; unless they are known they are asked for."""
    if ranks.everyone.size == 1:
        sizes = [b]
    elif sizes is None:
        everyones = torch.empty(ranks.everyone.size, 1, dtype=torch.int64, device=on.device)
        ranks.everyone.all_gather(everyones, torch.tensor([b], device=on.device))()
        sizes = everyones.flatten().tolist()
    return Layout(ranks, sizes)


def gathered(line: Line, x: Tensor, sizes: list[int], longest: int) -> list[Tensor]:
    """`x` of each rank of a line, which has `sizes` rows there."""
    if line.size == 1:
        return [x]
    out = x.new_empty(line.size, longest, *x.shape[1:])
    line.all_gather(out, padded(x, longest))()
    return [part[:size] for part, size in zip(out, sizes, strict=True)]


def padded(x: Tensor, length: int) -> Tensor:
    if len(x) == length:
        return x.contiguous()
    out = x.new_zeros(length, *x.shape[1:])
    out[: len(x)] = x
    return out


class Columns:
    """The texts of a line of ranks, chunk by chunk, each gathered while the one before it is in use."""

    def __init__(self, layout: Layout, text: Tensor, chunk: int, keep: bool):
        self.layout, self.text, self.line = layout, text.contiguous(), layout.columns
        self.chunk = max(1, min(chunk, layout.longest))
        self.count = -(-layout.longest // self.chunk)
        self.positives: list[Tensor] = []
        self.waits: dict[int, Wait] = {}
        self.ready = -1  # the last chunk whose gathering was waited for; with `keep` they all stay
        self.slots = self.count if keep else min(2, self.count)
        shape = self.line.size, self.chunk, text.shape[1]
        self.buffer = text.new_empty(self.slots, *shape) if self.line.size > 1 else text

    def gather(self, k: int) -> None:
        """Begin to gather chunk k, unless that was done."""
        if self.line.size > 1 and self.ready < k < self.count and k not in self.waits:
            own = padded(self.text[self.part(k)], self.chunk)
            self.waits[k] = self.line.all_gather(self.buffer[k % self.slots], own)

    def part(self, k: int) -> slice:
        return slice(k * self.chunk, (k + 1) * self.chunk)

    def lengths(self, k: int) -> list[int]:
        return [min(max(size - k * self.chunk, 0), self.chunk) for size in self.layout.column_sizes]

    def __iter__(self) -> Iterator[Side]:
        self.gather(0)
        for k in range(self.count):
            self.gather(k + 1)
            if k in self.waits:
                self.waits.pop(k)()
                self.ready = k
            yield self.side(k)

    def side(self, k: int) -> Side:
        lengths = self.lengths(k)
        begins = [0, *accumulate(lengths)]
        segments = tuple(
            Segment(begin, length, first + k * self.chunk)
            for begin, length, first in zip(begins, lengths, self.layout.column_first, strict=False)
        )
        positive = _joined([p[self.part(k)] for p in self.positives]) if self.positives else None
        if self.line.size == 1:
            return Side(self.text[self.part(k)], segments, positive)
        parts = self.buffer[k % self.slots]
        if min(lengths) == self.chunk:
            return Side(parts.flatten(0, 1), segments, positive)
        return Side(torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)]), segments, positive)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Homecoming:
    """The gradients of the texts, chunk by chunk: summed over the line, each rank's own come home."""

    def __init__(self, columns: Columns, dtext: Tensor):
        self.columns, self.dtext = columns, dtext
        shape = columns.line.size, columns.chunk, dtext.shape[1]
        self.buffers = [dtext.new_empty(shape) for _ in range(min(2, columns.count))] if columns.line.size > 1 else []
        self.under_way: Any = None

    def of(self, k: int) -> Tensor:
        """Where chunk k's gradients, (columns, D), are to be added."""
        if not self.buffers:
            return self.dtext[self.columns.part(k)]
        lengths = self.columns.lengths(k)
        if min(lengths) == self.columns.chunk:
            return self.buffers[k % 2].zero_().flatten(0, 1)
        return self.dtext.new_zeros(sum(lengths), self.dtext.shape[1])

    def send(self, k: int, gradients: Tensor) -> None:
        """Send chunk k, once the one before has arrived."""
        if not self.buffers:
            return
        buffer, lengths = self.buffers[k % 2], self.columns.lengths(k)
        if min(lengths) < self.columns.chunk:
            buffer.zero_()
            for part, gradient, n in zip(buffer, gradients.split(lengths), lengths, strict=True):
                part[:n] = gradient
        self.arrive()
        home = self.dtext[self.columns.part(k)]
        out = home if len(home) == self.columns.chunk else self.dtext.new_empty(buffer.shape[1:])
        self.under_way = self.columns.line.reduce_scatter(out, buffer), out, home

    def arrive(self) -> None:
        if self.under_way:
            wait, out, home = self.under_way
            wait()
            if out is not home:
                home.copy_(out[: len(home)])
        self.under_way = None


def contrastive_loss(tiles, image, text, scale, smoothing, row_mask, group, sizes, wants=None):
    """The op `contrastive_forward`, or with `wants` `contrastive_with_gradients`, over the tiles of a module.

    Samples that the mask takes out are out before anything begins: the rest is a batch of another size.
    """
    b, kept, image, text = len(image), *kept_rows(row_mask, image, text)
    lay = laid_out(grid(group), sizes, len(image), image)
    loss, accuracies, *gradients = contrastive(tiles, image, text, scale, smoothing, lay, wants)
    if not gradients:
        return loss, accuracies
    dimage, dtext, dscale = gradients
    return loss, accuracies, spread(dimage, kept, b), spread(dtext, kept, b), dscale.reshape(scale.shape)


def sigmoid_loss(tiles, image, text, scale, bias, group, sizes, wants=None):
    """The op `sigmoid_forward`, or with `wants` `sigmoid_with_gradients`, over the tiles of a module."""
    found = sigmoid(tiles, image, text, scale, bias, laid_out(grid(group), sizes, len(image), image), wants)
    if wants is None:
        return found
    loss, dimage, dtext, dscale, dbias = found
    return loss, dimage, dtext, dscale.reshape(scale.shape), dbias.reshape(bias.shape)


def contrastive(
    tiles: ModuleType,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    smoothing: float,
    lay: Layout,
    wants: tuple[bool, bool] | None,
):
    """The loss and the accuracies of the whole batch, the same on every rank; with `wants`, dimage, dtext and dscale.

    Gradients are `everyone.size` times this rank's share of those of the loss, in the dtype of the logits; where one is
    not wanted it is empty.
    """
    wide = widened(scale, image, text)
    if not lay.samples:
        return wide.new_zeros(()), wide.new_zeros(2), *no_gradients(image, text, wide, wants)
    chunk = tiles.chunk(lay.columns.size, image)
    columns = Columns(lay, text, chunk, keep=wants is not None)
    columns.gather(0)
    own = tiles.positives(image, text, wide)
    columns.positives = gathered(lay.columns, own, lay.column_sizes, lay.longest)
    rows = row_side(lay, image, own)

    by_row, by_column = nothing(len(rows.features), own), [nothing(0, own)]
    for side in columns:
        if len(side.features):
            of_rows, of_columns = tiles.statistics(rows, side, wide)
            by_row = of_rows.merge(by_row)
            by_column.append(of_columns)
    by_row = by_row.over(lay.rows)
    of_all = Statistics(*map(torch.cat, zip(*by_column, strict=True))).over(lay.columns)
    lengths = [sum(columns.lengths(k)) for k in range(columns.count)]
    by_column = [Statistics(*parts) for parts in zip(*(x.split(lengths) for x in of_all), strict=True)]

    mine = Statistics(*(x[lay.own] for x in by_row)), own_columns(columns, by_column)
    loss, accuracies, middle = summed(lay, own, *mine, smoothing, image, text, wide)
    if wants is None:
        return loss, accuracies
    rows = rows._replace(maximum=by_row.maximum, total=by_row.total, middle=middle)
    share = 0.5 / lay.samples

    product = wide.new_zeros((), dtype=torch.float64) if getattr(tiles, "RETURNS_PRODUCT", False) else None

    def gradients(k: int, side: Side, dimage: Tensor | None, dtext: Tensor | None) -> None:
        side = side._replace(maximum=by_column[k].maximum, total=by_column[k].total)
        found = tiles.contrastive_gradients(rows, side, wide, smoothing, lay.samples, share, dimage, dtext)
        if product is not None:
            product.add_(found)

    return loss, accuracies, *backpropagated(lay, rows, columns, image, text, wide, wants, gradients, product)


def sigmoid(
    tiles: ModuleType,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    lay: Layout,
    wants: tuple[bool, bool] | None,
):
    """The loss of the whole batch; with `wants`, dimage, dtext, dscale and dbias, as `contrastive` has them."""
    wide = widened(scale, image, text)
    sums = wide.new_zeros(2, dtype=torch.float64)  # of the loss and of W
    if not lay.samples:
        none = no_gradients(image, text, wide, wants)
        return (wide.new_zeros(()), *none, wide.new_zeros(())) if none else wide.new_zeros(())
    chunk = tiles.chunk(lay.columns.size, image)
    columns = Columns(lay, text, chunk, keep=False)
    columns.gather(0)
    rows = row_side(lay, image)
    share = 1 / lay.samples

    def gradients(k: int, side: Side, dimage: Tensor | None, dtext: Tensor | None) -> None:
        sums.add_(tiles.sigmoid_gradients(rows, side, wide, bias, share, dimage, dtext))

    given = backpropagated(lay, rows, columns, image, text, wide, wants or (False, False), gradients)
    dbias = (sums[1] * (lay.everyone.size * share)).to(wide.dtype)
    if lay.everyone.size > 1:
        lay.everyone.sum(sums)()
    loss = (sums[0] * share).to(wide.dtype)
    return loss if wants is None else (loss, *given, dbias)


def row_side(lay: Layout, image: Tensor, positive: Tensor | None = None) -> Side:
    begins = accumulate(lay.row_sizes, initial=0)
    segments = tuple(Segment(b, size, lay.row_first + b) for b, size in zip(begins, lay.row_sizes, strict=False))
    longest = max(lay.row_sizes)

    def joined(x: Tensor) -> Tensor:
        return _joined(gathered(lay.rows, x, lay.row_sizes, longest))

    return Side(joined(image), segments, None if positive is None else joined(positive))


def nothing(length: int, like: Tensor) -> Statistics:
    zeros = like.new_zeros(length)
    return Statistics(zeros - torch.inf, zeros, zeros)


def own_columns(columns: Columns, by_column: list[Statistics]) -> Statistics:
    """Of this rank's own texts."""
    me, found = columns.line.rank, []
    for k, stats in enumerate(by_column):
        lengths = columns.lengths(k)
        begin = sum(lengths[:me])
        found.append(Statistics(*(x[begin : begin + lengths[me]] for x in stats)))
    return Statistics(*map(torch.cat, zip(*found, strict=True)))


def cross_entropies(stats: Statistics, positive: Tensor) -> Tensor:
    return (stats.maximum - positive) + stats.total.log()  # in this order a small loss keeps its digits


def summed(lay, own, of_rows, of_columns, smoothing, image, text, scale) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the accuracies and the mean of own logits, by one sum over all ranks, in float64."""
    sums = [*(cross_entropies(stats, own).double().sum() for stats in (of_rows, of_columns))]
    sums += [(stats.beaten == 0).double().sum() for stats in (of_rows, of_columns)]
    parts = [torch.stack([*sums, own.double().sum()])]
    if smoothing:
        parts += [x.sum(0, dtype=torch.float64) for x in (image, text)]
    total = torch.cat(parts) / lay.samples
    if lay.everyone.size > 1:
        lay.everyone.sum(total)()
    loss = total[:2].mean()
    if smoothing:  # the mean of the positives minus that of S, which is the product of the mean features
        image_mean, text_mean = total[5:].chunk(2)
        loss = loss + smoothing * (total[4] - scale * image_mean.dot(text_mean))
    return loss.to(scale.dtype), total[2:4].to(scale.dtype, copy=True), total[4].to(scale.dtype)


def backpropagated(
    lay, rows, columns, image, text, scale, wants, gradients, product: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dimage, dtext and dscale of `gradients`, which adds a chunk's dS text and dS' image where they are wanted.

    `product` may be this rank's share of <dS, S> when all chunks are through.
    """
    wants_image, wants_text = wants
    dimage = scale.new_zeros(rows.features.shape) if wants_image else None
    dtext = scale.new_zeros(text.shape if wants_text else 0)
    home = Homecoming(columns, dtext) if wants_text else None
    for k, side in enumerate(columns):
        part = home.of(k) if home else None
        if len(side.features) and len(rows.features):
            gradients(k, side, dimage, part)
        if home and part is not None:
            home.send(k, part)
    if home:
        home.arrive()
    dimage = scale.new_empty(0) if dimage is None else own_rows(lay, dimage)
    dscale = scale.new_zeros(())
    if product is not None:
        dscale = (product / scale).to(scale.dtype)
    elif wants_image or wants_text:
        dscale = multiplied(*((image, dimage) if wants_image else (text, dtext)))
    if CHECK_SCALE and wants_image and wants_text:
        check_scale(lay, dscale, multiplied(text, dtext), image, dimage)
    scale = scale * lay.everyone.size
    return dimage.mul_(scale), dtext.mul_(scale), dscale.mul_(lay.everyone.size)


def multiplied(features: Tensor, gradient: Tensor) -> Tensor:
    """<features, gradient>, some rows at a time: what is made on the way stays small."""
    parts = zip(features.split(ROWS), gradient.split(ROWS), strict=True)
    return torch.stack([(x.to(dx.dtype) * dx).sum() for x, dx in parts]).sum()


def own_rows(lay: Layout, dimage: Tensor) -> Tensor:
    """Of the images' gradients those of this rank, summed over its neighbours, who saw other texts."""
    if lay.rows.size == 1:
        return dimage
    longest = max(lay.row_sizes)
    parts = torch.stack([padded(part, longest) for part in dimage.split(lay.row_sizes)])
    out = parts.new_empty(parts.shape[1:])
    lay.rows.reduce_scatter(out, parts)()
    return out[: lay.row_sizes[lay.rows.rank]].contiguous()


def check_scale(lay: Layout, by_image: Tensor, by_text: Tensor, image: Tensor, dimage: Tensor) -> None:
    """Assert that <image, dimage> = <text, dtext>, summed over all ranks."""
    sums = torch.stack((by_image, by_text, (image.norm() * dimage.norm()).to(by_image.dtype))).double()
    if lay.everyone.size > 1:
        lay.everyone.sum(sums)()
    precision = 1e-9 if by_image.dtype == torch.float64 else 1e-2 if image.dtype != torch.float32 else 1e-4
    assert (sums[0] - sums[1]).abs() <= precision * sums[2], f"gradients of the scale differ: {sums.tolist()}"


def no_gradients(image: Tensor, text: Tensor, scale: Tensor, wants: tuple[bool, bool] | None) -> tuple[Tensor, ...]:
    if wants is None:
        return ()
    features = zip((image, text), wants, strict=True)
    return *(scale.new_zeros(x.shape if wanted else 0) for x, wanted in features), scale.new_zeros(())


def widened(scalar: Tensor, image: Tensor, text: Tensor) -> Tensor:
    """A one-element tensor without dimensions, in the dtype of the logits."""
    return scalar.to(accumulator(torch.promote_types(image.dtype, text.dtype))).reshape(())


def kept_rows(row_mask: Tensor | None, image: Tensor, text: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """The samples that the mask keeps, as if the others were not in the batch, and their places in it."""
    if row_mask is None:
        return None, image, text
    kept = row_mask.nonzero().squeeze(1)
    return kept, image[kept], text[kept]


def spread(x: Tensor, kept: Tensor | None, b: int) -> Tensor:
    """Back to the whole batch, zero where it was masked; a gradient that was not wanted is empty and stays so."""
    return x if kept is None or x.dim() == 1 else x.new_zeros(b, x.shape[1]).index_copy_(0, kept, x)
