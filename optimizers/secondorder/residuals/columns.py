"""Columns of a layer as J has them: what a jet shows, of derivatives by nested autograd.

    ∂r_n/∂[W b] = Σ_s g_ns z̄_nsᵀ

A nested derivative uses a weight once for every backward pass that crosses it. Uses that have a z or a g in common are
one column, and by the product rule those that are left are the columns of a jet:

    Δ(g zᵀ) = Δg zᵀ + 2 Σ_i ∂_i g ∂_i zᵀ + g Δzᵀ          g = ∂u/∂y: d + 2 columns of 2 d + 2 uses

(without those whose g is zero, and with one for all derivatives that share their g: ∂_t and Δ of a heat equation.) A
bias is a use whose z̄ is the last unit vector; it shares its g with the value, and becomes that column's last entry.

How g zᵀ divides into g and z nobody knows: a factor of the operator, a coefficient at that sample, may be in either. So
both are made equally long, by which what follows depends on J alone and not on how its closure is written; signs stay
open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from secondorder.residuals.factored import Factored, Part, merged
from secondorder.residuals.layers import Layer, LayerCapture, Use
from secondorder.residuals.linearization import Linearization


def by_columns(layers: Sequence[Layer], J: Linearization, capture: LayerCapture) -> list[Layer]:
    """Layers with the uses that were captured, but of terms that differentiate by autograd those that J has.

    Args:
        layers: As they were captured.
        J: Of this process's residuals, as "expand" recorded it.
        capture: What was seen.
    """
    assert isinstance(J, Factored)
    found = []
    for layer in layers:
        uses = [use for use in layer.uses if use.term not in capture.nested]
        for (term, rows), weight in capture.passes.items():
            if term in capture.nested and (columns := _columns(J, layer, rows)) is not None:
                uses.append(Use(term, weight, True, *_balanced(*columns, weight), found=True))
        found.append(replace(layer, uses=uses))
    return found


def _columns(J: Factored, layer: Layer, rows: range) -> tuple[Tensor, Tensor] | None:
    """Z̄ `(n, S, i + 1)` and G `(n, S, o)` at some rows; None: they don't depend on the layer."""
    g, z = list[Tensor](), list[Tensor]()
    for a, own in _uses(J, layer.weight, rows):
        g.append(a)
        z.append(own if layer.bias is None else torch.cat([own, own.new_zeros(*own.shape[:2], 1)], 2))
    width = J._units[layer.weight][1]
    for a, own in _uses(J, layer.bias, rows) if layer.bias is not None else ():
        g.append(a)
        z.append(torch.cat([own.new_zeros(*own.shape[:2], width), own], 2))
    if not g:
        return None
    few = merged(Part(slice(rows.start, rows.stop, rows.step), g, z))
    Z, G = torch.cat(few.z, 1), torch.cat(few.a, 1)
    alive = ((Z != 0).any(2) & (G != 0).any(2)).any(0)
    return (Z[:, alive], G[:, alive]) if bool(alive.any()) else None


def _uses(J: Factored, i: int, rows: range) -> Iterator[tuple[Tensor, Tensor]]:
    """Of a parameter at some rows: `(n, s, o)` and `(n, s, i)`."""
    for part in J._parts[i]:
        known = range(len(J.residual))[part.rows]
        if rows[0] in known and rows[-1] in known:
            here = slice(known.index(rows[0]), known.index(rows[-1]) + 1, rows.step // known.step)
            yield from ((a[here], z[here]) for a, z in zip(part.a, part.z, strict=True))


def _balanced(z: Tensor, g: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same products; z as long as g of the residual that is not scaled, in every column of every sample."""
    tiny = torch.finfo(z.dtype).tiny
    scale = (len(z) / weight.clamp_min(tiny)).sqrt()
    sizes, slopes = (torch.linalg.vector_norm(x, dim=2, keepdim=True) for x in (z, g))
    ratio = (scale * slopes / sizes.clamp_min(tiny)).sqrt()
    return z * ratio, g / ratio.clamp_min(tiny)
