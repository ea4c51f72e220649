"""Which rank owns a block: the same answer on every rank, from costs and sizes alone.

Longest processing time first: blocks in descending order of cost, each to a rank that stays within 5 % of the mean, in
operations and in bytes. Of those ranks it takes the one that

1. stores most of the block already (what is not there must travel, twice a step);
2. has least work in the calls in which the block's factors are refreshed, so that no call is a spike on any rank;
3. has least work in all, then fewest bytes, then the lowest number.

Where there is no such rank, the least loaded one with room for its bytes takes it, if its load is below the mean; else
the least loaded of all. Hence, whatever the blocks are, with c the cost of the dearest one,

    load of a rank <= max(1.05 mean, mean + c, what it owned before)

since the least loaded rank never has more than the mean, and any other has room. For bytes there is no such promise:
they stay within 5 % as long as blocks are small against a rank's share. Where some block found no room, all are placed
a second time, each with the *fullest* rank that has room for it, so that gaps stay whole; the flatter result counts.

Sums are exact or in canonical order, and nothing is drawn, hashed or measured: that is why all ranks agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SLACK = 0.05  # above the mean; less leaves locality and phases no choice, more is idle time of all other ranks


@dataclass(frozen=True)
class Item:
    """A block, as far as its owner is concerned.

    Attributes:
        key: Its canonical name: the parameter's, and where the block begins. Keys are unique, and can be compared.
        cost: Floating-point operations per step, those of refreshes spread over their period.
        size: Bytes of state.
        phases: `(period, phase, operations)` of each of its refresh units.
        held: `(rank, elements)` of it that are stored there already; None: everywhere.
    """

    key: tuple
    cost: float
    size: int
    phases: tuple[tuple[int, int, float], ...] = ()
    held: tuple[tuple[int, int], ...] | None = None


def assign(items: Sequence[Item], world: int, known: Mapping[tuple, int] | None = None) -> dict[tuple, int]:
    """An owner for every block.

    Args:
        items: All blocks, in any order.
        world: Number of ranks.
        known: Owners of some of them, which they keep. Default: none.

    Returns:
        The owner's rank by key.

    Raises:
        ValueError: If keys are not unique, a cost or size is negative, infinite or nan, a rank is not in
            `range(world)`, or `known` names a block that is not there.
    """
    known = {} if known is None else known
    _check(items, world, known)
    order = sorted(items, key=lambda item: (-item.cost, -item.size, item.key))
    spread = _Placement(order, world, known)
    if spread.fits:
        return spread.owners
    packed = _Placement(order, world, known, pack=True)
    return packed.owners if packed.excess() < spread.excess() else spread.owners


def balance(values: Sequence[float]) -> float:
    """Largest over mean of non-negative values: 1.0 where all are equal (or zero).

    Raises:
        ValueError: If there are no values.
    """
    if not len(values):
        raise ValueError("values must not be empty")
    mean = math.fsum(values) / len(values)
    return max(values) / mean if mean > 0 else 1.0


class _Placement:
    """One way to place all blocks, and what every rank has of it."""

    def __init__(self, order: Sequence[Item], world: int, known: Mapping[tuple, int], pack: bool = False) -> None:
        self.mean_load = math.fsum(item.cost for item in order) / world
        self.mean_size = sum(item.size for item in order) / world
        self.load, self.size = np.zeros(world), np.zeros(world)
        self.work: dict[tuple[int, int], Any] = {}  # by period and phase
        self.owners: dict[tuple, int] = {}
        self.fits = True
        for item in order:
            if item.key in known:
                self._give(item, known[item.key])
        for item in order:
            if item.key not in known:
                self._give(item, self._choose(item, pack))

    def excess(self) -> float:
        """Balance of operations or bytes, whichever is worse."""
        return max(balance(self.load.tolist()), balance(self.size.tolist()))

    def _give(self, item: Item, rank: int) -> None:
        self.owners[item.key] = rank
        self.load[rank] += item.cost
        self.size[rank] += item.size
        for period, phase, operations in item.phases:
            self._work(period, phase)[rank] += operations

    def _work(self, period: int, phase: int) -> Any:
        if (period, phase) not in self.work:
            self.work[period, phase] = np.zeros_like(self.load)
        return self.work[period, phase]

    def _choose(self, item: Item, pack: bool) -> int:
        room = self.size <= (1 + SLACK) * self.mean_size - item.size
        within = room & (self.load <= (1 + SLACK) * self.mean_load - item.cost)
        if not within.any():
            self.fits = False
            low = room & (self.load <= self.mean_load)
            return _first(np.flatnonzero(low if low.any() else np.ones_like(low)), self.load, self.size)
        candidates = _nearest(item, within)
        if pack:
            return _first(candidates, -self.load, -self.size)
        work = [sum(self._work(period, phase) for period, phase, _ in item.phases)] if item.phases else []
        return _first(candidates, *work, self.load, self.size)


def _nearest(item: Item, within: Any) -> Any:
    """Of the ranks marked, those which hold most of a block, in ascending order; all where none holds any of it."""
    held = {rank: elements for rank, elements in item.held or () if within[rank]}
    most = max(held.values(), default=0)
    return np.array(sorted(r for r, n in held.items() if n == most)) if most > 0 else np.flatnonzero(within)


def _first(candidates: Any, *keys: Any) -> int:
    """The candidate whose keys are least, compared in turn; of equals the one that comes first."""
    for key in keys:
        if len(candidates) == 1:
            break
        values = key[candidates]
        candidates = candidates[values == values.min()]
    return int(candidates[0])


def _check(items: Sequence[Item], world: int, known: Mapping[tuple, int]) -> None:
    if world < 1:
        raise ValueError(f"world must be an int >= 1, got {world!r}")
    keys = {item.key for item in items}
    if len(keys) < len(items):
        raise ValueError(f"items must have keys of their own, got {len(items)} items with {len(keys)} keys")
    for item in items:
        for name, value in (("cost", item.cost), ("size", item.size)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number >= 0, got {value!r} of {item.key}")
        for rank, _ in item.held or ():
            if not 0 <= rank < world:
                raise ValueError(f"held must name ranks in range({world}), got {rank!r} of {item.key}")
    for key, rank in known.items():
        if key not in keys:
            raise ValueError(f"known must name items, got {key}")
        if not 0 <= rank < world:
            raise ValueError(f"known must name ranks in range({world}), got {rank!r} of {key}")
