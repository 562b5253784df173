"""A build as one web page: what it holds, what was left out and why, with examples.

The page stands alone: no script, nothing from the network, and a policy that forbids both. Names and text of a build
may be a stranger's, so every cell is escaped where it is written, and lengths and numbers of rows are bounded.
"""

from __future__ import annotations

import html
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.build_parts import Cell, Row, is_number, parts_of
from launch.plain_text import printable
from moe_dist.errors import DataError

MARK = "<!-- moe-dist data report -->"
_MOST_ROWS, _MOST_CHARACTERS = 200, 1_000
_HEAD = """<!doctype html>
{mark}
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }}
h2 {{ margin-top: 2.5rem }} p {{ max-width: 46rem }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ border-bottom: 1px solid #ddd; padding: .25rem .75rem; text-align: left; vertical-align: top }}
td {{ overflow-wrap: anywhere; white-space: pre-wrap }}
td.number, th.number {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }}
@media (prefers-color-scheme: dark) {{ body {{ background: #161616; color: #ddd }} th, td {{ border-color: #444 }} }}
</style></head><body>
<h1>{title}</h1>
"""


def write_page(found: Mapping[str, Any], path: Path) -> int:
    """Writes the page; an earlier one is replaced, any other file is not.

    Args:
        found: What `describe_build` gave.
        path: Where to.

    Returns:
        Its size in bytes.

    Raises:
        DataError: There is another file, or the place cannot be written.
    """
    contents = page(found).encode("utf-8")
    try:
        if path.exists() and MARK.encode() not in path.read_bytes()[:200]:
            raise DataError(str(path), "another file", "a report replaces only an earlier report", "another --html")
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        temporary.write_bytes(contents)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(str(path), error.strerror, "the report can be written", "another --html") from None
    return len(contents)


def page(found: Mapping[str, Any]) -> str:
    """The whole page."""
    lines = [_HEAD.format(mark=MARK, title=f"Build {_text(found['fingerprint'])}")]
    for part in parts_of(found):
        lines.append(f"<h2>{_text(part.title)}</h2>")
        lines += [_paragraph(part.note)] if part.note else []
        lines += [_table(part.names, part.rows)] if part.rows else []
    return "\n".join([*lines, "</body></html>\n"])


def _table(names: Sequence[str], rows: Sequence[Row]) -> str:
    numbers = [is_number(cell) for cell in rows[0]]
    lines = ["<table><tr>", *(_cell("th", name, number) for name, number in zip(names, numbers, strict=True)), "</tr>"]
    for row in rows[:_MOST_ROWS]:
        lines += ["<tr>", *(_cell("td", cell, number) for cell, number in zip(row, numbers, strict=True)), "</tr>"]
    more = f"and {len(rows) - _MOST_ROWS:,} more, in the manifest" if len(rows) > _MOST_ROWS else ""
    return "".join(lines) + "</table>" + (_paragraph(more) if more else "")


def _cell(tag: str, value: Cell, at_right: bool) -> str:
    shown = f"{value:,}" if isinstance(value, int | float) else value
    return f"<{tag}{' class=number' if at_right else ''}>{_text(shown)}</{tag}>"


def _paragraph(text: str) -> str:
    return f"<p>{_text(text)}</p>"


def _text(text: object) -> str:
    """Any text, cut to a length, as HTML that shows it."""
    return html.escape(printable(str(text)[:_MOST_CHARACTERS]), quote=True)
