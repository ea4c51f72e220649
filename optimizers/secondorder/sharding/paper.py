"""A plan without the processes: what each of so many would hold and compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secondorder.layout.buckets import Candidate
from secondorder.sharding.costs import cost, phases, state_bytes
from secondorder.sharding.owners import Item, assign, balance


@dataclass(frozen=True)
class PaperPlan:
    """State and work of blocks on every process.

    Attributes:
        state_bytes: By process.
        operations: Floating-point operations per step, by process.
    """

    state_bytes: Sequence[int]
    operations: Sequence[float]

    @property
    def state_balance(self) -> float:
        """Most state of a process over the mean."""
        return balance(self.state_bytes)

    @property
    def work_balance(self) -> float:
        """Most operations of a process over the mean."""
        return balance(self.operations)


def on_paper(candidates: Sequence[Candidate], world: int) -> PaperPlan:
    """The plan of these blocks for `world` processes, wherever their parameters are stored."""
    items = [Item((c.piece.index, c.piece.at), cost(c), state_bytes(c), phases(c)) for c in candidates]
    state, work = [0] * world, [0.0] * world
    owners = assign(items, world)
    for item in items:
        state[owners[item.key]] += item.size
        work[owners[item.key]] += item.cost
    return PaperPlan(state, work)
