"""Random numbers by counting: each is a function of (seed, place) alone, so every device computes the same ones
(normal ones up to the rounding of its logarithm and cosine).

PyTorch's generators give other numbers on a GPU than on the CPU, and a field an image drawn on the CPU makes a GPU
wait. Here a word is its place scrambled with the two halves of its seed, so fields of whole batches come from a few
element-wise operations where they are needed. The scrambler is a two-round integer hash with multipliers found by
search (Wellons 2018, "lowbias32"); the numbers are for noise, not for secrets.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32))
_LAST = 16
_SPREAD = 0x9E3779B9 - 2**32


def seed_of(*parts: object) -> int:
    """A 63-bit seed made of some texts and numbers."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def sampled(seed: Tensor, sample: Tensor) -> Tensor:
    """A seed of its own for each (seed, sample), int64 (m,) both."""
    low = words(seed, 2)  # (m, 2)
    own = _scrambled(_scrambled(low ^ _word(sample * _SPREAD)[:, None]) + low.flip(1))
    return own[:, 0].long() << 32 | own[:, 1].long() & 0xFFFFFFFF


def words(seed: Tensor, count: int) -> Tensor:
    """The first ``count`` 32-bit words of each seed, int64 (m,): int32, (m, count)."""
    high = _word(seed >> 32)
    low = _scrambled(_word(seed) ^ _scrambled(high ^ _SPREAD))  # so that every bit of the seed counts twice
    found = _scrambled(torch.arange(1, count + 1, dtype=torch.int32, device=seed.device) * _SPREAD)
    found = _scrambled(found ^ low[:, None])
    found ^= high[:, None]
    return _scrambled(found)


def uniform(seed: Tensor, count: int) -> Tensor:
    """``count`` numbers in (0, 1) of each seed (m,), float64: (m, count)."""
    return (words(seed, count).double() + (2**31 + 0.5)) * 2.0**-32


def normal(seed: Tensor, shape: Sequence[int]) -> Tensor:
    """A field of standard normal numbers of each seed (m,), float32: (m, *shape).

    By Box and Muller: two words give two numbers; none is beyond 6.7.
    """
    total = math.prod(shape)
    half = -(-total // 2)
    word = words(seed, 2 * half)
    radius = word[:, :half].float().abs_().mul_(2.0**-31).clamp_min_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = word[:, half:].float().mul_(2 * math.pi * 2.0**-32)
    found = torch.empty(len(seed), 2 * half, device=seed.device)
    torch.cos(angle, out=found[:, :half])
    torch.sin(angle, out=found[:, half:])
    found[:, :half] *= radius
    found[:, half:] *= radius
    return found[:, :total].reshape(len(seed), *shape)


def _scrambled(word: Tensor) -> Tensor:
    """Each int32 sent to another one, one to one, in place."""
    for shift, factor in _ROUNDS:
        word ^= _shifted(word, shift)
        word *= factor
    word ^= _shifted(word, _LAST)
    return word


def _shifted(word: Tensor, by: int) -> Tensor:
    """Shifted to the right with zeros coming in; PyTorch's shift brings copies of the sign in."""
    return (word >> by).bitwise_and_((1 << (32 - by)) - 1)


def _word(number: Tensor) -> Tensor:
    """The low 32 bits of int64 as int32."""
    low = number & 0xFFFFFFFF
    return (low - (low >> 31 << 32)).int()
