"""One Procrustes step. R, the skew part of K, is never stored: every product forms its tiles from those of K.

With S = Kᵀ - K, s = ‖S‖_F and R = S / s:   tr(K R) = s / 2,   tr(K R R) = -Σ_ij (K R)_ij R_ij.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from secondorder_kernels import policy
from secondorder_kernels.reference.group import LARGEST_TURN, SYMMETRIC
from secondorder_kernels.triton.matmul import dot, is_wide
from secondorder_kernels.triton.strided import corner, inside_tile, offsets
from secondorder_kernels.triton.tiles import lower_tile, lower_tiles

_LARGEST_TURN = tl.constexpr(LARGEST_TURN)
_SYMMETRIC = tl.constexpr(SYMMETRIC)


@triton.jit
def _mirrored(k_at, stack, row, column, i, j, inside, k_strides):
    """A tile of K and the same tile of Kᵀ."""
    turned = (k_strides[0], k_strides[2], k_strides[1])
    tile = tl.load(k_at + offsets(stack, row, column, i, j, k_strides), mask=inside, other=0.0)
    return tile, tl.load(k_at + offsets(stack, row, column, i, j, turned), mask=inside, other=0.0)


@triton.jit
def _sizes(k_at, sums_at, d, tiles, k_strides, WIDE: tl.constexpr, SIZE: tl.constexpr):
    """Sums of squares of S and of K over a tile and its mirror image."""
    pid = tl.program_id(0)
    row_tile, column_tile = lower_tile(pid % tiles)
    row, column = row_tile.to(tl.int64) * SIZE, column_tile.to(tl.int64) * SIZE
    i, j = inside_tile(SIZE, SIZE, WIDE)
    inside = (i < d - row) & (j < d - column)
    tile, mirror = _mirrored(k_at, (pid // tiles).to(tl.int64), row, column, i, j, inside, k_strides)
    skew, both = (mirror - tile) * (mirror - tile), tile * tile + mirror * mirror
    share = tl.where(row_tile == column_tile, 0.5, 1.0)  # a tile on the diagonal is its own mirror image
    tl.store(sums_at + 2 * pid, 2.0 * share * tl.sum(skew))
    tl.store(sums_at + 2 * pid + 1, share * tl.sum(both))


@triton.jit
def _skew_size(sums_at, stack):
    """What S is divided by, and whether K is symmetric as far as can be told."""
    size, whole = tl.sqrt_rn(tl.load(sums_at + 2 * stack)), tl.sqrt_rn(tl.load(sums_at + 2 * stack + 1))
    still = size <= whole * _SYMMETRIC
    return tl.where(still, 1.0, size), still


@triton.jit
def _times_skew(
    a_at,
    k_at,
    rows,
    columns,
    d,
    a_row,
    a_depth,
    k_row,
    k_column,
    column,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of A S: `a_at` points to its first row, `k_at` to the matrix K; `rows` and `columns` are left."""
    i, across = inside_tile(SIZE, DEPTH, WIDE)
    down, j = inside_tile(DEPTH, SIZE, WIDE)
    a_offsets = i * a_row + across * a_depth
    k_offsets, mirror_offsets = down * k_row + j * k_column, down * k_column + j * k_row
    mirror_at, k_at = k_at + column * k_row, k_at + column * k_column
    wide_depth = tl.cast(DEPTH, tl.int64)
    acc = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for start in range(0, d, DEPTH):
        there = (start + down < d) & (j < columns)
        skew = tl.load(mirror_at + mirror_offsets, mask=there, other=0.0)
        skew -= tl.load(k_at + k_offsets, mask=there, other=0.0)
        x = tl.load(a_at + a_offsets, mask=(i < rows) & (start + across < d), other=0.0)
        acc = dot(x, skew, acc, PRECISION)
        a_at += wide_depth * a_depth
        mirror_at += wide_depth * k_column
        k_at += wide_depth * k_row
    return acc


@triton.jit
def _once(
    k_at,
    once_at,
    sums_at,
    traces_at,
    d,
    k_strides,
    once_strides,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """K R, and sums of (K R)_ij R_ij over tiles."""
    stack, row, column = corner(d, d, SIZE, SIZE)
    rows, columns = (d - row).to(tl.int32), (d - column).to(tl.int32)
    k_here = k_at + stack * k_strides[0]
    acc = _times_skew(
        k_here + row * k_strides[1],
        k_here,
        rows,
        columns,
        d,
        k_strides[1],
        k_strides[2],
        k_strides[1],
        k_strides[2],
        column,
        PRECISION,
        WIDE,
        SIZE,
        DEPTH,
    )
    size, _ = _skew_size(sums_at, stack)
    once = acc / size
    i, j = inside_tile(SIZE, SIZE, WIDE)
    inside = (i < rows) & (j < columns)
    tl.store(once_at + offsets(stack, row, column, i, j, once_strides), once, mask=inside)
    tile, mirror = _mirrored(k_at, stack, row, column, i, j, inside, k_strides)
    tl.store(traces_at + tl.program_id(0), tl.sum(once * ((mirror - tile) / size)))


@triton.jit
def _twice(
    k_at,
    once_at,
    sums_at,
    traces_at,
    out_at,
    d,
    k_strides,
    once_strides,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """K + t K R + t²/2 K R R."""
    stack, row, column = corner(d, d, SIZE, SIZE)
    rows, columns = (d - row).to(tl.int32), (d - column).to(tl.int32)
    acc = _times_skew(
        once_at + stack * once_strides[0] + row * once_strides[1],
        k_at + stack * k_strides[0],
        rows,
        columns,
        d,
        once_strides[1],
        once_strides[2],
        k_strides[1],
        k_strides[2],
        column,
        PRECISION,
        WIDE,
        SIZE,
        DEPTH,
    )
    size, still = _skew_size(sums_at, stack)
    first, second = 0.5 * size, -tl.load(traces_at + stack)
    turn = tl.where(second < 0, -first, 1.0) / tl.where(second < 0, second, 1.0)
    turn = tl.where(turn > _LARGEST_TURN, _LARGEST_TURN, turn)  # tl.minimum would turn nan into a number
    turn = tl.where(still, 0.0, turn)
    i, j = inside_tile(SIZE, SIZE, WIDE)
    inside = (i < rows) & (j < columns)
    place = offsets(stack, row, column, i, j, once_strides)
    new = turn * tl.load(once_at + place, mask=inside, other=0.0)
    new += tl.load(k_at + offsets(stack, row, column, i, j, k_strides), mask=inside, other=0.0)
    new += 0.5 * turn * turn * (acc / size)
    tl.store(out_at + place, new, mask=inside)


def symmetrise(K: Tensor, *, config: Mapping[str, Any]) -> Tensor:
    """Launch three kernels on square tiles of `config["size"]`, with `config["depth"]` of the sum at a time."""
    n, d = K.shape[:2]
    out = torch.empty(K.shape, dtype=K.dtype, device=K.device)
    if K.numel() == 0:
        return out
    size, depth = config["size"], config["depth"]
    wide = is_wide(max(size, depth), K.stride(), out.stride())
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    tile = {"PRECISION": policy.precision(torch.float32), "WIDE": wide, "SIZE": size, "DEPTH": depth, **options}
    pairs, tiles = lower_tiles(d, size), triton.cdiv(d, size) ** 2

    sums = torch.empty(n, pairs, 2, dtype=torch.float32, device=K.device)
    _sizes[(n * pairs,)](K, sums, d, pairs, K.stride(), WIDE=wide, SIZE=size, **options)
    sums = sums.sum(1)
    once = torch.empty_like(out)
    traces = torch.empty(n, tiles, dtype=torch.float32, device=K.device)
    _once[(n * tiles,)](K, once, sums, traces, d, K.stride(), once.stride(), **tile)
    _twice[(n * tiles,)](K, once, sums, traces.sum(1), out, d, K.stride(), once.stride(), **tile)
    return out
