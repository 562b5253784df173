"""What each step of cleaning changed and removed, by source: the top-level file or folder of the input."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_MOST_SOURCES = 1_000
OTHER_SOURCES = "(other sources)"


@dataclass
class Tally:
    """Counts of documents with text.

    Attributes:
        documents: All of them, by source.
        changed: Those whose text a step changed, by (step, source).
        removed: Those that a step removed, by (step, source).
    """

    documents: Counter[str] = field(default_factory=Counter)
    changed: Counter[tuple[str, str]] = field(default_factory=Counter)
    removed: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, source: str, changed_by: tuple[str, ...], removed_by: str | None) -> None:
        """Counts one document."""
        self.documents[source] += 1
        self.changed.update((step, source) for step in changed_by)
        if removed_by is not None:
            self.removed[removed_by, source] += 1

    def merge(self, other: Tally) -> None:
        """Adds another's counts."""
        self.documents.update(other.documents)
        self.changed.update(other.changed)
        self.removed.update(other.removed)

    def named_sources(self) -> frozenset[str]:
        """The sources that are told apart where counts are stored."""
        ranked = sorted(self.documents, key=lambda source: (-self.documents[source], source))
        return frozenset(ranked[:_MOST_SOURCES])

    def tree(self) -> dict[str, Any]:
        """The counts as stored: `documents` and `kept` by source, `changed` and `removed` by step and source.

        Sources beyond the 1,000 with the most documents are one.
        """
        named = self.named_sources()
        kept = Counter(self.documents)
        for (_, source), count in self.removed.items():
            kept[source] -= count
        return {
            "documents": _by_source(self.documents, named),
            "kept": _by_source(kept, named),
            "changed": _by_step(self.changed, named),
            "removed": _by_step(self.removed, named),
        }


def source_of(file_id: str) -> str:
    """The top-level file or folder that a file of the input belongs to."""
    return file_id.partition("/")[0]


def _by_source(counts: Counter[str], named: frozenset[str]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for source, count in counts.items():
        found[source if source in named else OTHER_SOURCES] += count
    return dict(sorted(found.items()))


def _by_step(counts: Counter[tuple[str, str]], named: frozenset[str]) -> dict[str, dict[str, int]]:
    steps: dict[str, Counter[str]] = {}
    for (step, source), count in counts.items():
        steps.setdefault(step, Counter())[source] += count
    return {step: _by_source(steps[step], named) for step in sorted(steps)}
