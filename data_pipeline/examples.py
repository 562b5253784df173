"""A few examples of what cleaning left out, for a person to judge: bounded in number and in size.

Which near-duplicates are shown is decided once all are known, and their text is taken down when the second pass comes
by. They are taken at even distances from the least to the most similar, and of each pair the beginnings are shown, and
the text around the first difference where that is further on. Everything is a function of the input alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipeline.near import NearDuplicates

MOST_EXAMPLES = 20
NOTED_CHARACTERS = 4_000  # of the beginning of a document that may be shown
_SHOWN_CHARACTERS, _BEGINNING_CHARACTERS, _SHOWN_BEFORE = 320, 120, 60

Pair = tuple[int, int, float]
Note = tuple[int, str, str]  # number of a document in the whole input, its id, and the beginning of its text


def choose_pairs(near: NearDuplicates) -> list[Pair]:
    """Some pairs as (number that goes, number that stays, similarity), from the least similar to the most."""
    order = np.lexsort((near.gone, near.similarity))
    ranks = np.unique(np.linspace(0, max(0, len(order) - 1), MOST_EXAMPLES).round().astype(np.int64))
    return [(int(near.gone[i]), int(near.kept[i]), float(near.similarity[i])) for i in order[ranks[: len(order)]]]


def pair_examples(pairs: Sequence[Pair], notes: Mapping[int, tuple[str, str]]) -> list[dict[str, Any]]:
    """The pairs as the manifest has them: `gone`, `kept`, `similarity`, `gone_text`, `kept_text`.

    Args:
        pairs: What `choose_pairs` gave.
        notes: (id, beginning of the text) of each document in them.
    """
    rows = []
    for gone, kept, similarity in pairs:
        (gone_id, gone_text), (kept_id, kept_text) = notes[gone], notes[kept]
        places = range(min(len(gone_text), len(kept_text)))
        different = next((i for i in places if gone_text[i] != kept_text[i]), 0)  # further on: the beginning
        row = {"gone": gone_id, "kept": kept_id, "similarity": round(similarity, 3)}
        rows.append({**row, "gone_text": _shown(gone_text, different), "kept_text": _shown(kept_text, different)})
    return rows


def _shown(text: str, place: int) -> str:
    """The beginning of a text, and what surrounds a place where that is further on."""
    start = place - _SHOWN_BEFORE
    if start <= _BEGINNING_CHARACTERS:
        return text[:_SHOWN_CHARACTERS]
    return f"{text[:_BEGINNING_CHARACTERS]} ... {text[start : start + _SHOWN_CHARACTERS - _BEGINNING_CHARACTERS]}"


def leak_examples(leaks: Sequence[tuple[int, str, str, str]]) -> list[dict[str, str]]:
    """Documents with evaluation text as the manifest has them: `id`, `against`, `text`."""
    return [{"id": id_, "against": against, "text": text} for _, id_, against, text in leaks]


def cut_short(text: str) -> str:
    """The beginning of a text, if it is too long to be shown."""
    return text[:_SHOWN_CHARACTERS]
