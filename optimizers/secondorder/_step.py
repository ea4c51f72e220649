"""The phases of one step on one bucket: pure tensors and row ranges. Knows no parameter and no method's name.

    stage    streams into the workspaces; L2 decay
    begin    rows with their first usable gradient
    screen   gradients judged by the factors as they are
    early    statistics and refreshes of rows that observe before they apply
    apply    momentum, direction, coupled decay, update clip
    late     statistics and refreshes of rows that apply before they observe
    commit   decoupled decay and the update

Decisions are device tensors taken before any state is touched: `ok` for the whole step, a gate per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder.layout.buckets import BaseBucket, Bucket, FlatBucket, Part
from secondorder.layout.plan import Flags, Plan, smallest_norm
from secondorder.layout.schedule import RefreshPart, plan_step
from secondorder.preconditioner.protocol import Context, Method, Modes, State

Group = dict[str, Any]


def hyperparameters(b: BaseBucket, group: Group) -> Group:
    """The group's values as the bucket's method reads them: the fallback has its own betas and rate."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.view(())
    if not b.fallback:
        return {**group, "lr": lr}
    betas = group["betas"] if group["fallback_betas"] is None else group["fallback_betas"]
    # The clip is for preconditioned updates: AdamW's are bounded by themselves.
    return {**group, "betas": betas, "lr": lr * group["fallback_lr_scale"], "max_update_rms": None}


def step_bucket(
    b: BaseBucket, plan: Plan, params: Sequence[Tensor], flags: Flags, group: Group, calls: Sequence[int]
) -> None:
    """One step of one bucket, from gradients to parameters."""
    hp = hyperparameters(b, group)
    present = [flags.grads[piece.index] is not None for piece in b.pieces]
    if not any(present):
        return
    if isinstance(b, FlatBucket) and _step_in_place(b, params, flags, hp, present):
        return
    plan.stage(b, params, flags)
    grad = b.work["grad"]
    if hp["maximize"]:
        grad.neg_()
    if hp["weight_decay_kind"] == "l2" and hp["weight_decay"] != 0:
        grad.add_(b.work["param"], alpha=hp["weight_decay"])
    if isinstance(b, FlatBucket):
        rows = _advance_flat(b, flags, hp, present)
    else:
        assert isinstance(b, Bucket)
        rows = _advance(b, flags, hp, calls)
    _clip(b, hp)
    plan.commit(b, params, flags, hp, rows)


def _advance(b: Bucket, flags: Flags, hp: Group, calls: Sequence[int]) -> list[int]:
    """All phases on stacked blocks; the update is left in the workspace. Returns the rows to be written."""
    method, x = b.method, b.work
    schedule = plan_step(b, hp, calls, flags.present)
    ok = flags.ok[b.device]
    usable = b.norms(x["grad"]) > smallest_norm(b.dtype)
    # A row with no usable gradient yet waits wholly; later ones go on with momentum and decay, as in torch.
    seen_gate = (ok & usable).to(b.dtype)
    gate = (ok & (usable | (b.s["count"] > 0))).to(b.dtype)

    def parts(chosen: Sequence[Part], modes: Modes = b.modes, initial: bool = False) -> Iterator[_Rows]:
        for part in chosen:
            for s in b.select(part):
                yield _Rows(b, part, s, gate, seen_gate, hp, modes, initial)

    def observe(chosen: Sequence[Part]) -> None:
        for rows in parts(chosen):
            rows.s["seen"].add_(rows.c.seen_gate.to(torch.float32))
            method.observe(rows.s, rows.x, rows.c)

    def refresh(chosen: Sequence[RefreshPart]) -> None:
        for due in chosen:
            for rows in parts([due.part], due.modes, due.initial):
                method.refresh(rows.s, rows.c)

    if type(method).begin is not Method.begin:
        for rows in parts(schedule.apply):
            rows.c.gate = rows.c.gate * (rows.s["count"] == 0)
            method.begin(rows.s, rows.x, rows.c)
    if type(method).screen is not Method.screen:
        for rows in parts(schedule.apply):
            screened = method.screen(rows.s, rows.x, rows.c)
            if screened is not None:
                for name, value in screened[0].items():
                    x[name][rows.part] = value
                for flag in (gate, seen_gate):
                    flag[rows.part] *= screened[1].to(flag.dtype)
    observe(schedule.early)
    refresh(schedule.early_refresh)
    for rows in parts(schedule.apply):
        rows.s["count"].add_(rows.c.gate.to(torch.float32))
        rows.put_update(_direction(b, rows.s, rows.x, rows.c))
    observe(schedule.late)
    refresh(schedule.late_refresh)
    return schedule.written


class _Rows:
    """Some rows of a bucket at work: their state, streams and context."""

    def __init__(
        self,
        b: Bucket,
        part: Part,
        s: State,
        gate: Tensor,
        seen_gate: Tensor,
        hp: Group,
        modes: Modes,
        initial: bool,
    ) -> None:
        self.b, self.part, self.s = b, part, s
        self.x = {name: work[part] for name, work in b.work.items() if name != "update"}
        self.c = Context(hp, modes, gate[part], seen_gate[part], s["count"], s["seen"], initial, b.diagonal)

    def put_update(self, update: Tensor) -> None:
        """Leave the rows' update in the workspace."""
        self.b.work["update"][self.part] = update


def _direction(b: BaseBucket, s: State, x: dict[str, Tensor], c: Context) -> Tensor:
    """Momentum, the method's direction, coupled decay and clip; exactly zero where a row's gate is 0."""
    method, hp = b.method, c.hp
    moment = _momentum(s["momentum"], x["grad"], c, debias=True) if method.momentum == "gradient" else x["grad"]
    u = method.apply(s, moment, x, c)
    if hp["weight_decay_kind"] == "coupled" and hp["weight_decay"] != 0:
        u = u + hp["weight_decay"] * x["param"]
    if method.momentum == "update":
        u = _momentum(s["momentum"], u, c, debias=False)
    # where, not a product: the direction of a row that waits may be inf or nan, and inf * 0 is nan.
    return torch.where(c.expand(c.gate, u) > 0, u, 0.0)


def _momentum(m: Tensor, new: Tensor, c: Context, debias: bool) -> Tensor:
    """Momentum before the factor (a debiased average) or after it (heavy ball), with Nesterov's look-ahead if asked."""
    beta = c.hp["betas"][0]
    if debias:
        m.lerp_(new, c.expand(c.rate(beta, c.count), m))
        return m * beta + new * (1 - beta) if c.hp["nesterov"] else m
    # m <- gate (beta m + new) + (1 - gate) m, in increments so that a gate of 0 keeps the bits
    m.add_(torch.where(c.expand(c.gate, m) > 0, (beta - 1) * m + new, 0.0))
    return new + beta * m if c.hp["nesterov"] else m


def _clip(b: BaseBucket, hp: Group) -> None:
    """Scale down each row's update to at most `max_update_rms`."""
    limit = hp["max_update_rms"]
    if limit is not None:
        update = b.work["update"]
        rms = b.norms(update) / b.row_numel() ** 0.5
        update.mul_(b.expand((limit / rms.clamp_min(torch.finfo(rms.dtype).tiny)).clamp_max(1.0), update))


def _advance_flat(b: FlatBucket, flags: Flags, hp: Group, present: Sequence[bool]) -> list[int]:
    """An element-wise method on parameters laid end to end. Returns the rows to be written."""
    gate = flags.ok[b.device].to(b.dtype).expand(b.rows)
    if not all(present):
        gate = gate * torch.tensor(present, dtype=b.dtype).to(b.device)
    b.s["count"].add_(gate.to(torch.float32))
    c = Context(hp, (), gate, gate, b.s["count"], b.s["count"], expand=b.expand)
    x = {name: work for name, work in b.work.items() if name != "update"}
    b.work["update"].copy_(_direction(b, b.s, x, c))
    return [r for r, here in enumerate(present) if here]


def _step_in_place(
    b: FlatBucket, params: Sequence[Tensor], flags: Flags, hp: Group, present: Sequence[bool]
) -> bool:
    """Let the method's multi-tensor kernel work on the parameters' own storage, where it can."""
    in_place = getattr(b.method, "step_in_place", None)
    if in_place is None or not b.fusible or hp["max_update_rms"] is not None:
        return False
    if hp["weight_decay"] != 0 and hp["weight_decay_kind"] != "decoupled":
        return False
    rows = [r for r, here in enumerate(present) if here]
    ok = flags.ok[b.device]
    taken = ok.to(torch.float32)
    if len(rows) == b.rows:
        b.s["count"].add_(taken)
    else:
        b.s["count"].add_(torch.tensor(present, dtype=torch.float32).to(b.device) * taken)
    found = [flags.grads[b.pieces[r].index] for r in rows]
    grads = [g.to(b.param_dtype).contiguous() for g in found if g is not None]
    state = {name: [views[r] for r in rows] for name, views in b.row_state.items()}
    in_place([params[b.pieces[r].index] for r in rows], grads, state, 1 - taken, hp)
    return True
