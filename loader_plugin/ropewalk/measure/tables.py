"""Tables of results: as CSV, as columns for a terminal, as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

Row = Sequence[Any]


def csv_text(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """Comma-separated, with a line of names."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return out.getvalue()


def terminal_table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """Columns of equal width: the first to the left, the others, which are numbers, to the right."""
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zipped))
        for zipped in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    return "".join(line.rstrip() + "\n" for line in lines)


def markdown_table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """As GitHub and model cards show it: the first column to the left, the others to the right."""
    lines = [list(columns), ["---", *["--:"] * (len(columns) - 1)], *([str(cell) for cell in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def with_error(value: float, error: float | None, digits: int = 2) -> str:
    """ "7.13 ± 0.05", or the value alone."""
    shown = f"{value:,.{digits}f}"
    return shown if error is None else f"{shown} ± {error:,.{digits}f}"
