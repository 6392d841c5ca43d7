"""The norms by Triton kernels: one forward and one backward for the four functions, as in `csrc/norm/`.

    norm       y = norm(x)
    add_norm   sum = residual + row_scale * layer_scale * x, rounded to its dtype;   y = norm(sum)
    norm_add   sum = residual + row_scale * layer_scale * norm(x)

Everything between load and store is float32. What belongs to a tensor that is not there is left out at compile time.
"""

import torch
import triton.language as tl
from torch import Tensor

from evakernels import jit, native
from evakernels.ops import rows as tiles
from evakernels.ops.norm import buffers
from evakernels.ops.rows import inverse_root, of_columns, of_rows, row_mean

SUMMED = 8192  # columns of a row whose two sums the registers of 16 warps hold; half of it with a third, for the scale


def refuses(op: str, *args) -> str | None:
    """Why the kernels cannot serve this call: the device, a dtype, or the row length."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    return jit.refusal(*tensors) or tiles.refusal(tensors[0].shape[-1])


@jit.kernel
def _forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, layer_scale_ptr, row_scale_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
    rows, rows_per_sample, eps,
    KIND: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, columns = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None], tl.arange(0, COLUMNS)[None, :]
    live, inside = row < rows, columns < WIDTH
    at, mask = row.to(tl.int64) * WIDTH, live & inside
    row_scale = of_rows(row_scale_ptr, row // rows_per_sample, live, 1.0)
    layer_scale = of_columns(layer_scale_ptr, columns, inside, 1.0)

    x = tl.load(x_ptr + at + columns, mask, 0).to(tl.float32)
    if KIND == "add_norm":
        residual = tl.load(residual_ptr + at + columns, mask, 0).to(tl.float32)
        total = (residual + row_scale * (layer_scale * x)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at + columns, total, mask)
        x = total.to(tl.float32)

    if mean_ptr is not None:
        mean = row_mean(x, WIDTH)
        tl.store(mean_ptr + row, mean, live)
        x = tl.where(inside, x - mean, 0)
    rstd = inverse_root(row_mean(x * x, WIDTH) + eps)
    tl.store(rstd_ptr + row, rstd, live)

    y = x * rstd * of_columns(weight_ptr, columns, inside, 1.0) + of_columns(bias_ptr, columns, inside, 0.0)
    if KIND == "norm_add":  # the residual comes last: long rows have no registers for it before
        residual = tl.load(residual_ptr + at + columns, mask, 0).to(tl.float32)
        tl.store(sum_ptr + at + columns, residual + row_scale * (layer_scale * y), mask)
    else:
        tl.store(y_ptr + at + columns, y, mask)


@jit.kernel
def _row_means(
    dy_ptr, x_ptr, weight_ptr, layer_scale_ptr, row_scale_ptr, mean_ptr, rstd_ptr, means_ptr, rows, rows_per_sample,
    KIND: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The means over a row of g and of g * normed, for the backward kernel where it sees only a part of the row."""
    row = (tl.program_id(0) + tl.arange(0, 1))[:, None]
    live, at = row < rows, row.to(tl.int64) * WIDTH
    mean, rstd = of_rows(mean_ptr, row, live, 0.0), of_rows(rstd_ptr, row, live, 1.0)
    sum_g, sum_gn = tl.zeros((1, COLUMNS), tl.float32), tl.zeros((1, COLUMNS), tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)[None, :]
        inside = columns < WIDTH
        g = tl.load(dy_ptr + at + columns, inside, 0).to(tl.float32)
        if KIND == "norm_add":
            scale = of_columns(layer_scale_ptr, columns, inside, 1.0)
            g = of_rows(row_scale_ptr, row // rows_per_sample, live, 1.0) * g * scale
        g *= of_columns(weight_ptr, columns, inside, 1.0)
        sum_g += g
        sum_gn += g * (tl.load(x_ptr + at + columns, inside, 0).to(tl.float32) - mean) * rstd
    tl.store(means_ptr + row * 2, row_mean(sum_g, WIDTH))
    tl.store(means_ptr + row * 2 + 1, row_mean(sum_gn, WIDTH))


@jit.kernel
def _backward(
    dy_ptr, dsum_ptr, x_ptr, branch_ptr, weight_ptr, bias_ptr, layer_scale_ptr, row_scale_ptr, mean_ptr, rstd_ptr,
    means_ptr, dx_ptr, dbranch_ptr, partial_ptr, rows, rows_per_sample,
    KIND: tl.constexpr, BIAS: tl.constexpr, SUMS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some columns of some rows. With d the gradient of norm(x) and g = d * weight,

        dx = rstd * (g - mean(g) - normed * mean(g * normed)),   dweight = sum(d * normed),   dbias = sum(d),

    the means over the row, without mean(g) for RMSNorm, and the sums over these rows.
    """
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = columns < WIDTH
    weight = of_columns(weight_ptr, columns, inside, 1.0)
    bias = of_columns(bias_ptr, columns, inside, 0.0)
    layer_scale = of_columns(layer_scale_ptr, columns, inside, 1.0)
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    dscale = tl.zeros((ROWS, COLUMNS), tl.float32)

    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS))[:, None]
        live = row < rows
        at, mask = row.to(tl.int64) * WIDTH, live & inside
        if COLUMNS > 4096:  # there registers cannot keep it
            weight = of_columns(weight_ptr, columns, inside, 1.0)
        row_scale = of_rows(row_scale_ptr, row // rows_per_sample, live, 1.0)
        rstd = of_rows(rstd_ptr, row, live, 1.0)
        x = tl.load(x_ptr + at + columns, mask, 0).to(tl.float32)
        normed = (x - of_rows(mean_ptr, row, live, 0.0)) * rstd
        d = tl.load(dy_ptr + at + columns, mask, 0).to(tl.float32)
        if KIND == "norm_add":
            d = row_scale * d
            if layer_scale_ptr is not None:
                dscale += d * (normed * weight + bias)
                d *= layer_scale
        dweight += d * normed
        if BIAS:
            dbias += d
        g = d * weight
        if means_ptr is None:
            mean_g, mean_gn = row_mean(g, WIDTH), row_mean(g * normed, WIDTH)
        else:
            mean_g, mean_gn = of_rows(means_ptr, row * 2, live, 0.0), of_rows(means_ptr, row * 2 + 1, live, 0.0)
        dx = g - normed * mean_gn
        if mean_ptr is not None:
            dx -= mean_g
        dx *= rstd
        if KIND == "add_norm":
            if dsum_ptr is not None:
                dx += tl.load(dsum_ptr + at + columns, mask, 0).to(tl.float32)
            if layer_scale_ptr is not None:
                dscale += row_scale * dx * tl.load(branch_ptr + at + columns, mask, 0).to(tl.float32)
            if dbranch_ptr is not None:
                tl.store(dbranch_ptr + at + columns, row_scale * (layer_scale * dx), mask)
        tl.store(dx_ptr + at + columns, dx, mask)

    sums_ptr = partial_ptr + tl.program_id(0) * SUMS * WIDTH + columns
    tl.store(sums_ptr, tl.sum(dweight, 0)[None, :], inside)
    if BIAS:
        tl.store(sums_ptr + WIDTH, tl.sum(dbias, 0)[None, :], inside)
    if layer_scale_ptr is not None:
        tl.store(sums_ptr + (SUMS - 1) * WIDTH, tl.sum(dscale, 0)[None, :], inside)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, dtype: torch.dtype):
    y, statistics = x.new_empty(x.shape, dtype=dtype), buffers.statistics(x, rms)
    _launch_forward("norm", x, None, weight, bias, None, None, y, None, *statistics, eps)
    return y, *statistics


def add_norm(residual, branch, weight, bias, eps, rms, layer_scale, row_scale, dtype):
    total, statistics = residual.new_empty(residual.shape), buffers.statistics(residual, rms)
    y = residual.new_empty(residual.shape, dtype=dtype)
    _launch_forward("add_norm", branch, residual, weight, bias, layer_scale, row_scale, y, total, *statistics, eps)
    return total, y, *statistics


def norm_add(residual, branch, weight, bias, eps, rms, layer_scale, row_scale):
    out, statistics = residual.new_empty(residual.shape), buffers.statistics(residual, rms)
    _launch_forward("norm_add", branch, residual, weight, bias, layer_scale, row_scale, None, out, *statistics, eps)
    return out, *statistics


def norm_backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, bias: bool):
    dx, weights = x.new_empty(x.shape), _gradients(weight, bias, None, rstd)
    _launch_backward("norm", dy, None, x, None, weight, None, None, None, mean, rstd, dx, None, *weights)
    return dx, *weights[:2]


def add_norm_backward(dsum, dy, total, branch, weight, mean, rstd, layer_scale, row_scale, bias, branch_dtype):
    dresidual, weights = total.new_empty(total.shape), _gradients(weight, bias, layer_scale, rstd)
    alike = layer_scale is None and row_scale is None and branch_dtype == total.dtype
    dbranch = total.new_empty((0,) if alike else total.shape, dtype=branch_dtype)
    _launch_backward(
        *("add_norm", dy, dsum, total, branch, weight, None, layer_scale, row_scale, mean, rstd),
        *(dresidual, None if alike else dbranch, *weights),
    )
    return dresidual, dbranch, *weights


def norm_add_backward(dout, branch, weight, bias, mean, rstd, layer_scale, row_scale):
    dbranch, weights = branch.new_empty(branch.shape), _gradients(weight, bias is not None, layer_scale, rstd)
    _launch_backward(
        *("norm_add", dout, None, branch, None, weight, bias, layer_scale, row_scale, mean, rstd),
        *(dbranch, None, *weights),
    )
    return dbranch, *weights


def _gradients(weight: Tensor, bias: bool, layer_scale: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those of the weight, the bias and the layer scale; empty where they are not wanted."""
    width = weight.shape
    dscale = rstd.new_empty(0) if layer_scale is None else layer_scale.new_empty(width)
    return weight.new_empty(width), weight.new_empty(width if bias else (0,)), dscale


def _launch_forward(kind, x, residual, weight, bias, layer_scale, row_scale, y, total, mean, rstd, eps: float) -> None:
    rows, rows_per_sample, width = buffers.sizes(x)
    tile = tiles.forward_tiles(rows, width)
    jit.launch(
        _forward,
        tile.grid,
        *tiles.contiguous(x, residual, weight, bias, layer_scale, row_scale),
        *(y, total, mean if mean.numel() else None, rstd, rows, rows_per_sample, eps),
        warps=tile.warps,
        KIND=kind,
        WIDTH=width,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
    )


def _launch_backward(
    kind, dy, dsum, x, branch, weight, bias, layer_scale, row_scale, mean, rstd, dx, dbranch, dweight, dbias, dscale
) -> None:
    gradients = [g for g in (dweight, dbias, dscale) if g.numel()]
    rows, rows_per_sample, width = buffers.sizes(x)
    if not rows:
        for gradient in gradients:
            gradient.zero_()
        return
    dy, dsum, x, branch, weight, bias = tiles.contiguous(dy, dsum, x, branch, weight, bias)
    layer_scale, row_scale, rstd = tiles.contiguous(layer_scale, row_scale, rstd)
    mean = mean.contiguous() if mean.numel() else None
    tile = tiles.backward_tiles(
        *(rows, width, SUMMED if layer_scale is None else SUMMED // 2),
        sum(t.element_size() for t in (dy, dsum, x, branch, weight) if t is not None),
        *(native.multiprocessors(x.device), native.shared_memory(x.device)),
    )
    means = None
    if tile.grid[1] > 1:
        means = rstd.new_empty(rows, 2)
        jit.launch(
            _row_means,
            (rows,),
            *(dy, x, weight, layer_scale, row_scale, mean, rstd, means, rows, rows_per_sample),
            warps=tile.warps,
            KIND=kind,
            WIDTH=width,
            COLUMNS=tile.columns,
        )
    partial = rstd.new_empty(tile.grid[0], len(gradients), width)
    jit.launch(
        _backward,
        tile.grid,
        *(dy, dsum, x, branch, weight, bias, layer_scale, row_scale, mean, rstd, means),
        *(dx, dbranch, partial, rows, rows_per_sample),
        warps=tile.warps,
        KIND=kind,
        BIAS=dbias.numel() > 0,
        SUMS=len(gradients),
        WIDTH=width,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        STAGES=tile.stages,
    )
    tiles.add_up(partial, *gradients)
