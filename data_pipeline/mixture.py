"""Which source each sample of a run comes from: stages of weights, exact at any position, in memory that does not grow.

A stage is cut into periods of `period` samples. How many samples of a period each source gives follows from its share
of all samples up to the period's end, less what it gave before; a keyed permutation spreads them over the period. So
sample g of the run is sample number n of one source, every n occurs once, and neither depends on what was read before.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from math import lcm
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.permutation import Shuffle
from moe_dist.errors import ConfigError, DataError

_LEAST_PERIOD = 4096


class AskedStage(Protocol):
    """A stage as a person writes it: weights for so many tokens (None: for the rest of the run), or epochs."""

    @property
    def tokens(self) -> int | None: ...

    @property
    def weights(self) -> Mapping[str, float]: ...

    @property
    def epochs(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Stage:
    """A part of a run with one mixture.

    Attributes:
        weights: Share of each source in the samples, in whole numbers; 0 where it takes no part.
        samples: Length; None for the rest of the run.
        repeats: Begins again when it ends, for ever.
    """

    weights: tuple[int, ...]
    samples: int | None
    repeats: bool = False

    @property
    def period(self) -> int:
        """Samples of a period: enough that no rounding can ask for less than nothing of a source (see `counts`)."""
        return max(_LEAST_PERIOD, len(self.weights) ** 2)

    def counts(self, done: int) -> list[int]:
        """Samples of each source among the first `done`, which is where a period ends.

        Shares are rounded down, and the source with the largest weight has the rest. Over one period of P samples, K
        sources and weights that sum to 1 it has more than P * weight - K >= P / K - K >= 0; the others cannot shrink.
        """
        total = sum(self.weights)
        counts = [done * weight // total for weight in self.weights]
        counts[self.weights.index(max(self.weights))] += done - sum(counts)
        return counts

    def period_of(self, sample: int) -> tuple[int, int, int]:
        """(cycle, first sample, end) of the period that a sample of the stage is in, counted from its cycle's start.

        The last period of a stage also takes what would be a shorter one after it.
        """
        cycle, inner = divmod(sample, self.samples) if self.repeats and self.samples else (0, sample)
        index = inner // self.period
        if self.samples is None:
            return cycle, index * self.period, (index + 1) * self.period
        last = max(0, self.samples // self.period - 1)
        index = min(index, last)
        return cycle, index * self.period, self.samples if index == last else (index + 1) * self.period


@dataclass(frozen=True)
class _Period:
    """Samples [first, end) of a run that are shuffled together, and how many of each source came before and are in."""

    first: int
    end: int
    before: tuple[int, ...]
    inside: tuple[int, ...]
    tweak: tuple[int, ...]


class Mixture:
    """Sample g of a run -> (source, number of the sample within the source).

    Args:
        seed: Seed of the order.
        sources: Their names.
        stages: At least one, in order; each but the last has an end and does not repeat.
    """

    def __init__(self, seed: int, sources: Sequence[str], stages: Sequence[Stage]) -> None:
        self.sources, self.stages = tuple(sources), tuple(stages)
        self._shuffle = Shuffle(seed, "mixture")
        self._starts, self._before = [0], [[0] * len(sources)]
        for stage in self.stages[:-1]:
            assert stage.samples is not None and not stage.repeats, "only the last stage is without end"
            self._starts.append(self._starts[-1] + stage.samples)
            self._before.append([a + b for a, b in zip(self._before[-1], stage.counts(stage.samples), strict=True)])

    @property
    def num_samples(self) -> int | None:
        """Samples of all stages; None where the last one is without end."""
        last = self.stages[-1]
        return None if last.repeats or last.samples is None else self._starts[-1] + last.samples

    @property
    def sha256(self) -> str:
        """Identity of the mixture."""
        stages = [[stage.weights, stage.samples, stage.repeats] for stage in self.stages]
        return sha256(json.dumps([self.sources, stages]).encode()).hexdigest()

    def locate(self, sample: int) -> tuple[int, int]:
        """(place of the source, number within it) of one sample. The plain form, which `locate_range` must equal."""
        period = self._period(sample)
        place = sample - period.first
        if len(self.sources) > 1:
            place = self._shuffle.place(place, period.end - period.first, *period.tweak)
        for source, inside in enumerate(period.inside):
            if place < inside:
                return source, period.before[source] + place
            place -= inside
        raise AssertionError("the samples of a period are those of its sources")

    def locate_range(self, first: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(sources, numbers) of samples [first, end), which must exist: two arrays [end - first]."""
        sources, numbers = np.empty(end - first, dtype=np.int64), np.empty(end - first, dtype=np.int64)
        for period in self._periods(first, end):
            start, stop = max(first, period.first), min(end, period.end)
            places = np.arange(start, stop) - period.first
            if len(self.sources) > 1:
                places = self._shuffle.places(places, period.end - period.first, *period.tweak)
            ends = np.cumsum(period.inside)
            found = np.searchsorted(ends, places, side="right")
            sources[start - first : stop - first] = found
            shift = np.asarray(period.before) - (ends - period.inside)
            numbers[start - first : stop - first] = places + shift[found]
        return sources, numbers

    def _periods(self, first: int, end: int) -> Iterator[_Period]:
        while first < end:
            yield (period := self._period(first))
            first = period.end

    def _period(self, sample: int) -> _Period:
        number = bisect_right(self._starts, sample) - 1
        stage, start = self.stages[number], self._starts[number]
        cycle, first, end = stage.period_of(sample - start)
        length = stage.samples or 0  # of a cycle, where there are any
        before = [
            earlier + cycle * of_cycle + inner
            for earlier, of_cycle, inner in zip(
                self._before[number], stage.counts(length), stage.counts(first), strict=True
            )
        ]
        inside = [b - a for a, b in zip(stage.counts(first), stage.counts(end), strict=True)]
        assert min(inside) >= 0, "a period is long enough for the rounding of shares"
        start += cycle * length
        return _Period(start + first, start + end, tuple(before), tuple(inside), (number, cycle, first))


def each_once(rows: Mapping[str, int]) -> tuple[Stage, ...]:
    """The mixture of a run that names none: every epoch has each row of every source once."""
    return (Stage(tuple(rows.values()), sum(rows.values()), repeats=True),)


def stages_of(configured: Sequence[AskedStage], rows: Mapping[str, int], sequence_length: int) -> tuple[Stage, ...]:
    """The stages that a configuration asks for.

    Args:
        configured: What is asked for; nothing gives each source once in an epoch.
        rows: Training rows of each source, in the order of the build.
        sequence_length: Tokens of a sample.

    Raises:
        DataError: A source that is asked for fills no row.
    """
    if not configured:
        return each_once(rows)
    stages, tokens, samples = [], 0, 0
    for place, stage in enumerate(configured):
        where = f"data.mixture.{place}"
        if stage.epochs:
            stages.append(_by_epochs(where, stage.epochs, rows))
            continue
        _check_rows(where, stage.weights, rows)
        length = None
        if stage.tokens is not None:  # ends are rounded up from the tokens so far, so that roundings do not add up
            tokens += stage.tokens
            length = -(-tokens // sequence_length) - samples
            samples += length
        stages.append(Stage(_whole(stage.weights, rows), length))
    return tuple(stage for stage in stages if stage.samples != 0)


def _by_epochs(where: str, epochs: Mapping[str, float], rows: Mapping[str, int]) -> Stage:
    """A stage of just so many samples that each source has its epochs; parts of a row are rounded down."""
    _check_rows(where, epochs, rows)
    wanted = tuple(int(Fraction(str(epochs.get(name, 0))) * number) for name, number in rows.items())
    if not sum(wanted):
        raise ConfigError(f"{where}.epochs", dict(epochs), "a stage has at least one row", "ask for more epochs")
    return Stage(wanted, sum(wanted))


def _whole(weights: Mapping[str, float], rows: Mapping[str, int]) -> tuple[int, ...]:
    """Weights as whole numbers in the same proportion, exactly as their decimals are written."""
    exact = [Fraction(str(weights.get(name, 0))) for name in rows]
    scale = lcm(*(weight.denominator for weight in exact))
    return tuple(int(weight * scale) for weight in exact)


def _check_rows(where: str, asked: Mapping[str, float], rows: Mapping[str, int]) -> None:
    for name in asked:
        if not rows.get(name):
            raise DataError(
                f"{where}: {name}",
                f"{rows.get(name, 0)} training rows",
                "a source of a mixture fills at least one row of data.sequence_length_tokens",
                f"more text in data.sources.{name}, a smaller data.holdout_fraction, or a mixture without it",
            )
