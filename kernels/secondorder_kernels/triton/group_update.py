"""Factors that are moved by products: keep K - step K M, rounded where it is stored so, and its squared norm."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from secondorder_kernels import policy
from secondorder_kernels.triton.matmul import is_wide, tile_product
from secondorder_kernels.triton.rounding import rounded
from secondorder_kernels.triton.strided import inside_tile, offsets
from secondorder_kernels.triton.tiles import lower_tile, lower_tiles


@triton.jit
def _multiply_update(
    k_at,
    m_at,
    out_at,
    sums_at,
    step_at,
    keep_at,
    keys_at,
    d,
    tiles,
    k_strides,
    m_strides,
    step_stride,
    keep_stride,
    keys_stride,
    LOWER: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    pid = tl.program_id(0)
    stack, tile = (pid // tiles).to(tl.int64), pid % tiles
    if LOWER:
        row_tile, column_tile = lower_tile(tile)
        # Where neither K_ik nor M_kj is above the diagonal.
        first, last = column_tile * SIZE, tl.minimum((row_tile + 1) * SIZE, d)
    else:
        row_tile, column_tile = tile // tl.cdiv(d, SIZE), tile % tl.cdiv(d, SIZE)
        first, last = 0, d
    row, column = row_tile.to(tl.int64) * SIZE, column_tile.to(tl.int64) * SIZE
    rows_left, columns_left = d - row_tile * SIZE, d - column_tile * SIZE
    acc = tile_product(
        k_at + stack * k_strides[0] + row * k_strides[1],
        m_at + stack * m_strides[0] + column * m_strides[2],
        rows_left,
        columns_left,
        first,
        last,
        k_strides[1],
        k_strides[2],
        m_strides[1],
        m_strides[2],
        PRECISION,
        WIDE,
        SIZE,
        SIZE,
        DEPTH,
    )
    i, j = inside_tile(SIZE, SIZE, WIDE)
    inside = (i < rows_left) & (j < columns_left)
    new = tl.load(k_at + offsets(stack, row, column, i, j, k_strides), mask=inside, other=0.0).to(tl.float32)
    if keep_at is not None:
        new *= tl.load(keep_at + stack * keep_stride)
    new -= tl.load(step_at + stack * step_stride) * acc
    dtype: tl.constexpr = out_at.dtype.element_ty
    if keys_at is not None:
        key = tl.load(keys_at + stack * keys_stride).to(tl.uint32)
        new = rounded(new, key, (row + i) * d + (column + j), True, dtype)
    # A d of 1 is a number of Python's here, which has no `to`.
    out_strides = (tl.full((), 1, tl.int64) * d * d, d, 1)
    tl.store(out_at + offsets(stack, row, column, i, j, out_strides), new, mask=inside)
    new = new.to(tl.float32)
    tl.store(sums_at + pid, tl.sum(new * new))
    if LOWER:
        if row_tile != column_tile:
            above = tl.zeros((SIZE, SIZE), dtype)
            inside = (i < columns_left) & (j < rows_left)
            tl.store(out_at + offsets(stack, column, row, i, j, out_strides), above, mask=inside)


def multiply_update(
    K: Tensor,
    M: Tensor,
    step: Tensor,
    *,
    keep: Tensor | None = None,
    lower: bool = False,
    keys: Tensor | None = None,
    config: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """Launch on square tiles of `config["size"]`, with `config["depth"]` of the sum at a time."""
    n, d = K.shape[:2]
    size, depth = config["size"], config["depth"]
    out = torch.empty(K.shape, dtype=K.dtype, device=K.device)
    tiles = lower_tiles(d, size) if lower else triton.cdiv(d, size) ** 2
    sums = torch.empty(n, tiles, dtype=torch.float32, device=K.device)
    if policy.precision(torch.float32) == "ieee":
        # Where an operand comes out of bfloat16, Triton 3.7 multiplies by TF32 on sm100 instead, which cuts M off.
        K = K.to(torch.float32)
    if n * tiles:
        _multiply_update[(n * tiles,)](
            K,
            M,
            out,
            sums,
            step,
            keep,
            keys,
            d,
            tiles,
            K.stride(),
            M.stride(),
            step.stride(0),
            0 if keep is None else keep.stride(0),
            0 if keys is None else keys.stride(0),
            LOWER=lower,
            PRECISION=policy.precision(torch.float32),
            WIDE=is_wide(max(size, depth), K.stride(), M.stride(), (0, d)),
            SIZE=size,
            DEPTH=depth,
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )
    return out, sums.sum(1)
