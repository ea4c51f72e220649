"""The factors of a layer method in a neutral form, for tools that know nothing of this package (Laplace, influence).

A parameter's curvature is block diagonal. With `X = p` (or its fold) seen as the `view`, a column for the bias last,
every block covers the `region` of X, and on it, flattened row by row, the curvature is

    kronecker   F_0 ⊗ F_1 ⊗ ...     F_i of axis i of the block: a matrix, a diagonal, or None, the identity;
                Q diag(moment) Qᵀ   where there is a `moment` (EKFAC), Q = ⊗ eigenvectors (None: the identity)
    diagonal    diag(moment)        second moments of averaged gradients (AdamW's), not of examples

of the loss as it is written. With `loss_reduction="mean"` that is the curvature of an average loss term: a posterior
precision is its product with the number of terms in the data, plus that of the prior.

Kronecker-factored posteriors: Ritter et al., *A Scalable Laplace Approximation for Neural Networks* (2018). Influence:
Grosse et al. (2023, arXiv:2308.03296).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secondorder._fisher_export import described, region
from secondorder._layer_blocks import _axes
from secondorder._reports import _spectrum, resting
from secondorder.curvature.site import Site
from secondorder.layout.blocks import Treatment
from secondorder.layout.buckets import BaseBucket, Bucket

if TYPE_CHECKING:
    from secondorder._layers import LayerOptimizer

_FOUND = {"covariance": "factors", "diagonal": "factors", "basis": "eigenvectors", "eigenvalues": "eigenvalues"}


@torch.no_grad()
def factors(self: LayerOptimizer) -> dict[str, dict[str, Any]]:
    """Copies of the curvature factors in a neutral form, to be saved or handed to tools for posteriors or influence.

    Everything is a tensor or plain Python: `torch.load(..., weights_only=True)` reads it back. A block's curvature,
    flattened row by row, is `F_0 ⊗ F_1 ⊗ ...` of its factors, or `Q diag(moment) Qᵀ` with `Q = ⊗ eigenvectors` where
    there is a moment: what `curvature(p)` is an operator of. Averages are debiased, damping is left out.

    Returns:
        By name, for every trained parameter but biases that are a column of their weight's block:
            parameters: Its name, and that of the bias that is its last column.
            kind: `"kronecker"`, or `"diagonal"` for what the fallback trains.
            shape: Of the parameter.
            view: Shape that the blocks cut: `p.reshape(...)`, after the fold, with the bias as last column.
            fold: None, or `(split, order)`: first `p.reshape(split).permute(order)` (transposed convolutions).
            batched: The first axis of `view` counts k independent blocks; a block's axes are the others.
            bias_column: Whether the last column is the bias.
            sides: For every axis of a block, `"input"` or `"output"`: whose second moments its factor holds.
            loss_reduction: `"mean"`: curvature of an average loss term; `"sum"`: of a batch's loss.
            blocks: For every block
                region: `(start, stop)` on every axis of `view`,
                observations: number of statistics averaged, 0-d or `(k,)`,
                factors: for every axis `(d, d)`, or `(d,)` for a diagonal, `(k, ...)` where batched; None for the
                    identity,
                eigenvectors, eigenvalues: those that are applied, of the last refresh; None where there are none,
                moment: second moments in the eigenvectors, of the block's shape; None for KFAC. Blocks of a diagonal
                    kind have this entry and `observations` alone.

    Raises:
        RuntimeError: If other processes have some of the blocks.
    """
    layout, capture = self._complete(), self._capture
    names = {
        id(p): self._label(gi, pi).name
        for gi, group in enumerate(self.param_groups)
        for pi, p in enumerate(group["params"])
    }
    entries: dict[int, dict[str, Any]] = {}
    for i, (p, (_, _, t)) in enumerate(zip(layout.params, layout.treatments, strict=True)):
        if t.follows is not None:
            continue
        led = None if capture is None or t.fallback else capture.leads.get(id(p))
        entries[i] = {
            **described(layout, i, names),
            "kind": "diagonal" if t.fallback else "kronecker",
            "sides": () if t.fallback else _sides(t, led[0] if led else None),
            "loss_reduction": self.param_groups[0]["loss_reduction"],
        }
    for b in layout.buckets:
        for r, piece in enumerate(b.pieces):
            entry = entries[piece.index]
            found = {"region": region(piece, entry["view"]), **_block(b, r, self.param_groups[b.group])}
            entry["blocks"].append(found)
    return {names[id(layout.params[i])]: entry for i, entry in entries.items()}


def _sides(t: Treatment, site: Site | None) -> tuple[str, ...]:
    """`"input"` or `"output"` for every axis of a block."""
    axes = len(t.view) - t.batched
    at_in = None if site is None or not site.rule.d_in else _axes(site, t)[0] - t.batched
    return tuple("input" if axis == at_in else "output" for axis in range(axes))


def _block(b: BaseBucket, r: int, group: dict[str, Any]) -> dict[str, Any]:
    """Copies of one piece's state."""
    if not isinstance(b, Bucket):
        return {"observations": _copy(b.columns()["count"][r]), "moment": _copy(_spectrum(b, r, group, "curvature")[1])}
    state = {name: views[r] for name, views in b.columns().items()}
    found: dict[str, Any] = {"observations": _copy(state["seen"]), "moment": None}
    for kind in ("factors", "eigenvalues", "eigenvectors"):
        found[kind] = [None] * len(b.shape)
    for name, value in state.items():
        prefix, _, axis = name.rpartition("_")
        if prefix in _FOUND:
            found[_FOUND[prefix]][int(axis)] = _copy(value)
    span = b.span or 1
    rows = {name: stack[r * span : (r + 1) * span] for name, stack in b.s.items()}
    for mode, factor in b.method.factors(rows, resting(b, group, rows)).items():
        found["factors"][mode] = _copy(factor if b.span else factor[0])
    if "moment" in state:
        found["moment"] = _copy(state["moment"])
    return found


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
