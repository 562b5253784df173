"""A guess of a text's language: English, Chinese or other. Plain counting, so that anyone can say why.

Chinese: Han characters are at least as many as words in Latin script, which a manual is full of, hardly any letters are
kana, and most are of these two scripts. English: most letters are Latin, and at least a tenth
of the words are among a few that English needs in almost every sentence and its neighbours do not have, three different
ones at least. Everything else is `other`: other languages, and text too short or too odd to tell. Source code with
English comments may count as either.
"""

from __future__ import annotations

from typing import Literal

from data_pipeline.page import Page

Language = Literal["en", "zh", "other"]

_ENGLISH = frozenset(
    {"the", "of", "and", "to", "that", "with", "for", "this", "from", "are", "by", "not", "you", "have", "be", "it"}
    | {"they", "which", "has", "were", "at"}
)
_LEAST_SHARE, _LEAST_DIFFERENT = 0.1, 3


def language_of(page: Page) -> Language:
    """The language a text seems to be in."""
    if _is_chinese(page):
        return "zh"
    if page.script != "latin":
        return "other"
    found = [word for word in page.plain_words if word in _ENGLISH]
    is_english = len(found) >= _LEAST_SHARE * len(page.words) and len(set(found)) >= _LEAST_DIFFERENT
    return "en" if is_english else "other"


def _is_chinese(page: Page) -> bool:
    if page.text.isascii():
        return False
    letters = page.letters
    most = 2 * (letters["han"] + letters["latin"]) > letters["all"] and 20 * letters["kana"] <= letters["han"]
    return most and letters["han"] >= max(1, page.latin_words)
