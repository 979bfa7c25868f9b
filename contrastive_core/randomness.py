"""Random numbers as data: every number is a function of (seed, step, stream, place in the global batch).

A generator's numbers depend on everything drawn before; these depend on nothing but their address. So a run
draws the same augmentations on one process or on sixty-four, resumes exactly, and can be replayed patch by
patch; switching one operation off leaves the numbers of the others as they were.

The generator is counter-based: the SplitMix64 finaliser (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators") applied to the address, vectorised in int64 arithmetic, which wraps.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor


def _as_int64(unsigned: int) -> int:
    return unsigned - (1 << 64) if unsigned >= 1 << 63 else unsigned


_GOLDEN = _as_int64(0x9E3779B97F4A7C15)
_MIX_1 = _as_int64(0xBF58476D1CE4E5B9)
_MIX_2 = _as_int64(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's `>>` on int64 keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, int64 to int64: every bit of the input changes every bit of the output half the time."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def words(keys: Tensor, first: int, count: int) -> Tensor:
    """Random words number `first` .. `first` + `count` - 1 of each key, on the keys' device: int64 `n` -> `n count`.

    The keys are random words themselves, such as `Randomness.integers` gives.
    """
    return mix64(keys[:, None] + torch.arange(first + 1, first + count + 1, device=keys.device) * _GOLDEN)


class Randomness:
    """The random numbers of one step, for the images at the given places of the global batch.

    Args:
        seed: the run's seed, any integer that fits 64 bits.
        step: the optimizer step, counted from 0.
        places: `b` int64, each image's place in the global batch (not in this process's share).

    `places` can be read back, on the CPU.

    Each method takes the name of a stream and the shape wanted per image and returns `b *shape` on the CPU,
    where the host can read it without stalling a device. The same arguments always give the same numbers.

    Example: `Randomness(0, 7, torch.tensor([3])).uniform("flip")` equals
    `Randomness(0, 7, torch.arange(8)).uniform("flip")[3:4]`.
    """

    def __init__(self, seed: int, step: int, places: Tensor) -> None:
        key = mix64(torch.tensor(_as_int64(seed % (1 << 64))))
        key = mix64(key ^ (torch.tensor(step) + 1) * _GOLDEN)
        self.places = places.to("cpu", torch.int64)
        self._keys = mix64(key ^ (self.places + 1) * _GOLDEN)

    def _bits(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        keys = mix64(self._keys ^ (zlib.crc32(stream.encode()) * 0x100000001 % (1 << 63)))
        return words(keys, 0, math.prod(shape)).view(len(keys), *shape)

    def uniform(self, stream: str, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform in [low, high): float32 `b *shape`, 24 random bits each."""
        return low + (high - low) * (_shift_right(self._bits(stream, shape), 40) * 2.0**-24)

    def normal(self, stream: str, *shape: int) -> Tensor:
        """Standard normal, float32 `b *shape`, by the inverse of the distribution function."""
        centred = (_shift_right(self._bits(stream, shape), 40).double() + 0.5) * 2.0**-24
        return torch.special.ndtri(centred).float()

    def integers(self, stream: str, high: int, *shape: int) -> Tensor:
        """Uniform over 0 .. high - 1: int64 `b *shape`; the bias of the modulus is below high / 2**63."""
        return _shift_right(self._bits(stream, shape), 1) % high

    def bernoulli(self, stream: str, probability: float, *shape: int) -> Tensor:
        """True with the given probability: bool `b *shape`."""
        return self.uniform(stream, *shape) < probability
