"""Stochastic rounding to bfloat16 in epilogues: bit for bit the hash of `reference/rounding.py`."""

import triton
import triton.language as tl


@triton.jit
def mix(h):
    """Scramble uint32 numbers."""
    h ^= h >> 16
    h *= 0x21F0AAAD
    h ^= h >> 15
    h *= 0x735A2D97
    return h ^ (h >> 15)


@triton.jit
def rounded(x, key, position, STOCHASTIC: tl.constexpr, dtype: tl.constexpr):
    """Float32 `x` as `dtype`; stochastically, to bfloat16, by a row's uint32 `key` and the entry's `position` in it."""
    if STOCHASTIC:
        bits = x.to(tl.uint32, bitcast=True)
        noise = mix(position.to(tl.uint32) ^ key) >> 16
        cut = ((bits + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
        # What is added may carry a nan's bits over to a number.
        x = tl.where((bits & 0x7F800000) == 0x7F800000, x, cut)
    return x.to(dtype)
