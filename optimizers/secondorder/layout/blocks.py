"""How a parameter is cut into blocks, which modes of a block carry a factor, and why.

Pure functions: the block grid depends on shapes and options alone, never on the device or the world size, so that
state keys and curves are the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from torch import Tensor

from secondorder.preconditioner.structures import structure_names

Region = tuple[slice, ...]

_AXES = "rcxyzw"  # names of a tile's axes in state keys: row, column, then further axes


class Fold(NamedTuple):
    """How a parameter becomes its view when a reshape is not enough (a transposed convolution's weight).

    Attributes:
        split: Shape in which the parameter is seen first.
        order: Permutation of those axes; what comes out is reshaped to the view.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]

    def apply(self, tensor: Tensor, view: tuple[int, ...]) -> Tensor:
        """The view; a copy where axes that are merged are not neighbours."""
        return tensor.reshape(self.split).permute(self.order).reshape(view)

    def undo(self, viewed: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The parameter's shape again."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return viewed.view([self.split[i] for i in self.order]).permute(back).reshape(shape)


@dataclass(frozen=True)
class Treatment:
    """What becomes of one parameter.

    Attributes:
        view: Shape that the parameter is viewed as (a convolution as `(out, in·kh·kw)`).
        cuts: For each axis of `view`, the sizes of the pieces that it is cut into.
        modes: Axes of a block that carry a dense factor; empty where nothing is preconditioned.
        reason: One line for `coverage()`.
        fallback: True where the parameter is left to the fallback method.
        diagonal: Axes of a block that carry a diagonal factor.
        batched: The view's first axis counts independent blocks (groups of a convolution), each with factors of its
            own: `modes`, `diagonal` and block shapes leave it out.
        fold: How the parameter becomes its view, where a reshape is not enough.
        joined: `id` of a parameter that is one more column of the last axis, as a bias is of `[W | b]`, or None.
        follows: `id` of the parameter that this one is joined to, or None.
    """

    view: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]
    modes: tuple[int, ...]
    reason: str
    fallback: bool = False
    diagonal: tuple[int, ...] = ()
    batched: bool = False
    fold: Fold | None = None
    joined: int | None = None
    follows: int | None = None

    @property
    def split(self) -> bool:
        """Whether the parameter has more than one block."""
        return any(len(pieces) > 1 for pieces in self.cuts)

    def tiles(self) -> list[tuple[str, Region]]:
        """`(key, region of the view)` of each block, first axis outermost. Keys are `tile_r0_c1`, ..."""
        ranges = []
        for pieces in self.cuts:
            ends = [sum(pieces[: j + 1]) for j in range(len(pieces))]
            ranges.append([slice(end - size, end) for size, end in zip(pieces, ends, strict=True)])
        out = []
        for index in product(*(range(len(r)) for r in ranges)):
            key = "tile_" + "_".join(f"{axis}{j}" for axis, j in zip(_AXES, index[self.batched :], strict=False))
            out.append((key, tuple(r[j] for r, j in zip(ranges, index, strict=True))))
        return out


def even_cuts(size: int, limit: int | None) -> tuple[int, ...]:
    """Cut `size` into the fewest pieces of at most `limit`, equal up to one: `(1000, 512) -> (500, 500)`."""
    if limit is None or size <= limit:
        return (size,)
    count = math.ceil(size / limit)
    base, longer = divmod(size, count)
    return tuple(base + (j < longer) for j in range(count))


def whole(shape: tuple[int, ...], reason: str) -> Treatment:
    """The parameter as one block without factors, left to the fallback."""
    return Treatment(shape, tuple((d,) for d in shape), (), reason, fallback=True)


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Size-1 axes dropped, all axes after the first merged; None where nothing is left to be a matrix."""
    sides = tuple(d for d in shape if d != 1)
    return None if len(sides) < 2 or 0 in sides else (sides[0], math.prod(sides[1:]))


def _cut(
    shape: tuple[int, ...],
    matrix: tuple[int, int],
    modes: tuple[int, ...],
    diagonal: tuple[int, ...],
    size: int | None,
    note: str,
) -> Treatment:
    """A matrix cut along the sides with a dense factor."""
    cuts = tuple(even_cuts(d, size) if i in modes else (d,) for i, d in enumerate(matrix))
    name = " x ".join(map(str, matrix))
    merged = sum(d != 1 for d in shape) > 2
    reason = (f"{'x'.join(map(str, shape))} merged to {name}" if merged else f"{name} matrix") + note
    count = math.prod(len(pieces) for pieces in cuts)
    if count > 1:
        reason += f", cut into {count} blocks of at most {size}"
    return Treatment(matrix, cuts, modes, reason, diagonal=diagonal)


def matrix_blocks(shape: tuple[int, ...], hp: Mapping[str, Any], role: str | None) -> Treatment:
    """The default rule: matrices in blocks, wide ones one-sided, all else to the fallback.

    Args:
        shape: The parameter's shape.
        hp: Options of its group: `max_block_size`, `one_sided_aspect`, `max_precond_dim`.
        role: `"embedding"`, `"head"`, `"hidden"`, or None where nobody said; hidden layers may be of any width.

    Returns:
        The treatment. Size-1 axes are dropped and all axes after the first are merged (a convolution becomes
        `(out, in·kh·kw)`); a matrix whose sides differ by `one_sided_aspect` or more has a factor on its smaller side
        only, and stays whole along the other; sides with a factor are cut evenly to at most `max_block_size`.
    """
    matrix = _as_matrix(shape)
    if matrix is None:
        return whole(shape, "a vector or a scalar has no second mode" if 0 not in shape else "empty")
    rows, columns = matrix
    limit = hp["max_precond_dim"]
    if role != "hidden" and limit is not None and max(rows, columns) > limit:
        what = "taken for a vocabulary" if role is None else f"a vocabulary (role {role!r})"
        return whole(shape, f"a side of {max(rows, columns)} exceeds max_precond_dim={limit}: {what}")
    size, aspect = hp["max_block_size"], hp["one_sided_aspect"]
    modes: tuple[int, ...] = (0, 1)
    if aspect is not None and max(rows, columns) >= aspect * min(rows, columns):
        modes = (0,) if rows < columns else (1,)
    note = ""
    if len(modes) == 1:
        note = f", one-sided (aspect {max(rows, columns) / min(rows, columns):.3g} >= {aspect:g})"
    return _cut(shape, matrix, modes, (), size, note)


def two_sided_blocks(shape: tuple[int, ...], hp: Mapping[str, Any], role: str | None) -> Treatment:
    """Matrices in blocks with a dense factor on either side, however wide; a vocabulary side has a diagonal one.

    Args:
        shape: The parameter's shape.
        hp: Options of its group: `max_block_size`, `max_precond_dim`.
        role: `"embedding"`, `"head"`, `"hidden"`, or None where nobody said; the longer side of an embedding or a head
            is its vocabulary, and so is any side beyond `max_precond_dim` of a parameter of unknown role.
    """
    matrix = _as_matrix(shape)
    if matrix is None:
        return whole(shape, "a vector or a scalar has no second mode" if 0 not in shape else "empty")
    long = int(matrix[1] > matrix[0])
    limit = hp["max_precond_dim"]
    beyond = role is None and limit is not None and matrix[long] > limit
    diagonal = (long,) if beyond or role in ("embedding", "head") else ()
    modes = tuple(i for i in (0, 1) if i not in diagonal)
    note = f", diagonal on the side of {matrix[long]} (a vocabulary)" if diagonal else ""
    return _cut(shape, matrix, modes, diagonal, hp["max_block_size"], note)


def tensor_blocks(shape: tuple[int, ...], hp: Mapping[str, Any], role: str | None) -> Treatment:
    """Tensors in blocks that keep their axes, with a factor on every one, structured as the group says.

    Args:
        shape: The parameter's shape. Size-1 axes are dropped.
        hp: Options of its group: `structures` (a name for all axes, or one for each, the last one for further axes),
            `vectors` (the structure of what has one axis, or `"fallback"`), `max_block_size`, `max_precond_dim`.
        role: `"embedding"`, `"head"`, `"hidden"`, or None where nobody said; the longest side of an embedding or a
            head is its vocabulary, and so is any side beyond `max_precond_dim` of a parameter of unknown role: it has a
            diagonal factor. Sides with a dense factor are cut evenly to at most `max_block_size`, others stay whole.
    """
    sides = tuple(d for d in shape if d != 1)
    if 0 in shape:
        return whole(shape, "empty")
    if not sides or len(sides) > len(_AXES):
        return whole(shape, "a scalar has no axis" if not sides else f"more than {len(_AXES)} axes")
    if len(sides) == 1 and hp["vectors"] == "fallback":
        return whole(shape, "a vector (vectors='fallback')")
    names = structure_names(hp["structures"] if len(sides) > 1 else hp["vectors"], len(sides))
    limit = hp["max_precond_dim"]
    longest = sides.index(max(sides))
    vocabulary = [i for i, d in enumerate(sides) if role is None and limit is not None and d > limit]
    if role in ("embedding", "head") and len(sides) > 1:
        vocabulary = [longest]
    diagonal = tuple(i for i, name in enumerate(names) if name == "diagonal" or i in vocabulary)
    modes = tuple(i for i in range(len(sides)) if i not in diagonal)
    dense = [i for i in modes if names[i] == "dense"]
    cuts = tuple(even_cuts(d, hp["max_block_size"]) if i in dense else (d,) for i, d in enumerate(sides))
    kinds = ("diagonal (a vocabulary)" if i in vocabulary else name for i, name in enumerate(names))
    reason = " x ".join(map(str, sides)) + ": " + " x ".join(kinds)
    count = math.prod(len(pieces) for pieces in cuts)
    if count > 1:
        reason += f", cut into {count} blocks of at most {hp['max_block_size']}"
    return Treatment(sides, cuts, modes, reason, diagonal=diagonal)


def elementwise_blocks(shape: tuple[int, ...], hp: Mapping[str, Any], role: str | None) -> Treatment:
    """Every parameter whole and without factors, for methods that act element by element."""
    del hp, role
    return Treatment(shape, tuple((d,) for d in shape), (), "element-wise method")
