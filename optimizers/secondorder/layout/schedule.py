"""Which rows do what in a call: host integers only, no device is asked.

Refreshes are *staggered*: every (block, mode) unit has a phase in `range(refresh_every)`, chosen so that each call of a
period does about the same work. `refresh="together"` gives all units phase 0, the papers' schedule.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secondorder.layout.buckets import Bucket, Candidate, Part
from secondorder.preconditioner.protocol import Method, Modes


@dataclass(frozen=True)
class RefreshPart:
    """Rows whose factors of `modes` are due; `initial` where they are made anew instead of tracked."""

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


def assign_phases(candidates: Sequence[Candidate]) -> None:
    """Spread the refresh units over their period by cost: each to the call of the period with the least work so far.

    Candidates come in the order of the parameters, those of all processes, so that phases depend neither on how blocks
    are bucketed or owned nor on how parameters are grouped (among groups of one period), and a group that comes late
    leaves those of the others alone.
    """
    loads: dict[int, list[float]] = {}
    for c in candidates:
        c.phases = dict.fromkeys(c.bucket.modes, 0)
        if c.hp.get("refresh") == "staggered":
            period = int(c.hp["refresh_every"])
            load = loads.setdefault(period, [0.0] * period)
            for mode in c.bucket.modes:
                phase = min(range(period), key=load.__getitem__)
                load[phase] += c.bucket.method.refresh_cost(c.bucket.shape, mode) * c.rows
                c.phases[mode] = phase


def writes(method: Method, hp: Mapping[str, Any], t: int) -> bool:
    """Whether the parameter moves in its call `t` (from 1)."""
    return t > method.waits(hp) and not (t == 1 and method.first == "measure")


def last_refresh(method: Method, hp: Mapping[str, Any], phase: int, t: int) -> int:
    """The latest call up to `t` in which a unit of this phase was due; 0 where there is none yet."""
    offset = method.waits(hp)  # calls that only observe are not counted; all units are due in the last of them
    period = int(hp.get("refresh_every", 1))
    last = t - (t - offset - phase) % period
    if method.eager and hp.get("refresh") == "staggered" and t > offset:
        last = max(last, offset + (1 << (min(t - offset, period).bit_length() - 1)))
    return max(last if last >= method.start else 0, offset)


def plan_step(b: Bucket, hp: Mapping[str, Any], calls: Sequence[int], present: Sequence[bool]) -> Schedule:
    """The schedule of one bucket for one call.

    Args:
        b: The bucket.
        hp: Its group.
        calls: For every parameter, the calls it took part in, this one included.
        present: For every parameter, whether it has a gradient in this call.
    """
    period = int(hp.get("refresh_every", 1))
    times = {calls[piece.index] if piece.present(present) else None for piece in b.pieces}
    t = next(iter(times))
    if len(times) != 1 or t is None or t <= b.method.waits(hp) + b.method.start + 2 * period:
        return _plan_rows(b, hp, calls, present)
    # Every row does the same, and the first periods are over: the schedule repeats, and is remembered.
    key = (b.method.observes(t, hp), t % period, period)
    if key not in b.steady:
        b.steady[key] = _plan_rows(b, hp, calls, present)
    return b.steady[key]


def _plan_rows(b: Bucket, hp: Mapping[str, Any], calls: Sequence[int], present: Sequence[bool]) -> Schedule:
    method, plan, waits = b.method, Schedule(), b.method.waits(hp)
    refreshes = type(method).refresh is not Method.refresh
    groups: dict[str, list[int]] = defaultdict(list)
    due: dict[tuple[bool, Modes, bool], list[int]] = defaultdict(list)
    for r, piece in enumerate(b.pieces):
        if not piece.present(present):
            continue
        t = calls[piece.index]
        early = method.first in ("observe", "skip") if t == 1 else not method.lagged
        if t > waits:
            groups["apply"].append(r)
            if writes(method, hp, t):
                plan.written.append(r)
        if method.observes(t, hp):
            groups["early" if early else "late"].append(r)
        modes = tuple(i for i in b.modes if last_refresh(method, hp, b.phases[i][r], t) == t)
        if modes and refreshes:
            due[early and not method.refresh_last, modes, _is_initial(method, hp, t)].append(r)
    plan.apply = b.parts(groups["apply"])
    plan.early, plan.late = b.parts(groups["early"]), b.parts(groups["late"])
    for (early, modes, initial), rows in due.items():
        refresh = plan.early_refresh if early else plan.late_refresh
        refresh.extend(RefreshPart(part, modes, initial) for part in b.parts(rows))
    return plan


def _is_initial(method: Method, hp: Mapping[str, Any], t: int) -> bool:
    """Whether what a factor applies is made anew instead of tracked: in the first two periods.

    A unit's first refresh may have had a single gradient to go by, or none that was usable: from there, tracking would
    take long.
    """
    waits = method.waits(hp)
    return t <= waits if method.first == "skip" else t < waits + method.start + 2 * int(hp.get("refresh_every", 1))
