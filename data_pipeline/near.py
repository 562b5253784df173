"""Near-duplicates: a document goes where an earlier one that stays is similar to it.

Signatures are cut into bands; documents with a band in common are compared, as locality-sensitive hashing has it, and
the comparison of their whole signatures decides, not the band. Documents are taken in the order of the input, and each
is compared with those that stay only. So of a chain A ~ B ~ C where A and C differ, B goes for A's sake and C stays:
whatever goes is similar to something that stays, and no more goes than that asks for.

One process joins all signatures: 112 bytes a document with the default settings, about 30 more while one band is
sorted, and 16 for each band in which a document meets another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.minhash import similarity
from data_pipeline.shingles import SHINGLES_VERSION
from moe_dist.config.data_schema import NearDuplicateConfig

MOST_COMPARED = 256  # documents that stay and share one band, to which another is compared; a bound on time


@dataclass(frozen=True)
class NearDuplicates:
    """The documents that go, in order, and what they are similar to.

    Attributes:
        gone: Their numbers: [P].
        kept: The document that stays and is most similar; of equals, the first: [P].
        similarity: The estimate: [P].
    """

    gone: NDArray[np.int64]
    kept: NDArray[np.int64]
    similarity: NDArray[np.float64]


def near_created_from(near: NearDuplicateConfig) -> dict[str, Any]:
    """What decides which near-duplicates are found; nothing where none are looked for."""
    if near.similarity is None:
        return {}
    return {"data.dedup.near": near.model_dump(), "data.dedup.near.version": list(SHINGLES_VERSION)}


def find_near_duplicates(
    signatures: NDArray[np.uint8], taken: NDArray[np.int64], settings: NearDuplicateConfig
) -> NearDuplicates:
    """Finds near-duplicates among some documents.

    Args:
        signatures: Of all documents: [N, bands * rows].
        taken: Numbers of the documents that take part, in order; the others neither go nor make others go.
        settings: `data.dedup.near`.
    """
    assert settings.similarity is not None, "near-duplicates are switched on"
    meetings = _meetings(signatures, taken, settings)
    found: list[tuple[int, int, float]] = []
    for start, stop in zip(meetings.starts[:-1].tolist(), meetings.starts[1:].tolist(), strict=True):
        number, buckets = int(meetings.documents[start]), meetings.buckets[start:stop]
        candidates = meetings.kept_in(buckets)
        if len(candidates):
            estimates = similarity(signatures[number], signatures[candidates])
            best = int(estimates.argmax())
            if estimates[best] >= settings.similarity:
                found.append((number, int(candidates[best]), float(estimates[best])))
                continue
        meetings.keep(number, buckets)
    return NearDuplicates(
        np.array([gone for gone, _, _ in found], dtype=np.int64),
        np.array([kept for _, kept, _ in found], dtype=np.int64),
        np.array([value for _, _, value in found], dtype=np.float64),
    )


class _Meetings:
    """Which documents meet in which buckets (documents with the same band), and which of them stay so far.

    Args:
        documents: A document of each meeting.
        buckets: Its bucket, numbered from zero.
    """

    def __init__(self, documents: NDArray[np.int64], buckets: NDArray[np.int64]) -> None:
        order = np.argsort(documents, kind="stable")
        self.documents, self.buckets = documents[order], buckets[order]
        changes = np.flatnonzero(self.documents[1:] != self.documents[:-1]) + 1
        ends = np.array([len(documents)] if len(documents) else [], dtype=np.int64)
        self.starts = np.concatenate([np.zeros(1, dtype=np.int64), changes, ends])
        sizes = np.minimum(np.bincount(buckets), MOST_COMPARED)
        self._first = np.cumsum(sizes) - sizes
        self._kept = np.zeros(int(sizes.sum()), dtype=documents.dtype)
        self._filled = np.zeros(len(sizes), dtype=np.int16)

    def kept_in(self, buckets: NDArray[np.int64]) -> NDArray[np.int64]:
        """The documents in these buckets that stay, each once, in order."""
        filled, first = self._filled[buckets], self._first[buckets]
        parts = [self._kept[first[i] : first[i] + filled[i]] for i in np.flatnonzero(filled)]
        return np.unique(np.concatenate(parts)) if parts else self._kept[:0]

    def keep(self, number: int, buckets: NDArray[np.int64]) -> None:
        """Notes that a document stays."""
        open_ones = buckets[self._filled[buckets] < MOST_COMPARED]
        self._kept[self._first[open_ones] + self._filled[open_ones]] = number
        self._filled[open_ones] += 1


def _meetings(signatures: NDArray[np.uint8], taken: NDArray[np.int64], settings: NearDuplicateConfig) -> _Meetings:
    """Finds the bands that several documents share."""
    width = np.int32 if len(signatures) * settings.bands < 2**31 else np.int64
    documents, buckets, number = [], [], 0
    for band in range(settings.bands):
        order, same = _sorted_band(signatures, taken, slice(band * settings.rows, (band + 1) * settings.rows))
        meets = np.zeros(len(order), dtype=np.bool_)
        meets[1:] |= same
        meets[:-1] |= same
        begins = meets.copy()
        begins[1:] &= ~same
        documents.append(taken[order[meets]].astype(width))
        buckets.append((np.cumsum(begins[meets]) + (number - 1)).astype(width))
        number += int(begins.sum())
    return _Meetings(np.concatenate(documents), np.concatenate(buckets))


def _sorted_band(
    signatures: NDArray[np.uint8], taken: NDArray[np.int64], rows: slice
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """An order in which equal bands are neighbours and stay in the order of the input, and who equals the one before.

    Bands are hashed to 64 bits where they are longer: at worst, a document too many is compared.
    """
    keys = np.zeros(len(taken), dtype=np.uint64)
    for row in range(rows.start, rows.stop):
        keys = keys * np.uint64(0xD1342543DE82EF95) + signatures[taken, row]
        keys ^= keys >> np.uint64(29)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    return order, ordered[1:] == ordered[:-1]
