"""Records of what the second pass wrote, and what they depend on."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

from data_pipeline.encode import Written
from data_pipeline.listing import InputFile
from data_pipeline.manifest import Shard
from data_pipeline.once import basis_of, written_from_bytes, written_to_bytes
from data_pipeline.survey import WorkItem

# Names of files that are no UTF-8 have halves of surrogate pairs in them, as Python gives them.
FULL = Written(
    shards={"train": [Shard("train-0.arrow", 5, 1, 9, 100, "a" * 64, "b" * 64)], "heldout": []},
    content=Counter({("a\udcff", "zh", "tokens"): 2**40, ("a\udcff", "zh", "documents"): 3, ("b", "en", "tokens"): 0}),
    notes=[(7, "a\udcff/größe.txt", "text\r\n\u2028 🙂 \x01"), (9, "b", "")],
)
ITEM = WorkItem(3, (InputFile("a.txt", "/a.txt", "plain", 10, 20),), np.array([False, True]), 5, (1,))


def test_what_was_written_comes_back_equal_with_every_field() -> None:
    for field in dataclasses.fields(Written):
        assert getattr(FULL, field.name), f"give {field.name} a value here, so that it is tested"
    for written in (FULL, Written()):
        again = written_from_bytes(written_to_bytes(written))
        assert again == written
        for field in dataclasses.fields(Written):
            assert type(getattr(again, field.name)) is type(getattr(written, field.name)), field.name
    assert {type(row) for row in written_from_bytes(written_to_bytes(FULL)).notes} == {tuple}


def test_equal_results_have_equal_bytes() -> None:
    other = dataclasses.replace(FULL, content=Counter(dict(reversed(FULL.content.items()))))
    assert written_to_bytes(other) == written_to_bytes(FULL)


def test_basis_depends_on_all_that_the_second_pass_is_told() -> None:
    changed = {
        "index": 4,
        "files": (dataclasses.replace(ITEM.files[0], size_bytes=11),),
        "repeated": np.array([True, True]),
        "first": 6,
        "noted": (0,),
    }
    assert set(changed) == {field.name for field in dataclasses.fields(WorkItem)}
    bases = {basis_of(ITEM), basis_of(ITEM, "x"), basis_of(dataclasses.replace(ITEM, repeated=None))}
    bases |= {basis_of(dataclasses.replace(ITEM, **{name: value})) for name, value in changed.items()}
    assert len(bases) == 3 + len(changed)
