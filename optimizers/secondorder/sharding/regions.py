"""Which part of a parameter a process stores, in the coordinates in which the parameter is cut into blocks.

A process stores a product of index ranges of the parameter's own axes (`Holding`). Blocks are cut from a *view* of the
parameter that merges, splits or turns axes. A `Cell` is a box of that view that a process has as one box of its local
tensor; the cells of a process tile what it stores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from secondorder.layout.blocks import Fold

Span = tuple[int, int]
Box = tuple[Span, ...]
Holding = tuple[tuple[Span, ...], ...]  # ascending ranges of each axis, as they follow each other in the local tensor


def everything(shape: Sequence[int]) -> Holding:
    """What a process stores that has the whole tensor."""
    return tuple(((0, n),) for n in shape)


def holding(p: Tensor) -> Holding:
    """What this process stores of a parameter; no communication.

    Found by distributing each axis's indices as the parameter is, which serves every placement: uneven and empty
    shards, and the strided ones of FSDP over tensor parallelism.
    """
    if not isinstance(p, DTensor):
        return everything(p.shape)
    out = []
    for axis, n in enumerate(p.shape):
        along: list[Any] = []
        for placement in p.placements:
            kind: Any = type(placement)
            dim = getattr(placement, "dim", None)
            if dim is None or dim % p.ndim != axis:
                along.append(Replicate())
            elif kind is Shard:
                along.append(Shard(0))
            else:  # torch's own strided shard: the same, along the only axis of the indices
                along.append(kind(0, split_factor=getattr(placement, "split_factor")))  # noqa: B009
        indices = distribute_tensor(torch.arange(n), _on_cpu(p.device_mesh), along, src_data_rank=None)
        out.append(_ranges(indices.to_local().tolist()))
    return tuple(out)


@lru_cache(maxsize=8)
def _on_cpu(mesh: Any) -> Any:
    """The mesh for tensors on the CPU: `src_data_rank=None` needs no backend there."""
    if mesh.device_type == "cpu":
        return mesh
    return torch.distributed.device_mesh.DeviceMesh("cpu", mesh.mesh, _init_backend=False)


def _ranges(indices: Sequence[int]) -> tuple[Span, ...]:
    out: list[list[int]] = []
    for i in indices:
        if out and out[-1][1] == i:
            out[-1][1] = i + 1
        else:
            out.append([i, i + 1])
    return tuple((start, stop) for start, stop in out)


@dataclass(frozen=True)
class Cell:
    """A box of a parameter's view that one process stores as a box of its local tensor.

    Attributes:
        box: `(start, stop)` along each axis of the view.
        local: Where it is in the local tensor.
        atoms: Lengths of the box along the axes into which view and parameter can both be split.
        order: How these axes are turned to be those of the view.
    """

    box: Box
    local: tuple[slice, ...]
    atoms: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the box."""
        return tuple(stop - start for start, stop in self.box)

    def face(self, local: Tensor) -> Tensor:
        """The box of a local tensor in the view's coordinates; a copy where a view is not possible."""
        part = local[self.local]
        return part.reshape(self.atoms).permute(self.order).reshape(self.shape)

    def put(self, local: Tensor, face: Tensor) -> None:
        """Write a (changed) copy of `face` back."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        part = local[self.local]
        part.copy_(face.reshape([self.atoms[i] for i in self.order]).permute(back).reshape(part.shape))


@lru_cache(maxsize=1 << 14)
def cells(shape: tuple[int, ...], view: tuple[int, ...], fold: Fold | None, held: Holding) -> tuple[Cell, ...]:
    """The cells of a process that stores `held` of a parameter.

    Args:
        shape: The parameter's shape.
        view: The shape in which it is cut.
        fold: How it becomes its view where a reshape is not enough.
        held: What is stored.

    Raises:
        ValueError: If what is stored is not made of boxes of the view.
    """
    if 0 in shape or any(not spans for spans in held):
        return ()
    split = view if fold is None else fold.split
    atoms, by_axis, by_split = _refined(shape, split)
    turned = range(len(split)) if fold is None else fold.order
    order = [a for axis in turned for a in by_split[axis]]
    order += [a for a in range(len(atoms)) if a not in order]  # of length 1
    by_view = _grouped([atoms[a] for a in order], view)
    out = []
    along = [list(_axis_boxes(held[axis], [atoms[a] for a in by_axis[axis]])) for axis in range(len(shape))]
    for choice in product(*along):
        spans: dict[int, Span] = {a: (0, 1) for a, n in enumerate(atoms) if n == 1}
        for axis, (box, _) in enumerate(choice):
            spans.update(zip(by_axis[axis], box, strict=True))
        merged = tuple(_merged([spans[order[a]] for a in axis], [atoms[order[a]] for a in axis]) for axis in by_view)
        lengths = tuple(spans[a][1] - spans[a][0] for a in range(len(atoms)))
        out.append(Cell(merged, tuple(where for _, where in choice), lengths, tuple(order)))
    return tuple(out)


def _refined(a: Sequence[int], b: Sequence[int]) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """Axes into which two shapes of the same tensor can both be split, and which of them make each axis of either."""
    atoms: list[int] = []
    groups: tuple[list[list[int]], list[list[int]]] = ([[] for _ in a], [[] for _ in b])
    rest = [list(a), list(b)]
    i = j = 0
    while i < len(a) or j < len(b):
        s = rest[0][i] if i < len(a) else 1
        t = rest[1][j] if j < len(b) else 1
        if i < len(a) and s == 1:
            if not groups[0][i]:  # an axis of length 1 is an atom of its own
                groups[0][i].append(len(atoms))
                atoms.append(1)
            i += 1
            continue
        if j < len(b) and t == 1:
            if not groups[1][j]:
                groups[1][j].append(len(atoms))
                atoms.append(1)
            j += 1
            continue
        step = min(s, t)
        if s % step or t % step:
            raise ValueError(f"the shapes {tuple(a)} and {tuple(b)} have no common refinement")
        groups[0][i].append(len(atoms))
        groups[1][j].append(len(atoms))
        atoms.append(step)
        rest[0][i] //= step
        rest[1][j] //= step
    return atoms, *groups


def _grouped(atoms: Sequence[int], view: Sequence[int]) -> list[list[int]]:
    """Consecutive atoms that make each axis of the view."""
    out, at = [], 0
    for size in view:
        group: list[int] = []
        while at < len(atoms) and (math.prod(atoms[a] for a in group) < size or not group):
            group.append(at)
            at += 1
        if math.prod(atoms[a] for a in group) != size:
            raise ValueError(f"axes {tuple(atoms)} do not merge to the view {tuple(view)}")
        out.append(group)
    if any(atoms[a] != 1 for a in range(at, len(atoms))):
        raise ValueError(f"axes {tuple(atoms)} do not merge to the view {tuple(view)}")
    if out:
        out[-1] += range(at, len(atoms))
    return out


def _axis_boxes(held: Sequence[Span], atoms: Sequence[int]) -> Iterator[tuple[Box, slice]]:
    """Ranges of one axis as boxes of its atoms, each with its place in the local tensor."""
    at = 0
    for start, stop in held:
        for box in _boxes(start, stop, atoms):
            size = math.prod(b - a for a, b in box)
            yield box, slice(at, at + size)
            at += size


def _boxes(start: int, stop: int, atoms: Sequence[int]) -> Iterator[Box]:
    """A range of row-major positions as boxes, in order."""
    if len(atoms) <= 1:
        yield ((start, stop),) * len(atoms)
        return
    inner = math.prod(atoms[1:])
    first, last = -(-start // inner), stop // inner  # rows that are whole
    if first > last:  # within one row
        row = start // inner
        for box in _boxes(start - row * inner, stop - row * inner, atoms[1:]):
            yield (row, row + 1), *box
        return
    if start < first * inner:
        for box in _boxes(start - (first - 1) * inner, inner, atoms[1:]):
            yield (first - 1, first), *box
    if first < last:
        yield (first, last), *((0, n) for n in atoms[1:])
    if last * inner < stop:
        for box in _boxes(0, stop - last * inner, atoms[1:]):
            yield (last, last + 1), *box


def _merged(spans: Sequence[Span], atoms: Sequence[int]) -> Span:
    """A box of axes that are merged into one, as a range of that axis."""
    start = size = 0
    loose = False  # an axis of which more than one index is held: all that follow must be held whole
    for (low, high), n in zip(spans, atoms, strict=True):
        if loose and (low, high) != (0, n):
            raise ValueError("what is stored is no range of an axis of the view")
        loose = loose or high - low > 1
        start = start * n + low
        size = (size or 1) * (high - low)
    return start, start + (size or 1)
