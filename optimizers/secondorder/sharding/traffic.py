"""What travels in a step, as one process sees it: the routes of all blocks, and the buffers of both collectives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secondorder.layout.buckets import BaseBucket, Bucket, Candidate
from secondorder.layout.faces import Layout, streams
from secondorder.sharding.hook import OwnerHook
from secondorder.sharding.meeting import Meeting
from secondorder.sharding.routes import Patch, faces, holders, patches, sources
from secondorder.sharding.wire import Segment, Wire
from secondorder_kernels import apply_update_


class _Mail:
    """What goes to every process, or comes from it, each with whatever tells where it belongs."""

    def __init__(self, world: int) -> None:
        self._parts: list[list[tuple[Segment, tuple[Any, ...]]]] = [[] for _ in range(world)]

    def add(self, process: int, patch: Patch, dtype: torch.dtype, *what: Any) -> None:
        """One more tensor; sender and receiver must add theirs in the same order."""
        self._parts[process].append((Segment(patch.shape, dtype), what))

    def segments(self) -> list[list[Segment]]:
        """By process."""
        return [[segment for segment, _ in part] for part in self._parts]

    def with_views(self, views: Sequence[Sequence[Tensor]]) -> Iterator[tuple[Any, ...]]:
        """`(*what, its place in the buffer)` of all."""
        for part, places in zip(self._parts, views, strict=True):
            for (_, what), view in zip(part, places, strict=True):
                yield *what, view


@dataclass
class _Way:
    """How streams come into one of our buckets, and how its updates leave.

    Attributes:
        here: `(stream, patch, place in the workspace)` of what is stored here.
        places: Places in the workspaces,
        arrived: and what comes for them from others.
        local: `(strand, patch, update)` of what is stored here.
        strands: Strands of updates for others,
        updates: the updates in the workspace,
        sent: and where they leave.
    """

    here: list[tuple[str, Patch, Tensor]] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)
    arrived: list[Tensor] = field(default_factory=list)
    local: list[tuple[int, Patch, Tensor]] = field(default_factory=list)
    strands: list[int] = field(default_factory=list)
    updates: list[Tensor] = field(default_factory=list)
    sent: list[Tensor] = field(default_factory=list)


class Traffic:
    """Routes and buffers of one layout.

    Attributes:
        inward: The first collective: gradients to the owners.
        outward: The second: updates to all who store the parameter.
        incoming: `(block, patch, update)` of what comes back.
    """

    def __init__(
        self,
        group: Any,
        rank: int,
        world: int,
        layout: Layout,
        meeting: Meeting,
        owners: Sequence[int],
        hook: OwnerHook | None,
        words: tuple[int, int],
    ) -> None:
        """Find the routes, lay out the buffers.

        Args:
            group: The processes.
            rank: This one.
            world: How many there are.
            layout: Blocks, and our buckets with their workspaces.
            meeting: Who stores what.
            owners: The owner of every candidate.
            hook: By which DDP's gradients come to the owners; None: they are whole.
            words: Of each collective.

        Raises:
            ValueError: If parameters are on several devices.
        """
        devices = {p.device for p in layout.params}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"sharded parameters of one optimizer must be on one device, got {found}")
        device = devices.pop() if devices else torch.device("cpu")
        self._rank, self._meeting = rank, meeting
        self._ways = {id(b): _Way() for b in layout.buckets if isinstance(b, Bucket)}
        sends, receives, leaves, arrives = (_Mail(world) for _ in range(4))
        places = _strand_places(layout)
        for c, owner in zip(layout.candidates, owners, strict=True):
            for k in range(len(c.piece.strands)):
                self._add(c, k, owner, places.get((id(c.piece), k)), sends, receives, leaves, arrives)
        if hook is not None:
            hook.follow(layout, owners)
            _add_loose(hook, rank, world, sends, receives)
        self.inward = Wire(group, rank, device, sends.segments(), receives.segments(), words[0])
        self.outward = Wire(group, rank, device, leaves.segments(), arrives.segments(), words[1])
        self._sends: list[tuple[str, Patch, Tensor]] = list(sends.with_views(self.inward.outgoing))
        for way, place, view in receives.with_views(self.inward.incoming):
            if way is None and hook is not None:
                hook.arrived.append((place, view))
            else:
                way.places.append(place)
                way.arrived.append(view)
        for way, j, update, view in leaves.with_views(self.outward.outgoing):
            way.strands.append(j)
            way.updates.append(update)
            way.sent.append(view)
        self.incoming: list[tuple[Candidate, Patch, Tensor]] = list(arrives.with_views(self.outward.incoming))

    def _add(
        self,
        c: Candidate,
        k: int,
        owner: int,
        ours: tuple[Bucket, int] | None,
        sends: _Mail,
        receives: _Mail,
        leaves: _Mail,
        arrives: _Mail,
    ) -> None:
        """The routes of one strand that begin or end here; `ours`: its bucket and number there, if we own it."""
        strand, rank = c.piece.strands[k], self._rank
        shape, held = self._meeting.shapes[strand.index], self._meeting.held[strand.index]
        if ours is None and not patches(strand, shape, held[rank]):
            return
        names = ("grad", "param") if "param" in streams(c.bucket, dict(c.hp)) else ("grad",)
        stored_as, updated_in = c.bucket.param_dtype, c.bucket.dtype
        for source, patch in sources(strand, shape, held, owner, c.position):
            for name in names:
                if ours is None:
                    if source == rank:
                        sends.add(owner, patch, stored_as, name, patch)
                    continue
                b, j = ours
                place, way = b.work_rows[name][j][patch.at], self._ways[id(b)]
                if source == rank:
                    way.here.append((name, patch, place))
                else:
                    receives.add(source, patch, stored_as, way, place)
        for target, patch in holders(strand, shape, held):
            if ours is None:
                if target == rank:
                    arrives.add(owner, patch, updated_in, c, patch)
                continue
            b, j = ours
            update, way = b.work_rows["update"][j][patch.at], self._ways[id(b)]
            if target == rank:
                way.local.append((j, patch, update))
            else:
                leaves.add(target, patch, updated_in, way, j, update)

    # ------------------------------------------------------------------ a step

    def load(self, grads: Sequence[Tensor | None], stored: Sequence[Tensor]) -> None:
        """Fill the first collective; zeros for what is absent."""
        views, values, absent = [], [], []
        for name, patch, view in self._sends:
            source = grads[patch.index] if name == "grad" else stored[patch.index]
            if source is None:
                absent.append(view)
            else:
                views.append(view)
                values.append(patch.cut(source))
        if views:
            torch._foreach_copy_(views, values)
        if absent:
            torch._foreach_zero_(absent)

    def unload(self, b: BaseBucket, grads: Sequence[Tensor | None], stored: Sequence[Tensor]) -> None:
        """Bring into a bucket's workspaces what has come and what is stored here."""
        way = self._ways[id(b)]
        if any(grads[strand.index] is None for _, strand in b.strands):
            b.work["grad"].zero_()
        places, values = list(way.places), list(way.arrived)
        for name, patch, place in way.here:
            source = grads[patch.index] if name == "grad" else stored[patch.index]
            if source is not None:
                places.append(place)
                values.append(patch.cut(source))
        if places:
            torch._foreach_copy_(places, values)

    def hand_over(self, b: BaseBucket, chosen: set[int]) -> list[tuple[Patch, Tensor]]:
        """Fill the second collective with a bucket's updates; zeros for strands that are not chosen.

        Returns:
            Chosen updates of what is stored here.
        """
        way = self._ways[id(b)]
        if way.sent:
            idle = [update for j, update in zip(way.strands, way.updates, strict=True) if j not in chosen]
            if idle:  # left by another bucket
                torch._foreach_zero_(idle)
            torch._foreach_copy_(way.sent, way.updates)
        return [(patch, update) for j, patch, update in way.local if j in chosen]

    def write(
        self,
        found: Sequence[tuple[Patch, Tensor]],
        stored: Sequence[Tensor],
        lr: float,
        keep: Tensor | None,
        decay_after: bool,
    ) -> None:
        """`p <- (1 - lr wd) p - lr u` on patches of what is stored here."""
        if not found:
            return
        with faces([(patch, stored[patch.index]) for patch, _ in found]) as targets:
            apply_update_(targets, [update for _, update in found], lr=lr, keep=keep, decay_after=decay_after)


def _strand_places(layout: Layout) -> dict[tuple[int, int], tuple[Bucket, int]]:
    """For every strand of ours, by piece and number: its bucket and its number there."""
    out = {}
    for b in layout.buckets:
        if isinstance(b, Bucket):
            numbers: dict[int, int] = defaultdict(int)
            for j, (r, _) in enumerate(b.strands):
                out[id(b.pieces[r]), numbers[r]] = (b, j)
                numbers[r] += 1
    return out


def _add_loose(hook: OwnerHook, rank: int, world: int, sends: _Mail, receives: _Mail) -> None:
    """Sums of what is in no block go from where they were made to everybody."""
    for source, patch, dtype in hook.loose:
        if source != rank:
            receives.add(source, patch, dtype, None, patch)
            continue
        for target in range(world):
            if target != rank:
                sends.add(target, patch, dtype, "grad", patch)
