from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.dedup import PRINT_BYTES, document_print, find_repeated, split_hashes
from data_pipeline.leave_out import mark_repeated, take_out_repeated
from data_pipeline.survey import Sampled, Survey, WorkItem
from moe_dist.config.data_schema import DedupConfig

TEXTS = st.lists(st.sampled_from(["a", "b", "c", "a ", "é", "e\u0301", "字"]) | st.text(max_size=4), max_size=40)


def prints_of(texts: list[str]) -> bytearray:
    return bytearray().join(document_print(text, number) for number, text in enumerate(texts))


@given(TEXTS)
def test_repeated_are_exactly_those_after_the_first_of_their_text(texts: list[str]) -> None:
    expected = [text in texts[:number] for number, text in enumerate(texts)]
    assert find_repeated(prints_of(texts)).tolist() == expected


@given(TEXTS, st.randoms())
def test_order_of_the_input_does_not_change_which_texts_stay(texts: list[str], source) -> None:
    shuffled = source.sample(texts, len(texts))
    kept = [text for text, gone in zip(shuffled, find_repeated(prints_of(shuffled)), strict=True) if not gone]
    assert sorted(kept) == sorted(set(texts))


@given(TEXTS.filter(bool), st.integers(0, 3))
def test_survey_without_copies_is_the_survey_of_the_first_ones(texts: list[str], cut: int) -> None:
    first = [number for number, text in enumerate(texts) if text not in texts[:number]]
    size = max(1, len(texts) // (cut + 1))
    found = Survey(documents=len(texts), lowest_hash=0, prints=prints_of(texts))
    found.sample = [Sampled(number, number, text, 1) for number, text in enumerate(texts)]
    found.sources = [(f"s{start}", min(size, len(texts) - start)) for start in range(0, len(texts), size)]
    repeated, _ = take_out_repeated(found, DedupConfig(exact=True))
    assert (found.documents, found.lowest_hash) == (len(first), first[0])
    assert [sampled.split for sampled in found.sample] == first
    assert sum(found.tally.removed.values()) == len(texts) - len(first)
    numbers = [number for _, number in found.sources]
    items = mark_repeated([WorkItem(index, ()) for index in range(len(numbers))], numbers, repeated)
    assert [len(item.repeated) for item in items if item.repeated is not None] == numbers
    assert np.concatenate([item.repeated for item in items if item.repeated is not None]).tolist() == repeated.tolist()


def test_print_keeps_the_split_and_depends_on_every_character() -> None:
    assert split_hashes(document_print("x", 2**64 - 1)).tolist() == [2**64 - 1]
    assert len(document_print("x", 0)) == PRINT_BYTES
    assert document_print("x", 0) != document_print("x ", 0)


@pytest.mark.parametrize("distinct", [1, 100_000])
def test_memory_of_a_search_is_below_40_bytes_a_document(distinct: int) -> None:
    number = 200_000
    rows = np.random.default_rng(0).integers(0, 2**63, (distinct, 3), dtype=np.uint64)
    prints = rows[np.arange(number) % distinct].tobytes()
    tracemalloc.start()
    repeated = find_repeated(prints)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert int((~repeated).sum()) == distinct
    assert peak < 40 * number
