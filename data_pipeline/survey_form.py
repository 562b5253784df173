"""A `Survey` as bytes and back: JSON without anything that runs, compressed.

A field that JSON holds as it is needs no line here. Any other has its two functions in `_FORMS`; a test fails where a
field does not come back equal.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import zstandard

from data_pipeline.survey import Sampled, Survey
from data_pipeline.tally import Tally

SURVEY_FORM = 2  # raised when the bytes of one program mean something else to the next

_AsIs = Callable[[Any], Any]


def survey_to_bytes(survey: Survey) -> bytes:
    """The bytes of a survey; equal surveys give equal bytes."""
    tree = {field.name: getattr(survey, field.name) for field in dataclasses.fields(survey)}
    for name, (to_json, _) in _FORMS.items():
        tree[name] = to_json(tree[name])
    return zstandard.ZstdCompressor(level=1).compress(json.dumps(tree).encode("ascii"))


def survey_from_bytes(contents: bytes) -> Survey:
    """The survey of bytes that `survey_to_bytes` gave; their hash is known to be right."""
    tree = json.loads(zstandard.ZstdDecompressor().decompress(contents))
    for name, (_, from_json) in _FORMS.items():
        tree[name] = from_json(tree[name])
    return Survey(**tree)


def _sample_to_json(sample: list[Sampled]) -> list[list[Any]]:
    return [[s.order, s.split, s.text, s.num_bytes] for s in sample]


def _sample_from_json(rows: list[list[Any]]) -> list[Sampled]:
    return [Sampled(*row) for row in rows]


def _tally_to_json(tally: Tally) -> dict[str, Any]:
    changed, removed = ([[*key, n] for key, n in counts.items()] for counts in (tally.changed, tally.removed))
    return {"documents": tally.documents, "changed": changed, "removed": removed}


def _tally_from_json(tree: dict[str, Any]) -> Tally:
    changed, removed = (
        Counter({(step, source): n for step, source, n in tree[name]}) for name in ("changed", "removed")
    )
    return Tally(Counter(tree["documents"]), changed, removed)


def _pairs(rows: list[list[Any]]) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in rows]


def _bytes_to_json(value: bytes | bytearray) -> str:
    return base64.b64encode(value).decode("ascii")


def _bytes_from_json(text: str) -> bytearray:
    return bytearray(base64.b64decode(text))


_FORMS: dict[str, tuple[_AsIs, _AsIs]] = {
    "damaged": (sorted, set),
    "skipped": (list, _pairs),
    "sample": (_sample_to_json, _sample_from_json),
    "tally": (_tally_to_json, _tally_from_json),
    "prints": (_bytes_to_json, _bytes_from_json),
    "signatures": (_bytes_to_json, _bytes_from_json),
    "leaked": (_bytes_to_json, _bytes_from_json),
    "leaked_by": (dict, Counter),
    "leaks": (list, _pairs),
    "sources": (list, _pairs),
}
