"""Stochastic rounding to bfloat16 by a counter-based integer hash: no generator, no state but the callers' counters.

An increment below half a unit in the last place (ulp) is lost by rounding to nearest, however often it comes. Here

    P(round away from zero) = the part of an ulp that is cut off,    so that    E[round(x)] = x

exactly: a uniform hash of 16 bits is added below the 16 bits that bfloat16 keeps of a float32, then these are cut off.
Numbers that bfloat16 represents stay as they are. The hash is a function of integers only,

    hash(i, key) = mix(i xor key),    key = mix(c_1 + mix(c_2 + ... mix(seed)))     i: position, c: counters

    mix(h):  h ^= h >> 16;  h *= 0x21f0aaad;  h ^= h >> 15;  h *= 0x735a2d97;  h ^= h >> 15      (mod 2^32)

and so the same on every device and in every language that has 32-bit unsigned integers. `mix` is a bijection of the
family of Mulvey and Wellons ("hash prospector"); its multipliers are below 2^31, so that nothing overflows in int64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def mix(h: Tensor) -> Tensor:
    """Scramble 32-bit integers, by a bijection.

    Args:
        h: int64, values in [0, 2^32).

    Returns:
        int64, values in [0, 2^32).
    """
    h = h ^ (h >> 16)
    h = (h * 0x21F0AAAD) & _MASK
    h = h ^ (h >> 15)
    h = (h * 0x735A2D97) & _MASK
    return h ^ (h >> 15)


def row_keys(counters: Sequence[Tensor], seed: int) -> Tensor:
    """One key per row from its counters.

    Args:
        counters: At least one tensor `(n,)` of whole numbers in [0, 2^32).
        seed: Keeps apart what has equal counters, in [0, 2^32).

    Returns:
        `(n,)` int64.
    """
    key = torch.full_like(counters[0], seed, dtype=torch.int64)
    for counter in counters:
        key = mix((mix(key) + counter.to(torch.int64)) & _MASK)
    return key


def stochastic_round(x: Tensor, keys: Tensor) -> Tensor:
    """Round to bfloat16 so that the mean over keys is `x`."""
    x = x.to(torch.float32)
    rows = x.reshape(x.shape[0], x.shape[1:].numel()).contiguous()
    position = torch.arange(rows.shape[1], dtype=torch.int64, device=x.device)
    noise = mix(position ^ keys[:, None]) >> 16
    bits = rows.view(torch.int32)
    rounded = ((bits + noise.to(torch.int32)) & -0x10000).view(torch.float32)
    # What is added may carry a nan's bits over to a number.
    return torch.where(rows.isfinite(), rounded, rows).to(torch.bfloat16).view(x.shape)


def average_(stored: Tensor, new: Tensor, rate: Tensor, keys: Tensor | None) -> Tensor:
    """Move `stored` towards `new` by `rate`, in place; what is bfloat16 is rounded stochastically.

    Returns:
        The average before it is rounded: float32 where `stored` is bfloat16, else `stored` itself.
    """
    if stored.dtype != torch.bfloat16:
        return stored.lerp_(new, rate)
    assert keys is not None
    average = stored.to(torch.float32).lerp_(new, rate)
    stored.copy_(stochastic_round(average, keys))
    return average
