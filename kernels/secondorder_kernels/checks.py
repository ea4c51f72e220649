"""What arguments of element-wise operations must have in common."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secondorder_kernels import strides

_WIDE = ({torch.float32}, {torch.float64})


def check_shapes(operation: str, tensors: Mapping[str, Tensor], broadcast: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless tensors have one shape, and others broadcast to it."""
    shapes = [t.shape for t in tensors.values()]
    if shapes.count(shapes[0]) != len(shapes):
        raise ValueError(
            f"{operation} takes {_listed(tensors)} of one shape, got {', '.join(str(tuple(s)) for s in shapes)}"
        )
    for name, t in broadcast.items():
        if not strides.broadcasts(t, shapes[0]):
            raise ValueError(f"{operation} takes {name} that broadcasts to {tuple(shapes[0])}, got {tuple(t.shape)}")


def check_dtypes(operation: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise TypeError unless tensors are all float32 or all float64."""
    if {t.dtype for t in tensors.values()} not in _WIDE:
        raise TypeError(
            f"{operation} takes {_listed(tensors)} of one dtype, float32 or float64, "
            f"got {', '.join(str(t.dtype) for t in tensors.values())}"
        )


def check_keys(operation: str, keys: Tensor | None, states: Mapping[str, Tensor]) -> None:
    """Raise unless there are keys, one per row, exactly where some state is bfloat16."""
    rounded = [name for name, t in states.items() if t.dtype == torch.bfloat16]
    if keys is None:
        if rounded:
            raise TypeError(f"{operation} takes {rounded[0]} in bfloat16 only with keys, to round it stochastically")
        return
    if not rounded:
        dtypes = ", ".join(str(t.dtype) for t in states.values())
        raise TypeError(f"{operation} takes keys only where {' or '.join(states)} is bfloat16, got {dtypes}")
    if keys.dtype != torch.int64:
        raise TypeError(f"{operation} takes keys of int64, got {keys.dtype}")
    shape = states[rounded[0]].shape
    if not shape or keys.shape != shape[:1]:
        raise ValueError(f"{operation} takes keys (n,) for tensors (n, ...), got {tuple(keys.shape)}, {tuple(shape)}")


def _listed(names: Mapping[str, Tensor]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}"
