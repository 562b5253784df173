"""A report on a build as tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.build_parts import Cell, Part, Row, is_number
from launch.plain_text import printable

_MOST_ROWS, _MOST_EXAMPLES, _MOST_CHARACTERS = 20, 6, 280


def print_parts(parts: Sequence[Part], console: Console) -> None:
    """Prints the parts of a report; their text may be a stranger's, and is shown as it is, without mark-up."""
    for part in parts:
        console.print(Text(part.title, style="bold"))
        if part.note:
            console.print(Text(printable(part.note)))
        examples = any(_is_long(cell) for row in part.rows for cell in row)
        rows = part.rows[: _MOST_EXAMPLES if examples else _MOST_ROWS]
        if rows:
            console.print(_table(part.names, rows, examples))
        if len(part.rows) > len(rows):
            console.print(f"and {len(part.rows) - len(rows):,} more: --html FILE shows more, --json all")
        console.print()


def _table(names: Sequence[str], rows: Sequence[Row], examples: bool) -> Table:
    table = Table(show_lines=examples)
    for name, cell in zip(names, rows[0], strict=True):
        table.add_column(name, justify="right" if is_number(cell) else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_shown, row))
    return table


def _shown(cell: Cell) -> Text:
    """A cell; of several lines the first stays alone, and the others are joined."""
    if not isinstance(cell, str):
        return Text(f"{cell:,}")
    first, _, text = cell.partition("\n")
    shown = f"{first}\n{' '.join(text.split())}" if text else first
    return Text(printable(shown[:_MOST_CHARACTERS]))


def _is_long(cell: Cell) -> bool:
    return isinstance(cell, str) and "\n" in cell
