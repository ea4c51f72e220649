"""Eigenbases on the processes that do not own them: squares of gradients in them are captured wherever there are data.

A copy of each basis of others, outside of the state: `d²` numbers for a side of `d`. Who captures is everybody, so
these copies do not shrink with the number of processes. They travel in the calls in which they were refreshed, which
every process knows by the schedule.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.layout.buckets import Bucket, Candidate, Piece
from secondorder.layout.faces import Layout
from secondorder.layout.schedule import last_refresh
from secondorder.sharding.wire import Segment, Wire


def bases(b: Bucket) -> list[tuple[Piece, dict[int, Tensor]]]:
    """By block of a bucket, its eigenbases by mode, `(rows, d, d)`."""
    columns = {i: b.columns()[f"basis_{i}"] for i in b.modes}
    return [
        (piece, {i: q[r] if b.span else q[r][None] for i, q in columns.items()}) for r, piece in enumerate(b.pieces)
    ]


class _Unit(NamedTuple):
    """A basis: of which block and mode, who owns it, and where it is here."""

    candidate: Candidate
    mode: int
    owner: int
    basis: Tensor  # (rows, d, d)


class Frames:
    """The eigenbases of all blocks with moments.

    Attributes:
        copied: Bytes of the copies of what others own.
        sent: Bytes that the last exchange sent to others.
        exchanges: Exchanges so far.
    """

    def __init__(self, plan: Any, layout: Layout) -> None:
        self._plan, self._layout = plan, layout
        self.copied = self.sent = self.exchanges = 0
        self._units: list[_Unit] = []
        buckets = [b for b in layout.buckets if isinstance(b, Bucket) and "moment" in b.streams()]
        own = {id(piece): found for b in buckets for piece, found in bases(b)}
        for c in layout.candidates:
            if "moment" in c.bucket.streams():
                for mode in c.bucket.modes:
                    basis = own[id(c.piece)][mode] if id(c.piece) in own else self._copy(c, mode)
                    self._units.append(_Unit(c, mode, plan.owner(c), basis))

    def _copy(self, c: Candidate, mode: int) -> Tensor:
        d = c.bucket.shape[mode]
        basis = torch.zeros((c.rows, d, d), dtype=c.bucket.dtype, device=c.bucket.device)
        basis.diagonal(dim1=-2, dim2=-1).fill_(1)
        self.copied += basis.nbytes
        return basis

    def bases(self) -> list[tuple[Piece, dict[int, Tensor]]]:
        """By block, its bases by mode."""
        found: dict[int, tuple[Piece, dict[int, Tensor]]] = {}
        for unit in self._units:
            found.setdefault(id(unit.candidate), (unit.candidate.piece, {}))[1][unit.mode] = unit.basis
        return list(found.values())

    def share_all(self) -> None:
        """Bring the copies up to date, if there was any step; every process must come."""
        if self._layout.clock.max() > 0:
            self._share(self._units)

    def share_refreshed(self) -> None:
        """Bring those that were refreshed in the last call; every process must come."""
        due = []
        for unit in self._units:
            c, t = unit.candidate, int(self._layout.clock[unit.candidate.piece.index])
            if t > 0 and last_refresh(c.bucket.method, c.hp, c.phases[unit.mode], t) == t:
                due.append(unit)
        self._share(due)

    def _share(self, units: list[_Unit]) -> None:
        rank, world = self._plan.rank, self._plan.world
        if not units or world == 1:
            return
        by_owner = [[unit for unit in units if unit.owner == owner] for owner in range(world)]
        segments = [[Segment(tuple(u.basis.shape), u.basis.dtype) for u in owned] for owned in by_owner]
        sends = [[] if to == rank else segments[rank] for to in range(world)]
        receives = [[] if source == rank else segments[source] for source in range(world)]
        wire = Wire(self._plan.group, rank, units[0].basis.device, sends, receives, 1)
        targets = [view for views in wire.outgoing for view in views]
        if targets:
            torch._foreach_copy_(targets, [u.basis for u in by_owner[rank]] * (world - 1))
        wire.exchange(torch.zeros(1, dtype=torch.float64, device=units[0].basis.device))
        arrived = [view for views in wire.incoming for view in views]
        if arrived:
            copies = [u.basis for source, owned in enumerate(by_owner) if source != rank for u in owned]
            torch._foreach_copy_(copies, arrived)
        self.sent, self.exchanges = wire.sent, self.exchanges + 1
