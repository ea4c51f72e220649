"""Products of symmetric matrices that commute: tiles on and below the diagonal alone, half of a product's work."""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from secondorder_kernels import policy
from secondorder_kernels.triton.tiles import index_type, inner_tile, lower_tile, lower_tiles, store_tile, tile_at


@triton.jit
def _symmetric_product_kernel(
    a,
    b,
    c,
    out,
    alpha,
    beta,
    diagonal,
    tiles,
    d,
    a_n,
    a_row,
    a_col,
    b_n,
    b_row,
    b_col,
    c_n,
    c_row,
    c_col,
    EVEN_D: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one matrix; B is read by its rows, which are its columns."""
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64)
    tile_row, tile_col = lower_tile(pid % tiles)
    new = inner_tile(
        a + row * a_n,
        b + row * b_n,
        None,
        tile_row,
        tile_col,
        d,
        d,
        a_row,
        a_col,
        b_row,
        b_col,
        0,
        True,
        EVEN_D,
        EVEN_K,
        False,
        PRECISION,
        INDEX,
        BLOCK,
        BLOCK_K,
    )
    new *= alpha
    if c is not None:
        at, inside = tile_at(c + row * c_n, tile_row, tile_col, d, c_row, c_col, INDEX, BLOCK)
        new += beta * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if tile_row == tile_col:
        i = tl.arange(0, BLOCK)
        new += tl.where(i[:, None] == i[None, :], diagonal, 0.0)
    out += row * d * d
    store_tile(new.to(out.dtype.element_ty), out, tile_row, tile_col, d, d, 1, False, INDEX, BLOCK)


def symmetric_product(
    A: Tensor,
    B: Tensor,
    *,
    alpha: float = 1.0,
    C: Tensor | None = None,
    beta: float = 0.0,
    diagonal: float = 0.0,
    config: Mapping[str, Any],
) -> Tensor:
    """See `grams.py` of the package."""
    n, d, _ = A.shape
    block, block_k = config["block"], config["block_k"]
    tiles = lower_tiles(d, block)
    out = A.new_empty(n, d, d)
    if not n * tiles:
        return out
    A, B = (t if t.stride(2) <= t.stride(1) else t.mT for t in (A, B))
    strides = (*A.stride()[1:], *B.stride()[1:], d, *(() if C is None else C.stride()[1:]))
    _symmetric_product_kernel[(n * tiles,)](
        A,
        B,
        C,
        out,
        alpha,
        beta,
        diagonal,
        tiles,
        d,
        *A.stride(),
        *B.stride(),
        *((0, 0, 0) if C is None else C.stride()),
        EVEN_D=d % block == 0,
        EVEN_K=d % block_k == 0,
        PRECISION=policy.precision(A.dtype),
        INDEX=index_type(strides, max(block, block_k)),
        BLOCK=block,
        BLOCK_K=block_k,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return out
