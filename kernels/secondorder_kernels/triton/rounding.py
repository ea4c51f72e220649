"""Stochastic rounding to bfloat16 in epilogues: bit for bit the hash of `reference/rounding.py`."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from secondorder_kernels import strides
from secondorder_kernels.triton.strided import corner, inside_tile, offsets, places, row_keys, tiled


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


@triton.jit
def _stochastic_round(
    x_at,
    out_at,
    keys_at,
    rows,
    columns,
    x_strides,
    out_strides,
    key_strides,
    place_strides,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    stack, row, column = corner(rows, columns, ROWS, COLUMNS)
    i, j = inside_tile(ROWS, COLUMNS, WIDE)
    inside = (i < rows - row) & (j < columns - column)
    x = tl.load(x_at + offsets(stack, row, column, i, j, x_strides), mask=inside, other=0.0).to(tl.float32)
    key = row_keys(keys_at, stack, row, i, rows, key_strides)
    position = places(stack, row, column, i, j, place_strides)
    out_at += offsets(stack, row, column, i, j, out_strides)
    tl.store(out_at, rounded(x, key, position, True, out_at.dtype.element_ty), mask=inside)


def stochastic_round(x: Tensor, keys: Tensor, *, config: Mapping[str, Any]) -> Tensor:
    """Launch on tiles of at most `config["block"]` elements."""
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    if x.numel() == 0:
        return out
    found = strides.of_tensors(x.shape, (out, x), keys)
    assert found is not None  # or the path would have refused
    out_strides, x_strides, key_strides, place_strides = found.strides
    grid, tile = tiled(found, config["block"])
    _stochastic_round[grid](
        x,
        out,
        keys,
        *found.sizes[1:],
        x_strides,
        out_strides,
        key_strides,
        place_strides,
        **tile,
        num_warps=config["num_warps"],
    )
    return out
