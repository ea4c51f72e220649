"""Which rows do what in a call: host integers only, no device is asked.

Refreshes are *staggered*: every (block, mode) unit has a phase in `range(refresh_every)`, chosen so that each call of a
period does about the same work. `refresh="together"` gives all units phase 0, the papers' schedule.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from secondorder.layout.buckets import Bucket, Part
from secondorder.preconditioner.protocol import Modes


@dataclass(frozen=True)
class RefreshPart:
    """Rows whose factors of `modes` are due; `initial` where it is their first refresh."""

    part: Part
    modes: Modes
    initial: bool


@dataclass
class Schedule:
    """Parts of a bucket by phase of the step. `early` is before the update is computed, `late` after."""

    apply: list[Part] = field(default_factory=list)
    early: list[Part] = field(default_factory=list)
    late: list[Part] = field(default_factory=list)
    early_refresh: list[RefreshPart] = field(default_factory=list)
    late_refresh: list[RefreshPart] = field(default_factory=list)
    written: list[int] = field(default_factory=list)


class _Unit(NamedTuple):
    cost: float
    parameter: int
    at: tuple[int, ...]
    mode: int
    bucket: Bucket
    row: int


def assign_phases(buckets: Sequence[Bucket], groups: Sequence[Mapping[str, Any]]) -> None:
    """Spread the refresh units over their period by cost, dearest first, each to the call with the least work so far.

    The order of ties is the order of the parameters, so that phases depend neither on how blocks are bucketed nor on
    how parameters are grouped (among groups of the same period).
    """
    units: dict[int, list[_Unit]] = defaultdict(list)
    for b in buckets:
        hp = groups[b.group]
        b.phases = {mode: [0] * b.rows for mode in b.modes}
        b.steady.clear()
        if hp["refresh"] == "staggered":
            for mode in b.modes:
                cost = b.method.refresh_cost(b.shape, mode)
                for r, piece in enumerate(b.pieces):
                    at = () if piece.region is None else tuple(cut.start for cut in piece.region)
                    units[int(hp["refresh_every"])].append(_Unit(cost, piece.index, at, mode, b, r))
    for period, members in units.items():
        load = [0.0] * period
        for unit in sorted(members, key=lambda u: (-u.cost, u.parameter, u.at, u.mode)):
            phase = min(range(period), key=load.__getitem__)
            load[phase] += unit.cost
            unit.bucket.phases[unit.mode][unit.row] = phase


def plan_step(b: Bucket, hp: Mapping[str, Any], calls: Sequence[int], present: Sequence[bool]) -> Schedule:
    """The schedule of one bucket for one call.

    Args:
        b: The bucket.
        hp: Its group.
        calls: For every parameter, the calls it took part in, this one included.
        present: For every parameter, whether it has a gradient in this call.
    """
    period, every = int(hp["refresh_every"]), int(hp["statistics_every"])
    times = {calls[piece.index] if present[piece.index] else None for piece in b.pieces}
    t = next(iter(times))
    if len(times) != 1 or t is None or t <= b.method.first_refresh(hp) + period:
        return _plan_rows(b, period, every, b.method.first_refresh(hp), calls, present)
    # Every row does the same and all are past their first refresh: the schedule repeats, and is remembered.
    key = ((t - 1) % every == 0, t % period, period)
    if key not in b.steady:
        b.steady[key] = _plan_rows(b, period, every, b.method.first_refresh(hp), calls, present)
    return b.steady[key]


def _plan_rows(
    b: Bucket, period: int, every: int, start: int, calls: Sequence[int], present: Sequence[bool]
) -> Schedule:
    method, plan = b.method, Schedule()
    groups: dict[str, list[int]] = defaultdict(list)
    due: dict[tuple[bool, Modes, bool], list[int]] = defaultdict(list)
    for r, piece in enumerate(b.pieces):
        if not present[piece.index]:
            continue
        t = calls[piece.index]
        early = method.first != "apply" if t == 1 else not method.lagged
        if not (t == 1 and method.first == "skip"):
            groups["apply"].append(r)
        if (t - 1) % every == 0:
            groups["early" if early else "late"].append(r)
        for initial, modes in _due_modes(b, r, t, start, period).items():
            due[early, modes, initial].append(r)
    plan.apply, plan.written = b.parts(groups["apply"]), groups["apply"]
    plan.early, plan.late = b.parts(groups["early"]), b.parts(groups["late"])
    for (early, modes, initial), rows in due.items():
        refresh = plan.early_refresh if early else plan.late_refresh
        refresh.extend(RefreshPart(part, modes, initial) for part in b.parts(rows))
    return plan


def _due_modes(b: Bucket, r: int, t: int, start: int, period: int) -> dict[bool, Modes]:
    """Modes of a row that are due at call `t`, by whether it is their first refresh."""
    if t < start:
        return {}
    out: dict[bool, Modes] = {}
    for mode in b.modes:
        # A start at the very first call is the same for all phases: it stands in for the identity basis.
        first = start if start == 1 else start + b.phases[mode][r]
        if t == first or (t > first and (t - start - b.phases[mode][r]) % period == 0):
            out[t == first] = (*out.get(t == first, ()), mode)
    return out
