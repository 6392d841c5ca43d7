"""Results for machines, as JSON, and for people, as a table."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

Results = Mapping[str, Mapping[str, float]]  # data set -> metric -> value


def write_json(results: Results, path: str | Path) -> None:
    """Write results as JSON, values unrounded; folders are made as needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def table(results: Results) -> str:
    """Results as plain text: a row per data set, a column per metric, shares of 1 in percent."""
    header, rows = _cells(results)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *numbers]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def print_results(results: Results, *, title: str = "", file: TextIO | None = None) -> None:
    """Print results as a table: with rich where it is installed, else as `table` writes it."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(*([title] if title else []), table(results), sep="\n", file=file or sys.stdout)
        return
    header, rows = _cells(results)
    pretty = Table(title=title or None)
    for i, name in enumerate(header):
        pretty.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        pretty.add_row(*row)
    Console(file=file).print(pretty)


def _cells(results: Results) -> tuple[list[str], list[list[str]]]:
    metrics = list(dict.fromkeys(metric for values in results.values() for metric in values))
    rows = [[name, *(_cell(values.get(metric)) for metric in metrics)] for name, values in results.items()]
    return ["", *metrics], rows


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{100 * value:.1f} %"
