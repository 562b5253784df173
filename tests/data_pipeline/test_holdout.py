from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.holdout import HASH_RANGE, holdout_cut, sample_hash, split_hash


def test_split_hash_is_the_same_on_every_machine_and_version() -> None:
    assert split_hash("a/b.txt") == 2351561891209480217
    assert sample_hash("a/b.txt") == 10200029479710719403


def test_split_hash_holds_out_the_fraction_asked_for() -> None:
    cut = holdout_cut(0.03, 0)
    held = sum(split_hash(f"document {i}") < cut for i in range(20_000))
    assert abs(held / 20_000 - 0.03) < 0.005


def test_split_of_a_document_does_not_depend_on_the_others() -> None:
    names = [f"document {i}" for i in range(500)]
    few = {name for name in names if split_hash(name) < holdout_cut(0.1, min(map(split_hash, names)))}
    more = [*names, *(f"other {i}" for i in range(500))]
    assert few == {name for name in names if split_hash(name) < holdout_cut(0.1, min(map(split_hash, more)))}


@given(st.sets(st.text(min_size=1), min_size=1, max_size=30), st.floats(0.001, 0.49))
def test_holdout_cut_holds_out_at_least_the_document_with_the_lowest_hash(names: set[str], fraction: float) -> None:
    hashes = sorted(map(split_hash, names))
    cut = holdout_cut(fraction, hashes[0])
    held = [place for place in hashes if place < cut]
    assert held == ([p for p in hashes if p < int(fraction * HASH_RANGE)] or hashes[:1])


def test_sample_hash_is_independent_of_the_split() -> None:
    held = [f"document {i}" for i in range(20_000) if split_hash(f"document {i}") < HASH_RANGE // 10]
    early = sum(sample_hash(name) < HASH_RANGE // 2 for name in held)
    assert abs(early / len(held) - 0.5) < 0.05
