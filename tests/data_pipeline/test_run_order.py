"""The order of a whole run: one and many samples alike, in chunks, over the ends of stages and epochs."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import Stage, each_once
from data_pipeline.run_order import RunOrder

S = 8


@st.composite
def orders(draw: st.DrawFn) -> RunOrder:
    rows = {f"s{i}": draw(st.integers(1, 3000)) for i in range(draw(st.integers(1, 4)))}
    weights = st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)).filter(any).map(tuple)
    stages = [Stage(draw(weights), draw(st.integers(1, 9000))) for _ in range(draw(st.integers(0, 2)))]
    last = each_once(rows) if draw(st.booleans()) else (Stage(draw(weights), None),)
    return RunOrder(draw(st.integers(0, 99)), rows, [*stages, *last], S, draw(st.integers(1, 2**21)))


@settings(deadline=None, max_examples=30)
@given(orders(), st.lists(st.tuples(st.integers(0, 25_000), st.integers(0, 9_000)), min_size=1, max_size=4))
def test_run_order_of_any_ranges_is_that_of_each_sample(order: RunOrder, ranges: list[tuple[int, int]]) -> None:
    for first, count in ranges:
        sources, rows = order.locate_range(first, first + count)
        assert len(sources) == len(rows) == count
        for place in np.linspace(0, count - 1, 5).astype(int).tolist() if count else []:
            assert order.locate(first + place) == (sources[place], rows[place])


def test_run_order_ends_with_its_last_stage() -> None:
    order = RunOrder(0, {"a": 50}, [Stage((1,), 100)], S, 10**6)
    assert order.locate_range(0, 100)[1].tolist()[:50] != list(range(50))
    assert np.bincount(order.locate_range(0, 100)[1]).tolist() == [2] * 50


def test_run_order_identity_tells_windows_and_seeds_apart() -> None:
    identities = [
        RunOrder(seed, {"a": 50}, each_once({"a": 50}), S, window).identity
        for seed, window in ((0, 2**18), (1, 2**18), (0, 2**20))
    ]
    assert identities[0] != identities[1] and identities[0] != identities[2]
