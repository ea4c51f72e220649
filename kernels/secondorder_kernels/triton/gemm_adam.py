"""Adam as the epilogue of a product: the rotated gradient never reaches memory."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from secondorder_kernels import policy
from secondorder_kernels.triton.matmul import is_wide, tile_product
from secondorder_kernels.triton.strided import corner, inside_tile, lerp, offsets


@triton.jit
def _adam_in_basis(
    m_at,
    v_at,
    x_at,
    q_at,
    out_at,
    rate1_at,
    rate2_at,
    eps_at,
    beta1,
    eps,
    rows,
    columns,
    m_strides,
    v_strides,
    x_strides,
    q_strides,
    out_strides,
    rate1_stride,
    rate2_stride,
    eps_stride,
    NESTEROV: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    stack, row, column = corner(rows, columns, ROWS, COLUMNS)
    rows_left, columns_left = (rows - row).to(tl.int32), (columns - column).to(tl.int32)
    g = tile_product(
        x_at + stack * x_strides[0] + row * x_strides[1],
        q_at + stack * q_strides[0] + column * q_strides[2],
        rows_left,
        columns_left,
        0,
        columns,
        x_strides[1],
        x_strides[2],
        q_strides[1],
        q_strides[2],
        PRECISION,
        WIDE,
        ROWS,
        COLUMNS,
        DEPTH,
    )
    i, j = inside_tile(ROWS, COLUMNS, WIDE)
    inside = (i < rows_left) & (j < columns_left)
    m_at += offsets(stack, row, column, i, j, m_strides)
    v_at += offsets(stack, row, column, i, j, v_strides)
    m = lerp(tl.load(m_at, mask=inside, other=0.0), g, tl.load(rate1_at + stack * rate1_stride))
    tl.store(m_at, m, mask=inside)
    v = lerp(tl.load(v_at, mask=inside, other=0.0), g * g, tl.load(rate2_at + stack * rate2_stride))
    tl.store(v_at, v, mask=inside)
    if eps_at is not None:
        eps = tl.load(eps_at + stack * eps_stride)
    ahead = lerp(g, m, beta1) if NESTEROV else m
    out_at += offsets(stack, row, column, i, j, out_strides)
    tl.store(out_at, tl.div_rn(ahead, tl.sqrt_rn(v) + eps), mask=inside)


def adam_in_basis_(
    m: Tensor,
    v: Tensor,
    X: Tensor,
    Q: Tensor,
    out: Tensor,
    *,
    beta1_rate: Tensor,
    beta2_rate: Tensor,
    beta1: float,
    eps: float = 0.0,
    eps_tensor: Tensor | None = None,
    nesterov: bool = False,
    config: Mapping[str, Any],
) -> None:
    """Launch on tiles of `config["rows"]` x `config["columns"]`, with `config["depth"]` of the sum at a time."""
    n, rows, columns = X.shape
    tile = config["rows"], config["columns"], config["depth"]
    programs = n * triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1])
    if programs == 0:
        return
    tensors = m, v, X, Q, out
    _adam_in_basis[(programs,)](
        *tensors,
        beta1_rate,
        beta2_rate,
        eps_tensor,
        beta1,
        eps,
        rows,
        columns,
        *(t.stride() for t in tensors),
        beta1_rate.stride(0),
        beta2_rate.stride(0),
        0 if eps_tensor is None or eps_tensor.numel() == 1 else eps_tensor.stride(0),
        NESTEROV=nesterov,
        PRECISION=policy.precision(torch.float32),
        WIDE=is_wide(max(tile), *(t.stride() for t in tensors)),
        ROWS=tile[0],
        COLUMNS=tile[1],
        DEPTH=tile[2],
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
