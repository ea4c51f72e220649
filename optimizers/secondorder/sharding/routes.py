"""How the parts of a block travel: from where they are stored to the block's owner, and back to all who store them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from secondorder.layout.buckets import Strand
from secondorder.sharding.regions import Box, Cell, Holding, cells


@dataclass(frozen=True)
class Patch:
    """What a cell and a strand have in common.

    Attributes:
        index: Position of the parameter.
        cell: Where a process stores it.
        inside: Its place in the cell's box.
        at: Its place in the strand's region.
    """

    index: int
    cell: Cell
    inside: tuple[slice, ...]
    at: tuple[slice, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the patch."""
        return tuple(cut.stop - cut.start for cut in self.at)

    @property
    def numel(self) -> int:
        """Its elements."""
        n = 1
        for size in self.shape:
            n *= size
        return n

    def cut(self, local: Tensor) -> Tensor:
        """The patch of a local tensor; a copy where a view is not possible."""
        return self.cell.face(local)[self.inside]


def patches(strand: Strand, shape: tuple[int, ...], held: Holding) -> list[Patch]:
    """The parts of a strand that a process stores which has `held` of the parameter of this shape."""
    region: Box = tuple((0, n) for n in strand.view)
    if strand.region is not None:
        region = tuple((cut.start, cut.stop) for cut in strand.region)
    found = []
    for cell in cells(shape, strand.view, strand.fold, held):
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(region, cell.box, strict=True)]
        if all(start < stop for start, stop in common):
            inside = _relative(common, cell.box)
            found.append(Patch(strand.index, cell, inside, _relative(common, region)))
    return found


def _relative(box: Sequence[tuple[int, int]], to: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, to, strict=True))


def sources(
    strand: Strand, shape: tuple[int, ...], held: Sequence[Holding], owner: int, turn: int
) -> list[tuple[int, Patch]]:
    """Who sends what of a strand to its owner: each part once, from the owner itself where it has it.

    Args:
        strand: The strand.
        shape: Of its parameter.
        held: What each process stores.
        owner: The block's owner.
        turn: Where several others have a part, a number by which they take turns.

    Raises:
        ValueError: If what the processes store does not tile the strand.
    """
    by_place: dict[tuple[tuple[int, int], ...], list[tuple[int, Patch]]] = {}
    for rank, patch in holders(strand, shape, held):
        by_place.setdefault(tuple((cut.start, cut.stop) for cut in patch.at), []).append((rank, patch))
    chosen = []
    for candidates in by_place.values():
        own = [c for c in candidates if c[0] == owner]
        chosen.append(own[0] if own else candidates[turn % len(candidates)])
    whole = 1
    for axis, n in enumerate(strand.view):
        whole *= n if strand.region is None else strand.region[axis].stop - strand.region[axis].start
    if sum(patch.numel for _, patch in chosen) != whole:
        raise ValueError(f"what the processes store of a parameter of shape {shape} does not tile it")
    return chosen


def holders(strand: Strand, shape: tuple[int, ...], held: Sequence[Holding]) -> list[tuple[int, Patch]]:
    """Every part of a strand with every process that stores it."""
    known: dict[Holding, list[Patch]] = {}
    out = []
    for rank, holding in enumerate(held):
        if holding not in known:
            known[holding] = patches(strand, shape, holding)
        out += [(rank, patch) for patch in known[holding]]
    return out


@contextmanager
def faces(found: Sequence[tuple[Patch, Tensor]]) -> Iterator[list[Tensor]]:
    """Patches of local tensors, to be written to; where a view is not possible copies, which then are written back."""
    known: dict[tuple[int, Box], tuple[Cell, Tensor, Tensor]] = {}
    out = []
    for patch, tensor in found:
        where = id(tensor), patch.cell.box
        if where not in known:
            known[where] = patch.cell, tensor, patch.cell.face(tensor)
        out.append(known[where][2][patch.inside])
    yield out
    for cell, tensor, face in known.values():
        if face.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            cell.put(tensor, face)
