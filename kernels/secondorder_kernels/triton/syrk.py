"""Symmetric products of stacked matrices: tiles on and below the diagonal alone, half of a product's work.

One launch, whose programs are the tiles of all matrices. Where these are few and the sums long (an embedding's factor),
`config["split"]` programs share a tile: they leave partial sums, which a second launch adds up in order.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from secondorder_kernels import policy
from secondorder_kernels.triton.tiles import (
    fold_tile,
    index_type,
    inner_tile,
    lower_tile,
    lower_tiles,
)

Config = Mapping[str, Any]


@triton.jit
def _coefficient(coefficients, row, stride, factor):
    """A row's coefficient, where there is one by row, times the one of all rows."""
    if coefficients is not None:
        factor *= tl.load(coefficients + row * stride)
    return factor


@triton.jit
def _key(keys, row, stride):
    key = 0
    if keys is not None:
        key = tl.load(keys + row * stride).to(tl.uint32)
    return key


@triton.jit
def _syrk_kernel(
    x,
    weight,
    c,
    coefficients,
    keys,
    partials,
    workspace,
    factor,
    tiles,
    d,
    x_rows,
    m,
    part,
    x_n,
    x_d,
    x_k,
    weight_n,
    weight_k,
    c_n,
    c_row,
    c_col,
    coefficients_n,
    keys_n,
    FOLD: tl.constexpr,
    LOWER: tl.constexpr,
    SPLIT: tl.constexpr,
    K_FAST: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_K: tl.constexpr,
    ONES: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one matrix, or one of the parts of its sums."""
    pid = tl.program_id(0)
    tile = pid // SPLIT
    row = (tile // tiles).to(tl.int64)
    tile_row, tile_col = lower_tile(tile % tiles)
    coefficient = _coefficient(coefficients, row, coefficients_n, factor)
    x += row * x_n
    if weight is not None:
        weight += row * weight_n
    length = m
    if SPLIT > 1:
        begin = pid % SPLIT * part
        length = tl.minimum(m - begin, part)
        x += begin.to(tl.int64) * x_k
        if weight is not None:
            weight += begin.to(tl.int64) * weight_k
    if FOLD != "new":
        length = tl.where(coefficient == 0, 0, length)  # what does not move needs no sums
    sums = inner_tile(
        x,
        x,
        weight,
        tile_row,
        tile_col,
        length,
        x_rows,
        x_d,
        x_k,
        x_d,
        x_k,
        weight_k,
        K_FAST,
        EVEN_D,
        EVEN_K,
        ONES,
        PRECISION,
        INDEX,
        BLOCK,
        BLOCK_K,
    )
    if SPLIT > 1:
        i = tl.arange(0, BLOCK)
        tl.store(workspace + pid.to(tl.int64) * (BLOCK * BLOCK) + i[:, None] * BLOCK + i[None, :], sums)
    else:
        if partials is not None:
            partials += tile.to(tl.int64) * 2
        fold_tile(
            sums,
            c + row * c_n,
            coefficient,
            _key(keys, row, keys_n),
            partials,
            tile_row,
            tile_col,
            d,
            c_row,
            c_col,
            FOLD,
            LOWER,
            keys is not None,
            INDEX,
            BLOCK,
        )


@triton.jit
def _join_kernel(
    workspace,
    c,
    coefficients,
    keys,
    partials,
    factor,
    tiles,
    d,
    c_n,
    c_row,
    c_col,
    coefficients_n,
    keys_n,
    FOLD: tl.constexpr,
    LOWER: tl.constexpr,
    SPLIT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the parts of a tile's sums, in order."""
    tile = tl.program_id(0)
    row = (tile // tiles).to(tl.int64)
    tile_row, tile_col = lower_tile(tile % tiles)
    i = tl.arange(0, BLOCK)
    workspace += tile.to(tl.int64) * (SPLIT * BLOCK * BLOCK) + i[:, None] * BLOCK + i[None, :]
    sums = tl.load(workspace)
    for _ in range(1, SPLIT):
        workspace += BLOCK * BLOCK
        sums += tl.load(workspace)
    if partials is not None:
        partials += tile.to(tl.int64) * 2
    fold_tile(
        sums,
        c + row * c_n,
        _coefficient(coefficients, row, coefficients_n, factor),
        _key(keys, row, keys_n),
        partials,
        tile_row,
        tile_col,
        d,
        c_row,
        c_col,
        FOLD,
        LOWER,
        keys is not None,
        INDEX,
        BLOCK,
    )


@triton.jit
def _pair_kernel(
    g,
    left,
    right,
    rates,
    left_tiles,
    tiles,
    d1,
    d2,
    g_n,
    g_1,
    g_2,
    left_n,
    left_row,
    left_col,
    right_n,
    right_row,
    right_col,
    rates_n,
    LAST_FAST: tl.constexpr,
    EVEN_1: tl.constexpr,
    EVEN_2: tl.constexpr,
    EVEN_K1: tl.constexpr,
    EVEN_K2: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one matrix, first those of the left ones: what the right ones read of G is then in the cache."""
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    rate = tl.load(rates + row * rates_n)
    g += row * g_n
    if tile < left_tiles:
        tile_row, tile_col = lower_tile(tile)
        length = tl.where(rate == 0, 0, d2)
        sums = inner_tile(
            g,
            g,
            None,
            tile_row,
            tile_col,
            length,
            d1,
            g_1,
            g_2,
            g_1,
            g_2,
            0,
            LAST_FAST,
            EVEN_1,
            EVEN_K2,
            False,
            PRECISION,
            INDEX,
            BLOCK,
            BLOCK_K,
        )
        left += row * left_n
        fold_tile(
            sums, left, rate, 0, None, tile_row, tile_col, d1, left_row, left_col, "ema", False, False, INDEX, BLOCK
        )
    else:
        tile_row, tile_col = lower_tile(tile - left_tiles)
        length = tl.where(rate == 0, 0, d1)
        sums = inner_tile(
            g,
            g,
            None,
            tile_row,
            tile_col,
            length,
            d2,
            g_2,
            g_1,
            g_2,
            g_1,
            0,
            not LAST_FAST,
            EVEN_2,
            EVEN_K1,
            False,
            PRECISION,
            INDEX,
            BLOCK,
            BLOCK_K,
        )
        right += row * right_n
        fold_tile(
            sums, right, rate, 0, None, tile_row, tile_col, d2, right_row, right_col, "ema", False, False, INDEX, BLOCK
        )


def ema_syrk_(
    C: Tensor,
    X: Tensor,
    rate: Tensor,
    *,
    lower: bool = False,
    weight: Tensor | None = None,
    ones: bool = False,
    moments: Tensor | None = None,
    keys: Tensor | None = None,
    config: Config,
) -> None:
    """See `products.py` of the package."""
    partials = None
    if moments is not None:
        partials = rate.new_empty(len(C), lower_tiles(C.shape[1], config["block"]), 2)
    _syrk("ema", C, X, config, rate, lower=lower, weight=weight, ones=ones, partials=partials, keys=keys)
    if partials is not None:
        torch.sum(partials, 1, out=moments)


def gram(
    X: Tensor,
    *,
    scale: float = 1.0,
    scale_tensor: Tensor | None = None,
    weight: Tensor | None = None,
    ones: bool = False,
    config: Config,
) -> Tensor:
    """See `grams.py` of the package."""
    n, d, _ = X.shape
    out = X.new_empty(n, d + ones, d + ones)
    _syrk("new", out, X, config, scale_tensor, factor=scale, weight=weight, ones=ones)
    return out


def add_gram_(C: Tensor, X: Tensor, scale: Tensor, *, config: Config) -> None:
    """See `grams.py` of the package."""
    _syrk("add", C, X, config, scale)


def _syrk(
    fold: str,
    C: Tensor,
    X: Tensor,
    config: Config,
    coefficients: Tensor | None,
    *,
    factor: float = 1.0,
    lower: bool = False,
    weight: Tensor | None = None,
    ones: bool = False,
    partials: Tensor | None = None,
    keys: Tensor | None = None,
) -> None:
    n, d, m = len(C), C.shape[1], X.shape[2]
    block, block_k = config["block"], config["block_k"]
    tiles = lower_tiles(d, block)
    if not n * tiles:
        return
    steps = triton.cdiv(m, block_k)
    part = triton.cdiv(steps, min(config.get("split", 1), steps)) if steps else 0  # steps of a program
    split = triton.cdiv(steps, part) if steps else 1
    workspace = None
    if split > 1:
        workspace = torch.empty(n * tiles * split, block, block, dtype=torch.float32, device=C.device)
    x_d, x_k = X.stride()[1:]
    weight_n, weight_k = (0, 0) if weight is None else weight.stride()
    coefficients_n = 0 if coefficients is None else coefficients.stride(0)
    keys_n = 0 if keys is None else keys.stride(0)
    index = index_type((x_d, x_k, weight_k, *C.stride()[1:]), max(block, block_k))
    _syrk_kernel[(n * tiles * split,)](
        X,
        weight,
        C,
        coefficients,
        keys,
        partials,
        workspace,
        factor,
        tiles,
        d,
        d - ones,
        m,
        part * block_k,
        X.stride(0),
        x_d,
        x_k,
        weight_n,
        weight_k,
        *C.stride(),
        coefficients_n,
        keys_n,
        FOLD=fold,
        LOWER=lower,
        SPLIT=split,
        K_FAST=x_k <= x_d,
        EVEN_D=d % block == 0 and not ones,
        EVEN_K=m % block_k == 0,
        ONES=ones,
        PRECISION=_precision(X, weight),
        INDEX=index,
        BLOCK=block,
        BLOCK_K=block_k,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    if split > 1:
        _join_kernel[(n * tiles,)](
            workspace,
            C,
            coefficients,
            keys,
            partials,
            factor,
            tiles,
            d,
            *C.stride(),
            coefficients_n,
            keys_n,
            FOLD=fold,
            LOWER=lower,
            SPLIT=split,
            INDEX=index,
            BLOCK=block,
            num_warps=config["num_warps"],
        )


def _precision(X: Tensor, weight: Tensor | None) -> str:
    if weight is None:
        return policy.precision(X.dtype)
    chosen = policy.precision(torch.float32)
    if chosen == "ieee" and X.dtype != torch.float32 and not torch.version.hip:
        # Half precision is exact in TF32, and so is all but the last bits of its product with a weight in three of
        # them. Besides, Triton 3.7 makes plain TF32 of "ieee" on sm100 if operands were widened in registers.
        return "tf32x3"
    return chosen


def ema_syrk_pair_(L: Tensor, R: Tensor, G: Tensor, rate: Tensor, *, config: Config) -> None:
    """See `products.py` of the package."""
    n, d1, d2 = G.shape
    block, block_k = config["block"], config["block_k"]
    left_tiles = lower_tiles(d1, block)
    tiles = left_tiles + lower_tiles(d2, block)
    if not n * tiles:
        return
    strides = (*G.stride()[1:], *L.stride()[1:], *R.stride()[1:])
    _pair_kernel[(n * tiles,)](
        G,
        L,
        R,
        rate,
        left_tiles,
        tiles,
        d1,
        d2,
        *G.stride(),
        *L.stride(),
        *R.stride(),
        rate.stride(0),
        LAST_FAST=G.stride(2) <= G.stride(1),
        EVEN_1=d1 % block == 0,
        EVEN_2=d2 % block == 0,
        EVEN_K1=d1 % block_k == 0,
        EVEN_K2=d2 % block_k == 0,
        PRECISION=policy.precision(G.dtype),
        INDEX=index_type(strides, max(block, block_k)),
        BLOCK=block,
        BLOCK_K=block_k,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
