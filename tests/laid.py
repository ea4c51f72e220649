"""Tensors in layouts that kernels must take, in memory whose rest is poisoned and watched."""

import math

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = ("rows", "columns", "sliced", "batch")


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
        self._fill = torch.tensor(fill, dtype=x.dtype, device=DEVICE)
        self._around = self._fill.repeat([n + 2 * margin for n in shape])
        self._inside = tuple(slice(margin, margin + n) for n in shape)
        self.t = self._around[self._inside].permute([order.index(axis) for axis in axes])
        self.t.copy_(x)

    def untouched(self):
        """Whether everything around the tensor is as it was."""
        rest = self._around.clone()
        rest[self._inside] = self._fill
        return torch.equal(rest.isnan(), self._fill.isnan().expand_as(rest)) and torch.equal(
            rest.nan_to_num(), self._fill.nan_to_num().expand_as(rest)
        )


def far_apart(folder, shape, strides, dtype):
    """Zeros that lie gigabytes apart; on a CPU, in a sparse file of which only what is touched takes space."""
    span = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    path = folder / f"far{len(list(folder.iterdir()))}"
    return torch.from_file(str(path), shared=True, size=span, dtype=dtype).as_strided(shape, strides)
