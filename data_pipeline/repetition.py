"""Gopher's rules against text that repeats itself.

Source: Rae et al., "Scaling Language Models: Methods, Analysis & Insights from Training Gopher" (2021), appendix A.1.1,
table A1. A duplicate is every occurrence after the first. Shares of characters are of the characters in lines,
paragraphs or words, without the white space between them. Where the source leaves it open: characters in overlapping
occurrences of the most frequent n-gram count once, and of equally frequent n-grams the longest is taken.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from data_pipeline.page import Page

_TOP_SHARES = {2: 0.20, 3: 0.18, 4: 0.16}
_DUPLICATE_SHARES = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


def gopher_duplicate_lines(page: Page) -> bool:
    """Keeps at most 30 % of lines that are duplicates."""
    return _duplicates(page.lines)[0] <= 0.30


def gopher_duplicate_line_characters(page: Page) -> bool:
    """Keeps at most 20 % of characters in duplicate lines."""
    return _duplicates(page.lines)[1] <= 0.20


def gopher_duplicate_paragraphs(page: Page) -> bool:
    """Keeps at most 30 % of paragraphs (between blank lines) that are duplicates."""
    return _duplicates(_paragraphs(page))[0] <= 0.30


def gopher_duplicate_paragraph_characters(page: Page) -> bool:
    """Keeps at most 20 % of characters in duplicate paragraphs."""
    return _duplicates(_paragraphs(page))[1] <= 0.20


def gopher_top_ngrams(page: Page) -> bool:
    """Keeps at most 20, 18 and 16 % of characters in the most frequent group of 2, 3 and 4 words."""
    return all(_top_share(page.words, n) <= most for n, most in _TOP_SHARES.items())


def gopher_duplicate_ngrams(page: Page) -> bool:
    """Keeps at most 15, 14, 13, 12, 11 and 10 % of characters in duplicate groups of 5 to 10 words."""
    return all(_duplicate_share(page.words, n) <= most for n, most in _DUPLICATE_SHARES.items())


def _paragraphs(page: Page) -> list[str]:
    return [stripped for part in _PARAGRAPH_BREAK.split(page.text) if (stripped := part.strip())]


def _duplicates(parts: Sequence[str]) -> tuple[float, float]:
    """The share of parts that are duplicates, and of characters in them."""
    if not parts:
        return 0.0, 0.0
    seen: set[str] = set()
    number = characters = 0
    for part in parts:
        if part in seen:
            number += 1
            characters += len(part)
        seen.add(part)
    return number / len(parts), characters / sum(map(len, parts))


def _ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def _top_share(words: Sequence[str], n: int) -> float:
    counts = Counter(_ngrams(words, n))
    most = max(counts.values(), default=0)
    if most < 2:
        return 0.0
    tops = (ngram for ngram, count in counts.items() if count == most)
    top = max(tops, key=lambda ngram: sum(map(len, ngram)))
    return _share_covered(words, n, (start for start, ngram in enumerate(_ngrams(words, n)) if ngram == top))


def _duplicate_share(words: Sequence[str], n: int) -> float:
    seen: set[tuple[str, ...]] = set()
    starts: list[int] = []
    for start, ngram in enumerate(_ngrams(words, n)):
        if ngram in seen:
            starts.append(start)
        else:
            seen.add(ngram)
    return _share_covered(words, n, starts)


def _share_covered(words: Sequence[str], n: int, starts: Sequence[int] | Iterator[int]) -> float:
    """The share of the words' characters that lie in groups of n words from these starts (ascending), each once."""
    covered = end = 0
    for start in starts:
        covered += sum(map(len, words[max(start, end) : start + n]))
        end = start + n
    return covered / sum(map(len, words)) if covered else 0.0
