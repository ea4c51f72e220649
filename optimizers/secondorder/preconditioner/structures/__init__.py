"""Structures of inverse-free factors, by name.

| name | matrices | numbers stored |
|---|---|---|
| `"dense"` | all | d² |
| `"diagonal"` | diagonal | d |
| `"block"`, `"block(b)"` | blocks b x b along the diagonal; b = 32 | b d |
| `"tril_toeplitz"`, `"triu_toeplitz"` | lower, upper triangular with constant diagonals | d |
| `"hierarchical"`, `"hierarchical(k1,k2)"` | k1 full rows, a diagonal, k2 rows; k1 = k2 = 16 | (k1 + k2 + 1) d |
| `"triu_bottom_right_diag"` | a diagonal and the first row | 2d |
| `"tril_bottom_right_diag"` | a diagonal and the first column | 2d |
| `"tril_top_left_diag"` | a diagonal and the last row | 2d |
| `"triu_top_left_diag"` | a diagonal and the last column | 2d |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from secondorder.preconditioner.structures.arrow import Arrow
from secondorder.preconditioner.structures.block_diagonal import BlockDiagonal
from secondorder.preconditioner.structures.dense import Dense
from secondorder.preconditioner.structures.diagonal import Diagonal
from secondorder.preconditioner.structures.protocol import Structure
from secondorder.preconditioner.structures.toeplitz import Toeplitz

STRUCTURES: dict[str, Structure] = {
    "dense": Dense(),
    "diagonal": Diagonal(),
    "block": BlockDiagonal(),
    "tril_toeplitz": Toeplitz(),
    "triu_toeplitz": Toeplitz(upper=True),
    "hierarchical": Arrow(),
    "triu_bottom_right_diag": Arrow(1, 0),
    "tril_bottom_right_diag": Arrow(1, 0, transposed=True),
    "tril_top_left_diag": Arrow(0, 1),
    "triu_top_left_diag": Arrow(0, 1, transposed=True),
}

_SIZED: dict[str, tuple[int, Callable[..., Structure]]] = {"block": (1, BlockDiagonal), "hierarchical": (2, Arrow)}


def structure(name: str) -> Structure:
    """The structure of a name such as `"dense"`, `"block(30)"`, `"hierarchical(15,15)"`.

    Raises:
        TypeError: `name` is no string.
        ValueError: No structure has this name, or its sizes are not allowed.
    """
    if not isinstance(name, str):
        raise TypeError(f"structure must be a name, got {type(name).__name__}")
    if name in STRUCTURES:
        return STRUCTURES[name]
    match = re.fullmatch(r"(\w+)\(\s*(\d+(?:\s*,\s*\d+)*)\s*\)", name)
    if match is not None and match[1] in _SIZED:
        count, make = _SIZED[match[1]]
        sizes = [int(size) for size in match[2].split(",")]
        if len(sizes) == count:
            return make(*sizes)
    known = ", ".join([*STRUCTURES, "block(b)", "hierarchical(k1,k2)"])
    raise ValueError(f"Invalid structure: {name!r}, must be one of {known}")


def is_structure(name: Any) -> bool:
    """Whether a structure has this name."""
    try:
        structure(name)
    except (TypeError, ValueError):
        return False
    return True


def structure_names(given: str | Sequence[str], axes: int) -> tuple[str, ...]:
    """The name of each axis: one for all, or a sequence whose last name is that of all further axes."""
    names = (given,) if isinstance(given, str) else tuple(given)
    return tuple(names[min(i, len(names) - 1)] for i in range(axes))


__all__ = [
    "STRUCTURES",
    "Arrow",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "Structure",
    "Toeplitz",
    "is_structure",
    "structure",
    "structure_names",
]
