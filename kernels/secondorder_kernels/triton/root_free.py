"""The average of squared gradients, and a moment divided by it, in one pass."""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from secondorder_kernels import strides
from secondorder_kernels.triton.strided import coefficient, corner, inside_tile, lerp, offsets, tiled


@triton.jit
def _root_free(
    v_at,
    g_at,
    moment_at,
    out_at,
    rate_at,
    scale_at,
    scale,
    eps,
    rows,
    columns,
    v_strides,
    g_strides,
    moment_strides,
    out_strides,
    rate_strides,
    EACH_RATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    stack, row, column = corner(rows, columns, ROWS, COLUMNS)
    i, j = inside_tile(ROWS, COLUMNS, WIDE)
    inside = (i < rows - row) & (j < columns - column)
    v_at += offsets(stack, row, column, i, j, v_strides)
    v = tl.load(v_at, mask=inside, other=1.0)
    g = tl.load(g_at + offsets(stack, row, column, i, j, g_strides), mask=inside, other=0.0)
    moment = tl.load(moment_at + offsets(stack, row, column, i, j, moment_strides), mask=inside, other=0.0)
    rate = coefficient(rate_at, stack, row, column, i, j, rows, inside, rate_strides, EACH_RATE)
    if scale_at is not None:
        scale = tl.load(scale_at).to(tl.float32)
    v = lerp(v, g * g * scale, rate)
    tl.store(v_at, v, mask=inside)
    out_at += offsets(stack, row, column, i, j, out_strides)
    tl.store(out_at, tl.div_rn(moment, v + eps), mask=inside)


def root_free_(
    v: Tensor,
    g: Tensor,
    moment: Tensor,
    out: Tensor,
    *,
    rate: Tensor,
    scale: float = 1.0,
    scale_tensor: Tensor | None = None,
    eps: float,
    config: Mapping[str, Any],
) -> None:
    """Launch on tiles of at most `config["block"]` elements."""
    if v.numel() == 0:
        return
    tensors = (v, g, moment, out, rate)
    found = strides.of_tensors(v.shape, tensors)
    assert found is not None  # or the path would have refused
    grid, tile = tiled(found, config["block"])
    _root_free[grid](
        *tensors,
        scale_tensor,
        float(scale),  # whole numbers would be compiled in
        float(eps),
        *found.sizes[1:],
        *found.strides[:5],
        EACH_RATE=found.strides[4][2] != 0,
        **tile,
        num_warps=config["num_warps"],
    )
