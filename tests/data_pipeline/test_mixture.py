"""Which source a sample comes from: exact shares, every sample of a source once, the same from any position."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import Mixture, Stage, each_once, stages_of
from moe_dist.errors import ConfigError, DataError

ROWS = {"a": 900, "b": 100, "c": 50}


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    """One to four stages of up to six sources; a last stage that ends, goes on, or repeats."""
    sources = draw(st.integers(1, 6))
    weight = st.sampled_from([0, 1, 2, 10**6]) | st.integers(0, 10**6)
    weights = st.lists(weight, min_size=sources, max_size=sources).filter(any).map(tuple)
    length = st.sampled_from([1, 5, 100, 4095, 4096, 5000, 8191, 8192, 9000])
    stages = [Stage(draw(weights), draw(length)) for _ in range(draw(st.integers(0, 3)))]
    last = draw(st.sampled_from([(None, False), (5000, False), (5000, True), (700, True)]))
    return Mixture(draw(st.integers(0, 9)), list(map(str, range(sources))), [*stages, Stage(draw(weights), *last)])


def asked(tokens: int | None = None, weights: dict | None = None, epochs: dict | None = None) -> SimpleNamespace:
    return SimpleNamespace(tokens=tokens, weights=weights or {}, epochs=epochs or {})


@settings(deadline=None, max_examples=25)
@given(mixtures(), st.data())
def test_mixture_has_each_sample_of_a_source_once_from_any_position(mixture: Mixture, data: st.DataObject) -> None:
    total = mixture.num_samples or 30_000
    sources, numbers = mixture.locate_range(0, total)
    for source in range(len(mixture.sources)):
        found = numbers[sources == source]
        assert len(np.unique(found)) == len(found)
        if mixture.num_samples:
            assert np.array_equal(np.sort(found), np.arange(len(found)))
    first = data.draw(st.integers(0, total - 1))
    end = data.draw(st.integers(first, total))
    part = mixture.locate_range(first, end)
    assert np.array_equal(part[0], sources[first:end]) and np.array_equal(part[1], numbers[first:end])
    assert mixture.locate(first) == (sources[first], numbers[first])


def test_mixture_shares_are_exact_where_a_period_ends() -> None:
    stage = Stage((7, 2, 1), None)
    sources, _ = Mixture(0, "abc", [stage]).locate_range(0, 10 * stage.period)
    for end in range(stage.period, 10 * stage.period + 1, stage.period):
        shares = np.bincount(sources[:end], minlength=3) - end * np.array([0.7, 0.2, 0.1])
        assert abs(shares).max() < 2


def test_mixture_within_a_period_is_spread() -> None:
    sources, _ = Mixture(0, "ab", [Stage((1, 1), None)]).locate_range(0, 4096)
    halves = [np.bincount(part, minlength=2)[0] for part in sources.reshape(8, 512)]
    assert min(halves) > 190 and max(halves) < 322


def test_mixture_by_default_has_each_row_once_in_every_epoch() -> None:
    mixture = Mixture(5, list(ROWS), each_once(ROWS))
    for epoch in range(3):
        sources, numbers = mixture.locate_range(1050 * epoch, 1050 * (epoch + 1))
        for source, rows in enumerate(ROWS.values()):
            assert sorted(numbers[sources == source].tolist()) == list(range(rows * epoch, rows * (epoch + 1)))


def test_mixture_of_one_source_is_its_own_order() -> None:
    sources, numbers = Mixture(0, ["a"], each_once({"a": 7})).locate_range(3, 50)
    assert not sources.any() and numbers.tolist() == list(range(3, 50))


def test_mixture_of_ten_billion_samples_is_immediate() -> None:
    rows = {"a": 4 * 10**9, "b": 6 * 10**9}
    mixture = Mixture(0, list(rows), each_once(rows))
    first = 3 * 10**10 - 100
    sources, numbers = mixture.locate_range(first, first + 200)
    assert mixture.locate(first + 150) == (sources[150], numbers[150])
    assert max(numbers[sources == 0]) >= 12 * 10**9


def test_stages_of_epochs_have_just_so_many_samples() -> None:
    (stage,) = stages_of([asked(epochs={"a": 1, "c": 2.5})], ROWS, 32)
    assert (stage.samples, stage.counts(stage.samples)) == (1025, [900, 0, 125])


def test_stages_of_tokens_round_ends_and_not_lengths() -> None:
    stages = stages_of([asked(50, {"a": 0.3, "b": 0.1}), asked(50, {"a": 1}), asked(None, {"c": 1})], ROWS, 32)
    assert [stage.samples for stage in stages] == [2, 2, None]
    assert stages[0].weights == (3, 1, 0)


def test_stages_of_a_source_without_rows_are_refused() -> None:
    for stage in (asked(weights={"d": 1}), asked(epochs={"d": 1})):
        with pytest.raises(DataError, match=r"data\.mixture\.0: d"):
            stages_of([stage], {**ROWS, "d": 0}, 32)
    with pytest.raises(ConfigError, match="at least one row"):
        stages_of([asked(epochs={"c": 0.001})], ROWS, 32)
