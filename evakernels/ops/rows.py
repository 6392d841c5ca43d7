"""What the Triton row kernels of norm and swiglu share: how rows fall to programs, and the sums over all rows.

A program works on a tile of rows, (rows, columns), where columns is a power of two: what a row does not have is masked.
A row stays in registers between its passes. Backward, a program goes on to further rows, and sums up what becomes the
gradients of the weights; rows too long to stay beside their sums are cut into tiles side by side.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from evakernels import jit

LONGEST = 16384  # columns of a row that registers hold: 16 for each of 1024 threads


class Tiles(NamedTuple):
    """How rows fall to programs."""

    rows: int
    columns: int
    warps: int
    grid: tuple[int, int]
    stages: int = 1


def refusal(width: int) -> str | None:
    """Why rows of this length cannot be served, in a sentence; None when they can."""
    if width <= LONGEST:
        return None
    return f"its kernels take rows of up to {LONGEST} elements, which registers hold, not {width}"


def power_of_2(n: int) -> int:
    """The least power of two that is not less than n."""
    return 1 << (n - 1).bit_length()


def element_tiles(rows: int, width: int) -> Tiles:
    """Tiles where nothing is summed up: 8 columns a thread, 16 bytes of bfloat16."""
    columns = min(1024, power_of_2(width))
    tall = 1024 // columns
    return Tiles(tall, columns, 4, (triton.cdiv(rows, tall), triton.cdiv(width, columns)))


def forward_tiles(rows: int, width: int) -> Tiles:
    """Tiles of whole rows, each seen once.

    By formula, not measured: 8 columns a thread, 16 bytes of bfloat16; 16 where that would take more than 8 warps,
    which wait for one another. Narrow rows share a tile of 4 warps.
    """
    columns = power_of_2(width)
    tall = max(1, 1024 // columns)
    warps = min(8, tall * columns // 256) if columns <= 4096 else columns // 512
    return Tiles(tall, columns, warps, (triton.cdiv(rows, tall), 1))


def backward_tiles(
    rows: int, width: int, summed: int, column_bytes: int, multiprocessors: int, shared_memory: int
) -> Tiles:
    """Tiles of rows whose sums over all rows become gradients.

    By formula, not measured: a multiprocessor has 16 warps, whose threads then have 128 registers each, so that all
    programs are there from the beginning to the end; 8 columns a thread. The next two tiles are under way to shared
    memory, where it holds them.

    Args:
        rows, width: of the tensors.
        summed: how many columns of a row registers hold beside their sums.
        column_bytes: of what is loaded for each column of a row.
        multiprocessors, shared_memory: of the GPU; bytes that one program may have.
    """
    columns = min(summed, power_of_2(width))
    tall = max(1, 1024 // columns)
    elements, across = tall * columns, triton.cdiv(width, columns)
    warps = min(16, elements // 256)
    programs = triton.cdiv(16 // warps * multiprocessors, across)
    # One kibibyte of each program's is CUDA's own; a change of layout takes 4 bytes an element.
    room = shared_memory // (16 // warps) - 1024 - 4 * elements
    stages = min(3, 1 + max(0, room) // (column_bytes * elements))
    return Tiles(tall, columns, warps, (min(programs, triton.cdiv(rows, tall)), across), stages)


@triton.jit
def of_columns(values_ptr, columns, inside, otherwise):
    """One value per column, (1, columns) in float32; `otherwise` where there is no tensor of them.

    Two dimensions, like the rows: the compiler then loads it in their layout, and has nothing to exchange.
    """
    if values_ptr is None:
        return otherwise
    else:
        return tl.load(values_ptr + columns, inside, 0).to(tl.float32)


@triton.jit
def of_rows(values_ptr, row, live, otherwise):
    """One value per row, (rows, 1) in float32; `otherwise` where there is no tensor of them."""
    if values_ptr is None:
        return otherwise
    else:
        return tl.load(values_ptr + row, live, 0).to(tl.float32)


@triton.jit
def row_mean(x, WIDTH: tl.constexpr):
    """The mean over the WIDTH columns of a row, (rows, 1); x is 0 in all others."""
    return tl.sum(x, 1)[:, None] * (1 / WIDTH)


@triton.jit
def inverse_root(x):
    """1 / sqrt(x): a step of Newton's after the GPU's approximation, which is off by a unit or two."""
    y = tl.rsqrt(x)
    return y * (1.5 - 0.5 * x * y * y)


@jit.kernel
def _add_up(
    partial_ptr, first_ptr, second_ptr, third_ptr, programs,
    WIDTH: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of one of the sums over all programs, in an order that depends on nothing but their number."""
    columns, which = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1)
    inside = columns < WIDTH
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, programs, ROWS):
        program = start + tl.arange(0, ROWS)[:, None]
        at = (program * SUMS + which) * WIDTH + columns
        total += tl.load(partial_ptr + at, (program < programs) & inside, 0)
    result = tl.sum(total, 0)
    if which == 0:
        tl.store(first_ptr + columns, result, inside)
    if SUMS > 1 and which == 1:
        tl.store(second_ptr + columns, result, inside)
    if SUMS > 2 and which == 2:
        tl.store(third_ptr + columns, result, inside)


def add_up(partial: Tensor, *gradients: Tensor) -> None:
    """Write the sums over the first dimension of `partial`, (programs, gradients, width), each in its own dtype."""
    programs, sums, width = partial.shape
    first, second, third = (*gradients, None, None)[:3]
    # 32 columns are a line of the cache, and 128 partial rows of it under way at a time.
    jit.launch(
        *(_add_up, (triton.cdiv(width, 32), sums), partial, first, second, third, programs),
        **{"WIDTH": width, "SUMS": sums, "ROWS": 128, "COLUMNS": 32},
    )


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]
