"""Tiles of tensors of any strides that are seen as stacks of matrices (see `strides.py` of the package above)."""

from typing import Any

import triton
import triton.language as tl

from secondorder_kernels.strides import Layout

_CACHE_LINES = 32  # columns of a tile where some tensor is not contiguous along them: rows then fill cache lines


@triton.jit
def corner(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Stack, row and column where this program's tile begins, in 64 bits: strides multiply them."""
    across = tl.cdiv(columns, COLUMNS)
    tiles = tl.cdiv(rows, ROWS) * across
    pid = tl.program_id(0)
    stack, tile = pid // tiles, pid % tiles
    return stack.to(tl.int64), (tile // across).to(tl.int64) * ROWS, (tile % across).to(tl.int64) * COLUMNS


@triton.jit
def inside_tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Rows and columns of a tile counted from its corner; in 64 bits where strides call for it."""
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return i.to(tl.int64) if WIDE else i, j.to(tl.int64) if WIDE else j


@triton.jit
def offsets(stack, row, column, i, j, strides):
    """Offsets of a tile: 64 bits to its corner, and from there what `i` and `j` have."""
    return stack * strides[0] + row * strides[1] + column * strides[2] + (i * strides[1] + j * strides[2])


@triton.jit
def places(stack, row, column, i, j, strides):
    """Places of a tile's entries in their rows, for stochastic rounding, which reads 32 bits of them."""
    first = stack * strides[0] + row * strides[1] + column * strides[2]
    return first.to(tl.uint32) + (i * strides[1] + j * strides[2]).to(tl.uint32)


@triton.jit
def coefficient(at, stack, row, column, i, j, rows, inside, strides, EACH: tl.constexpr):
    """A tile of float32 coefficients; a column of them where they do not differ along the columns (not `EACH`)."""
    if EACH:
        r = tl.load(at + offsets(stack, row, column, i, j, strides), mask=inside, other=0.0)
    else:
        at += stack * strides[0] + row * strides[1]
        r = tl.load(at + i * strides[1], mask=i < rows - row, other=0.0)
    return r.to(tl.float32)


@triton.jit
def row_keys(at, stack, row, i, rows, strides):
    """A column of keys for stochastic rounding."""
    at += stack * strides[0] + row * strides[1]
    return tl.load(at + i * strides[1], mask=i < rows - row, other=0).to(tl.uint32)


@triton.jit
def moved(old, new, rate):
    """As `torch.lerp`: a rate of 1 gives `new`."""
    far = rate >= 0.5
    return tl.where(far, new, old) + tl.where(far, rate - 1.0, rate) * (new - old)


@triton.jit
def lerp(old, new, rate):
    """As `torch.lerp`, and a rate of 0 gives `old`, bit for bit and whatever `new` is."""
    return tl.where(rate == 0.0, old, moved(old, new, rate))


def tiled(layout: Layout, block: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and the size of tiles of at most `block` elements as keyword arguments of a kernel."""
    stacks, rows, columns = layout.sizes
    tall, wide = triton.next_power_of_2(rows), triton.next_power_of_2(columns)
    width = min(wide, block if layout.contiguous else max(block // tall, _CACHE_LINES))
    height = max(1, min(tall, block // width))
    farthest = max(abs(s[1]) * height + abs(s[2]) * width for s in layout.strides)
    grid = (stacks * triton.cdiv(rows, height) * triton.cdiv(columns, width),)
    return grid, {"ROWS": height, "COLUMNS": width, "WIDE": farthest >= 2**31}
