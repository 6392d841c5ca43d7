"""Both contrastive losses by two Triton kernels over tiles of S; all other products are the library's.

    lse_tiles            a tile of S, and nothing of it stored: maximum and sum of exponentials of its rows and of its
                         columns, and whether a sample's own logit is beaten there; a small kernel puts tiles together
    softmax_grad_tiles   S again, and from it the weights W, rounded to the features' dtype, rows x columns of a chunk;
                         then dimage += W text and dtext += W' image, summed up in float32

**What rounding W would cost** is kept out of the gradients in two ways, both in float32. A sample's weight to its own
pair is kept apart: there the softmaxes and the label cancel. And what all features have in common cancels in a sum over
W, whose rows and columns sum to almost nothing, but not in one over its roundings: what each row and each column has
lost by rounding is summed up, and added again in the direction of the mean feature.
"""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from evakernels import jit, native
from evakernels.ops.contrastive import streamed
from evakernels.ops.contrastive.streamed import Side, Statistics

# Texts of all ranks in a chunk: the products' inner dimension is then long (W text) or their rows are many (W' image).
COLUMNS = 16384
# Of the weights at a time. By formula: W and what is added to (float32, width D) cost the memory 6 bytes for each
# element of W and 8 D for each of its rows and columns; for 4096 x 16384 in two bytes at D = 1024 that is 720 FLOP
# for a byte, of which an H100 does 300 in the time of one.
BYTES = 128 << 20
# float16 is precise from 6e-5 on, and weights are about 2 / n. They are at most 2.
HALF_SCALE = 2.0**14

INTERPRETED = tl.constexpr(jit.INTERPRETED)
# The logits of rows and columns that are not there: exp(NOWHERE - maximum) is 0, and NOWHERE - NOWHERE too.
NOWHERE = tl.constexpr(-3e38)


class Config(NamedTuple):
    rows: int  # of a tile of S; no more than columns, and those a multiple of them
    columns: int
    k: int  # how much of the features' width is multiplied at a time
    warps: int
    stages: int


def config(itemsize: int, shared_memory: int) -> Config:
    """The tile of all kernels: all have the same, so that a logit has the same bits wherever it is computed.

    By formula: with 8 warps a thread has 64 sums of the tile's 128 x 128, which leaves enough of 128 registers for two
    programs to share a multiprocessor: one multiplies while the other is at its exponentials. The stages of both must
    fit its shared memory: three on an H100, two on an A100.
    """
    if itemsize == 4:  # on the GPU's ordinary units, which multiply true float32
        return Config(64, 64, 32, warps=4, stages=2)
    stage = (128 + 128) * 64 * itemsize
    return Config(128, 128, 64, warps=8, stages=max(1, min(3, shared_memory // 2 // stage)))


def chunk(rows: int, ranks: int, features: Tensor) -> int:
    """How many texts of each rank to gather at once: `COLUMNS` of all ranks, in whole tiles."""
    return max(128, COLUMNS // ranks // 128 * 128)


def refuses(op: str, image: Tensor, text: Tensor, *others) -> str | None:
    """Why the kernels cannot serve this call, in a sentence; None when they can."""
    return jit.refusal(image, text)


def contrastive_forward(image, text, scale, smoothing, row_mask, group, sizes):
    return streamed.contrastive_loss(TILES, *alike(image, text), scale, smoothing, row_mask, group, sizes)


def contrastive_with_gradients(image, text, scale, smoothing, row_mask, group, sizes, wants_image, wants_text):
    wants = wants_image, wants_text
    return streamed.contrastive_loss(TILES, *alike(image, text), scale, smoothing, row_mask, group, sizes, wants)


def sigmoid_forward(image, text, scale, bias, group, sizes):
    return streamed.sigmoid_loss(TILES, *alike(image, text), scale, bias, group, sizes)


def sigmoid_with_gradients(image, text, scale, bias, group, sizes, wants_image, wants_text):
    return streamed.sigmoid_loss(TILES, *alike(image, text), scale, bias, group, sizes, (wants_image, wants_text))


def alike(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Both as the kernels read them: contiguous, in the narrowest dtype that has the values of both."""
    dtype = torch.promote_types(image.dtype, text.dtype)
    return image.to(dtype).contiguous(), text.to(dtype).contiguous()


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which block of rows and which of columns are this program's: programs in turn go down 8 blocks of rows, then on
    to the next columns, so that those that run together read few features."""
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    band, within = tl.program_id(0) // (8 * across), tl.program_id(0) % (8 * across)
    height = tl.minimum(down - 8 * band, 8)
    return 8 * band + within % height, within // height


@triton.jit
def _logits(
    image_ptr, text_ptr, scale_ptr, row, column, rows, columns,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile of scale * image text', (ROWS, COLUMNS) in float32; what is beyond the last row or column repeats it."""
    images_ptr = image_ptr + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * WIDTH
    texts_ptr = text_ptr + tl.minimum(column, columns - 1).to(tl.int64)[None, :] * WIDTH
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, WIDTH, K):
        k = start + tl.arange(0, K)
        if WIDTH % K == 0:
            image, text = tl.load(images_ptr + k[None, :]), tl.load(texts_ptr + k[:, None])
        else:
            image = tl.load(images_ptr + k[None, :], k[None, :] < WIDTH, 0)
            text = tl.load(texts_ptr + k[:, None], k[:, None] < WIDTH, 0)
        if INTERPRETED:  # the interpreter would multiply the bits of bfloat16
            image, text = image.to(tl.float32), text.to(tl.float32)
        total = tl.dot(image, text, total, input_precision="ieee")
    return total * tl.load(scale_ptr)


@jit.kernel
def _positives(
    image_ptr, text_ptr, scale_ptr, out_ptr, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out[i] = S_ii, out of a whole tile, as the other kernels compute it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * ROWS + tl.arange(0, COLUMNS)
    logits = _logits(image_ptr, text_ptr, scale_ptr, row, column, rows, rows, WIDTH, ROWS, COLUMNS, K)
    tl.store(out_ptr + row, tl.sum(tl.where(row[:, None] == column[None, :], logits, 0), 1), row < rows)


@jit.kernel
def _lse_tiles(
    image_ptr, text_ptr, scale_ptr, row_positive_ptr, column_positive_ptr, row_place_ptr, column_place_ptr,
    of_rows_ptr, of_columns_ptr, rows, columns,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Of a tile of S: maximum, sum of exp(S - maximum) and 1.0 where the own logit is beaten, of rows and of columns.

    of_rows (3, blocks of columns, rows), of_columns (3, blocks of rows, columns).
    """
    i, j = _tile(rows, columns, ROWS, COLUMNS)
    row, column = i * ROWS + tl.arange(0, ROWS), j * COLUMNS + tl.arange(0, COLUMNS)
    logits = _logits(image_ptr, text_ptr, scale_ptr, row, column, rows, columns, WIDTH, ROWS, COLUMNS, K)
    logits = tl.where((row < rows)[:, None] & (column < columns)[None, :], logits, NOWHERE)
    row_maximum, column_maximum = tl.max(logits, 1), tl.max(logits, 0)

    last_row, last_column = tl.minimum(row, rows - 1), tl.minimum(column, columns - 1)
    row_positive, column_positive = tl.load(row_positive_ptr + last_row), tl.load(column_positive_ptr + last_column)
    row_place, column_place = tl.load(row_place_ptr + last_row), tl.load(column_place_ptr + last_column)
    # Of equal logits the one of lowest place counts.
    if tl.max(column_place, 0) < tl.min(row_place, 0):
        row_beaten = (row_maximum >= row_positive).to(tl.float32)
        column_beaten = (column_maximum > column_positive).to(tl.float32)
    elif tl.min(column_place, 0) > tl.max(row_place, 0):
        row_beaten = (row_maximum > row_positive).to(tl.float32)
        column_beaten = (column_maximum >= column_positive).to(tl.float32)
    else:  # own pairs may be here
        i_place, j_place = row_place[:, None], column_place[None, :]
        larger, as_large = logits > row_positive[:, None], logits == row_positive[:, None]
        row_beaten = tl.max(((i_place != j_place) & (larger | (as_large & (j_place < i_place)))).to(tl.float32), 1)
        larger, as_large = logits > column_positive[None, :], logits == column_positive[None, :]
        column_beaten = tl.max(((i_place != j_place) & (larger | (as_large & (i_place < j_place)))).to(tl.float32), 0)

    row_total = tl.sum(tl.exp(logits - row_maximum[:, None]), 1)
    column_total = tl.sum(tl.exp(logits - column_maximum[None, :]), 0)
    _store_three(of_rows_ptr, row_maximum, row_total, row_beaten, j, row, tl.cdiv(columns, COLUMNS), rows)
    _store_three(of_columns_ptr, column_maximum, column_total, column_beaten, i, column, tl.cdiv(rows, ROWS), columns)


@triton.jit
def _store_three(out_ptr, first, second, third, part, at, parts, length):
    step = parts.to(tl.int64) * length
    at_ptr = out_ptr + part.to(tl.int64) * length + at
    tl.store(at_ptr, first, at < length)
    tl.store(at_ptr + step, second, at < length)
    tl.store(at_ptr + 2 * step, third, at < length)


@jit.kernel
def _together(parts_ptr, out_ptr, parts, length, PARTS: tl.constexpr, LENGTH: tl.constexpr):
    """The statistics of all tiles of a row or of a column together: (3, parts, length) to (3, length)."""
    at = tl.program_id(0) * LENGTH + tl.arange(0, LENGTH)
    step = parts.to(tl.int64) * length
    maximum = tl.full((LENGTH,), float("-inf"), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        mask = (part < parts) & (at < length)[None, :]
        maximum = tl.maximum(
            maximum, tl.max(tl.load(parts_ptr + part.to(tl.int64) * length + at[None, :], mask, float("-inf")), 0)
        )
    total, beaten = tl.zeros((LENGTH,), tl.float32), tl.zeros((LENGTH,), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        mask = (part < parts) & (at < length)[None, :]
        at_ptr = parts_ptr + part.to(tl.int64) * length + at[None, :]
        shift = tl.exp(tl.load(at_ptr, mask, float("-inf")) - maximum[None, :])
        total += tl.sum(tl.load(at_ptr + step, mask, 0) * shift, 0)
        beaten += tl.sum(tl.load(at_ptr + 2 * step, mask, 0), 0)
    tl.store(out_ptr + at, maximum, at < length)
    tl.store(out_ptr + length + at, total, at < length)
    tl.store(out_ptr + 2 * length + at, beaten, at < length)


@triton.jit
def _softplus_and_sigmoid(z):
    """log(1 + exp(z)) and 1 / (1 + exp(-z)), to a few units in the last place however small they are.

    log(1 + e) = 2 artanh(e / (2 + e)): its series has odd powers of at most 1/3.
    """
    e = tl.exp(-tl.abs(z))
    t = e / (2 + e)
    u = t * t
    series = 1 + u * (1 / 3 + u * (1 / 5 + u * (1 / 7 + u * (1 / 9 + u * (1 / 11 + u * (1 / 13 + u * (1 / 15)))))))
    return tl.maximum(z, 0) + 2 * t * series, tl.where(z >= 0, 1, e) / (1 + e)


@jit.kernel
def _softmax_grad_tiles(
    image_ptr, text_ptr, scale_ptr, bias_ptr, row_maximum_ptr, row_total_ptr, column_maximum_ptr, column_total_ptr,
    row_place_ptr, column_place_ptr, w_ptr, own_ptr, row_lost_ptr, column_lost_ptr, sums_ptr,
    label, uniform, rows, columns, eighths,
    W_SCALE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Of a tile of S the weights W; of what is None neither is computed.

        contrastive   W = softmax over the row + softmax over the column - uniform,   minus label for the own pair
        sigmoid       W = sigmoid(S + bias),   minus 1 for the own pair; sums (tiles, 2) gets those of the loss and of W

    w (rows, 8 * eighths) gets W_SCALE * W, rounded, and 0 for an own pair, whose W goes to own[row]. What rounding took
    from the rows goes to row_lost (blocks of columns, rows), from the columns to column_lost (blocks of rows, columns).
    """
    i, j = _tile(rows, columns, ROWS, COLUMNS)
    row, column = i * ROWS + tl.arange(0, ROWS), j * COLUMNS + tl.arange(0, COLUMNS)
    logits = _logits(image_ptr, text_ptr, scale_ptr, row, column, rows, columns, WIDTH, ROWS, COLUMNS, K)
    last_row, last_column = tl.minimum(row, rows - 1), tl.minimum(column, columns - 1)
    row_place, column_place = tl.load(row_place_ptr + last_row), tl.load(column_place_ptr + last_column)
    live, own = (row < rows)[:, None] & (column < columns)[None, :], row_place[:, None] == column_place[None, :]
    if bias_ptr is not None:
        z = logits + tl.load(bias_ptr)
        loss, w = _softplus_and_sigmoid(tl.where(own, -z, z))
        w = tl.where(live, tl.where(own, -w, w), 0)
        tl.store(sums_ptr + 2 * tl.program_id(0), tl.sum(tl.sum(tl.where(live, loss, 0), 1), 0))
        tl.store(sums_ptr + 2 * tl.program_id(0) + 1, tl.sum(tl.sum(w, 1), 0))
    else:
        w = tl.exp(logits - tl.load(row_maximum_ptr + last_row)[:, None])
        w *= (1 / tl.load(row_total_ptr + last_row))[:, None]
        by_column = tl.exp(logits - tl.load(column_maximum_ptr + last_column)[None, :])
        w += by_column * (1 / tl.load(column_total_ptr + last_column))[None, :]
        w = tl.where(live, w - tl.where(own, uniform + label, uniform), 0)
    if w_ptr is not None:
        if (tl.max(column_place, 0) >= tl.min(row_place, 0)) & (tl.min(column_place, 0) <= tl.max(row_place, 0)):
            here = tl.max(own.to(tl.int32), 1) > 0
            tl.store(own_ptr + row, tl.sum(tl.where(own, w, 0), 1), here & (row < rows))
            w = tl.where(own, 0, w)
        rounded = (w * W_SCALE).to(w_ptr.dtype.element_ty)
        tl.store(w_ptr + row.to(tl.int64)[:, None] * (8 * eighths) + column[None, :], rounded, live)
        lost = w - rounded.to(tl.float32) * (1 / W_SCALE)
        if row_lost_ptr is not None:
            tl.store(row_lost_ptr + j.to(tl.int64) * rows + row, tl.sum(lost, 1), row < rows)
        if column_lost_ptr is not None:
            tl.store(column_lost_ptr + i.to(tl.int64) * columns + column, tl.sum(lost, 0), column < columns)


def positives(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """(b,): the diagonal of S, bit for bit as the tiles have it."""
    out, tile = scale.new_empty(len(image)), _config(image)
    grid = (triton.cdiv(len(image), tile.rows),)
    jit.launch(_positives, grid, image, text, scale, out, len(image), **_options(tile, image))
    return out


def statistics(rows: Side, columns: Side, scale: Tensor) -> tuple[Statistics, Statistics]:
    """Of the rows and of the columns of a block of S."""
    image, text, tile = rows.features, columns.features, _config(rows.features)
    down, across = triton.cdiv(len(image), tile.rows), triton.cdiv(len(text), tile.columns)
    of_rows, of_columns = scale.new_empty(3, across, len(image)), scale.new_empty(3, down, len(text))
    jit.launch(
        *(_lse_tiles, (down * across,), image, text, scale, rows.positive, columns.positive),
        *(rows.places(), columns.places(), of_rows, of_columns, len(image), len(text)),
        **_options(tile, image),
    )
    return _all_tiles(of_rows), _all_tiles(of_columns)


def _all_tiles(of_tiles: Tensor) -> Statistics:
    _, parts, length = of_tiles.shape
    out = of_tiles.new_empty(3, length)
    jit.launch(_together, (triton.cdiv(length, 64),), of_tiles, out, parts, length, PARTS=16, LENGTH=64)
    return Statistics(*out.unbind())


def contrastive_gradients(
    rows: Side, columns: Side, scale: Tensor, smoothing: float, samples: int, share: float,
    dimage: Tensor | None, dtext: Tensor | None,
) -> None:  # fmt: skip
    """Add share * W text to dimage and share * W' image to dtext, where they are wanted."""
    _gradients(rows, columns, scale, None, 2 * (1 - smoothing), 2 * smoothing / samples, share, dimage, dtext)


def sigmoid_gradients(
    rows: Side, columns: Side, scale: Tensor, bias: Tensor, share: float, dimage: Tensor | None, dtext: Tensor | None
) -> Tensor:
    """As `contrastive_gradients`; returns, in float64, the sums of the losses and of W over the block."""
    return _gradients(rows, columns, scale, bias.to(scale.dtype), 0.0, 0.0, share, dimage, dtext)


def _gradients(rows, columns, scale, bias, label, uniform, share, dimage, dtext) -> Tensor:
    image, text, tile = rows.features, columns.features, _config(rows.features)
    row_place, column_place = rows.places(), columns.places()
    wanted, rounds = dimage is not None or dtext is not None, image.dtype != torch.float32
    height, pitch = weights_at_a_time(len(image), len(text), image.element_size(), tile) if wanted else (len(image), 0)
    w = image.new_empty(height, pitch) if wanted else None
    w_scale = HALF_SCALE if image.dtype == torch.float16 else 1.0
    own = scale.new_empty(len(image)) if wanted else None
    column_lost = scale.new_zeros(len(text)) if rounds and dtext is not None else None
    sums = scale.new_zeros(2, dtype=torch.float64)
    mean_text = text.mean(0, dtype=scale.dtype) if rounds and dimage is not None else None

    for begin in range(0, len(image), height):
        part = slice(begin, min(begin + height, len(image)))
        length = part.stop - begin
        down, across = triton.cdiv(length, tile.rows), triton.cdiv(len(text), tile.columns)
        of_tiles = None if bias is None else scale.new_empty(down * across, 2)
        lost_by_row = None if mean_text is None else scale.new_empty(across, length)
        lost_by_column = None if column_lost is None else scale.new_empty(down, len(text))
        jit.launch(
            *(_softmax_grad_tiles, (down * across,), image[part], text, scale, bias),
            *(x if x is None else x[part] for x in (rows.maximum, rows.total)),
            *(columns.maximum, columns.total, row_place[part], column_place, w, None if own is None else own[part]),
            *(lost_by_row, lost_by_column, of_tiles, label, uniform, length, len(text), pitch // 8),
            **_options(tile, image),
            W_SCALE=w_scale,
        )
        if of_tiles is not None:
            sums += of_tiles.sum(0, dtype=torch.float64)
        if w is None:
            continue
        weights = w[:length, : len(text)]
        if dimage is not None:
            _add_product(dimage[part], weights, text, share / w_scale)
            if lost_by_row is not None:
                dimage[part].addr_(lost_by_row.sum(0), mean_text, alpha=share)
        if dtext is not None:
            _add_product(dtext, weights.t(), image[part], share / w_scale)
            if lost_by_column is not None:
                column_lost += lost_by_column.sum(0)

    if column_lost is not None:
        dtext.addr_(column_lost, image.mean(0, dtype=scale.dtype), alpha=share)
    for i, j in own_pairs(rows, columns) if wanted else ():
        weight = own[i].unsqueeze(1)
        if dimage is not None:
            dimage[i].addcmul_(weight, text[j], value=share)
        if dtext is not None:
            dtext[j].addcmul_(weight, image[i], value=share)
    return sums


def weights_at_a_time(rows: int, columns: int, itemsize: int, tile: Config) -> tuple[int, int]:
    """How many rows of W are computed at a time, whole tiles of at most `BYTES`, and how long each is in memory."""
    pitch = triton.cdiv(columns, 64) * 64
    return min(rows, max(1, BYTES // (pitch * itemsize) // tile.rows) * tile.rows), pitch


def own_pairs(rows: Side, columns: Side) -> Iterator[tuple[slice, slice]]:
    """The samples that are among the rows and among the columns: where in each."""
    for r in rows.segments:
        for c in columns.segments:
            first, last = max(r.first, c.first), min(r.first + r.length, c.first + c.length)
            if first < last:
                yield tuple(slice(s.begin + first - s.first, s.begin + last - s.first) for s in (r, c))


def _add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """out += alpha * a b, summed up in float32."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, alpha=alpha)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, alpha=alpha, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), alpha=alpha)


def _config(features: Tensor) -> Config:
    return config(features.element_size(), native.shared_memory(features.device))


def _options(tile: Config, features: Tensor) -> dict:
    sizes = {"WIDTH": features.shape[1], "ROWS": tile.rows, "COLUMNS": tile.columns, "K": tile.k}
    return {"warps": tile.warps, "stages": tile.stages, **sizes}


TILES = sys.modules[__name__]
