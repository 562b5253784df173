"""Runs of words as 64-bit hashes: what near-duplicates and leaked evaluation text are recognised by.

A word is a run of letters, digits and their marks in lower case; punctuation and white space only separate. Scripts
written without spaces (Han, kana, Thai, Lao, Khmer, Myanmar) have one word for each character. So the script decides by
itself whether a shingle of five words is five words or five characters, even within one document.

Hashes are integer arithmetic modulo 2**64 on whole arrays: the same on every machine and for every cut of the work, and
fast enough for every document. They depend on Python's version only through its Unicode tables (`SHINGLES_VERSION`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

SHINGLES_VERSION = (1, unicodedata.unidata_version)  # raised with every change of a hash
BATCH_CHARACTERS = 2**17  # worth hashing at once; a longer text is one batch

_SEPARATOR, _LETTER, _WHOLE_WORD = 0, 1, 2
_UNSPACED = re.compile(
    r"[\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    r"\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fd-\u30ff"  # kana
    r"\u0e01-\u0e5b\u0e81-\u0edf\u1000-\u109f\u1780-\u17dd\uaa60-\uaa7f]"  # Thai, Lao, Myanmar, Khmer
)
_BLOCK = 2**16  # characters whose hashes share one sum
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_WORD_BASE = 0xD1342543DE82EF95


@dataclass(frozen=True)
class Shingles:
    """The shingles of some texts, side by side.

    Attributes:
        hashes: One for each shingle, in the order of the text: [S]. A text with fewer words than a shingle has one, of
            all its words; a text without words has none.
        counts: Shingles of each text: [D].
        words: Words of each text: [D].
    """

    hashes: NDArray[np.uint64]
    counts: NDArray[np.int64]
    words: NDArray[np.int64]


def shingles_of(texts: Sequence[str], length: int) -> Shingles:
    """The shingles of some texts.

    Args:
        texts: The texts; `BATCH_CHARACTERS` of them at once are fastest.
        length: Words of a shingle.
    """
    lowered = [text.lower() for text in texts]
    codes = _codes("\n".join(lowered))
    firsts, lasts = _word_bounds(codes)
    ends = np.cumsum([len(text) + 1 for text in lowered], dtype=np.int64)  # the line end belongs to the text before it
    owners = np.searchsorted(ends, firsts, side="right")
    words = np.bincount(owners, minlength=len(texts)).astype(np.int64)
    # Length - 1 words of value zero follow each text, so that no window reaches into the next one.
    padded = np.zeros(len(firsts) + len(texts) * (length - 1) + length, dtype=np.uint64)
    padded[np.arange(len(firsts)) + owners * (length - 1)] = _word_hashes(codes, firsts, lasts)
    counts = np.where(words > 0, np.maximum(1, words - length + 1), 0)
    before = np.cumsum(words + length - 1) - (words + length - 1)
    starts = np.repeat(before - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    sums = np.zeros(len(starts), dtype=np.uint64)
    for place, factor in enumerate(_powers(_WORD_BASE, length)):
        sums += padded[starts + place] * factor
    return Shingles(_mixed(sums), counts, words)


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where each word of a text begins and ends, in characters of `text.lower()`."""
    firsts, lasts = _word_bounds(_codes(text.lower()))
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _word_bounds(codes: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First character of each word and the one after its last: [W], [W]."""
    kinds = _kinds()[codes]
    edge = np.zeros(1, dtype=np.uint8)
    before, after = np.concatenate([edge, kinds[:-1]]), np.concatenate([kinds[1:], edge])
    whole = kinds == _WHOLE_WORD
    firsts = np.flatnonzero(whole | ((kinds == _LETTER) & (before != _LETTER)))
    lasts = np.flatnonzero(whole | ((kinds == _LETTER) & (after != _LETTER))) + 1
    return firsts, lasts


def _word_hashes(codes: NDArray[np.uint32], firsts: NDArray[np.int64], lasts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A polynomial in the characters of each word, from sums over blocks of text, then mixed: never zero.

    Of a word longer than a block, the first characters count.
    """
    hashes = np.zeros(len(firsts), dtype=np.uint64)
    lasts = np.minimum(lasts, firsts + _BLOCK)
    start = 0
    while start < len(firsts):
        origin = int(firsts[start])
        stop = int(np.searchsorted(firsts, origin + _BLOCK))
        block = codes[origin : lasts[stop - 1]].astype(np.uint64)
        sums = np.zeros(len(block) + 1, dtype=np.uint64)
        np.cumsum(_mixed(block + np.uint64(1)) * _block_powers(_BASE)[: len(block)], out=sums[1:])
        first, last = firsts[start:stop] - origin, lasts[start:stop] - origin
        hashes[start:stop] = (sums[last] - sums[first]) * _block_powers(pow(_BASE, -1, 2**64))[first]
        start = stop
    return _mixed(hashes) | np.uint64(1)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spreads every bit over all others, one to one (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _powers(base: int, number: int) -> NDArray[np.uint64]:
    """base**0, base**1, ... modulo 2**64: [number]."""
    powers = np.full(number, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers)


@cache
def _block_powers(base: int) -> NDArray[np.uint64]:
    return _powers(base, 2 * _BLOCK)


@cache
def _kinds() -> NDArray[np.uint8]:
    """What each character is: a separator, a part of a word, or a word of its own."""
    kinds = np.zeros(0x110000, dtype=np.uint8)
    for code in range(len(kinds)):
        character = chr(code)
        if _UNSPACED.match(character):
            kinds[code] = _WHOLE_WORD
        elif character.isalnum() or unicodedata.category(character).startswith("M"):
            kinds[code] = _LETTER
    return kinds
