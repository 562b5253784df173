"""What cleaning did to a build's documents, and what is there, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.plain_text import printable

_MOST_SOURCES, _MOST_EXAMPLES = 15, 5


def print_cleaning(cleaning: Mapping[str, Any], console: Console) -> None:
    """Prints the counts by step, the sources that lost most, what is there by source and language, and examples.

    Args:
        cleaning: The manifest's `cleaning`. Its text may be a stranger's, and is shown as it is, without mark-up.
        console: Where to.
    """
    documents, kept = sum(cleaning["documents"].values()), sum(cleaning["kept"].values())
    console.print(f"cleaning kept {kept:,} of {documents:,} documents", style="bold")
    table = Table()
    for name in ("step", "changed", "removed"):
        table.add_column(name, justify="left" if name == "step" else "right")
    changed, removed = cleaning["changed"], cleaning["removed"]
    for step in sorted(changed.keys() | removed.keys()):
        table.add_row(_plain(step), *(f"{sum(part.get(step, {}).values()):,}" for part in (changed, removed)))
    if table.row_count:
        console.print(table)
    _print_sources(cleaning, console)
    _print_content(cleaning.get("content") or {}, console)
    _print_examples(cleaning, console)


def _print_sources(cleaning: Mapping[str, Any], console: Console) -> None:
    documents, kept, removed = cleaning["documents"], cleaning["kept"], cleaning["removed"]
    ranked = sorted(
        (source for source in documents if kept[source] < documents[source]), key=lambda s: kept[s] - documents[s]
    )
    if not ranked:
        return
    table = Table()
    for name in ("source", "documents", "kept", "removed most by"):
        table.add_column(name, justify="right" if name in ("documents", "kept") else "left", overflow="fold")
    for source in ranked[:_MOST_SOURCES]:
        rules = sorted(removed, key=lambda rule: (-removed[rule].get(source, 0), rule))
        most = ", ".join(f"{rule} {removed[rule][source]:,}" for rule in rules[:2] if removed[rule].get(source))
        table.add_row(_plain(source), f"{documents[source]:,}", f"{kept[source]:,}", _plain(most))
    console.print(table)
    if len(ranked) > _MOST_SOURCES:
        console.print(f"and {len(ranked) - _MOST_SOURCES:,} more sources, in the manifest")


def _print_content(content: Mapping[str, Mapping[str, Mapping[str, int]]], console: Console) -> None:
    rows = [(source, language, figures) for source, found in content.items() for language, figures in found.items()]
    if not rows:
        return
    table = Table()
    for name in ("source", "language", "documents", "bytes of text", "tokens", "of all"):
        table.add_column(name, justify="left" if name in ("source", "language") else "right", overflow="fold")
    total = max(1, sum(figures["tokens"] for _, _, figures in rows))
    rows.sort(key=lambda row: (-row[2]["tokens"], row[0], row[1]))
    for source, language, figures in rows[:_MOST_SOURCES]:
        numbers = (f"{figures[key]:,}" for key in ("documents", "text_bytes", "tokens"))
        table.add_row(_plain(source), _plain(language), *numbers, f"{figures['tokens'] / total:.1%}")
    console.print(table)
    if len(rows) > _MOST_SOURCES:
        console.print(f"and {len(rows) - _MOST_SOURCES:,} more rows, in the manifest")


def _print_examples(cleaning: Mapping[str, Any], console: Console) -> None:
    """The names only; `moe-dist data report` shows text."""
    pairs, leaks = cleaning.get("near_duplicates") or [], cleaning.get("decontaminated") or []
    if pairs:
        console.print("near-duplicates, least similar first: left out, kept (`data report` has text)", style="bold")
    for row in pairs[:_MOST_EXAMPLES]:
        console.print(_plain(f"  {row['similarity']:.3f}  {row['gone']}  {row['kept']}"), soft_wrap=True)
    if leaks:
        console.print("documents with evaluation text: left out, found in", style="bold")
    for row in leaks[:_MOST_EXAMPLES]:
        console.print(_plain(f"  {row['id']}  {row['against']}"), soft_wrap=True)


def _plain(text: str) -> Text:
    return Text(printable(text))
