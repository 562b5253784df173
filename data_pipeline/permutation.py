"""The global order of samples: a keyed permutation of the rows for each epoch, computed for one sample at a time.

A Feistel network permutes [0, 4**k) for the smallest k that covers the rows; a value outside the rows is sent through
again until it is one of them (cycle walking), which keeps it a permutation. Integers only, so that every machine and
any number of ranks see the same order.

Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), sections 4 and 5.
"""

from __future__ import annotations

from hashlib import blake2b

_ROUNDS = 8
_MASK = 2**64 - 1


def row_order(seed: int, num_rows: int, sample: int) -> int:
    """The row that is sample number `sample` of a run; every epoch of `num_rows` samples has each row once.

    Args:
        seed: Seed of the order.
        num_rows: Rows of the split, at least 1.
        sample: Position in the endless order, from 0.
    """
    epoch, value = divmod(sample, num_rows)
    keys = _round_keys(seed, epoch)
    half_bits = max(1, ((num_rows - 1).bit_length() + 1) // 2)
    value = _permute(value, half_bits, keys)
    while value >= num_rows:
        value = _permute(value, half_bits, keys)
    return value


def _round_keys(seed: int, epoch: int) -> list[int]:
    digest = blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * _ROUNDS, person=b"row order").digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]


def _permute(value: int, half_bits: int, keys: list[int]) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half_bits | right


def _mix(value: int) -> int:
    """The finaliser of SplitMix64: every bit of the result depends on every bit of the value."""
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31
