"""The angles of two-dimensional rotary position embedding, as two small tables: one for rows, one for columns."""

import torch
from torch import Tensor, nn


class Rope2d(nn.Module):
    """Rotary embedding of a grid of patches: half of each head turns with the row, half with the column.

    Pair i of the first D/4 pairs of channels turns by t_row * theta^(-4i/D), pair i of the other D/4 by
    t_column * theta^(-4i/D), where t_row = row * reference_grid / h and t_column = column * reference_grid / w.
    Tables are computed, never loaded: they are no parameters, have no state-dict keys and stay float32.

    Args:
        grid: patches per side, or (h, w); patch (row, column) has the id row * w + column.
        head_dim: D, a multiple of 4.
        theta: the base of the frequencies.
        reference_grid: the side of the grid whose angles a grid of any size spans; None: t is the index itself.
        prefix_tokens: how many tokens before the patches (class token, registers) are not turned.
        interleaved: pairs are channels (2i, 2i + 1); otherwise (i, i + D/2).

    Attributes:
        row_table, column_table: (h, D/4, 2) and (w, D/4, 2), float32, the last dimension (cos, sin).

    Raises:
        ValueError: an argument is out of range.

    Source: Su et al., arXiv 2104.09864; on a grid: Fang et al., arXiv 2303.11331 (EVA-02).
    """

    row_table: Tensor
    column_table: Tensor

    def __init__(
        self,
        grid: int | tuple[int, int],
        head_dim: int,
        *,
        theta: float = 10000.0,
        reference_grid: float | None = 16,
        prefix_tokens: int = 1,
        interleaved: bool = True,
    ) -> None:
        super().__init__()
        self.grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
        self.head_dim, self.theta, self.reference_grid = head_dim, theta, reference_grid
        self.prefix_tokens, self.interleaved = prefix_tokens, interleaved
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"Rope2d: grid is {grid}; give the patches per side, or (rows, columns), each at least 1")
        if head_dim < 4 or head_dim % 4:
            raise ValueError(f"Rope2d: head_dim is {head_dim}; rows and columns need a multiple of 4")
        if theta <= 0 or (reference_grid is not None and reference_grid <= 0):
            raise ValueError(f"Rope2d: theta {theta} and reference_grid {reference_grid} must be positive")
        if prefix_tokens < 0:
            raise ValueError(f"Rope2d: prefix_tokens is {prefix_tokens}; give 0 or more")
        device = torch.get_default_device()
        self.register_buffer("row_table", self._table(self.grid[0], device), persistent=False)
        self.register_buffer("column_table", self._table(self.grid[1], device), persistent=False)

    def _table(self, size: int, device: torch.device) -> Tensor:
        # Computed on the CPU, where float64 is to be had, even under `torch.device("meta")`.
        pairs = self.head_dim // 4
        frequency = self.theta ** -(torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)
        position = torch.arange(size, dtype=torch.float64, device="cpu")
        if self.reference_grid is not None:
            position = position * self.reference_grid / size
        angle = position[:, None] * frequency
        return torch.stack((angle.cos(), angle.sin()), -1).to(torch.float32).to(device)

    def _apply(self, fn, recurse=True):
        # What .half() has rounded or .to_empty() left unwritten is computed anew, wherever it lies now.
        before = self.row_table, self.column_table
        super()._apply(fn, recurse)
        if self.row_table is not before[0]:
            self.row_table = self._table(self.grid[0], self.row_table.device)
        if self.column_table is not before[1]:
            self.column_table = self._table(self.grid[1], self.column_table.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"grid={self.grid}, head_dim={self.head_dim}, theta={self.theta}, reference_grid={self.reference_grid}, "
            f"prefix_tokens={self.prefix_tokens}, interleaved={self.interleaved}"
        )
