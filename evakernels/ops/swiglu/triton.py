"""SwiGLU and the LayerNorm after it by Triton kernels: one forward and one backward, as in `csrc/swiglu/`.

Everything between load and store is float32; the product is never stored. Rows of `WIDTH` columns lie in rows of
`PADDED`: what the pad holds is replaced by zeros as it is loaded, so that a row is read in whole vectors.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from evakernels import jit, native
from evakernels.ops import rows as tiles
from evakernels.ops.rows import inverse_root, of_columns, of_rows, row_mean
from evakernels.ops.swiglu.buffers import operators

SUMMED = 4096  # columns of a row whose two sums the registers of 16 warps hold beside gate, up and dy


def refuses(op: str, *args) -> str | None:
    """Why the kernels cannot serve this call: the device, a dtype, or the row length."""
    first, weight = {"swiglu": (0, 2), "swiglu_packed": (0, 1)}.get(op, (1, 3 if op == "swiglu_backward" else 2))
    padded = args[first].shape[-1] // (2 if "packed" in op else 1)
    tensors = (a for a in args if isinstance(a, Tensor))
    return jit.refusal(*tensors) or (None if args[weight] is None else tiles.refusal(padded))


@triton.jit
def _load(x_ptr, row, pitch, columns, rows, UNIT: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Some columns of some rows in float32, zeros in the pad."""
    mask = (row < rows) & (columns < PADDED)
    x = tl.load(x_ptr + row.to(tl.int64) * pitch * UNIT + columns, mask, 0).to(tl.float32)
    return x if PADDED == WIDTH else tl.where(columns < WIDTH, x, 0)


@triton.jit
def _store(x_ptr, x, row, columns, rows, PITCH: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The same for contiguous results: zeros in the pad, whatever was computed there."""
    x = x if PADDED == WIDTH else tl.where(columns < WIDTH, x, 0)
    tl.store(x_ptr + row.to(tl.int64) * PITCH + columns, x, (row < rows) & (columns < PADDED))


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)), the quotient with a step of Newton's, which an infinity would turn into NaN."""
    y = 1 + tl.minimum(tl.exp(-x), 1e37)
    s = 1 / y
    return s * (2 - y * s)


@jit.kernel
def _forward(
    gate_ptr, up_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, rows, gate_pitch, up_pitch, eps,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some rows; without the norm, some columns of them."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = columns < WIDTH
    gate = _load(gate_ptr, row, gate_pitch, columns, rows, UNIT, WIDTH, PADDED)
    y = gate * _sigmoid(gate) * _load(up_ptr, row, up_pitch, columns, rows, UNIT, WIDTH, PADDED)
    if weight_ptr is not None:
        mean = row_mean(y, WIDTH)
        y = tl.where(inside, y - mean, 0)
        rstd = inverse_root(row_mean(y * y, WIDTH) + eps)
        tl.store(mean_ptr + row, mean, row < rows)
        tl.store(rstd_ptr + row, rstd, row < rows)
        y = y * rstd * of_columns(weight_ptr, columns, inside, 1.0) + of_columns(bias_ptr, columns, inside, 0.0)
    _store(y_ptr, y, row, columns, rows, PADDED, WIDTH, PADDED)


@jit.kernel
def _row_means(
    dy_ptr, gate_ptr, up_ptr, weight_ptr, mean_ptr, rstd_ptr, means_ptr, rows, dy_pitch, gate_pitch, up_pitch,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The means over a row of g and of g * normed, for the backward kernel where it sees only a part of the row."""
    row = (tl.program_id(0) + tl.arange(0, 1))[:, None]
    mean, rstd = of_rows(mean_ptr, row, row < rows, 0.0), of_rows(rstd_ptr, row, row < rows, 1.0)
    sum_g, sum_gn = tl.zeros((1, COLUMNS), tl.float32), tl.zeros((1, COLUMNS), tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)[None, :]
        gate = _load(gate_ptr, row, gate_pitch, columns, rows, UNIT, WIDTH, PADDED)
        product = gate * _sigmoid(gate) * _load(up_ptr, row, up_pitch, columns, rows, UNIT, WIDTH, PADDED)
        g = _load(dy_ptr, row, dy_pitch, columns, rows, UNIT, WIDTH, PADDED)
        g *= of_columns(weight_ptr, columns, columns < WIDTH, 1.0)
        sum_g += g
        sum_gn += g * (product - mean) * rstd
    tl.store(means_ptr + row * 2, row_mean(sum_g, WIDTH))
    tl.store(means_ptr + row * 2 + 1, row_mean(sum_gn, WIDTH))


@jit.kernel
def _backward(
    dy_ptr, gate_ptr, up_ptr, weight_ptr, mean_ptr, rstd_ptr, means_ptr, dgate_ptr, dup_ptr, partial_ptr,
    rows, dy_pitch, gate_pitch, up_pitch,
    BIAS: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, PITCH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some columns of some rows: the gradients of gate and up, and sums over these rows for those of the weights."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = columns < WIDTH
    weight = of_columns(weight_ptr, columns, inside, 1.0)
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)

    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS))[:, None]
        live = row < rows
        gate = _load(gate_ptr, row, gate_pitch, columns, rows, UNIT, WIDTH, PADDED)
        up = _load(up_ptr, row, up_pitch, columns, rows, UNIT, WIDTH, PADDED)
        dproduct = _load(dy_ptr, row, dy_pitch, columns, rows, UNIT, WIDTH, PADDED)
        sigmoid = _sigmoid(gate)
        silu = gate * sigmoid
        if weight_ptr is not None:
            rstd = of_rows(rstd_ptr, row, live, 1.0)
            normed = (silu * up - of_rows(mean_ptr, row, live, 0.0)) * rstd
            dweight += dproduct * normed
            if BIAS:
                dbias += dproduct
            g = dproduct * weight
            if means_ptr is None:
                mean_g, mean_gn = row_mean(g, WIDTH), row_mean(g * normed, WIDTH)
            else:
                mean_g, mean_gn = of_rows(means_ptr, row * 2, live, 0.0), of_rows(means_ptr, row * 2 + 1, live, 0.0)
            dproduct = rstd * (g - mean_g - normed * mean_gn)
        dgate = dproduct * up * sigmoid * (1 + gate * (1 - sigmoid))
        _store(dgate_ptr, dgate, row, columns, rows, PITCH, WIDTH, PADDED)
        _store(dup_ptr, dproduct * silu, row, columns, rows, PITCH, WIDTH, PADDED)

    if weight_ptr is not None:
        sums_ptr = partial_ptr + tl.program_id(0) * (1 + BIAS) * WIDTH + columns
        tl.store(sums_ptr, tl.sum(dweight, 0)[None, :], inside)
        if BIAS:
            tl.store(sums_ptr + WIDTH, tl.sum(dbias, 0)[None, :], inside)


def _pitches(*rows: Tensor) -> tuple[int, list[int]]:
    """From row to row: the unit, of up to 8 elements, that vectors may have, and each tensor's number of units."""
    unit = math.gcd(8, *(x.stride(0) for x in rows))
    return unit, [x.stride(0) // unit for x in rows]


def _launch_forward(gate, up, weight, bias, y, mean, rstd, eps: float, width: int) -> None:
    rows, padded = gate.shape
    unit, pitches = _pitches(gate, up)
    tile = tiles.element_tiles(rows, padded) if weight is None else tiles.forward_tiles(rows, padded)
    weight, bias = tiles.contiguous(weight, bias)
    jit.launch(
        _forward,
        tile.grid,
        *(gate, up, weight, bias, y, mean, rstd, rows, *pitches, eps),
        warps=tile.warps,
        UNIT=unit,
        WIDTH=width,
        PADDED=padded,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
    )


def _launch_backward(dy, gate, up, weight, mean, rstd, dgate, dup, dweight, dbias, width: int) -> None:
    gradients = [g for g in (dweight, dbias) if g.numel()]
    rows, padded = gate.shape
    if not rows:
        for gradient in gradients:
            gradient.zero_()
        return
    unit, pitches = _pitches(dy, gate, up)
    weight, mean, rstd = tiles.contiguous(weight, mean, rstd)
    means = partial = None
    if weight is None:
        tile = tiles.element_tiles(rows, padded)
    else:
        column_bytes = sum(t.element_size() for t in (dy, gate, up))
        tile = tiles.backward_tiles(
            *(rows, padded, SUMMED, column_bytes),
            *(native.multiprocessors(gate.device), native.shared_memory(gate.device)),
        )
        partial = rstd.new_empty(tile.grid[0], len(gradients), width)
        if tile.grid[1] > 1:
            means = rstd.new_empty(rows, 2)
            jit.launch(
                _row_means,
                (rows,),
                *(dy, gate, up, weight, mean, rstd, means, rows, *pitches),
                warps=tile.warps,
                UNIT=unit,
                WIDTH=width,
                PADDED=padded,
                COLUMNS=tile.columns,
            )
    jit.launch(
        _backward,
        tile.grid,
        *(dy, gate, up, weight, mean, rstd, means, dgate, dup, partial, rows, *pitches),
        warps=tile.warps,
        BIAS=dbias.numel() > 0,
        UNIT=unit,
        WIDTH=width,
        PADDED=padded,
        PITCH=dgate.stride(0),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        STAGES=tile.stages,
    )
    if partial is not None:
        tiles.add_up(partial, *gradients)


swiglu, swiglu_backward, swiglu_packed, swiglu_packed_backward = operators(_launch_forward, _launch_backward)
