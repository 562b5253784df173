"""A document's text as the quality rules see it: its lines, its words, and the scripts its letters belong to.

A word is what stands between spaces. Chinese and Japanese are written without spaces: in a piece that has Han or kana
characters, each of them is one word, each run of other letters or digits is one, and punctuation is none. So "50 words"
are 50 characters of Chinese, about 30 of its dictionary words.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Literal

Script = Literal["latin", "han", "other"]

_HAN = r"\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = r"\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fd-\u30ff"
_LATIN = r"A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff"
_HAN_RUN, _KANA_RUN, _LATIN_RUN = (re.compile(f"[{letters}]+") for letters in (_HAN, _KANA, _LATIN))
_LETTER_RUN = re.compile(r"[^\W\d_]+")
_UNSPACED = re.compile(f"[{_HAN}{_KANA}]")
_UNSPACED_PARTS = re.compile(rf"[{_HAN}{_KANA}]|[^\W{_HAN}{_KANA}]+")
_EDGES = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~“”‘’«»…"


class Page:
    """One text; what several rules need of it is worked out once.

    Args:
        text: The text.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        return split_words(self.text)

    @cached_property
    def plain_words(self) -> list[str]:
        """The words in lower case, without punctuation at their ends."""
        return [word.strip(_EDGES) for word in split_words(self.text.lower())]

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank, without white space at their ends."""
        return [stripped for line in self.text.splitlines() if (stripped := line.strip())]

    @cached_property
    def letters(self) -> dict[str, int]:
        """Letters in all (`all`), and those of `latin`, `han` and `kana`."""
        runs = {"all": _LETTER_RUN, "latin": _LATIN_RUN, "han": _HAN_RUN, "kana": _KANA_RUN}
        return {name: sum(map(len, run.findall(self.text))) for name, run in runs.items()}

    @cached_property
    def latin_words(self) -> int:
        """Runs of Latin letters."""
        return len(_LATIN_RUN.findall(self.text))

    @cached_property
    def script(self) -> Script:
        """The script of most letters; a text without letters, such as a table of numbers, counts as Latin.

        Text with more than one kana to twenty Han characters is Japanese, and so `other`.
        """
        if self.text.isascii() or 2 * self.letters["latin"] >= self.letters["all"]:
            return "latin"
        is_han = 2 * self.letters["han"] > self.letters["all"] and 20 * self.letters["kana"] <= self.letters["han"]
        return "han" if is_han else "other"


def split_words(text: str) -> list[str]:
    """The words of a text, in order."""
    pieces = text.split()
    if text.isascii() or not _UNSPACED.search(text):
        return pieces
    words: list[str] = []
    for piece in pieces:
        words += _UNSPACED_PARTS.findall(piece) if _UNSPACED.search(piece) else [piece]
    return words


def is_unspaced(word: str) -> bool:
    """Whether a word is a single Han or kana character."""
    return len(word) == 1 and _UNSPACED.match(word) is not None
