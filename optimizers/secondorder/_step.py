"""The phases of one step on one bucket: pure tensors and row ranges. Knows no parameter and no method's name.

    stage    streams into the workspaces; L2 decay
    begin    rows with their first usable gradient
    screen   gradients judged by the factors as they are
    early    statistics and refreshes of rows that observe before they apply
    apply    momentum, direction, coupled decay, update clip
    late     statistics and refreshes of rows that apply before they observe
    settle   what all buckets must agree on (KL clip), coupled decay, momentum that lives after the factor, update clip
    commit   decoupled decay and the update

`advance` ends before `settle` for buckets that are held, until all have their directions; the others are completed.
Decisions are device tensors taken before any state is touched: `ok` for the whole step, a gate per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from secondorder.layout.buckets import BaseBucket, Bucket, FlatBucket, Part, wide_dtype
from secondorder.layout.faces import Layout
from secondorder.layout.plan import Flags, Plan, smallest_norm
from secondorder.layout.schedule import RefreshPart, plan_step
from secondorder.linalg import known
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


_TOGETHER: tuple[Literal["norm_clip", "kl_clip"], ...] = ("norm_clip", "kl_clip")


@dataclass
class Held:
    """A bucket whose direction waits in its workspace to be settled.

    Attributes:
        bucket: The bucket.
        hp: Its hyper-parameters.
        rows: Pieces (of a flat bucket: rows) to be written.
        taken: `(n,)`, 1 in rows that take part in this step, else 0.
        slopes: `(n,)`, inner product of the direction and the (averaged) gradient that it is made of, float64.
    """

    bucket: BaseBucket
    hp: Group
    rows: list[int]
    taken: Tensor
    slopes: Tensor | None = None


def advance(
    buckets: Sequence[BaseBucket],
    plan: Plan,
    params: Sequence[Tensor],
    flags: Flags,
    groups: Sequence[Group],
    calls: Sequence[int],
) -> list[Held]:
    """From gradients to directions. Buckets that wait for no other one are completed at once, the others returned."""
    held = []
    for b in buckets:
        hp = hyperparameters(b, groups[b.group])
        present = flags.present
        if not any(piece.present(present) for piece in b.pieces):
            continue
        if isinstance(b, FlatBucket) and _step_in_place(b, params, flags, hp, calls):
            continue
        plan.stage(b, params, flags)
        grad = b.work["grad"]
        if hp["maximize"]:
            grad.neg_()
        if hp["weight_decay_kind"] == "l2" and hp["weight_decay"] != 0:
            grad.add_(b.work["param"], alpha=hp["weight_decay"])
        if isinstance(b, FlatBucket):
            found = _advance_flat(b, flags, hp, calls)
        else:
            assert isinstance(b, Bucket)
            found = _advance(b, flags, hp, calls)
        if b.held:
            held.append(found)
        else:
            _settle(found, plan)
            commit([found], plan, params, flags)
    return held


def settle(held: Sequence[Held], layout: Layout, groups: Sequence[Group]) -> None:
    """From directions to updates, which stay in the workspaces."""
    for name in _TOGETHER:
        if any(group.get(name) is not None for group in groups):
            _clip_together([h for h in held if h.hp[name] is not None], name, layout)
    for h in held:
        _settle(h, layout.plan)


def commit(held: Sequence[Held], plan: Plan, params: Sequence[Tensor], flags: Flags) -> None:
    """Decoupled decay and the updates."""
    for h in held:
        plan.commit(h.bucket, params, flags, h.hp, h.rows)


def _clip_together(held: Sequence[Held], name: Literal["norm_clip", "kl_clip"], layout: Layout) -> None:
    """Scale down all directions by what they have in common.

    `<P m, m>` is the squared length of the direction in the curvature's own metric; times lr², to second order, twice
    the divergence KL(p_old || p_new) of a step along it.
    """
    stretched = name == "kl_clip"
    # In the order of the blocks, whoever owns them: the sum has the same bits for every number of processes.
    device = layout.params[0].device
    slopes = torch.zeros(layout.rows, dtype=wide_dtype(device), device=device)
    for h in held:
        assert h.slopes is not None and isinstance(h.bucket, Bucket)
        found = h.slopes * (h.hp["lr"] ** 2 if stretched else 1.0)
        slopes[h.bucket.places.to(device)] = found.to(slopes)
    total = layout.plan.merge(slopes).sum().abs()
    for h in held:
        limit = h.hp["kl_clip"] if stretched else h.hp["norm_clip"] ** 2
        factor = (limit / total.clamp_min(torch.finfo(total.dtype).tiny)).sqrt().clamp_max(1.0)
        h.bucket.told[name] = factor
        update = h.bucket.work["update"]
        update.mul_(factor.to(update.device, update.dtype))
        if h.slopes is not None:
            h.slopes = h.slopes * factor.to(h.slopes.device) ** 2


def _settle(h: Held, plan: Plan) -> None:
    """Coupled decay, momentum after the factor, update clip."""
    b, hp, update = h.bucket, h.hp, h.bucket.work["update"]
    if hp["weight_decay_kind"] == "coupled" and hp["weight_decay"] != 0:
        update.add_(torch.where(b.expand(h.taken, update) > 0, b.work["param"], 0.0), alpha=hp["weight_decay"])
    if b.method.momentum == "update":
        update.copy_(_heavy_ball(b.s["momentum"], update, b.expand(h.taken, update) > 0, hp))
    _clip(b, hp, plan)


def _advance(b: Bucket, flags: Flags, hp: Group, calls: Sequence[int]) -> Held:
    """Statistics, refreshes and directions on stacked blocks; the directions are left in the workspace."""
    method, x = b.method, b.work
    schedule = plan_step(b, hp, calls, flags.present)
    ok = flags.ok[b.device]
    # A threshold, no number that enters anything: float64, as in `norms`, would cost a copy of the gradient.
    usable = torch.linalg.vector_norm(x["grad"].flatten(1), dim=1) > smallest_norm(b.dtype)
    seen_gate = ok & usable
    if "arrived" in x:
        seen_gate = seen_gate & (x["arrived"] > 0)
        usable = seen_gate | (usable & (b.s["seen"] > 0))
    # A row with no usable gradient yet waits wholly; later ones go on with momentum and decay, as in torch.
    gate = (ok & (usable | (b.s["count"] > 0))).to(b.dtype)
    seen_gate = seen_gate.to(b.dtype)
    taken = torch.zeros_like(gate)

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
    slopes = torch.zeros(b.rows, dtype=wide_dtype(b.device), device=b.device) if b.held else None
    if b.held:
        x["update"].zero_()
    for rows in parts(schedule.apply):
        rows.s["count"].add_(rows.c.gate.to(torch.float32))
        taken[rows.part] = rows.c.gate
        update, moment = _direction(b, rows.s, rows.x, rows.c)
        finite = torch.linalg.vector_norm(update, dim=tuple(range(1, update.ndim))).isfinite()
        if not known(finite):
            update = torch.where(b.expand(finite, update), update, 0.0)
            rows.s["failures"].add_((~finite).to(torch.float32))
        rows.put_update(update)
        if slopes is not None:
            slopes[rows.part] = (update * moment).flatten(1).sum(1, dtype=slopes.dtype)
    observe(schedule.late)
    refresh(schedule.late_refresh)
    return Held(b, hp, schedule.written, taken, slopes)


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


def _direction(b: BaseBucket, s: State, x: dict[str, Tensor], c: Context) -> tuple[Tensor, Tensor]:
    """The method's direction, exactly zero where a row's gate is 0, and the (averaged) gradient it is made of."""
    method = b.method
    moment = _average(s["momentum"], x["grad"], c) if method.momentum == "gradient" else x["grad"]
    u = method.apply(s, moment, x, c)
    # where, not a product: the direction of a row that waits may be inf or nan, and inf * 0 is nan.
    return u if known(c.gate) else torch.where(c.expand(c.gate, u) > 0, u, 0.0), moment


def _average(m: Tensor, new: Tensor, c: Context) -> Tensor:
    """Momentum before the factor, a debiased average, with Nesterov's look-ahead if asked."""
    beta = c.hp["betas"][0]
    m.lerp_(new, c.expand(c.rate(beta, c.count), m))
    return m * beta + new * (1 - beta) if c.hp.get("nesterov") else m


def _heavy_ball(m: Tensor, new: Tensor, taken: Tensor, hp: Group) -> Tensor:
    """Momentum after the factor, `m <- β m + new`, with Nesterov's look-ahead if asked; zero in rows not taken."""
    beta = hp["betas"][0]
    # in increments, so that rows that are not taken keep their bits
    m.add_(torch.where(taken, (beta - 1) * m + new, 0.0))
    return torch.where(taken, new + beta * m if hp.get("nesterov") else m, 0.0)


def _clip(b: BaseBucket, hp: Group, plan: Plan) -> None:
    """Scale down each row's update to at most `max_update_rms`."""
    limit = hp["max_update_rms"]
    if limit is not None:
        update = b.work["update"]
        rms = plan.rms(b, update)
        b.told["clip"] = (limit / rms.clamp_min(torch.finfo(rms.dtype).tiny)).clamp_max(1.0)
        update.mul_(b.expand(b.told["clip"], update))


def _stepping(b: FlatBucket, flags: Flags, hp: Group, calls: Sequence[int]) -> list[bool]:
    """For every row, whether it takes this step: it has a gradient, and waits no longer."""
    waits = b.method.waits(hp)
    return [flags.grads[piece.index] is not None and calls[piece.index] > waits for piece in b.pieces]


def _advance_flat(b: FlatBucket, flags: Flags, hp: Group, calls: Sequence[int]) -> Held:
    """An element-wise method on parameters laid end to end."""
    present = _stepping(b, flags, hp, calls)
    gate = flags.ok[b.device].to(b.dtype).expand(b.rows)
    if not all(present):
        gate = gate * torch.tensor(present, dtype=b.dtype).to(b.device)
    b.s["count"].add_(gate.to(torch.float32))
    c = Context(hp, (), gate, gate, b.s["count"], b.s["count"], expand=b.expand)
    x = {name: work for name, work in b.work.items() if name != "update"}
    b.work["update"].copy_(_direction(b, b.s, x, c)[0])
    return Held(b, hp, [r for r, here in enumerate(present) if here], gate)


def _step_in_place(b: FlatBucket, params: Sequence[Tensor], flags: Flags, hp: Group, calls: Sequence[int]) -> bool:
    """Let the method's multi-tensor kernel work on the parameters' own storage, where it can."""
    in_place = getattr(b.method, "step_in_place", None)
    if in_place is None or not b.fusible or hp["max_update_rms"] is not None:
        return False
    if hp["weight_decay"] != 0 and hp["weight_decay_kind"] != "decoupled":
        return False
    present = _stepping(b, flags, hp, calls)
    rows = [r for r, here in enumerate(present) if here]
    if not rows:
        return True
    ok = flags.ok[b.device]
    taken = ok.to(torch.float32)
    if len(rows) == b.rows:
        b.s["count"].add_(taken)
    else:
        b.s["count"].add_(torch.tensor(present, dtype=torch.float32).to(b.device) * taken)
    found = [flags.grads[b.pieces[r].index] for r in rows]
    grads = [
        g if g.dtype == b.param_dtype and g.is_contiguous() else g.to(b.param_dtype).contiguous()
        for g in found
        if g is not None
    ]
    state = {name: [views[r] for r in rows] for name, views in b.row_state.items()}
    in_place([params[b.pieces[r].index] for r in rows], grads, state, 1 - taken, hp)
    return True
