"""What the first pass found in the whole input -> which documents the second pass leaves out, and which it notes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dedup import find_repeated, split_hashes
from data_pipeline.examples import Pair, choose_pairs
from data_pipeline.minhash import Signer
from data_pipeline.near import NearDuplicates, find_near_duplicates
from data_pipeline.survey import Survey, WorkItem
from moe_dist.config.data_schema import DedupConfig


def leave_out(
    found: Survey, items: list[WorkItem], numbers: list[int], dedup: DedupConfig
) -> tuple[list[WorkItem], list[Pair]]:
    """Takes what `take_out_repeated` finds out of a whole survey and of the items.

    Args:
        found: The survey of the whole input; it then counts what stays.
        items: The items.
        numbers: Their numbers of prints.
        dedup: `data.dedup`.

    Returns:
        The items for the second pass, and the near-duplicates that are shown as examples.
    """
    repeated, near = take_out_repeated(found, dedup)
    pairs = choose_pairs(near) if near is not None else []
    noted = (number for gone, kept, _ in pairs for number in (gone, kept))
    return mark_repeated(items, numbers, repeated, noted), pairs


def take_out_repeated(found: Survey, dedup: DedupConfig) -> tuple[NDArray[np.bool_], NearDuplicates | None]:
    """Takes copies of earlier documents out of a whole survey: exact ones first, then near-duplicates.

    Documents with evaluation text are out already; they make no other one go.

    Args:
        found: The survey of the whole input.
        dedup: `data.dedup`.

    Returns:
        Which documents go, in the order of the prints: [N]; and the near-duplicates among them, if such are looked for.
    """
    splits = split_hashes(found.prints)
    gone = np.frombuffer(found.leaked or bytes(len(splits)), dtype=np.bool_).copy()
    near = None
    if dedup.exact:
        repeated = find_repeated(found.prints) & ~gone  # a copy of a leak is a leak itself
        _count_removed(found, "exact_duplicate", repeated)
        gone |= repeated
    if dedup.near.similarity is not None:
        signatures = np.frombuffer(found.signatures, dtype=np.uint8).reshape(len(splits), Signer(dedup.near).size)
        near = find_near_duplicates(signatures, np.flatnonzero(~gone & signatures.any(axis=1)), dedup.near)
        similar = np.zeros(len(splits), dtype=np.bool_)
        similar[near.gone] = True
        _count_removed(found, "near_duplicate", similar)
        gone |= similar
    sampled = np.array([document.split for document in found.sample], dtype=np.uint64)
    stays = (~np.isin(sampled, splits[gone])).tolist()
    found.sample = [document for document, keep in zip(found.sample, stays, strict=True) if keep]
    found.documents = int((~gone).sum())
    found.lowest_hash = int(splits[~gone].min()) if found.documents else None
    return gone, near


def _count_removed(found: Survey, rule: str, removed: NDArray[np.bool_]) -> None:
    start = 0
    for source, number in found.sources:
        count = int(removed[start : start + number].sum())
        if count:
            found.tally.removed[rule, source] += count
        start += number


def mark_repeated(
    items: list[WorkItem], numbers: list[int], repeated: NDArray[np.bool_], noted: Iterable[int] = ()
) -> list[WorkItem]:
    """Gives each item its part of what `take_out_repeated` found.

    Args:
        items: The items.
        numbers: Their numbers of prints.
        repeated: Which documents go: [N].
        noted: Numbers of documents that may be shown.
    """
    ends = list(accumulate(numbers))
    parts = np.split(repeated, ends[:-1])
    wanted = sorted(set(noted))
    marked = []
    for item, part, end in zip(items, parts, ends, strict=True):
        first = end - len(part)
        own = tuple(number - first for number in wanted if first <= number < end)
        marked.append(replace(item, repeated=part, first=first, noted=own))
    return marked
