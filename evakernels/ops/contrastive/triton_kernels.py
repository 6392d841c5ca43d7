"""The Triton kernels of the contrastive losses; what launches them is in `triton.py`.

A program has one tile of S = scale * image text', in registers; own pairs are those of equal place in the whole batch.
"""

import triton
import triton.language as tl

from evakernels import jit

INTERPRETED = tl.constexpr(jit.INTERPRETED)
# The logit of what is not there: exp(NOWHERE - maximum) is 0, and NOWHERE - NOWHERE is not NaN.
NOWHERE = tl.constexpr(-3e38)


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
def positives(
    image_ptr, text_ptr, scale_ptr, out_ptr, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out[i] = S_ii, out of a whole tile, so that equal features have equal logits here and in the other kernels."""
    STEP: tl.constexpr = min(ROWS, COLUMNS)
    row, column = tl.program_id(0) * STEP + tl.arange(0, ROWS), tl.program_id(0) * STEP + tl.arange(0, COLUMNS)
    logits = _logits(image_ptr, text_ptr, scale_ptr, row, column, rows, rows, WIDTH, ROWS, COLUMNS, K)
    diagonal = tl.sum(tl.where(row[:, None] == column[None, :], logits, 0), 1)
    tl.store(out_ptr + row, diagonal, (tl.arange(0, ROWS) < STEP) & (row < rows))


@triton.jit
def _ordinary(place, column_place, i, j, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether a tile is whole and certainly has no own pair."""
    apart = (tl.max(column_place, 0) < tl.min(place, 0)) | (tl.min(column_place, 0) > tl.max(place, 0))
    return apart & ((i + 1) * ROWS <= rows) & ((j + 1) * COLUMNS <= columns)


@triton.jit
def _zeros(LENGTH: tl.constexpr):
    return tl.zeros((LENGTH,), tl.float32)


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _quarters(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns of a tile, a quarter at a time: what is computed from one dies before the next is begun."""
    a, b = _halves(x, ROWS, COLUMNS)
    c, d = _halves(a, ROWS, COLUMNS // 2)
    e, f = _halves(b, ROWS, COLUMNS // 2)
    return c, d, e, f


@jit.kernel
def lse_tiles(
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
    last_row, last_column = tl.minimum(row, rows - 1), tl.minimum(column, columns - 1)
    positive, place = tl.load(row_positive_ptr + last_row), tl.load(row_place_ptr + last_row)
    column_place = tl.load(column_place_ptr + last_column)
    if not _ordinary(place, column_place, i, j, rows, columns, ROWS, COLUMNS):
        # Own logits are those that everybody knows, to the last bit.
        logits = tl.where(place[:, None] == column_place[None, :], positive[:, None], logits)
        logits = tl.where((row < rows)[:, None] & (column < columns)[None, :], logits, NOWHERE)
    maximum, total, beaten = tl.max(logits, 1), _zeros(ROWS), _zeros(ROWS)

    quarters = _quarters(logits, ROWS, COLUMNS)
    for q in tl.static_range(4):
        part, column = quarters[q], j * COLUMNS + q * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
        last_column = tl.minimum(column, columns - 1)
        column_positive = tl.load(column_positive_ptr + last_column)
        column_place = tl.load(column_place_ptr + last_column)
        column_maximum, row_maximum = tl.max(part, 0), tl.max(part, 1)
        # Of equal logits the one of lowest place counts.
        if tl.max(column_place, 0) < tl.min(place, 0):
            row_beaten = (row_maximum >= positive).to(tl.float32)
            column_beaten = (column_maximum > column_positive).to(tl.float32)
        elif tl.min(column_place, 0) > tl.max(place, 0):
            row_beaten = (row_maximum > positive).to(tl.float32)
            column_beaten = (column_maximum >= column_positive).to(tl.float32)
        else:  # own pairs may be here
            ahead = place[:, None] - column_place[None, :]
            larger, as_large = part > positive[:, None], part == positive[:, None]
            row_beaten = tl.max(((ahead != 0) & (larger | (as_large & (ahead > 0)))).to(tl.float32), 1)
            larger, as_large = part > column_positive[None, :], part == column_positive[None, :]
            column_beaten = tl.max(((ahead != 0) & (larger | (as_large & (ahead < 0)))).to(tl.float32), 0)
        beaten = tl.maximum(beaten, row_beaten)
        total += tl.sum(tl.exp(part - maximum[:, None]), 1)
        column_total = tl.sum(tl.exp(part - column_maximum[None, :]), 0)
        _store_three(
            of_columns_ptr, column_maximum, column_total, column_beaten, i, column, tl.cdiv(rows, ROWS), columns
        )
    _store_three(of_rows_ptr, maximum, total, beaten, j, row, tl.cdiv(columns, COLUMNS), rows)


@triton.jit
def _store_three(out_ptr, first, second, third, part, at, parts, length):
    step = parts.to(tl.int64) * length
    at_ptr = out_ptr + part.to(tl.int64) * length + at
    tl.store(at_ptr, first, at < length)
    tl.store(at_ptr + step, second, at < length)
    tl.store(at_ptr + 2 * step, third, at < length)


@jit.kernel
def together(parts_ptr, out_ptr, parts, length, PARTS: tl.constexpr, LENGTH: tl.constexpr):
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
    total, beaten = _zeros(LENGTH), _zeros(LENGTH)
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
def _softplus(z):
    """log(1 + exp(z)), to a few units in the last place however small it is.

    log(1 + e) = 2 artanh(e / (2 + e)), in whose series are the odd powers of at most 1/3.
    """
    e = tl.exp(-tl.abs(z))
    t = e / (2 + e)
    u = t * t
    series = 1 + u * (1 / 3 + u * (1 / 5 + u * (1 / 7 + u * (1 / 9 + u * (1 / 11 + u * (1 / 13 + u * (1 / 15)))))))
    return tl.maximum(z, 0) + 2 * t * series


@jit.kernel
def softmax_grad_tiles(
    image_ptr, text_ptr, scale_ptr, bias_ptr, middle_ptr, row_maximum_ptr, row_total_ptr, column_maximum_ptr,
    column_total_ptr, row_place_ptr, column_place_ptr, w_ptr, row_lost_ptr, column_lost_ptr, sums_ptr,
    rows, columns, eighths,
    W_SCALE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Of a tile of S the weights W of the pairs that are no sample's own; what is None is not computed.

        contrastive   W = softmax over the row + softmax over the column;   sums (tiles, 2) gets <W, S - middle>, 0
        sigmoid       W = sigmoid(S + bias);   sums gets those of the loss and of W

    w (rows, 8 * eighths) gets W_SCALE * W, rounded. What rounding took from rows goes to row_lost (blocks of columns,
    rows), from columns to column_lost (blocks of rows, columns).
    """
    i, j = _tile(rows, columns, ROWS, COLUMNS)
    row, column = i * ROWS + tl.arange(0, ROWS), j * COLUMNS + tl.arange(0, COLUMNS)
    logits = _logits(image_ptr, text_ptr, scale_ptr, row, column, rows, columns, WIDTH, ROWS, COLUMNS, K)
    last_row = tl.minimum(row, rows - 1)
    place, column_place = tl.load(row_place_ptr + last_row), tl.load(column_place_ptr + tl.minimum(column, columns - 1))
    if not _ordinary(place, column_place, i, j, rows, columns, ROWS, COLUMNS):
        kept = (row < rows)[:, None] & (column < columns)[None, :] & (place[:, None] != column_place[None, :])
        logits = tl.where(kept, logits, NOWHERE)
    if bias_ptr is None:
        maximum, share = tl.load(row_maximum_ptr + last_row), 1 / tl.load(row_total_ptr + last_row)
        middle = tl.load(middle_ptr)
    row_lost, first, second = _zeros(ROWS), _zeros(ROWS), _zeros(ROWS)

    quarters = _quarters(logits, ROWS, COLUMNS)
    for q in tl.static_range(4):
        part, column = quarters[q], j * COLUMNS + q * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
        if bias_ptr is None:
            last_column = tl.minimum(column, columns - 1)
            column_share = 1 / tl.load(column_total_ptr + last_column)
            w = tl.exp(part - tl.load(column_maximum_ptr + last_column)[None, :]) * column_share[None, :]
            w += tl.exp(part - maximum[:, None]) * share[:, None]
            first += tl.sum(w * (part - middle), 1)
        else:
            z = part + tl.load(bias_ptr)
            first += tl.sum(_softplus(z), 1)
            w = 1 / (1 + tl.exp(-z))
            second += tl.sum(w, 1)
        if w_ptr is not None:
            rounded = (w * W_SCALE).to(w_ptr.dtype.element_ty)
            at = row[:, None] * (8 * eighths) + column[None, :]
            tl.store(w_ptr + at, rounded, (row < rows)[:, None] & (column < columns)[None, :])
            lost = w - rounded.to(tl.float32) * (1 / W_SCALE)
            if row_lost_ptr is not None:
                row_lost += tl.sum(lost, 1)
            if column_lost_ptr is not None:
                tl.store(column_lost_ptr + i.to(tl.int64) * columns + column, tl.sum(lost, 0), column < columns)
    if row_lost_ptr is not None:
        tl.store(row_lost_ptr + j.to(tl.int64) * rows + row, row_lost, row < rows)
    tl.store(sums_ptr + 2 * tl.program_id(0), tl.sum(first, 0))
    tl.store(sums_ptr + 2 * tl.program_id(0) + 1, tl.sum(second, 0))
