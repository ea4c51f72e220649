"""Loss terms, counted, and the loss scale, measured: captured gradients carry it, `p.grad` does not any more.

Both are asked of reference layers, of which the last one comes first. Where it takes no part in a step (heads that take
turns), or only with weight zero, others know as much: a linear layer with a trained bias tells for a column sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from secondorder.curvature.site import Site, Wants
from secondorder.layout.blocks import Fold
from secondorder.layout.plan import Flags, Plan

_TOLERANCE = 1e-3


def references(sites: Sequence[Site], wanted: dict[Site, Wants], trained: Container[int]) -> list[Site]:
    """Reference layers in order of preference; what they must capture is added to `wanted`.

    Args:
        sites: All sites in the order of the network.
        wanted: What is captured at them.
        trained: `id` of parameters that have gradients.
    """
    dense = [s for s in sites if s in wanted and s.rule.d_in and not s.rule.tokens and s.names[0] == "weight"]
    uses = Counter(id(p) for s in sites for p in (s.weight, s.bias))
    found: list[Site] = []
    for site in reversed(dense):
        alone = [p is not None and id(p) in trained and uses[id(p)] == 1 for p in (site.weight, site.bias)]
        by = "bias" if alone[1] else "weight" if alone[0] and not site.rule.pooled else None
        if by is not None and (not found or (by == "bias" and site.rule.masks)):
            wanted[site] = replace(wanted[site], reference=by)
            found.append(site)
    return found


def loss_terms(counts: Sequence[Tensor]) -> Tensor:  # each (1,)
    """The first count that is not zero, 0-d."""
    like = counts[0]
    every = torch.cat([count.to(like.device) for count in counts]).to(like.dtype)
    return every.gather(0, (every > 0).int().argmax(0, keepdim=True))[0]


def applied(sites: Sequence[Site], at: Mapping[int, int], plan: Plan, flags: Flags) -> dict[Site, Tensor]:
    """What probes are compared with, `(k d_out,)`: of the gradients of reference layers, what this process stores.

    Args:
        sites: Reference layers.
        at: By `id`, positions of parameters.
        plan: How they are stored.
        flags: Their gradients.
    """
    out = {}
    for site in sites:
        p, rule = site.bias if site.wants.reference == "bias" else site.weight, site.rule
        grad = flags.grads[at[id(p)]]
        if grad is not None:
            rows, fold = rule.groups * rule.d_out, None if rule.fold is None else Fold(*rule.fold)
            view, fold = ((rows,), None) if p is site.bias else ((rows, rule.d_in), fold)
            out[site] = plan.row_sums(at[id(p)], grad, view, fold)
    return out


def loss_scale(probes: Mapping[Site, Tensor], applied: Mapping[Site, Tensor], grad_scaler: Any) -> Tensor:
    """The factor by which captured gradients exceed `p.grad`, 0-d: exactly a power of two, or 1.

    Args:
        probes: By reference layer, the captured gradient `(k, d_out)` of the bias, or of the weight summed over inputs.
        applied: What they are compared with, where there is a gradient.
        grad_scaler: Where one is given, its scale is taken.
    """
    like = next(iter(probes.values()))
    if grad_scaler is not None:
        return torch.as_tensor(float(grad_scaler.get_scale()), dtype=like.dtype, device=like.device)
    ratio, square = _ratio(probes, applied)
    exponent = ratio.log2()
    near = (exponent - exponent.round()).abs() < _TOLERANCE
    return torch.where(near & (square > 0), exponent.round().exp2(), torch.ones_like(square))


def unclipped(probes: Mapping[Site, Tensor], applied: Mapping[Site, Tensor], scale: Tensor) -> Tensor:
    """The factor by which captured gradients, divided by the loss scale, exceed `p.grad`, 0-d: 1, or it was clipped."""
    ratio, square = _ratio(probes, applied)
    return torch.where(square > 0, ratio / scale, torch.ones_like(square))


def _ratio(probes: Mapping[Site, Tensor], applied: Mapping[Site, Tensor]) -> tuple[Tensor, Tensor]:
    """How many times `p.grad` captured gradients are, in the least squares sense, and the sum of its squares."""
    like = next(iter(probes.values()))
    pairs = [(probe, applied[site]) for site, probe in probes.items() if site in applied]
    if not pairs:
        return torch.ones_like(like[0, 0]), torch.zeros_like(like[0, 0])
    flat = ([t.detach().reshape(-1).to(like.device) for t in side] for side in zip(*pairs, strict=True))
    captured, g = (torch.cat(side).to(like.dtype) for side in flat)  # one cast for all
    square = g.square().sum()
    return (captured * g).sum() / square.clamp_min(torch.finfo(g.dtype).tiny), square
