"""Cleaning: one document's text -> the text that is kept, or why it is not. The same pure function in both passes.

The order is fixed: normalise, mask, take out or edit lines, language, page rules. A document is counted under the first
rule that removes it, in the order of `quality.py` and not of the configuration.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from data_pipeline.documents import Document
from data_pipeline.language import language_of
from data_pipeline.page import Page
from data_pipeline.personal import mask_emails, mask_ip_addresses
from data_pipeline.quality import LINE_RULES, PAGE_RULES, LineRule, PageRule
from moe_dist.config.data_schema import CleanConfig

_RULES_VERSION = 2  # of what the steps do: raised with every change of it, so that other text is another build


@dataclass(frozen=True)
class Cleaned:
    """What became of a document.

    Attributes:
        document: It, with the text that is kept; None where it is removed.
        changed_by: Steps that changed its text.
        removed_by: The rule that removed it; None where it stays.
    """

    document: Document | None
    changed_by: tuple[str, ...] = ()
    removed_by: str | None = None


@dataclass(frozen=True)
class Cleaner:
    """Cleans documents; small and picklable, to be sent to other processes.

    Attributes:
        settings: `data.clean`.
    """

    settings: CleanConfig = field(default_factory=CleanConfig)

    @property
    def is_on(self) -> bool:
        """Whether any step is switched on."""
        return self.settings != CleanConfig()

    @property
    def created_from(self) -> dict[str, Any]:
        """What decides the text that is kept; nothing where no step is on."""
        if not self.is_on:
            return {}
        settings = self.settings
        return {
            "data.clean.normalize": settings.normalize,
            "data.clean.mask": sorted(set(settings.mask)),
            "data.clean.languages": sorted(set(settings.languages)),
            "data.clean.rules": [rule.__name__ for rule in (*self._line_rules, *self._page_rules)],
            "data.clean.version": [_RULES_VERSION, unicodedata.unidata_version],
        }

    def __call__(self, document: Document) -> Cleaned:
        """Cleans one document."""
        if not self.is_on:
            return Cleaned(document)
        text = document.text
        changed: list[str] = []
        for step, changed_text in self._edits(text):
            if changed_text != text:
                changed.append(step)
            text = changed_text
        removed_by = self._removed_by(text)
        if removed_by is not None:
            return Cleaned(None, tuple(changed), removed_by)
        kept = Document(document.id, text, len(text.encode("utf-8"))) if changed else document
        return Cleaned(kept, tuple(changed))

    def _edits(self, text: str) -> Iterator[tuple[str, str]]:
        """Yields (step, text after it)."""
        if self.settings.normalize != "none":
            text = unicodedata.normalize(self.settings.normalize, text)
            yield self.settings.normalize, text
        if "email" in self.settings.mask:
            text = mask_emails(text)
            yield "mask_email", text
        if "ip" in self.settings.mask:
            text = mask_ip_addresses(text)
            yield "mask_ip", text
        lines = text.splitlines(keepends=True) if self._line_rules else []
        for rule in self._line_rules:
            lines = [kept for line in lines if (kept := rule(line)) is not None]
            yield rule.__name__, "".join(lines)

    def _removed_by(self, text: str) -> str | None:
        if not text.strip():
            return "no_text_left"
        page = Page(text)
        if self.settings.languages and language_of(page) not in self.settings.languages:
            return "language"
        return next((rule.__name__ for rule in self._page_rules if not rule(page)), None)

    @cached_property
    def _line_rules(self) -> tuple[LineRule, ...]:
        return tuple(rule for rule in LINE_RULES if rule.__name__ in self.settings.rules)

    @cached_property
    def _page_rules(self) -> tuple[PageRule, ...]:
        return tuple(rule for rule in PAGE_RULES if rule.__name__ in self.settings.rules)
