"""Tensors in layouts that kernels must take, in memory whose rest is poisoned and watched."""

import math

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = ("rows", "columns", "sliced", "batch")
_ENDS = 64  # numbers in front and behind: as many keep addresses aligned


class Laid:
    """A copy of a tensor in some layout, inside of a larger one that is filled with one number.

    Attributes:
        t: The copy.
    """

    def __init__(self, x, layout="rows", fill=math.nan):
        axes = list(range(x.ndim))
        order = {"columns": [*axes[:-2], *axes[-2:][::-1]], "batch": [*axes[1:], *axes[:1]]}.get(layout, axes)
        margin = 3 if layout == "sliced" else 0
        shape = [x.shape[axis] for axis in order]
        wide = [n + 2 * margin for n in shape]
        self._fill = torch.tensor(fill, dtype=x.dtype, device=DEVICE)
        self._around = self._fill.repeat(math.prod(wide) + 2 * _ENDS)
        inside = self._around[_ENDS : _ENDS + math.prod(wide)].view(wide)
        self.t = inside[tuple(slice(margin, margin + n) for n in shape)].permute([order.index(axis) for axis in axes])
        self._place = self.t.shape, self.t.stride(), self.t.storage_offset()
        self.t.copy_(x)

    def untouched(self):
        """Whether everything around the tensor is as it was."""
        rest = self._around.clone()
        rest.as_strided(*self._place).copy_(self._fill)
        return bool(((rest == self._fill) | (rest.isnan() & self._fill.isnan())).all())


def far_apart(folder, shape, strides, dtype):
    """Zeros that lie gigabytes apart; on a CPU, in a sparse file of which only what is touched takes space."""
    span = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if DEVICE == "cpu":
        path = folder / f"far{len(list(folder.iterdir()))}"
        return torch.from_file(str(path), shared=True, size=span, dtype=dtype).as_strided(shape, strides)
    try:
        return torch.zeros(span, dtype=dtype, device=DEVICE).as_strided(shape, strides)
    except torch.OutOfMemoryError:
        pytest.skip(f"there is no memory for {span} numbers")
