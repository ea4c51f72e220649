"""Adam's two averages and its direction in one pass."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from secondorder_kernels import strides
from secondorder_kernels.triton.rounding import mix, rounded
from secondorder_kernels.triton.strided import coefficient, corner, inside_tile, lerp, offsets, places, row_keys, tiled


@triton.jit
def _adam_direction(
    m_at,
    v_at,
    g_at,
    out_at,
    rate1_at,
    rate2_at,
    eps_at,
    keys_at,
    beta1,
    eps,
    rows,
    columns,
    m_strides,
    v_strides,
    g_strides,
    out_strides,
    rate1_strides,
    rate2_strides,
    eps_strides,
    key_strides,
    place_strides,
    NESTEROV: tl.constexpr,
    STOCHASTIC_M: tl.constexpr,
    STOCHASTIC_V: tl.constexpr,
    EACH_RATE1: tl.constexpr,
    EACH_RATE2: tl.constexpr,
    EACH_EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    stack, row, column = corner(rows, columns, ROWS, COLUMNS)
    i, j = inside_tile(ROWS, COLUMNS, WIDE)
    inside = (i < rows - row) & (j < columns - column)
    m_at += offsets(stack, row, column, i, j, m_strides)
    v_at += offsets(stack, row, column, i, j, v_strides)
    g_at += offsets(stack, row, column, i, j, g_strides)
    out_at += offsets(stack, row, column, i, j, out_strides)

    m = tl.load(m_at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_at, mask=inside, other=1.0).to(tl.float32)
    g = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)
    rate1 = coefficient(rate1_at, stack, row, column, i, j, rows, inside, rate1_strides, EACH_RATE1)
    rate2 = coefficient(rate2_at, stack, row, column, i, j, rows, inside, rate2_strides, EACH_RATE2)
    if eps_at is not None:
        eps = coefficient(eps_at, stack, row, column, i, j, rows, inside, eps_strides, EACH_EPS)
    m, v = lerp(m, g, rate1), lerp(v, g * g, rate2)
    ahead = lerp(g, m, beta1) if NESTEROV else m
    tl.store(out_at, tl.div_rn(ahead, tl.sqrt_rn(v) + eps).to(out_at.dtype.element_ty), mask=inside)

    key, position = 0, 0
    if STOCHASTIC_M or STOCHASTIC_V:
        key = row_keys(keys_at, stack, row, i, rows, key_strides)
        position = places(stack, row, column, i, j, place_strides)
    tl.store(m_at, rounded(m, key, position, STOCHASTIC_M, m_at.dtype.element_ty), mask=inside)
    if STOCHASTIC_V:
        key = mix(key)
    tl.store(v_at, rounded(v, key, position, STOCHASTIC_V, v_at.dtype.element_ty), mask=inside)


def adam_direction_(
    m: Tensor,
    v: Tensor,
    g: Tensor,
    out: Tensor,
    *,
    beta1_rate: Tensor,
    beta2_rate: Tensor,
    beta1: float,
    eps: float = 0.0,
    eps_tensor: Tensor | None = None,
    nesterov: bool = False,
    keys: Tensor | None = None,
    config: Mapping[str, Any],
) -> None:
    """Launch on tiles of at most `config["block"]` elements."""
    if m.numel() == 0:
        return
    tensors = (m, v, g, out, beta1_rate, beta2_rate, eps_tensor)
    found = strides.of_tensors(m.shape, tensors, keys)
    assert found is not None  # or the path would have refused
    each = [s[2] != 0 for s in found.strides]
    grid, tile = tiled(found, config["block"])
    _adam_direction[grid](
        *tensors,
        keys,
        float(beta1),  # whole numbers would be compiled in
        float(eps),
        *found.sizes[1:],
        *found.strides,
        NESTEROV=nesterov,
        STOCHASTIC_M=m.dtype == torch.bfloat16,
        STOCHASTIC_V=v.dtype == torch.bfloat16,
        EACH_RATE1=each[4],
        EACH_RATE2=each[5],
        EACH_EPS=each[6],
        **tile,
        num_warps=config["num_warps"],
    )
