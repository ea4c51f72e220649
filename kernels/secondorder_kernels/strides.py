"""How kernels see tensors of one shape and any strides: as few axes as they can be merged into."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

Ints = tuple[int, ...]

SCATTERED = "tensors of this shape and these strides cannot be seen as stacks of matrices"


@functools.lru_cache(maxsize=4096)
def merged(shape: Ints, strides: tuple[Ints, ...], rows: bool = False) -> tuple[Ints, tuple[Ints, ...]]:
    """Sort the axes by the first tensor's strides, largest first, and merge those that are one in every tensor.

    Args:
        shape: Of all tensors.
        strides: Of each of them; 0 where a tensor is broadcast, which the first one must not be.
        rows: Whether the first axis stays by itself, in front, even if its size is 1.

    Returns:
        Sizes, and the strides of each tensor. No axis is left of a single element.
    """
    if 0 in shape:
        shape, strides = (*shape[:rows], 0), tuple((*s[:rows], 1) for s in strides)
    axes = [(size, tuple(s[k] for s in strides)) for k, size in enumerate(shape)]
    found = axes[:1] if rows else []
    apart = len(found)
    for size, steps in sorted(axes[apart:], key=lambda axis: -axis[1][0]):
        if size == 1:
            continue
        if len(found) > apart and found[-1][1] == tuple(step * size for step in steps):
            found[-1] = (found[-1][0] * size, steps)
        else:
            found.append((size, steps))
    return tuple(size for size, _ in found), tuple(tuple(steps[t] for _, steps in found) for t in range(len(strides)))


class Layout(NamedTuple):
    """Stacks of matrices that cover tensors of one shape.

    Attributes:
        sizes: Stacks, rows, columns.
        strides: For each tensor, the strides of these three axes.
    """

    sizes: tuple[int, int, int]
    strides: tuple[Ints, ...]

    @property
    def contiguous(self) -> bool:
        """Whether neighbours in a matrix's row are neighbours in every tensor, or the same element."""
        return all(step in (0, 1) for *_, step in self.strides)


@functools.lru_cache(maxsize=4096)
def layout(shape: Ints, strides: tuple[Ints, ...], rows: bool = False) -> Layout | None:
    """Merge axes until three are left, or say None if there are more; arguments as for `merged`.

    With `rows`, the first axis is that of the stacks, or that of the rows where a row of the tensors is one axis.
    """
    sizes, steps = merged(shape, strides, rows)
    if rows and len(sizes) == 1:
        sizes, steps = (*sizes, 1), tuple((*s, 1) for s in steps)
    if len(sizes) > 3:
        return None
    one = (1,) * (3 - len(sizes))
    stacks, matrix_rows, columns = *one, *sizes
    return Layout((stacks, matrix_rows, columns), tuple((*(0 for _ in one), *s) for s in steps))


def broadcast_strides(tensor: Tensor, shape: Ints) -> Ints:
    """Strides of a tensor that is broadcast to a shape; `broadcasts` must hold."""
    own = zip(tensor.shape, tensor.stride(), shape[len(shape) - tensor.ndim :], strict=True)
    return (*(0,) * (len(shape) - tensor.ndim), *(step if size == wanted else 0 for size, step, wanted in own))


def broadcasts(tensor: Tensor, shape: Ints) -> bool:
    """Whether a tensor can be broadcast to a shape."""
    own = tensor.shape
    if not own or own == shape:
        return True
    ends = zip(reversed(own), reversed(shape), strict=False)
    return len(own) <= len(shape) and all(size in (1, wanted) for size, wanted in ends)


def row_major(shape: Ints) -> Ints:
    """Strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if shape else ()


def places(shape: Ints) -> Ints:
    """Strides of an entry's place in its row: in `(n, ...)`, the entries of every row are numbered from 0."""
    return (0, *row_major(shape[1:]))


def of_strides(shape: Ints, steps: Iterable[Ints], keys: Tensor | None = None) -> Layout | None:
    """Lay out tensors of these strides, whose rows have keys; behind their strides are those of the keys and `places`.

    None where there are too many axes; without keys, the strides of keys and places are 0.
    """
    nothing = (0,) * len(shape)
    if keys is None:
        return layout(shape, (*steps, nothing, nothing))
    return layout(shape, (*steps, (keys.stride(0), *nothing[1:]), places(shape)), rows=True)


def of_tensors(shape: Ints, tensors: Iterable[Tensor | None], keys: Tensor | None = None) -> Layout | None:
    """Lay out tensors that are broadcast to the shape of the first, as `of_strides`; what is left out has strides 0."""
    nothing = (0,) * len(shape)
    return of_strides(shape, (nothing if t is None else broadcast_strides(t, shape) for t in tensors), keys)


def of_rows(shape: Ints, tensors: Iterable[Tensor | None], rate: Tensor | None) -> Layout | None:
    """Lay out rows `(n, ...)` so that none is merged with another, or say None if that cannot be done.

    Args:
        shape: Of all tensors; the first of them must not be broadcast.
        tensors: All tensors. Those that are left out have strides of 0.
        rate: One number for each row, or None.

    Returns:
        The layout; behind the strides of the tensors are those of the rate, and of a contiguous tensor `(n,)`.
    """
    nothing = (0,) * len(shape)
    steps = [nothing if t is None else t.stride() for t in tensors]
    rates = nothing if rate is None else (rate.stride(0), *nothing[1:])
    return layout(shape, (*steps, rates, (1, *nothing[1:])), rows=True)
