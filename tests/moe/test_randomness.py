"""Random numbers as functions of integer keys: fixed bits, even, and without visible ties between keys."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.moe.randomness import Draw, normal, random_bits, uniform
from moe_dist.moe.reference_routing import _bits

KEY = st.integers(0, 2**63 - 1)


@settings(max_examples=100, deadline=None)
@given(st.lists(KEY, min_size=1, max_size=4))
def test_bits_equal_those_of_plain_integers(keys):
    found = int(random_bits(*keys)) % 2**64
    assert found == _bits(*keys)
    assert found == int(random_bits(*[torch.tensor(key) for key in keys])) % 2**64


def test_bits_of_seeds_beyond_63_bits_wrap():
    assert int(random_bits(2**64 + 5)) == int(random_bits(5))
    assert int(random_bits(2**63)) == int(random_bits(-(2**63)))


def test_bits_keep_their_values():
    """First value: SplitMix64 seeded with 0 (Steele et al. 2014), as every implementation of it prints it."""
    assert int(random_bits(0)) % 2**64 == 0xE220A8397B1DCDAF
    assert [int(random_bits(1, 2, key)) % 2**64 for key in range(2)] == KEPT


KEPT = [0x508AFB8E036D2294, 0x25D57FCB2B61F9C1]


def test_uniform_is_even_in_mean_spread_and_bins():
    numbers = uniform(7, torch.arange(300)[:, None], torch.arange(200))
    assert numbers.shape == (300, 200) and numbers.dtype == torch.float64
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    assert numbers.unique().numel() == numbers.numel()
    assert abs(float(numbers.mean()) - 0.5) < 0.005
    bins = torch.histc(numbers, bins=20, min=0, max=1) / numbers.numel()
    assert float((bins - 0.05).abs().max()) < 0.004
    flat = numbers.flatten() - 0.5
    for lag in (1, 2, 200):  # neighbours in either key
        assert abs(float((flat[:-lag] * flat[lag:]).mean() * 12)) < 0.02


def test_uniform_changes_with_every_key_and_with_their_order():
    position = torch.arange(50)
    sets = [uniform(*keys, position) for keys in ((0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2), (0, 1, 0))]
    for first in range(len(sets)):
        for second in range(first):
            assert not bool((sets[first] == sets[second]).any())


def test_normal_has_mean_zero_and_spread_one():
    numbers = normal(3, torch.arange(60_000))
    assert abs(float(numbers.mean())) < 0.02 and abs(float(numbers.std()) - 1) < 0.02
    assert bool(torch.isfinite(numbers).all())
    assert abs(float((numbers.abs() < 1).double().mean()) - 0.6827) < 0.01


def test_positions_count_through_the_global_batch():
    device = torch.device("cpu")
    assert Draw(0, 0, 0).positions_T(2, 3, device).tolist() == [0, 1, 2, 3, 4, 5]
    assert Draw(0, 0, 4).positions_T(1, 3, device).tolist() == [12, 13, 14]
