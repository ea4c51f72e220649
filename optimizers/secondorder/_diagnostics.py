"""`diagnostics()`: what state and measurements say about training, as a flat dict of floats.

Of the curvature C that a block's state holds, with eigenvalues c (`curvature(p)`), and of what a step applies:

    effective_rank_i   exp(-Σ p log p), p = eigenvalues of mode i over their sum (Roy and Vetterli 2007); between 1 and
                       d_i. A mode's eigenvalues: sums of c over the other modes, which is exact for ⊗ C_i
    damping_share      mean of 1 - P / P_0 over eigendirections; P is applied, P_0 would be without damping: λ / (c + λ)
                       where P = 1 / (c + λ). 0: undamped, 1: gradient descent. Damping that is learned with the factors
                       is no part of P, and counts as 0
    average_weight     1 - β^t: how full the averages of statistics are, as if there were no fast start

All tensors that are asked for come to the host in one transfer per device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder._reports import resting
from secondorder._step import hyperparameters
from secondorder._watch import TOP, Watch, bucket_names
from secondorder.layout.buckets import COUNTERS, BaseBucket, Bucket
from secondorder.layout.faces import Layout
from secondorder.layout.schedule import last_refresh

Group = Mapping[str, Any]
Told = dict[tuple[str, str], Tensor]

_DAMPING = {"damping", "eps", "floor"}  # options that damp what is applied


def diagnostics(layout: Layout, groups: Sequence[dict[str, Any]], watch: Watch, full: bool) -> dict[str, float]:
    """See `PreconditionedOptimizer.diagnostics`."""
    names = bucket_names(layout.buckets)
    told = _read(_asked(layout, groups, watch, full, names))
    out = {
        "parameters": len(layout.params),
        "preconditioned_blocks": sum(b.rows for b in layout.buckets if isinstance(b, Bucket)),
        "fallback_parameters": sum(b.rows for b in layout.buckets if b.fallback),
        "state_bytes": 4 * len(layout.params) + sum(map(_bytes, layout.buckets)),
        "workspace_bytes": sum(t.numel() * t.element_size() for t in layout._workspaces.values()),
        "refused_steps": max((float(t) for (_, key), t in told.items() if key == "refused"), default=0),
    }
    buckets = {
        name: _of_bucket(b, hyperparameters(b, groups[b.group]), layout.clock, name, told)
        for name, b in zip(names, layout.buckets, strict=True)
    }
    blocks = [buckets[name] for name, b in zip(names, layout.buckets, strict=True) if isinstance(b, Bucket)]

    def over(found: Sequence[Mapping[str, float]], key: str, how: Callable[[list[float]], float]) -> float:
        values = [values[key] for values in found if key in values]
        return math.nan if any(map(math.isnan, values)) else how(values)

    out["refresh_failures"] = over(blocks, "refresh_failures", sum)
    if layout.plan.failures is not None:  # those of other processes' blocks too
        out["refresh_failures"] = max(out["refresh_failures"], float(layout.plan.failures))
    out["waiting_blocks"] = over(blocks, "waiting", sum)
    out["skipped_updates_max"] = over(list(buckets.values()), "skipped_updates_max", _most)
    out["steps_since_refresh_max"] = over(blocks, "steps_since_refresh_max", _most)
    out["average_weight_min"] = over(list(buckets.values()), "average_weight_min", lambda v: min(v, default=0.0))
    if layout.gradient_norm is not None:
        out["gradient_norm"] = float(told["", "gradient_norm"])
    for key in ("norm_clip", "kl_clip"):
        factors = [float(t) for (_, name), t in told.items() if name == key]
        if factors:
            out[f"{key}_factor"] = min(factors)
    if any("clipped_share" in values for values in blocks):
        count = over(blocks, "clipped_share", len)
        out["clipped_share"] = over(blocks, "clipped_share", sum) / count
    _add_measured(out, buckets, layout, groups, told)
    if ("", "ggn") in told:
        out.update({f"ggn_top_{i}": value for i, value in enumerate(told["", "ggn"].tolist(), 1)})
    if full:
        _add_spectral(out, buckets, told)
    for name, values in buckets.items():
        out.update({f"bucket/{name}/{key}": value for key, value in values.items()})
    return {key: float(value) for key, value in out.items()}


def _asked(layout: Layout, groups: Sequence[dict[str, Any]], watch: Watch, full: bool, names: Sequence[str]) -> Told:
    """By bucket (or `""`) and name, what must be read from devices."""
    asked = {(str(device), "refused"): count for device, count in layout.refused.items()}
    if layout.gradient_norm is not None:
        asked["", "gradient_norm"] = layout.gradient_norm
    if watch.top is not None:
        asked["", "ggn"] = watch.top
    for name, b in zip(names, layout.buckets, strict=True):
        found = {key: b.s[key] for key in COUNTERS if key in b.s} | b.told
        if full and b.device.type != "meta":
            found |= _spectral(b, hyperparameters(b, groups[b.group]))
        for key, kept in (("moved", watch.moved), ("spread", watch.spread), ("averages", watch.averages)):
            if name in kept:
                found[key] = kept[name]
        asked.update({(name, key): tensor for key, tensor in found.items()})
    return asked


def _read(asked: Told) -> Told:
    """The same on the CPU in float64; nan for what has no values (the meta device)."""
    out: Told = {}
    for device in {tensor.device for tensor in asked.values()}:
        here = {key: tensor for key, tensor in asked.items() if tensor.device == device}
        if device.type == "meta":
            out.update({key: torch.full(tensor.shape, torch.nan).double() for key, tensor in here.items()})
            continue
        wide = torch.float32 if device.type == "mps" else torch.float64
        packed = torch.cat([tensor.detach().reshape(-1).to(wide) for tensor in here.values()]).cpu().double()
        parts = packed.split([tensor.numel() for tensor in here.values()])
        out.update({key: part.view(here[key].shape) for key, part in zip(here, parts, strict=True)})
    return out


def _of_bucket(b: BaseBucket, hp: Group, clock: Tensor, name: str, told: Told) -> dict[str, float]:
    """What is known of a bucket from counters."""
    count = told[name, "count"]
    seen = told.get((name, "seen"), count)
    span = b.rows // len(b.pieces)
    calls = clock[[piece.index for piece in b.pieces]].double()
    due = (calls - b.method.waits(hp)).clamp_min(0).repeat_interleave(span)
    out = {
        "blocks": float(b.rows),
        "elements": float(b.numel),
        "state_bytes": float(_bytes(b)),
        "average_weight_min": float((1 - _decay(b, hp) ** seen).amin()),
        "skipped_updates_max": float((due - count).amax()),
    }
    if not isinstance(b, Bucket):
        return out
    stale = 0
    for phases in b.phases.values() if "refresh_every" in hp else ():
        for piece, phase in zip(b.pieces, phases, strict=True):
            t = int(clock[piece.index])
            stale = max(stale, t - last_refresh(b.method, hp, phase, t))
    out["steps_since_refresh_max"] = stale
    out["waiting"] = float(torch.where(count.isnan(), count, (count == 0).double()).sum())
    out["refresh_failures"] = float(told[name, "failures"].sum())
    if (name, "clip") in told:
        factors = told[name, "clip"]
        out["clipped_share"] = float(torch.where(factors.isnan(), factors, (factors < 1).double()).mean())
    return out


def _decay(b: BaseBucket, hp: Group) -> float:
    """Decay rate of the averages of statistics; 0 for a sum, which forgets nothing."""
    if not isinstance(b, Bucket):
        return float(hp["betas"][1])
    if hp.get("factor_average") == "sum":
        return 0.0
    if hp.get("factor_beta") is not None:
        return float(hp["factor_beta"])
    return 1 - float(hp["factor_rate"]) if "factor_rate" in hp else float(hp["betas"][1])


def _bytes(b: BaseBucket) -> int:
    return sum(t.numel() * t.element_size() for t in b.s.values())


def _most(values: list[float]) -> float:
    return max(values, default=0.0)


# ---------------------------------------------------------------------- measured by track()


def _add_measured(
    out: dict[str, float], buckets: Mapping[str, dict[str, float]], layout: Layout, groups: Sequence[Group], told: Told
) -> None:
    moved = {name: told[name, "moved"] for name in buckets if (name, "moved") in told}
    for name, squares in moved.items():
        buckets[name].update(_movement(squares))
    if moved:
        found = _movement(torch.stack(list(moved.values())).sum(0))
        del found["gradient_norm"]  # of all parameters, it is told in any case
        out.update(found)
    spread = {name: told[name, "spread"] for name in buckets if (name, "spread") in told}
    by_mean = {f: groups[b.group].get("loss_reduction") != "sum" for f, b in zip(buckets, layout.buckets, strict=True)}
    for name, values in spread.items():
        v, s, rows = values.tolist()
        buckets[name].update(_noise(v, s, rows, by_mean[name]))
    if spread:
        v, s, _ = torch.stack(list(spread.values())).sum(0).tolist()
        rows = min(float(values[2]) for values in spread.values())
        out.update(_noise(v, s, rows, by_mean[next(iter(spread))]))
        v, s = torch.stack([told[name, "averages"] for name in spread]).sum(0).tolist()
        out["batch_size_hint"] = rows * v / s if s > 0 else math.inf if v > 0 else math.nan


def _movement(squares: Tensor) -> dict[str, float]:
    p, step, g, inner = squares.tolist()
    found = {"parameter_norm": p**0.5, "update_norm": step**0.5, "gradient_norm": g**0.5}
    found["update_ratio"] = (step / p) ** 0.5 if p else math.inf if step else 0.0
    found["cosine"] = inner / (step * g) ** 0.5 if step * g else math.nan
    return found


def _noise(v: float, s: float, rows: float, by_mean: bool) -> dict[str, float]:
    """Of one row's gradient, in a mean loss; of a sum, where it is N times as large, divided by it."""
    unit = 1 if by_mean else rows**2
    return {
        "sample_gradient_norm": max((rows * v + s) / unit, 0.0) ** 0.5,
        "gradient_variance": rows * v / unit,
        "signal_to_noise": max(s, 0.0) / v if v > 0 else math.inf if v <= 0 else math.nan,
    }


# ---------------------------------------------------------------------- full


@torch.no_grad()
def _spectral(b: BaseBucket, hp: dict[str, Any]) -> dict[str, Tensor]:
    """Condition numbers, effective ranks and shares of damping of a bucket's rows; its largest eigenvalues."""
    s, c = b.s, resting(b, hp, b.s)
    live = c.seen > 0
    out = {f"condition_{i}": values[live] for i, values in b.method.conditions(s, c).items()}
    found = b.method.spectra(s, c)
    if found is None:
        return out
    free = b.method.spectra(s, resting(b, {**hp, **dict.fromkeys(_DAMPING & hp.keys(), 0.0)}, s))
    assert free is not None
    share = torch.where(free[2].isfinite() & (free[2] > 0), 1 - found[2] / free[2], 1.0).clamp(0, 1)
    if not isinstance(b, Bucket):
        return {**out, "damping_share": share[b.expand(live, share)]}
    out["damping_share"] = share.flatten(1).mean(1)[live]
    held = b.method.held(s, c)
    curvature = (found[1] if held is None else held[1])[live].clamp_min(0)
    for i in sorted((*b.modes, *b.diagonal)):
        turned = curvature.movedim(i + 1, 1)
        sums = turned.flatten(2).sum(2) if turned.ndim > 2 else turned
        p = sums / sums.sum(1, keepdim=True)
        out[f"effective_rank_{i}"] = torch.special.entr(p).sum(1).exp()
    values = curvature.flatten()
    out["top"] = values.topk(min(TOP, values.numel())).values
    return out


def _add_spectral(out: dict[str, float], buckets: Mapping[str, dict[str, float]], told: Told) -> None:
    conditions, ranks, top = [], [], []
    damped, elements = 0.0, 0.0
    for (name, key), values in told.items():
        if not values.numel():
            continue
        if key.startswith("condition_"):
            buckets[name][key] = float(values.max())
            conditions.append(values)
        elif key.startswith("effective_rank_"):
            buckets[name][key] = float(values.mean())
            ranks.append(values)
        elif key == "damping_share":
            buckets[name][key] = float(values.mean())
            if (name, "top") in told:
                damped += buckets[name][key] * buckets[name]["elements"]
                elements += buckets[name]["elements"]
        elif key == "top":
            top.append(values)
    if conditions:
        every = torch.cat(conditions)
        out["condition_max"], out["condition_median"] = float(every.max()), float(every.median())
    if ranks:
        out["effective_rank_min"] = float(torch.cat(ranks).min())
    if elements:
        out["damping_share"] = damped / elements
    if top:
        largest = torch.cat(top).sort(descending=True).values[:TOP]
        out.update({f"curvature_top_{i}": float(value) for i, value in enumerate(largest.tolist(), 1)})
