"""Keyed permutations of [0, n), computed for one value at a time or for many, in memory that does not depend on n.

A Feistel network permutes [0, 4**k) for the smallest k that covers n; a value outside is sent through again until it
is below n (cycle walking), which keeps it a permutation. Integers only, so that every machine and any number of ranks
see the same order. Imports no more than numpy and hashlib: the order costs a process no other memory.

Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), sections 4 and 5. The tweak, which makes a
family of permutations from one set of keys, is after Liskov, Rivest and Wagner, "Tweakable Block Ciphers" (2002).
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_LEAST_HALF_BITS = 3  # with halves of two bits, places of two values of four fail a chi-square test of 20,000 tweaks
_MASK = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15  # of SplitMix64: an odd number with no pattern in its bits


class Shuffle:
    """A family of permutations, one for each size and tweak.

    Args:
        words: Seed and purpose; others give another family.
    """

    def __init__(self, *words: int | str) -> None:
        self._keys = _round_keys(repr(words))

    def place(self, value: int, size: int, *tweak: int) -> int:
        """Where `value` of [0, size) goes. The plain form, which `places` must equal."""
        if size == 1:
            return 0
        half_bits, keys = _half_bits(size), _tweaked(self._keys, tweak)
        value = _permute(value, half_bits, keys)
        while value >= size:
            value = _permute(value, half_bits, keys)
        return value

    def places(self, values: NDArray[np.int64], size: int, *tweak: int) -> NDArray[np.int64]:
        """Where each of `values` goes: [N]."""
        if size == 1:
            return np.zeros_like(values)
        half_bits, keys = _half_bits(size), _tweaked(self._keys, tweak)
        found = _permute_many(values.astype(np.uint64), half_bits, keys)
        outside = np.flatnonzero(found >= size)
        while len(outside):
            found[outside] = _permute_many(found[outside], half_bits, keys)
            outside = outside[found[outside] >= size]
        return found.astype(np.int64)


def _half_bits(size: int) -> int:
    """Bits of each half of the network."""
    return max(_LEAST_HALF_BITS, ((size - 1).bit_length() + 1) // 2)


def _round_keys(text: str) -> list[int]:
    digest = blake2b(text.encode(), digest_size=8 * _ROUNDS, person=b"shuffle").digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]


def _tweaked(keys: Sequence[int], tweak: Sequence[int]) -> list[int]:
    mixed = 0
    for number in tweak:
        mixed = _mix((mixed + number + _STEP) & _MASK)
    return [_mix(key ^ mixed) for key in keys]


def _permute(value: int, half_bits: int, keys: Sequence[int]) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half_bits | right


def _permute_many(values: NDArray[np.uint64], half_bits: int, keys: Sequence[int]) -> NDArray[np.uint64]:
    """`_permute` of many; products wrap around at 2**64 as `_mix` cuts them."""
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix_many(right ^ np.uint64(key)) & mask)
    return left << bits | right


def _mix(value: int) -> int:
    """The finaliser of SplitMix64: every bit of the result depends on every bit of the value."""
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31


def _mix_many(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
