"""What cleaning did to a build's documents, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_MOST_SOURCES = 15


def print_cleaning(cleaning: Mapping[str, Any], console: Console) -> None:
    """Prints the counts of `Tally.tree`: by step, then for the sources that lost most.

    Args:
        cleaning: The manifest's `cleaning`.
        console: Where to.
    """
    documents, kept = sum(cleaning["documents"].values()), sum(cleaning["kept"].values())
    console.print(f"cleaning kept {kept:,} of {documents:,} documents", style="bold")
    table = Table()
    for name in ("step", "changed", "removed"):
        table.add_column(name, justify="left" if name == "step" else "right")
    changed, removed = cleaning["changed"], cleaning["removed"]
    for step in sorted(changed.keys() | removed.keys()):
        table.add_row(step, *(f"{sum(part.get(step, {}).values()):,}" for part in (changed, removed)))
    if table.row_count:
        console.print(table)
    _print_sources(cleaning, console)


def _print_sources(cleaning: Mapping[str, Any], console: Console) -> None:
    documents, kept, removed = cleaning["documents"], cleaning["kept"], cleaning["removed"]
    ranked = sorted(
        (source for source in documents if kept[source] < documents[source]), key=lambda s: kept[s] - documents[s]
    )
    if not ranked:
        return
    table = Table()
    for name in ("source", "documents", "kept", "removed most by"):
        table.add_column(name, justify="right" if name in ("documents", "kept") else "left")
    for source in ranked[:_MOST_SOURCES]:
        rules = sorted(removed, key=lambda rule: (-removed[rule].get(source, 0), rule))
        most = ", ".join(f"{rule} {removed[rule][source]:,}" for rule in rules[:2] if removed[rule].get(source))
        table.add_row(source, f"{documents[source]:,}", f"{kept[source]:,}", most)
    console.print(table)
    if len(ranked) > _MOST_SOURCES:
        console.print(f"and {len(ranked) - _MOST_SOURCES:,} more sources, in the manifest")
