"""Buckets: all blocks of one (group, method, shape, modes, dtype, device), stacked. All mathematics runs on buckets.

`Bucket` stacks blocks of one shape, `(n, d1, ..., dk)`. `FlatBucket` lays the parameters of an element-wise method end
to end, whatever their shapes. To the step they look the same: named state tensors, `expand` for per-row factors,
`select` for the rows that take part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secondorder.layout.blocks import Region, Treatment
from secondorder.preconditioner.protocol import Method, Modes, Spec, expand_rows

COUNTERS = ("count", "seen", "failures")
_MOST_RANGES = 4  # beyond, one gather and one scatter of the rows cost less than a launch per contiguous range

Part = slice | Tensor  # contiguous rows, or an index of rows


@dataclass(frozen=True)
class Piece:
    """One row of a bucket: a region of a parameter's view.

    Attributes:
        index: Position of the parameter among all parameters.
        view: The shape in which the parameter is cut.
        region: Slices of the view, or None for all of it.
        key: Key of the tile in `state[p]`, or None where the parameter is one block.
        block: Shape of the piece.
        viewable: The parameter's memory can be viewed so; else it is written through a copy.
    """

    index: int
    view: tuple[int, ...]
    region: Region | None
    key: str | None
    block: tuple[int, ...]
    viewable: bool

    def cut(self, tensor: Tensor) -> Tensor:
        """This piece of a tensor that has the parameter's shape; a copy where the view needs one."""
        viewed = tensor if tensor.shape == self.view else tensor.reshape(self.view)
        return viewed if self.region is None else viewed[self.region]


def cut_pieces(index: int, p: Tensor, treatment: Treatment) -> list[Piece]:
    """The pieces of one parameter, in the order of its grid."""
    try:
        p.detach().view(treatment.view)
        viewable = True
    except RuntimeError:
        viewable = False
    if not treatment.split:
        return [Piece(index, treatment.view, None, None, treatment.view, viewable)]
    return [
        Piece(index, treatment.view, region, key, tuple(cut.stop - cut.start for cut in region), viewable)
        for key, region in treatment.tiles()
    ]


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 parameters, else float32: an average in half precision stops learning."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
        pieces: One entry per row.
        s: State by name, allocated by `allocate`.
        phases: For each mode, the refresh phase of every row (see `layout.schedule`).
        work: Workspaces by stream, shared with other buckets: valid while this bucket is at work.
        work_rows: Their rows, in the shapes of the pieces.
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

    def bind(self, workspaces: Mapping[str, Tensor]) -> None:
        """Use these flat workspaces for `grad`, `update` and (where there is one) `param`."""
        self.work = {name: self.stacked(flat[: self.numel]) for name, flat in workspaces.items()}
        self.work_rows = {name: [self.row(work, r) for r in range(self.rows)] for name, work in self.work.items()}

    def stacked(self, flat: Tensor) -> Tensor:
        """A flat workspace in the shape of the bucket."""
        raise NotImplementedError

    def row(self, work: Tensor, row: int) -> Tensor:
        """One row of a workspace, in the shape of its piece."""
        raise NotImplementedError

    def expand(self, r: Tensor, like: Tensor) -> Tensor:
        """Broadcast `r (n,)` over the rows of `like`."""
        raise NotImplementedError

    def norms(self, work: Tensor) -> Tensor:
        """Euclidean norm of every row of a workspace, `(n,)`."""
        raise NotImplementedError

    def row_numel(self) -> Tensor | float:
        """Elements per row."""
        raise NotImplementedError


@dataclass
class Bucket(BaseBucket):
    """Blocks of one shape, stacked.

    Attributes:
        shape: Shape of every block.
        steady: Schedules of past calls that come again (see `layout.schedule`).
    """

    shape: tuple[int, ...] = ()
    steady: dict[tuple[bool, int, int], Any] = field(default_factory=dict, repr=False)

    @property
    def numel(self) -> int:
        """See `BaseBucket`."""
        return self.rows * torch.Size(self.shape).numel()

    def specs(self, hp: Mapping[str, Any]) -> dict[str, Spec]:
        """See `BaseBucket`."""
        momentum = {} if self.method.momentum == "none" else {"momentum": Spec(self.shape)}
        return {**self.method.specs(self.shape, self.modes, hp, self.diagonal), **momentum}

    def allocate(self, hp: Mapping[str, Any]) -> None:
        """See `BaseBucket`."""
        self.s = {k: torch.zeros(self.rows, dtype=torch.float32, device=self.device) for k in COUNTERS}
        for name, spec in self.specs(hp).items():
            stack = torch.zeros((self.rows, *spec.shape), dtype=self.dtype, device=self.device)
            if spec.init == "eye":
                stack.diagonal(dim1=-2, dim2=-1).fill_(1)
            elif spec.init:
                stack.fill_(spec.init)
            self.s[name] = stack

    def columns(self) -> dict[str, list[Tensor]]:
        """See `BaseBucket`."""
        return {name: list(stack.unbind(0)) for name, stack in self.s.items()}

    def stacked(self, flat: Tensor) -> Tensor:
        """See `BaseBucket`."""
        return flat.view(self.rows, *self.shape)

    def row(self, work: Tensor, row: int) -> Tensor:
        """See `BaseBucket`."""
        return work[row]

    def expand(self, r: Tensor, like: Tensor) -> Tensor:
        """See `BaseBucket`."""
        return expand_rows(r, like)

    def norms(self, work: Tensor) -> Tensor:
        """See `BaseBucket`."""
        return torch.linalg.vector_norm(work.flatten(1), dim=1)

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

    def parts(self, rows: Sequence[int]) -> list[Part]:
        """Ascending rows as contiguous ranges, or as one index where there are many ranges."""
        ranges: list[Part] = []
        for r in rows:
            if ranges and ranges[-1].stop == r:  # type: ignore[union-attr]
                ranges[-1] = slice(ranges[-1].start, r + 1)  # type: ignore[union-attr]
            else:
                ranges.append(slice(r, r + 1))
        if len(ranges) <= _MOST_RANGES:
            return ranges
        return [torch.tensor(list(rows)).to(self.device)]


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
            self.s[name] = torch.full(spec.shape, float(spec.init), dtype=self.dtype, device=self.device)
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

    def row(self, work: Tensor, row: int) -> Tensor:
        """See `BaseBucket`."""
        size = self.sizes[row]
        start = self._starts[row]
        return work[start : start + size].view(self.pieces[row].block)

    def expand(self, r: Tensor, like: Tensor) -> Tensor:
        """See `BaseBucket`."""
        return r.repeat_interleave(self.lengths, output_size=self.numel)

    def norms(self, work: Tensor) -> Tensor:
        """See `BaseBucket`."""
        return torch.stack(torch._foreach_norm([self.row(work, r) for r in range(self.rows)]))

    def row_numel(self) -> Tensor | float:
        """See `BaseBucket`."""
        return self.lengths.to(self.dtype)
