"""What a plan says about itself: owners, state and work of every process, bytes on the way, and what could be saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secondorder.layout.buckets import Candidate
from secondorder.layout.faces import streams
from secondorder.sharding.costs import cost, state_bytes
from secondorder.sharding.meeting import Meeting
from secondorder.sharding.paper import PaperPlan
from secondorder.sharding.routes import holders, sources


@dataclass(frozen=True)
class BlockRow:
    """One block.

    Attributes:
        parameter: Name of the parameter that leads it.
        tile: Its key in `state[p]`, or "".
        shape: Its shape.
        owner: The process that works on it.
        state_bytes: Bytes of its state.
        operations: Floating-point operations per step.
    """

    parameter: str
    tile: str
    shape: tuple[int, ...]
    owner: int
    state_bytes: int
    operations: float


@dataclass(frozen=True)
class PlanReport(PaperPlan):
    """Who owns what, and what travels; state and work as of a `PaperPlan`. Printable.

    Attributes:
        world: Number of processes.
        blocks: All blocks with factors.
        sent: Bytes that a step sends, by process, as predicted from the routes: to the owners and back.
        bound: Bytes of gradients and updates that are not where they are needed, by process.
        measured: Bytes that this process has sent per step so far; None before the first.
        steps: Exchanges so far.
    """

    world: int
    blocks: Sequence[BlockRow]
    sent: Sequence[tuple[int, int]]
    bound: Sequence[int]
    measured: tuple[int, int] | None
    steps: int

    @property
    def over_bound(self) -> float:
        """Bytes sent by all over the bound; 1 where nothing need be sent."""
        needed = sum(self.bound)
        return sum(a + b for a, b in self.sent) / needed if needed else 1.0

    def __str__(self) -> str:
        lines = [
            f"{len(self.blocks)} blocks on {self.world} processes; most over mean: state {self.state_balance:.3f}, "
            f"work {self.work_balance:.3f}; {self.over_bound:.3f} of the bytes that must travel",
            "process  blocks  state MB  Gflop/step  sent to owners  updates sent",
        ]
        for rank in range(self.world):
            mine = sum(row.owner == rank for row in self.blocks)
            inward, outward = self.sent[rank]
            lines.append(
                f"{rank:7d}  {mine:6d}  {self.state_bytes[rank] / 1e6:8.2f}  {self.operations[rank] / 1e9:10.3f}  "
                f"{inward:14,d}  {outward:12,d}"
            )
        if self.measured is not None:
            inward, outward = self.measured
            lines.append(f"measured here over {self.steps} steps: {inward:,d} + {outward:,d} bytes a step")
        width = max((len(row.parameter) for row in self.blocks), default=0)
        for row in self.blocks:
            shape = "x".join(map(str, row.shape))
            lines.append(f"{row.parameter:{width}s}  {row.tile:12s}  {shape:>12s}  process {row.owner}")
        return "\n".join(lines)


def made_report(
    candidates: Sequence[Candidate],
    owners: Sequence[int],
    world: int,
    meeting: Meeting,
    words: tuple[int, int],
    loose: Sequence[tuple[int, int]],
    measured: tuple[int, int] | None,
    steps: int,
) -> PlanReport:
    """The report of a plan.

    Args:
        candidates: All blocks.
        owners: Their owners.
        world: Number of processes.
        meeting: Names of the parameters, and who stores what of them.
        words: Bytes that the two collectives send to each process beside tensors.
        loose: `(process, bytes)` of gradients in no block that it sends to every other one on the way to the owners.
        measured: See `PlanReport`.
        steps: See `PlanReport`.
    """
    rows, state, work = [], [0] * world, [0.0] * world
    inward, outward = [words[0] * (world - 1)] * world, [words[1] * (world - 1)] * world
    bound = [0] * world
    for rank, size in loose:
        inward[rank] += size * (world - 1)
        bound[rank] += size * (world - 1)
    for c, owner in zip(candidates, owners, strict=True):
        row = BlockRow(
            meeting.names[c.piece.index], c.piece.key or "", c.piece.block, owner, state_bytes(c), cost(c)
        )  # fmt: skip
        rows.append(row)
        state[owner] += row.state_bytes
        work[owner] += row.operations
        size = c.bucket.param_dtype.itemsize * (2 if "param" in streams(c.bucket, dict(c.hp)) else 1)
        for strand in c.piece.strands:
            where = meeting.shapes[strand.index], meeting.held[strand.index]
            for source, patch in sources(strand, *where, owner, c.position):
                if source != owner:
                    inward[source] += size * patch.numel
                    bound[source] += size * patch.numel
            for holder, patch in holders(strand, *where):
                if holder != owner:
                    outward[owner] += c.bucket.dtype.itemsize * patch.numel
                    bound[owner] += c.bucket.dtype.itemsize * patch.numel
    sent = list(zip(inward, outward, strict=True))
    return PlanReport(state, work, world, rows, sent, bound, measured, steps)
