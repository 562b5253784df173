"""What a build holds by source and language: documents, bytes of text and tokens, as the second pass wrote them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from data_pipeline.language import language_of
from data_pipeline.page import Page

MEASURES = ("documents", "text_bytes", "tokens")

Counts = Counter[tuple[str, str, str]]  # by (source, language, measure)


def count_document(counts: Counts, source: str, text: str, figures: tuple[int, int]) -> None:
    """Counts one document; `figures` are its bytes and its tokens, end-of-text included."""
    language = language_of(Page(text))
    for measure, figure in zip(MEASURES, (1, *figures), strict=True):
        counts[source, language, measure] += figure


def add_up(parts: Iterable[Counts]) -> Counts:
    """The counts of the whole input from those of its parts."""
    total: Counts = Counter()
    for part in parts:
        total.update(part)
    return total


def content_tree(counts: Counts, named: frozenset[str], others: str) -> dict[str, Any]:
    """The counts as stored: {source: {language: {measure: number}}}.

    Args:
        counts: Of the whole input.
        named: Sources that are told apart.
        others: What all others are called.
    """
    total: Counts = Counter()
    for (source, language, measure), figure in counts.items():
        total[source if source in named else others, language, measure] += figure
    tree: dict[str, Any] = {}
    for (source, language, measure), figure in sorted(total.items()):
        tree.setdefault(source, {}).setdefault(language, {})[measure] = figure
    return tree
