"""`fisher()`: what the accumulators hold, as tensors by parameter name, for merging, pruning or continual learning.

Of a parameter block with curvature C = V diag(c) Vᵀ, V = ⊗ Q_i (`curvature(p)`):

    diag        diag(C) = ⊗ (Q_i ∘ Q_i) c, exactly
    kronecker   F_i with ⊗ F_i ≈ C: the factors that the state holds, scaled together to tr(⊗ F_i) = tr(C)

Scale. Layer methods hold F = E[u uᵀ] over the gradients u of single loss terms: the Fisher matrix of the average loss
term, empirical, or true with `fisher_backward`. Others hold second moments of what a step sees, the gradient g of a
mean over B terms: E[g gᵀ] = F / B + (1 - 1/B) E[u] E[u]ᵀ. Times B that is F as far as the mean gradient is small beside
the noise, |E[u]|² ≪ tr(F) / B.

Li et al., *Fishers for Free? Approximating the Fisher Information Matrix by Recycling the Squared Gradient Accumulator*
(2025, arXiv:2507.18807).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from secondorder import linalg
from secondorder._reports import resting
from secondorder._step import hyperparameters
from secondorder.layout.buckets import BaseBucket, Bucket, Piece
from secondorder.layout.faces import Layout
from secondorder.preconditioner.modes import mul
from secondorder.preconditioner.protocol import Context, State

if TYPE_CHECKING:
    from secondorder._inspection import Inspection

KINDS = ("diag", "kronecker")


def fisher(optimizer: Inspection, kind: Literal["diag", "kronecker"], batch_size: float | None) -> dict[str, Any]:
    """See `Inspection.fisher`."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if batch_size is not None and not batch_size > 0:
        raise ValueError(f"batch_size must be None or a number > 0, got {batch_size!r}")
    layout, groups = optimizer._complete(), optimizer._groups()
    names = {
        id(p): optimizer._label(gi, pi).name
        for gi, group in enumerate(optimizer.param_groups)
        for pi, p in enumerate(group["params"])
    }
    if kind == "diag":
        values = _diagonals(layout, groups, batch_size)
        return {names[id(p)]: value for p, value in zip(layout.params, values, strict=True)}
    found = _kroneckers(layout, groups, batch_size, names)
    if not found:
        raise ValueError(
            f"{type(optimizer).__name__} holds no Kronecker factors of these parameters (see coverage()): use "
            "kind='diag'"
        )
    return found


def _diagonals(layout: Layout, groups: Sequence[dict[str, Any]], batch_size: float | None) -> list[Tensor]:
    views: dict[int, Tensor] = {}
    for b in layout.buckets:
        group = groups[b.group]
        s, c = _at_rest(b, group)
        bases, values = _curvature(b, s, c)
        for i, Q in bases.items():
            values = mul(Q.square(), values, i)
        values = _known(b, values, c) * _scale(b, group, batch_size)
        for r, strand in b.strands:
            view = views.setdefault(strand.index, values.new_zeros(strand.view))
            view[strand.region if strand.region is not None else ...] = strand.place(b.row(values, r))
    out = []
    for i, p in enumerate(layout.params):
        fold = layout.treatments[i][2].fold
        out.append(views[i].reshape(p.shape) if fold is None else fold.undo(views[i], tuple(p.shape)).contiguous())
    return out


def _kroneckers(
    layout: Layout, groups: Sequence[dict[str, Any]], batch_size: float | None, names: Mapping[int, str]
) -> dict[str, Any]:
    entries: dict[int, dict[str, Any]] = {}
    for b in layout.buckets:
        if not isinstance(b, Bucket) or not (b.modes or b.diagonal):
            continue
        group = groups[b.group]
        s, c = _at_rest(b, group)
        factors = _factors(b, s, c, _scale(b, group, batch_size))
        for r, piece in enumerate(b.pieces):
            entry = entries.setdefault(piece.index, described(layout, piece.index, names))
            mine = {i: F[r] if b.span is None else F[r * b.span : (r + 1) * b.span] for i, F in factors.items()}
            entry["blocks"].append(
                {
                    "region": region(piece, entry["view"]),
                    "factors": [mine[i].clone() if i in mine else None for i in range(len(b.shape))],
                }
            )
    return {names[id(layout.params[i])]: entries[i] for i in sorted(entries)}


def described(layout: Layout, index: int, names: Mapping[int, str]) -> dict[str, Any]:
    """How a parameter is seen by its blocks, which are to be filled in (see `_factors.factors`)."""
    p, t = layout.params[index], layout.treatments[index][2]
    return {
        "parameters": [names[key] for key in (id(p), t.joined) if key is not None],
        "shape": tuple(p.shape),
        "view": t.view if t.joined is None else (*t.view[:-1], t.view[-1] + 1),
        "fold": None if t.fold is None else tuple(t.fold),
        "batched": t.batched,
        "bias_column": t.joined is not None,
        "blocks": [],
    }


def region(piece: Piece, view: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """`(start, stop)` of a piece on every axis of the view."""
    starts = piece.at or (0,) * len(view)
    lengths = piece.block if piece.span is None else (piece.span, *piece.block)
    return tuple((start, start + length) for start, length in zip(starts, lengths, strict=True))


def _at_rest(b: BaseBucket, group: dict[str, Any]) -> tuple[State, Context]:
    return b.s, resting(b, hyperparameters(b, group), b.s)


def _curvature(b: BaseBucket, s: State, c: Context) -> tuple[dict[int, Tensor], Tensor]:
    """Bases by mode, and the spectrum of all rows in them."""
    held = b.method.held(s, c)
    if held is not None:
        return held
    found = b.method.spectra(s, c)
    if found is None:
        raise ValueError(f"the state of {type(b.method).__name__} has no diagonal")
    return found[0], found[1]


def _known(b: BaseBucket, values: Tensor, c: Context) -> Tensor:
    """Zero in rows that have observed nothing."""
    return torch.where(b.expand(c.seen, values) > 0, values, 0.0)


def _factors(b: Bucket, s: State, c: Context, scale: float) -> dict[int, Tensor]:
    """Factors by mode, `(n, d, d)` or `(n, d)`, whose product has the trace of the curvature, times `scale`."""
    bases, values = _curvature(b, s, c)
    found = dict(b.method.factors(s, c))
    for name in () if found else s:
        kind, _, mode = name.rpartition("_")
        if kind in ("covariance", "diagonal"):
            found[int(mode)] = s[name]
    traces = {i: (F if F.ndim == 2 else F.diagonal(dim1=-2, dim2=-1)).sum(-1) for i, F in found.items()}
    for i in () if found else sorted((*b.modes, *b.diagonal)):  # the spectrum is a product: sums over the other modes
        sums = values.movedim(i + 1, 1).flatten(2).sum(2)
        found[i] = (bases[i] * sums[:, None]) @ bases[i].mT if i in bases else sums
        traces[i] = sums.sum(1)  # a basis may be orthogonal but roughly
    logs = [linalg.wide(trace).log() for trace in traces.values()]
    free = torch.Size(d for i, d in enumerate(b.shape) if i not in found).numel()
    total = linalg.wide(values.flatten(1).sum(1)) * (scale / free)
    each = ((total.log() - torch.stack(logs).sum(0)) / len(found)).exp()
    return {i: _known(b, F * b.expand(each.to(F.dtype), F), c) for i, F in found.items()}


def _scale(b: BaseBucket, group: Mapping[str, Any], batch_size: float | None) -> float:
    """What turns the state's scale into that of single terms of a mean loss."""
    by_term = bool(b.method.statistics((1, 1), (0, 1), ()))
    if batch_size is None:
        return 1.0
    if group.get("loss_reduction") == "sum":
        return 1 / batch_size
    return 1.0 if by_term or (group.get("batch_size") is not None and not b.fallback) else float(batch_size)
