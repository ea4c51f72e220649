"""Where a program's tile lies, and what tiles of symmetric products are made of."""

import triton
import triton.language as tl

from secondorder_kernels.triton.rounding import rounded
from secondorder_kernels.triton.strided import moved


@triton.jit
def lower_tile(t):
    """Row and column of the t-th tile on or below the diagonal, counted row by row."""
    # A float guess, right to within one for any grid, then corrected in both directions.
    row = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where((row + 1) * (row + 2) // 2 <= t, row + 1, row)
    row = tl.where(row * (row + 1) // 2 > t, row - 1, row)
    return row, t - row * (row + 1) // 2


def lower_tiles(d: int, block: int) -> int:
    """How many tiles of a `(d, d)` matrix are on or below the diagonal."""
    rows = triton.cdiv(d, block)
    return rows * (rows + 1) // 2


def index_type(strides, block: int):
    """Of offsets inside a tile, whose widths are at most `block`: int32, unless strides are very large."""
    return tl.int64 if max(strides, default=0) * block >= 2**30 else tl.int32


@triton.jit
def _operand(at, inside, here, one, EVEN_D: tl.constexpr, EVEN_K: tl.constexpr, ONES: tl.constexpr):
    """A tile of a factor: zero outside of it, and 1 in the row that `ones` adds."""
    if EVEN_D and EVEN_K:
        x = tl.load(at)
    elif EVEN_K:
        x = tl.load(at, mask=inside, other=0.0)
    elif EVEN_D:
        x = tl.load(at, mask=here, other=0.0)
    else:
        x = tl.load(at, mask=inside & here, other=0.0)
    if ONES:
        x = tl.where(one & here, tl.full((), 1.0, tl.float32).to(x.dtype), x)
    return x


@triton.jit
def inner_tile(
    x,
    y,
    weight,
    tile_row,
    tile_col,
    length,
    d,
    x_d,
    x_k,
    y_d,
    y_k,
    weight_k,
    K_FAST: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_K: tl.constexpr,
    ONES: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`Σ_k x[i, k] weight[k] y[j, k]` for the i of a row of tiles, the j of a column of tiles and `0 <= k < length`.

    `x` and `y` have d rows, and with ONES one more, of ones. EVEN: no tile reaches beyond a factor's end.
    """
    i = tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    rows, cols = tile_row * BLOCK + i, tile_col * BLOCK + i
    x += (tile_row * BLOCK).to(tl.int64) * x_d
    y += (tile_col * BLOCK).to(tl.int64) * y_d
    i_wide, k_wide = i.to(INDEX), k.to(INDEX)
    step = tl.full((), BLOCK_K, INDEX)
    if K_FAST:  # operands lie as they do in memory, so that loads are wide
        x_at = i_wide[:, None] * x_d + k_wide[None, :] * x_k
        y_at = i_wide[:, None] * y_d + k_wide[None, :] * y_k
        rows, cols = rows[:, None], cols[:, None]
    else:
        x_at = k_wide[:, None] * x_k + i_wide[None, :] * x_d
        y_at = k_wide[:, None] * y_k + i_wide[None, :] * y_d
        rows, cols = rows[None, :], cols[None, :]
    if weight is not None:
        weight += k_wide * weight_k
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, length, BLOCK_K):
        here = start + k < length
        across = here[None, :] if K_FAST else here[:, None]
        a = _operand(x + x_at, rows < d, across, rows == d, EVEN_D, EVEN_K, ONES)
        b = _operand(y + y_at, cols < d, across, cols == d, EVEN_D, EVEN_K, ONES)
        if weight is not None:
            by = tl.load(weight) if EVEN_K else tl.load(weight, mask=here, other=0.0)
            a = a.to(tl.float32) * (by[None, :] if K_FAST else by[:, None])
            b = b.to(tl.float32)
            weight += step * weight_k
        if PRECISION == "bf16":
            a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
        if not K_FAST:
            a, b = tl.trans(a), tl.trans(b)
        sums = tl.dot(a, tl.trans(b), sums, input_precision="ieee" if PRECISION == "bf16" else PRECISION)
        x += step * x_k
        y += step * y_k
    return sums


@triton.jit
def tile_at(c, tile_row, tile_col, d, c_row, c_col, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to a tile of a `(d, d)` matrix, and which of them are inside."""
    i = tl.arange(0, BLOCK)
    c += (tile_row * BLOCK).to(tl.int64) * c_row + (tile_col * BLOCK).to(tl.int64) * c_col
    at = c + i.to(INDEX)[:, None] * c_row + i.to(INDEX)[None, :] * c_col
    return at, (tile_row * BLOCK + i < d)[:, None] & (tile_col * BLOCK + i < d)[None, :]


@triton.jit
def fold_tile(
    sums,
    c,
    coefficient,
    key,
    partial,
    tile_row,
    tile_col,
    d,
    c_row,
    c_col,
    FOLD: tl.constexpr,
    LOWER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fold a tile of sums into C as "new", "add" or "ema" has it; the latter two leave C if the coefficient is 0."""
    at, inside = tile_at(c, tile_row, tile_col, d, c_row, c_col, INDEX, BLOCK)
    i = tl.arange(0, BLOCK)
    rows, cols = (tile_row * BLOCK + i)[:, None], (tile_col * BLOCK + i)[None, :]
    if FOLD == "new":
        new = sums * coefficient
    else:
        old = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if FOLD == "add":
            new = old + coefficient * sums
        else:
            new = moved(old, sums, coefficient)
    new = rounded(new, key, rows.to(tl.int64) * d + cols, STOCHASTIC, c.dtype.element_ty)
    if partial is not None:
        seen = new.to(tl.float32)
        tl.store(partial, tl.sum(tl.where(rows == cols, seen, 0.0)))
        squares = tl.where(rows >= cols, seen * seen, 0.0) + tl.where(rows > cols, seen * seen, 0.0)
        tl.store(partial + 1, tl.sum(squares))
    if FOLD == "new":
        store_tile(new, c, tile_row, tile_col, d, c_row, c_col, LOWER, INDEX, BLOCK)
    elif coefficient != 0:
        store_tile(new, c, tile_row, tile_col, d, c_row, c_col, LOWER, INDEX, BLOCK)


@triton.jit
def store_tile(
    new,
    c,
    tile_row,
    tile_col,
    d,
    c_row,
    c_col,
    LOWER: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store a tile on or below the diagonal and, unless LOWER, its mirror image."""
    at, inside = tile_at(c, tile_row, tile_col, d, c_row, c_col, INDEX, BLOCK)
    i = tl.arange(0, BLOCK)
    below = i[:, None] >= i[None, :]
    if tile_row != tile_col:
        tl.store(at, new, mask=inside)
        if not LOWER:
            at, inside = tile_at(c, tile_col, tile_row, d, c_row, c_col, INDEX, BLOCK)
            tl.store(at, tl.trans(new), mask=inside)
    elif LOWER:
        tl.store(at, new, mask=inside & below)
    else:  # products need not sum both triangles in one order
        tl.store(at, tl.where(below, new, tl.trans(new)), mask=inside)
