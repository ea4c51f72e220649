"""Where a program's tile lies."""

import triton
import triton.language as tl


@triton.jit
def lower_tile(t):
    """Row and column of the t-th tile on or below the diagonal, counted row by row."""
    # A float guess, right to within one for any grid, then corrected in both directions.
    row = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where((row + 1) * (row + 2) // 2 <= t, row + 1, row)
    row = tl.where(row * (row + 1) // 2 > t, row - 1, row)
    return row, t - row * (row + 1) // 2
