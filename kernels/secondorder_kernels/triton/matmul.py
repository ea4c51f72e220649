"""One tile of a matrix product, of operands with any strides."""

import triton
import triton.language as tl

from secondorder_kernels.triton.strided import inside_tile


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr):
    """`acc + x y`, with both operands in the dtype of `y` or in bfloat16."""
    dtype: tl.constexpr = tl.bfloat16 if PRECISION == "bf16" else y.dtype
    products: tl.constexpr = "ieee" if PRECISION == "bf16" else PRECISION
    return tl.dot(x.to(dtype), y.to(dtype), acc, input_precision=products)


@triton.jit
def tile_product(
    a_at,
    b_at,
    rows,
    columns,
    first,
    last,
    a_row,
    a_depth,
    b_depth,
    b_column,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The sum of A_ik B_kj over `first <= k < last`, in float32.

    `a_at` points to the tile's first row, `b_at` to its first column, both to k = 0; `rows` and `columns` are left.
    """
    i, across = inside_tile(ROWS, DEPTH, WIDE)
    down, j = inside_tile(DEPTH, COLUMNS, WIDE)
    # The addresses advance, not the offsets: those are then as many numbers of 32 bits as a thread loads.
    a_at += tl.cast(first, tl.int64) * a_depth
    b_at += tl.cast(first, tl.int64) * b_depth
    a_offsets, b_offsets = i * a_row + across * a_depth, down * b_depth + j * b_column
    a_step, b_step = tl.cast(DEPTH, tl.int64) * a_depth, tl.cast(DEPTH, tl.int64) * b_depth
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(first, last, DEPTH):
        x = tl.load(a_at + a_offsets, mask=(i < rows) & (start + across < last), other=0.0)
        y = tl.load(b_at + b_offsets, mask=(start + down < last) & (j < columns), other=0.0)
        acc = dot(x, y, acc, PRECISION)
        a_at += a_step
        b_at += b_step
    return acc


def is_wide(tile: int, *strides: tuple[int, ...]) -> bool:
    """Whether offsets inside a tile of `tile` rows and columns at most need 64 bits."""
    return 2 * tile * max((abs(step) for steps in strides for step in steps[1:]), default=0) >= 2**31
