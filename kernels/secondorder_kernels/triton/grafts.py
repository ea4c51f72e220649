"""Grafting in two passes: the element-wise method's state and all norms, then the direction."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from secondorder_kernels import strides
from secondorder_kernels.triton.strided import coefficient, corner, inside_tile, lerp, offsets, tiled


@triton.jit
def _measure(
    u_at,
    moment_at,
    g_at,
    v_at,
    rate_at,
    partial_at,
    partials,
    eps,
    rows,
    columns,
    u_strides,
    moment_strides,
    g_strides,
    v_strides,
    rate_strides,
    KIND: tl.constexpr,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Fold in G², and sum up D² and U²: for every row of a tile, or for all of it where a matrix is one row."""
    stack, row, column = corner(rows, columns, ROWS, COLUMNS)
    i, j = inside_tile(ROWS, COLUMNS, WIDE)
    inside = (i < rows - row) & (j < columns - column)
    d = tl.load(moment_at + offsets(stack, row, column, i, j, moment_strides), mask=inside, other=0.0)
    if KIND != "sgd":
        v_at += offsets(stack, row, column, i, j, v_strides)
        v = tl.load(v_at, mask=inside, other=1.0)
        g = tl.load(g_at + offsets(stack, row, column, i, j, g_strides), mask=inside, other=0.0)
        rate = coefficient(rate_at, stack, row, column, i, j, rows, inside, rate_strides, False)
        if KIND == "adam":
            v = lerp(v, g * g, rate)
        else:
            v += tl.where(rate > 0, g * g, 0.0)
        tl.store(v_at, v, mask=inside)
        d = tl.where(inside, _divided(d, v, eps), 0.0)
    u = tl.load(u_at + offsets(stack, row, column, i, j, u_strides), mask=inside, other=0.0)
    # In float64, where no square of a float32 number vanishes or overflows.
    d, u = d.to(tl.float64), u.to(tl.float64)
    if BY_ROW:
        number = tl.arange(0, ROWS)
        partial_at += (row + number) * tl.cdiv(columns, COLUMNS) + column // COLUMNS
        tl.store(partial_at, tl.sum(d * d, axis=1), mask=number < rows - row)
        tl.store(partial_at + partials, tl.sum(u * u, axis=1), mask=number < rows - row)
    else:
        partial_at += tl.program_id(0)
        tl.store(partial_at, tl.sum(tl.sum(d * d, axis=1), axis=0))
        tl.store(partial_at + partials, tl.sum(tl.sum(u * u, axis=1), axis=0))


@triton.jit
def _divided(moment, v, eps):
    return moment * tl.div_rn(1.0, tl.sqrt_rn(v) + eps)


@triton.jit
def _graft(
    u_at,
    moment_at,
    v_at,
    sum_at,
    out_at,
    scale_at,
    n,
    eps,
    rows,
    columns,
    u_strides,
    moment_strides,
    v_strides,
    row_strides,
    out_strides,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    stack, row, column = corner(rows, columns, ROWS, COLUMNS)
    i, j = inside_tile(ROWS, COLUMNS, WIDE)
    inside = (i < rows - row) & (j < columns - column)
    place = stack * row_strides[0] + (row + i) * row_strides[1]
    length = tl.sqrt(tl.load(sum_at + place, mask=i < rows - row, other=0.0)).to(tl.float32)
    own = tl.sqrt(tl.load(sum_at + n + place, mask=i < rows - row, other=0.0)).to(tl.float32)
    grafted = own > 0
    scale = tl.where(grafted, tl.div_rn(length, tl.where(grafted, own, 1.0)), 0.0)
    u = tl.load(u_at + offsets(stack, row, column, i, j, u_strides), mask=inside & grafted, other=0.0)
    bare = inside & (own <= 0)
    d = tl.load(moment_at + offsets(stack, row, column, i, j, moment_strides), mask=bare, other=0.0)
    if KIND != "sgd":
        v = tl.load(v_at + offsets(stack, row, column, i, j, v_strides), mask=bare, other=1.0)
        d = _divided(d, v, eps)
    out_at += offsets(stack, row, column, i, j, out_strides)
    tl.store(out_at, tl.where(grafted, u * scale, d), mask=inside)
    # One program of a row tells its scale, and one line of it.
    first = (column == 0) & ((row + i == 0) | (row_strides[1] != 0))
    tl.store(scale_at + place, scale, mask=first & (i < rows - row))


def graft_(
    U: Tensor,
    moment: Tensor,
    G: Tensor | None,
    V: Tensor | None,
    out: Tensor,
    scale: Tensor,
    *,
    rate: Tensor | None = None,
    eps: float = 0.0,
    kind: str,
    config: Mapping[str, Any],
) -> None:
    """Launch twice on tiles of at most `config["block"]` elements, with a sum of the tiles' norms in between."""
    if out.numel() == 0:
        scale.zero_()
        return
    found = strides.of_rows(U.shape, (U, moment, G, V, out), rate)
    assert found is not None  # or the path would have refused
    u_strides, moment_strides, g_strides, v_strides, out_strides, rate_strides, row_strides = found.strides
    grid, tile = tiled(found, config["block"])
    by_row = row_strides[1] != 0
    stacks, rows, columns = found.sizes
    across = triton.cdiv(columns, tile["COLUMNS"])
    partials = torch.empty((2, rows * across if by_row else grid[0]), dtype=torch.float64, device=U.device)
    _measure[grid](
        U,
        moment,
        G,
        V,
        rate,
        partials,
        partials.shape[1],
        float(eps),  # a whole number would be compiled in
        rows,
        columns,
        u_strides,
        moment_strides,
        g_strides,
        v_strides,
        rate_strides,
        KIND=kind,
        BY_ROW=by_row,
        **tile,
        num_warps=config["num_warps"],
    )
    sums = partials.view(2, len(U), -1).sum(dim=2)
    _graft[grid](
        U,
        moment,
        V,
        sums,
        out,
        scale,
        len(U),
        float(eps),
        rows,
        columns,
        u_strides,
        moment_strides,
        v_strides,
        row_strides,
        out_strides,
        KIND=kind,
        **tile,
        num_warps=config["num_warps"],
    )
