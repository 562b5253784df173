"""MinHash signatures: one byte for each of some hash functions, by which documents are compared without their text.

The share of equal minima of two sets estimates their Jaccard similarity (Broder 1997). Of each minimum one byte is kept
(b-bit MinHash, Li and König 2010): unrelated ones agree once in 256, which the estimate takes into account.

Own code in place of `datasketch` or `rensa`: the values have to be the same in every process, version and machine that
takes part in a build, for years; libraries change theirs between versions, and both want every shingle as a string of
its own, which alone costs several times what is done here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shingles import Shingles, shingles_of
from moe_dist.config.data_schema import NearDuplicateConfig

_BITS = 8
_CACHED = 2**17  # values that are hashed at once: few enough to stay in a cache, many enough for short texts
_SEED = 0x6D6F655F64697374


@dataclass(frozen=True)
class Signer:
    """Makes signatures; small and picklable.

    Attributes:
        settings: `data.dedup.near`.
    """

    settings: NearDuplicateConfig

    @property
    def size(self) -> int:
        """Bytes of a signature: bands times rows."""
        return self.settings.bands * self.settings.rows

    def __call__(self, texts: Sequence[str]) -> NDArray[np.uint8]:
        """The signature of each text: [D, size]; zeros where a text has no word."""
        return signatures_of(shingles_of(texts, self.settings.shingle_words), self.size)


def signatures_of(shingles: Shingles, size: int) -> NDArray[np.uint8]:
    """The signatures of sets of shingles: [D, size]; zeros where a set is empty."""
    signatures = np.zeros((len(shingles.counts), size), dtype=np.uint8)
    filled = shingles.counts > 0
    if not filled.any():
        return signatures
    starts = (np.cumsum(shingles.counts) - shingles.counts)[filled]
    values = (shingles.hashes >> np.uint64(32)).astype(np.uint32)
    factors, offsets = _functions(size)
    minima = np.empty((size, len(starts)), dtype=np.uint32)
    at_once = max(1, _CACHED // len(values))
    for first in range(0, size, at_once):
        some = slice(first, first + at_once)
        hashed = values * factors[some, None]
        hashed += offsets[some, None]
        np.minimum.reduceat(hashed, starts, axis=1, out=minima[some])
    signatures[filled] = _bytes_of(minima).T
    return signatures


def similarity(one: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The estimated Jaccard similarity of one signature [size] to others [N, size]: [N]."""
    equal = (others == one).mean(axis=1)
    chance = 1 / 2**_BITS
    return np.maximum(0.0, (equal - chance) / (1 - chance))


def _bytes_of(minima: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """One byte that depends on all bits of a minimum, whose own leading bits are mostly zero."""
    values = minima ^ (minima >> np.uint32(16))
    values = values * np.uint32(0x7FEB352D)
    values ^= values >> np.uint32(15)
    values = values * np.uint32(0x846CA68B)
    return (values >> np.uint32(32 - _BITS)).astype(np.uint8)


@cache
def _functions(size: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Factors (odd) and offsets of the hash functions x -> factor * x + offset modulo 2**32: [size], [size].

    From SplitMix64 rather than numpy's generators, whose streams a new version may change.
    """
    values = np.arange(1, 2 * size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(_SEED)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    drawn = (values >> np.uint64(32)).astype(np.uint32)
    return drawn[:size] | np.uint32(1), drawn[size:]
