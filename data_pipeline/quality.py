"""Published quality rules, one function each: a line rule gives the line, changed or None; a page rule, if it stays.

Sources: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (JMLR 21,
2020), section 2.2 (C4); Rae et al., "Scaling Language Models: Methods, Analysis & Insights from Training Gopher"
(2021), appendix A.1.1. Of C4 two rules are not here: the list of bad words, and duplicates of three sentences.

All are made for English. What a word is in Chinese is in `page.py`; where a threshold speaks of English words alone,
the rule says what it does with other scripts.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from data_pipeline.page import Page, is_unspaced, split_words
from data_pipeline.repetition import (
    gopher_duplicate_line_characters,
    gopher_duplicate_lines,
    gopher_duplicate_ngrams,
    gopher_duplicate_paragraph_characters,
    gopher_duplicate_paragraphs,
    gopher_top_ngrams,
)

LineRule = Callable[[str], str | None]
PageRule = Callable[[Page], bool]

_LINE_ENDS = (".", "!", "?", '"', "”", "。", "！", "？", "」", "』")
_POLICY = re.compile(
    r"terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies", re.IGNORECASE
)
_CITATION = re.compile(r"\[\d+\]|\[edit\]|\[citation needed\]")
_SENTENCE_END = re.compile(r"[.!?]+[\"”')\]]*(?=\s|$)|[。！？]+[”」』]*")
_ELLIPSIS = re.compile(r"\.{3,}|…+")
_ALPHABETIC = re.compile(r"[^\W\d_]")
_BULLETS = tuple("•‣◦▪▫■□●○►▶◆◇-–—*·")
_ENGLISH_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_CHINESE_STOP_WORDS = frozenset("的是不了在有和这這")


def c4_terminal_punctuation(line: str) -> str | None:
    """Keeps lines that end in a full stop, exclamation mark, question mark or end quotation mark.

    Source: C4. The marks of Chinese and Japanese count as theirs.
    """
    return line if line.rstrip().endswith(_LINE_ENDS) else None


def c4_line_words(line: str) -> str | None:
    """Keeps lines of at least three words. Source: C4 (the authors' program asks for five)."""
    return line if len(split_words(line)) >= 3 else None


def c4_javascript(line: str) -> str | None:
    """Removes lines with the word Javascript. Source: C4."""
    return None if "javascript" in line.lower() else line


def c4_policy_lines(line: str) -> str | None:
    """Removes lines about terms of use, privacy or cookies. Source: C4; the phrases are English only."""
    return None if _POLICY.search(line) else line


def c4_citations(line: str) -> str | None:
    """Takes out Wikipedia's marks [1], [edit] and [citation needed]. Source: C4."""
    return _CITATION.sub("", line)


def c4_lorem_ipsum(page: Page) -> bool:
    """Removes pages with the placeholder "lorem ipsum". Source: C4."""
    return "lorem ipsum" not in page.text.lower()


def c4_curly_bracket(page: Page) -> bool:
    """Removes pages with a curly bracket, which most program text has. Source: C4."""
    return "{" not in page.text


def c4_sentences(page: Page) -> bool:
    """Keeps pages of at least five sentences. Source: C4 (the authors' program asks for three).

    Departs: a sentence is counted by its end (marks before white space, Chinese ones anywhere) and not by NLTK.
    """
    return len(_SENTENCE_END.findall(page.text)) >= 5


def gopher_word_count(page: Page) -> bool:
    """Keeps 50 to 100,000 words. Source: Gopher. Of Chinese, 50 to 100,000 characters."""
    return 50 <= len(page.words) <= 100_000


def gopher_mean_word_length(page: Page) -> bool:
    """Keeps a mean word length of 3 to 10 characters. Source: Gopher.

    Judges text in Latin letters, by its words other than single Han or kana characters.
    """
    if page.script != "latin":
        return True
    lengths = [len(word) for word in page.words if not is_unspaced(word)]
    return not lengths or 3 * len(lengths) <= sum(lengths) <= 10 * len(lengths)


def gopher_symbols(page: Page) -> bool:
    """Keeps at most one hash sign and at most one ellipsis to ten words. Source: Gopher.

    Three dots or more are one ellipsis, as is the Chinese pair `……`.
    """
    most = len(page.words) / 10
    return page.text.count("#") <= most and len(_ELLIPSIS.findall(page.text)) <= most


def gopher_bullet_lines(page: Page) -> bool:
    """Keeps at most 90 % of lines that begin with a bullet. Source: Gopher."""
    return 10 * sum(line.startswith(_BULLETS) for line in page.lines) <= 9 * len(page.lines)


def gopher_ellipsis_lines(page: Page) -> bool:
    """Keeps at most 30 % of lines that end with an ellipsis. Source: Gopher."""
    return 10 * sum(line.endswith(("...", "…")) for line in page.lines) <= 3 * len(page.lines)


def gopher_alphabetic_words(page: Page) -> bool:
    """Keeps at least 80 % of words with a letter in them, of any script. Source: Gopher."""
    return 10 * sum(_ALPHABETIC.search(word) is not None for word in page.words) >= 8 * len(page.words)


def gopher_stop_words(page: Page) -> bool:
    """Keeps pages with two of: the, be, to, of, and, that, have, with. Source: Gopher.

    Departs: text in Han characters needs two of 的 是 不 了 在 有 和 这 (這), each among the most frequent of written
    Chinese; text in other scripts stays. Other languages in Latin letters go, as in the source.
    """
    if page.script == "other":
        return True
    if page.script == "han":
        return len(_CHINESE_STOP_WORDS.intersection(page.text)) >= 2
    return len(_ENGLISH_STOP_WORDS.intersection(page.plain_words)) >= 2


LINE_RULES: tuple[LineRule, ...] = (
    c4_citations,
    c4_javascript,
    c4_policy_lines,
    c4_terminal_punctuation,
    c4_line_words,
)
PAGE_RULES: tuple[PageRule, ...] = (
    c4_lorem_ipsum,
    c4_curly_bracket,
    c4_sentences,
    gopher_word_count,
    gopher_mean_word_length,
    gopher_symbols,
    gopher_bullet_lines,
    gopher_ellipsis_lines,
    gopher_alphabetic_words,
    gopher_stop_words,
    gopher_duplicate_lines,
    gopher_duplicate_paragraphs,
    gopher_duplicate_line_characters,
    gopher_duplicate_paragraph_characters,
    gopher_top_ngrams,
    gopher_duplicate_ngrams,
)
