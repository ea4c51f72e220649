"""Structured factors: diagonal ones on both sides of a matrix, and products with blocks."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from secondorder_kernels import policy
from secondorder_kernels.triton.matmul import is_wide, tile_product
from secondorder_kernels.triton.strided import corner, inside_tile, offsets


@triton.jit
def _entries(at, stack, first, i, left, strides):
    """A tile's part of a diagonal."""
    return tl.load(at + stack * strides[0] + first * strides[1] + i * strides[1], mask=i < left, other=0.0)


@triton.jit
def _diagonal_moments(
    g_at,
    a_at,
    b_at,
    row_sums_at,
    column_sums_at,
    rows,
    columns,
    g_strides,
    a_strides,
    b_strides,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    stack, row, column = corner(rows, columns, ROWS, COLUMNS)
    i, j = inside_tile(ROWS, COLUMNS, WIDE)
    inside = (i < rows - row) & (j < columns - column)
    g = tl.load(g_at + offsets(stack, row, column, i, j, g_strides), mask=inside, other=0.0)
    w = _entries(a_at, stack, row, i, rows - row, a_strides) * g
    w *= _entries(b_at, stack, column, j, columns - column, b_strides)
    # Sums of rows have a line per column of tiles, sums of columns one per row of tiles.
    row_sums_at += (stack * tl.cdiv(columns, COLUMNS) + column // COLUMNS) * rows + row
    column_sums_at += (stack * tl.cdiv(rows, ROWS) + row // ROWS) * columns + column
    tl.store(row_sums_at + i, tl.sum(w * w, 1, keep_dims=True), mask=i < rows - row)
    tl.store(column_sums_at + j, tl.sum(w * w, 0, keep_dims=True), mask=j < columns - column)


def diagonal_moments(G: Tensor, a: Tensor, b: Tensor, *, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Launch on tiles of `config["rows"]` x `config["columns"]`; their sums are added up in order."""
    n, rows, columns = G.shape
    tile = config["rows"], config["columns"]
    down, across = triton.cdiv(rows, tile[0]), triton.cdiv(columns, tile[1])
    row_sums = torch.empty(n, across, rows, dtype=torch.float32, device=G.device)
    column_sums = torch.empty(n, down, columns, dtype=torch.float32, device=G.device)
    if n * down * across:
        _diagonal_moments[(n * down * across,)](
            G,
            a,
            b,
            row_sums,
            column_sums,
            rows,
            columns,
            G.stride(),
            a.stride(),
            b.stride(),
            WIDE=is_wide(max(tile), G.stride(), a.stride(), b.stride()),
            ROWS=tile[0],
            COLUMNS=tile[1],
            num_warps=config["num_warps"],
        )
    return row_sums.sum(1), column_sums.sum(1)


@triton.jit
def _diagonal_apply(
    g_at,
    a_at,
    b_at,
    out_at,
    rows,
    columns,
    g_strides,
    a_strides,
    b_strides,
    out_strides,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    stack, row, column = corner(rows, columns, ROWS, COLUMNS)
    i, j = inside_tile(ROWS, COLUMNS, WIDE)
    inside = (i < rows - row) & (j < columns - column)
    g = tl.load(g_at + offsets(stack, row, column, i, j, g_strides), mask=inside, other=0.0)
    a = _entries(a_at, stack, row, i, rows - row, a_strides)
    b = _entries(b_at, stack, column, j, columns - column, b_strides)
    tl.store(out_at + offsets(stack, row, column, i, j, out_strides), a * (a * g) * b * b, mask=inside)


def diagonal_apply(G: Tensor, a: Tensor, b: Tensor, *, config: Mapping[str, Any]) -> Tensor:
    """Launch on tiles of `config["rows"]` x `config["columns"]`."""
    n, rows, columns = G.shape
    tile = config["rows"], config["columns"]
    out = torch.empty_like(G)
    programs = n * triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1])
    if programs:
        _diagonal_apply[(programs,)](
            G,
            a,
            b,
            out,
            rows,
            columns,
            G.stride(),
            a.stride(),
            b.stride(),
            out.stride(),
            WIDE=is_wide(max(tile), G.stride(), a.stride(), b.stride(), out.stride()),
            ROWS=tile[0],
            COLUMNS=tile[1],
            num_warps=config["num_warps"],
        )
    return out


@triton.jit
def _block_apply(
    k_at,
    x_at,
    out_at,
    blocks,
    size,
    columns,
    k_strides,
    x_strides,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    place, row, column = corner(size, columns, ROWS, COLUMNS)
    stack, block = place // blocks, place % blocks
    rows_left, columns_left = (size - row).to(tl.int32), (columns - column).to(tl.int32)
    acc = tile_product(
        k_at + stack * k_strides[0] + block * k_strides[1] + row * k_strides[2],
        x_at + stack * x_strides[0] + block * x_strides[1] + column * x_strides[3],
        rows_left,
        columns_left,
        0,
        size,
        k_strides[2],
        k_strides[3],
        x_strides[2],
        x_strides[3],
        PRECISION,
        WIDE,
        ROWS,
        COLUMNS,
        DEPTH,
    )
    i, j = inside_tile(ROWS, COLUMNS, WIDE)
    out_at += (place * size + row) * columns + column + (i * columns + j)
    tl.store(out_at, acc.to(out_at.dtype.element_ty), mask=(i < rows_left) & (j < columns_left))


def block_apply(K: Tensor, X: Tensor, *, transposed: bool = False, config: Mapping[str, Any]) -> Tensor:
    """Launch on tiles of `config["rows"]` x `config["columns"]`, with `config["depth"]` of the sum at a time.

    Where blocks are smaller than a tile, the tile is made as small: then a program takes all rows of a block.
    """
    n, blocks, size, columns = X.shape
    out = torch.empty(X.shape, dtype=X.dtype, device=X.device)
    least = max(16, triton.next_power_of_2(size))  # 16: the least that matrix units take
    rows, depth = min(config["rows"], least), min(config["depth"], least)
    programs = n * blocks * triton.cdiv(size, rows) * triton.cdiv(columns, config["columns"])
    if programs:
        K = K.mT if transposed else K
        _block_apply[(programs,)](
            K,
            X,
            out,
            blocks,
            size,
            columns,
            K.stride(),
            X.stride(),
            PRECISION=policy.precision(K.dtype),
            WIDE=is_wide(max(rows, depth, config["columns"]), K.stride()[1:], X.stride()[1:], (0, columns)),
            ROWS=rows,
            COLUMNS=config["columns"],
            DEPTH=depth,
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )
    return out
