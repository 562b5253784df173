"""Random numbers that belong to a place: pure functions of integer keys, the same bits on every device and layout.

Shape letters: T tokens.

A number is named by (seed, step, purpose, layer, global token position, ...). There is no generator and no state, so
that recomputing a layer, cutting the batch elsewhere or continuing a run draws the same numbers again.

Each key is stirred into 64 bits by the finaliser of SplitMix64; all arithmetic is that of int64 with wrap-around.
Source: Steele, Lea and Flood 2014 (fast splittable pseudorandom number generators); Salmon et al. 2011 for
the idea of counter-based numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# What a number is for: two uses with otherwise equal keys must not share their numbers.
JITTER, NOISE, SECOND_EXPERT, HASH = 1, 2, 3, 4

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


@dataclass(frozen=True)
class Draw:
    """Names the random numbers of one forward in training.

    Attributes:
        seed: Of the run.
        step: Optimizer updates made before.
        first_row: Place of the first sequence here among those of the global batch.
    """

    seed: int
    step: int
    first_row: int

    def positions_T(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Position of every token in the global batch of the step, int64 [batch * length]."""
        return torch.arange(batch * length, device=device) + self.first_row * length


def random_bits(*keys: int | Tensor) -> Tensor:
    """64 random bits, as int64, for integer keys that broadcast against each other."""
    bits = torch.zeros((), dtype=torch.int64)
    for key in keys:
        whole = key if isinstance(key, Tensor) else torch.tensor(_signed(key))
        bits = _stir(bits + whole * _GOLDEN + _GOLDEN)
    return bits


def uniform(*keys: int | Tensor) -> Tensor:
    """Uniform in [0, 1), fp64: the upper 53 bits, so that the value is exact on every device."""
    return _shift(random_bits(*keys), 11).double() * 2.0**-53


def normal(*keys: int | Tensor) -> Tensor:
    """Standard normal, fp64. Source: Box and Muller 1958. Equal over devices up to the rounding of log and cos."""
    radius = torch.sqrt(-2 * torch.log(1 - uniform(*keys, 0)))
    return radius * torch.cos(2 * math.pi * uniform(*keys, 1))


def _stir(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift(bits, 30)) * _FIRST
    bits = (bits ^ _shift(bits, 27)) * _SECOND
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, places: int) -> Tensor:
    """Shift to the right that fills with zeros: int64 by itself repeats the sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _signed(key: int) -> int:
    """The int64 with the lowest 64 bits of a whole number."""
    return (key + 2**63) % 2**64 - 2**63
