"""What an optimizer tells about itself: coverage, memory, diagnostics, and its state as linear operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from secondorder._step import hyperparameters
from secondorder.layout.buckets import BaseBucket, FlatBucket
from secondorder.layout.faces import Layout, place, streams
from secondorder.preconditioner.operators import EigenBlock, KroneckerOperator
from secondorder.preconditioner.protocol import Context

if TYPE_CHECKING:
    from secondorder._inspection import Inspection

Group = dict[str, Any]

FAILURES = {
    "refused_steps": "a step was refused, because a gradient was not finite or too large (of several processes: on one "
    "of them, or they disagree on learning rates or on which parameters have gradients); state and parameters are as "
    "they were",
    "refresh_failures": "a decomposition failed, or a layer statistic was not finite: the factor keeps its last good "
    "value; or the update of a block was not finite, and was left out",
}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[j]) for row in (header, *rows)) for j in range(len(header))]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in (header, *rows))
    return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True)
class CoverageRow:
    """One parameter: its name, shape, treatment, number of blocks (with their shape), and the reason."""

    name: str
    shape: tuple[int, ...]
    treatment: str
    blocks: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """Which parameter is treated how, and why. Iterable; `print` it for a table."""

    rows: list[CoverageRow]

    def __iter__(self) -> Iterator[CoverageRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        cells = [
            (r.name, "x".join(map(str, r.shape)) or "scalar", r.treatment, str(r.blocks), r.reason) for r in self.rows
        ]
        return _table(("parameter", "shape", "treatment", "blocks", "reason"), cells)


def coverage(optimizer: Inspection) -> Coverage:
    """See `Inspection.coverage`."""
    rows = []
    for gi, group in enumerate(optimizer.param_groups):
        for pi, p in enumerate(group["params"]):
            name = optimizer._label(gi, pi).name
            if is_lazy(p):
                rows.append(CoverageRow(name, (), "undecided", 0, "lazy: has no shape before its first forward pass"))
                continue
            if not p.requires_grad:
                rows.append(CoverageRow(name, tuple(p.shape), "frozen", 0, "requires_grad is False"))
                continue
            method, treatment = optimizer._treat(p, group, gi, pi)
            kind = type(optimizer).__name__ if not treatment.fallback else method.name
            rows.append(CoverageRow(name, tuple(p.shape), kind, len(treatment.tiles()), treatment.reason))
    return Coverage(rows)


@dataclass(frozen=True)
class MemoryRow:
    """State of one parameter in bytes."""

    name: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of state per parameter, of workspaces, and in all. `print` it for a table."""

    rows: list[MemoryRow]
    workspaces: int
    elements: int = field(default=0)

    @property
    def total(self) -> int:
        """State and workspaces, in bytes."""
        return self.state + self.workspaces

    @property
    def state(self) -> int:
        """State, in bytes."""
        return sum(r.bytes for r in self.rows)

    def __str__(self) -> str:
        cells = [(r.name, "x".join(map(str, r.shape)) or "scalar", f"{r.bytes:,}") for r in self.rows]
        per = self.state / max(1, self.elements)
        last = f"state {self.state:,} bytes ({per:.1f} per parameter element), workspaces {self.workspaces:,} bytes"
        return _table(("parameter", "shape", "bytes"), cells) + "\n" + last


def memory_report(optimizer: Inspection) -> MemoryReport:
    """See `Inspection.memory_report`. Counts a layout of empty parameters: nothing is allocated."""
    ghost = Layout.ghost(optimizer._layout.plan, optimizer.param_groups, optimizer._treat)
    names = {}
    for gi, group in enumerate(optimizer.param_groups):
        for pi, p in enumerate(group["params"]):
            names[id(p)] = optimizer._label(gi, pi).name
    size = [4] * len(ghost.params)  # the step
    works: dict[Any, int] = {}
    for b in ghost.buckets:
        for views in b.columns().values():
            for piece, view in zip(b.pieces, views, strict=True):
                size[piece.index] += view.numel() * view.element_size()
        for name, n in streams(b, optimizer.param_groups[b.group]).items():
            key = place(b, name)
            works[key] = max(works.get(key, 0), n * b.dtype.itemsize)
    rows = [MemoryRow(names[id(p)], tuple(p.shape), n) for p, n in zip(ghost.params, size, strict=True)]
    return MemoryReport(rows, sum(works.values()), sum(p.numel() for p in ghost.params))


def resting(b: BaseBucket, hp: Group, s: dict[str, Tensor]) -> Context:
    """A context outside of a step."""
    count = s["count"]
    ones = torch.ones_like(count, dtype=b.dtype)
    return Context(hp, b.modes, ones, ones, count, s.get("seen", count), diagonal=b.diagonal, expand=b.expand)


def operator(
    layout: Layout, groups: Sequence[Group], p: Tensor, kind: Literal["curvature", "preconditioner"]
) -> KroneckerOperator:
    """A parameter's curvature or preconditioner.

    Raises:
        ValueError: If the parameter is not one of the optimizer's trainable ones.
    """
    index = next((i for i, q in enumerate(layout.params) if q is p), None)
    if index is None:
        raise ValueError(f"the parameter of shape {tuple(p.shape)} is not a trainable parameter of this optimizer")
    t = layout.treatments[index][2]
    if t.follows is not None:
        lead = next(i for i, (_, _, other) in enumerate(layout.treatments) if other.joined == id(p))
        return operator(layout, groups, layout.params[lead], kind)
    view = t.view if t.joined is None else (*t.view[:-1], t.view[-1] + 1)
    plain = t.joined is None and t.fold is None
    return _operator(layout, groups, index, tuple(p.shape) if plain else view, view, kind)


def _operator(
    layout: Layout, groups: Sequence[Group], index: int, shape: tuple[int, ...], view: tuple[int, ...], kind: str
) -> KroneckerOperator:
    """The operator on a view of a parameter (with the column that is joined to it)."""
    blocks = []
    for b in layout.buckets:
        for r, piece in enumerate(b.pieces):
            if piece.index != index:
                continue
            region = piece.strands[0].region or tuple(slice(0, d) for d in layout.treatments[index][2].view)
            if len(piece.strands) > 1:
                region = (*region[:-1], slice(region[-1].start, region[-1].stop + 1))
            if piece.span is None:
                blocks.append(EigenBlock(region, *_spectrum(b, r, groups[b.group], kind)))
            for row in range(piece.span or 0):
                bases, spectrum = _spectrum(b, r * (piece.span or 1) + row, groups[b.group], kind)
                batched = {i + 1: q for i, q in bases.items()}
                blocks.append(EigenBlock((slice(row, row + 1), *region[1:]), batched, spectrum[None]))
    return KroneckerOperator(shape, view, blocks)


def _spectrum(b: BaseBucket, r: int, group: Group, kind: str) -> tuple[dict[int, Tensor], Tensor]:
    flat, hp = isinstance(b, FlatBucket), hyperparameters(b, group)
    s = b.s if flat else {name: stack[r : r + 1] for name, stack in b.s.items()}
    c = resting(b, hp, s)
    held = b.method.held(s, c) if kind == "curvature" else None
    if held is not None:
        return {i: q[0] for i, q in held[0].items()}, held[1][0]
    found = b.method.spectra(s, c)
    if found is None:
        raise NotImplementedError(f"{type(b.method).__name__} has no spectral view of its state")
    bases, *spectra = found
    spectrum = spectra[kind == "preconditioner"]
    return {i: q[0] for i, q in bases.items()}, b.row(spectrum, r) if flat else spectrum[0]
