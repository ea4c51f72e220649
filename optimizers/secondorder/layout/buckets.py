"""Buckets: all blocks of one (group, method, shape, modes, dtype, device), stacked. All mathematics runs on buckets.

`Bucket` stacks blocks of one shape, `(n, d1, ..., dk)`. `FlatBucket` lays the parameters of an element-wise method end
to end, whatever their shapes. To the step they look the same: named state tensors, `expand` for per-row factors,
`select` for the rows that take part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from secondorder.layout.blocks import Fold, Region, Treatment
from secondorder.preconditioner.protocol import Method, Modes, Spec, expand_rows

COUNTERS = ("count", "seen", "failures")
_MOST_RANGES = 4  # beyond, one gather and one scatter of the rows cost less than a launch per contiguous range

Part = slice | Tensor  # contiguous rows, or an index of rows


@dataclass(frozen=True)
class Strand:
    """A region of one parameter, and where it lies in a block.

    Attributes:
        index: Position of the parameter among all parameters.
        view: The shape in which the parameter is cut.
        region: Slices of the view, or None for all of it.
        viewable: The parameter's memory can be viewed so; else it is written through a copy.
        into: Slices of the block, or None for all of it.
        fold: How the parameter becomes its view, where a reshape is not enough.
    """

    index: int
    view: tuple[int, ...]
    region: Region | None
    viewable: bool
    into: tuple[Any, ...] | None = None
    fold: Fold | None = None

    def unfold(self, tensor: Tensor) -> Tensor:
        """The view of a tensor that has the parameter's shape; a copy where it needs one."""
        if self.fold is not None:
            return self.fold.apply(tensor, self.view)
        return tensor if tensor.shape == self.view else tensor.reshape(self.view)

    def cut(self, tensor: Tensor) -> Tensor:
        """This region of a tensor that has the parameter's shape; a copy where the view needs one."""
        viewed = self.unfold(tensor)
        return viewed if self.region is None else viewed[self.region]

    def place(self, block: Tensor) -> Tensor:
        """Where this region lies in a block."""
        return block if self.into is None else block[self.into]


@dataclass(frozen=True)
class Piece:
    """A block, or a stack of equal ones: the rows of a bucket that belong to one tile of a parameter.

    Attributes:
        strands: What it is made of; the first one's parameter leads: it keeps the state.
        key: Key of the tile in `state[p]`, or None where the parameter has only one.
        block: Shape of a block.
        span: Number of rows, None for a single one without an axis of its own in `state[p]`.
    """

    strands: tuple[Strand, ...]
    key: str | None
    block: tuple[int, ...]
    span: int | None = None

    @property
    def index(self) -> int:
        """Position of the leading parameter."""
        return self.strands[0].index

    @property
    def at(self) -> tuple[int, ...]:
        """Where the piece begins in the parameter's view."""
        region = self.strands[0].region
        return () if region is None else tuple(cut.start for cut in region)

    def present(self, present: Sequence[bool]) -> bool:
        """Whether any of its parameters has a gradient."""
        return any(present[strand.index] for strand in self.strands)


@dataclass
class Candidate:
    """A piece that some process works on, and the bucket that it is in there.

    Attributes:
        piece: The piece.
        bucket: An empty bucket of the kind that takes it.
        hp: Its group.
        phases: For each mode, its refresh phase (see `layout.schedule`).
        position: Place of its first row among those of all candidates.
    """

    piece: Piece
    bucket: Bucket
    hp: Mapping[str, Any]
    phases: dict[int, int] = field(default_factory=dict)
    position: int = 0

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.piece.span or 1

    def kind(self) -> tuple[Any, ...]:
        """Candidates of one kind share a bucket."""
        b = self.bucket
        return b.group, b.method, b.fallback, b.modes, b.diagonal, b.param_dtype, b.device, b.shape, b.span


def cut_pieces(index: int, p: Tensor, treatment: Treatment, joined: tuple[int, Tensor] | None = None) -> list[Piece]:
    """The pieces of one parameter (and of the one joined to it), in the order of its grid."""
    view, fold = treatment.view, treatment.fold
    viewable = _viewable(p, view, fold)
    span = view[0] if treatment.batched else None
    pieces = []
    for key, region in treatment.tiles():
        shape = tuple(cut.stop - cut.start for cut in region)
        whole = not treatment.split
        strands = [Strand(index, view, None if whole else region, viewable, fold=fold)]
        if joined is not None:
            last = shape[-1]
            strands[0] = replace(strands[0], into=(..., slice(0, last)))
            if region[-1].stop == view[-1]:
                follower, column = (*view[:-1], 1), (*region[:-1], slice(0, 1))
                there = _viewable(joined[1], follower, None)
                strands.append(Strand(joined[0], follower, column, there, (..., slice(last, last + 1))))
                shape = (*shape[:-1], last + 1)
        block = shape[1:] if treatment.batched else shape
        pieces.append(Piece(tuple(strands), key if treatment.split else None, block, span))
    return pieces


def _viewable(p: Tensor, view: tuple[int, ...], fold: Fold | None) -> bool:
    try:
        if fold is None:
            p.detach().view(view)
        else:
            p.detach().view(fold.split).permute(fold.order).view(view)
    except RuntimeError:
        return False
    return True


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 parameters, else float32: an average in half precision stops learning."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, where the device has it: in float32 the order of a sum, and its last bit, hang on a row's address."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass
class BaseBucket:
    """What both kinds of bucket share.

    Attributes:
        group: Index of the parameter group.
        method: The row of the table that works here.
        fallback: Whether it is the group's fallback.
        modes: Axes with a dense factor.
        diagonal: Axes with a diagonal factor.
        param_dtype: Dtype of the parameters.
        dtype: Dtype of state and products.
        device: Where.
        pieces: What the rows are made of: one entry per row, or per `span` rows.
        s: State by name, allocated by `allocate`.
        phases: For each mode, the refresh phase of every piece (see `layout.schedule`).
        work: Workspaces by stream, shared with other buckets: valid while this bucket is at work.
        work_rows: Their parts, in the shapes of the pieces.
        strands: `(piece, strand)` of every strand; `work_rows` has their places in the same order.
        held: Streams with workspaces of their own: the update waits there until all buckets have theirs (see `_step`).
        told: What the last step left for `diagnostics()`.
        origins: Where strands come from (see `noise`), made where it is asked for.
    """

    group: int
    method: Method
    fallback: bool
    modes: Modes
    diagonal: Modes
    param_dtype: torch.dtype
    device: torch.device
    pieces: list[Piece] = field(default_factory=list)
    s: dict[str, Tensor] = field(default_factory=dict)
    phases: dict[int, list[int]] = field(default_factory=dict)
    work: dict[str, Tensor] = field(default_factory=dict, repr=False)
    work_rows: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)
    strands: list[tuple[int, Strand]] = field(default_factory=list, repr=False)
    held: tuple[str, ...] = ()
    told: dict[str, Tensor] = field(default_factory=dict, repr=False)
    origins: Tensor | None = field(default=None, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the bucket's state, products and workspaces."""
        return factor_dtype(self.param_dtype)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.pieces)

    @property
    def numel(self) -> int:
        """Elements of one workspace."""
        raise NotImplementedError

    def specs(self, hp: Mapping[str, Any]) -> dict[str, Spec]:
        """State of one row, counters left out."""
        raise NotImplementedError

    def allocate(self, hp: Mapping[str, Any]) -> None:
        """Make fresh state."""
        raise NotImplementedError

    def columns(self) -> dict[str, list[Tensor]]:
        """Views of every row's state, by name; made once, they are what `state[p]` holds."""
        raise NotImplementedError

    def streams(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a row of the statistics that the plan brings, by name."""
        return {}

    def bind(self, workspaces: Mapping[str, Tensor]) -> None:
        """Use these flat workspaces for `grad`, `update`, (where there is one) `param`, and statistics."""
        self.strands = [(r, strand) for r, piece in enumerate(self.pieces) for strand in piece.strands]
        self.origins = None
        self.work, self.work_rows = {}, {}
        shapes = self.streams()
        for name, flat in workspaces.items():
            if name in shapes:
                self.work[name] = flat.view(self.rows, *shapes[name])
                self.work_rows[name] = [self.row(self.work[name], r) for r in range(len(self.pieces))]
                continue
            self.work[name] = self.stacked(flat)
            rows = [self.row(self.work[name], r) for r in range(len(self.pieces))]
            self.work_rows[name] = [strand.place(rows[r]) for r, strand in self.strands]

    def stacked(self, flat: Tensor) -> Tensor:
        """A flat workspace in the shape of the bucket."""
        raise NotImplementedError

    def row(self, work: Tensor, piece: int) -> Tensor:
        """The rows of one piece of a workspace, in the piece's shape."""
        raise NotImplementedError

    def expand(self, r: Tensor, like: Tensor) -> Tensor:
        """Broadcast `r (n,)` over the rows of `like`."""
        raise NotImplementedError

    def norms(self, work: Tensor) -> Tensor:
        """Euclidean norm of every row of a workspace, `(n,)`, in `wide_dtype`."""
        raise NotImplementedError

    def row_numel(self) -> Tensor | float:
        """Elements per row."""
        raise NotImplementedError


@dataclass
class Bucket(BaseBucket):
    """Blocks of one shape, stacked.

    Attributes:
        shape: Shape of every block.
        span: Rows of every piece, None for single rows.
        positions: For every piece, the place of its first row among those of all processes.
        steady: Schedules of past calls that come again (see `layout.schedule`).
    """

    shape: tuple[int, ...] = ()
    span: int | None = None
    positions: list[int] = field(default_factory=list, repr=False)
    steady: dict[tuple[bool, int, int], Any] = field(default_factory=dict, repr=False)

    @property
    def rows(self) -> int:
        """See `BaseBucket`."""
        return len(self.pieces) * (self.span or 1)

    @property
    def numel(self) -> int:
        """See `BaseBucket`."""
        return self.rows * torch.Size(self.shape).numel()

    def take(self, candidate: Candidate) -> None:
        """Add a piece."""
        self.pieces.append(candidate.piece)
        self.positions.append(candidate.position)
        for mode, phase in candidate.phases.items():
            self.phases.setdefault(mode, []).append(phase)

    def streams(self) -> dict[str, tuple[int, ...]]:
        """See `BaseBucket`."""
        return self.method.statistics(self.shape, self.modes, self.diagonal)

    def specs(self, hp: Mapping[str, Any]) -> dict[str, Spec]:
        """See `BaseBucket`."""
        momentum = {} if self.method.momentum == "none" else {"momentum": Spec(self.shape)}
        return {**self.method.specs(self.shape, self.modes, hp, self.diagonal), **momentum}

    def allocate(self, hp: Mapping[str, Any]) -> None:
        """See `BaseBucket`."""
        rows = [first + r for first in self.positions for r in range(self.span or 1)]
        self.places = torch.tensor(rows, dtype=torch.int64).to(self.device)
        self.s = {k: torch.zeros(self.rows, dtype=torch.float32, device=self.device) for k in COUNTERS}
        for name, spec in self.specs(hp).items():
            stack = torch.zeros((self.rows, *spec.shape), dtype=spec.dtype or self.dtype, device=self.device)
            if callable(spec.init):
                stack.copy_(spec.init(dtype=self.dtype, device=self.device))
            elif spec.init == "eye":
                stack.diagonal(dim1=-2, dim2=-1).fill_(1)
            elif spec.init:
                stack.fill_(spec.init)
            self.s[name] = stack

    def columns(self) -> dict[str, list[Tensor]]:
        """See `BaseBucket`."""
        if self.span is None:
            return {name: list(stack.unbind(0)) for name, stack in self.s.items()}
        return {name: list(stack.split(self.span)) for name, stack in self.s.items()}

    def stacked(self, flat: Tensor) -> Tensor:
        """See `BaseBucket`."""
        return flat.view(self.rows, *self.shape)

    def row(self, work: Tensor, piece: int) -> Tensor:
        """See `BaseBucket`."""
        return work[piece] if self.span is None else work[piece * self.span : (piece + 1) * self.span]

    def expand(self, r: Tensor, like: Tensor) -> Tensor:
        """See `BaseBucket`."""
        return expand_rows(r, like)

    def norms(self, work: Tensor) -> Tensor:
        """See `BaseBucket`."""
        return torch.linalg.vector_norm(work.flatten(1), dim=1, dtype=wide_dtype(work.device))

    def row_numel(self) -> Tensor | float:
        """See `BaseBucket`."""
        return float(torch.Size(self.shape).numel())

    def select(self, part: Part) -> Iterator[dict[str, Tensor]]:
        """Yield the state of some rows, once; changes reach the stacks when the loop's body is done."""
        if isinstance(part, slice):
            everything = part == slice(0, self.rows)
            yield self.s if everything else {k: t[part] for k, t in self.s.items()}
            return
        taken = {k: t.index_select(0, part) for k, t in self.s.items()}
        yield taken
        for k, t in self.s.items():
            t.index_copy_(0, part, taken[k])

    def parts(self, pieces: Sequence[int]) -> list[Part]:
        """The rows of ascending pieces as contiguous ranges, or as one index where there are many ranges."""
        span = self.span or 1
        ranges: list[slice] = []
        for r in pieces:
            if ranges and ranges[-1].stop == r * span:
                ranges[-1] = slice(ranges[-1].start, (r + 1) * span)
            else:
                ranges.append(slice(r * span, (r + 1) * span))
        if len(ranges) <= _MOST_RANGES:
            return list(ranges)
        return [torch.tensor([row for cut in ranges for row in range(cut.start, cut.stop)]).to(self.device)]


@dataclass
class FlatBucket(BaseBucket):
    """Parameters of an element-wise method, end to end.

    Attributes:
        fusible: The parameters are contiguous and of the state's dtype: a multi-tensor kernel can take them in place.
        row_state: Views of every row's state by name, in the parameters' shapes.
    """

    fusible: bool = False
    row_state: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._sizes: list[int] = []

    @property
    def numel(self) -> int:
        """See `BaseBucket`."""
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Elements of every row."""
        if len(self._sizes) != self.rows:
            self._sizes = [torch.Size(piece.block).numel() for piece in self.pieces]
            self._starts = [sum(self._sizes[:r]) for r in range(self.rows)]
        return self._sizes

    def specs(self, hp: Mapping[str, Any]) -> dict[str, Spec]:
        """See `BaseBucket`."""
        shape = (self.numel,)
        momentum = {} if self.method.momentum == "none" else {"momentum": Spec(shape)}
        return {**self.method.specs(shape, (), hp), **momentum}

    def allocate(self, hp: Mapping[str, Any]) -> None:
        """See `BaseBucket`."""
        self.s = {"count": torch.zeros(self.rows, dtype=torch.float32, device=self.device)}
        for name, spec in self.specs(hp).items():
            start = float(spec.init)  # type: ignore[arg-type]
            self.s[name] = torch.full(spec.shape, start, dtype=self.dtype, device=self.device)
        self.lengths = torch.tensor(self.sizes).to(self.device)
        self.row_state = {
            name: list(t.unbind(0)) if name == "count" else [self.row(t, r) for r in range(self.rows)]
            for name, t in self.s.items()
        }

    def columns(self) -> dict[str, list[Tensor]]:
        """See `BaseBucket`."""
        return self.row_state

    def stacked(self, flat: Tensor) -> Tensor:
        """See `BaseBucket`."""
        return flat

    def row(self, work: Tensor, piece: int) -> Tensor:
        """See `BaseBucket`."""
        size = self.sizes[piece]
        start = self._starts[piece]
        return work[start : start + size].view(self.pieces[piece].block)

    def expand(self, r: Tensor, like: Tensor) -> Tensor:
        """See `BaseBucket`."""
        return r.repeat_interleave(self.lengths, output_size=self.numel)

    def norms(self, work: Tensor) -> Tensor:
        """See `BaseBucket`."""
        rows = [self.row(work, r) for r in range(self.rows)]
        return torch.stack(torch._foreach_norm(rows, dtype=wide_dtype(work.device)))

    def row_numel(self) -> Tensor | float:
        """See `BaseBucket`."""
        return self.lengths.to(self.dtype)
