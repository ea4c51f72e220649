"""How gradients of a few examples overlap: a small matrix that has the eigenvalues of the curvature on them.

    u_n = Σ_s g_ns a_nsᵀ                    gradient of example n in a layer, from the rows of its normal form
    K_nm = Σ_layers <u_n, u_m> = Σ_layers Σ_{s,t} (g_ns · g_mt) (a_ns · a_mt)

Over the parameters of all tapped layers together, with what lies off the diagonal blocks, `U Uᵀ = Σ u uᵀ` and
`K = Uᵀ U` share all eigenvalues that are not zero. Where the g are gradients of losses that is the empirical Fisher
matrix. Where they are `v` with `Σ v vᵀ` the loss's Hessian in the outputs (type-2 Fisher vectors: C passes over one
forward pass) it is the generalised Gauss-Newton matrix. Rows are kept while backward passes that take place anyway go
by.

Dangel et al., *ViViT: Curvature access through the generalized Gauss-Newton's low-rank structure* (2021,
arXiv:2106.02624), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secondorder.curvature.layers.protocol import LayerRule


@dataclass
class Kept:
    """Rows of the first m examples in one backward pass through one use of a layer.

    Attributes:
        a: `(k, m, s, d_in)`, of groups that differ in positions one each; of tokens their indices `(m, s)`.
        g: `(k, m, s, d_out)`, the same.
        n: Examples of the pass.
        anew: The first pass over these examples; later ones carry other vectors.
    """

    a: list[Tensor]
    g: list[Tensor]
    n: int
    anew: bool

    @property
    def m(self) -> int:
        """Number of examples."""
        return self.g[0].shape[1]


def keep(rule: LayerRule, g: Sequence[Tensor], saved: tuple[Tensor, ...] | None, m: int, anew: bool) -> Kept:
    """Rows of the first m examples.

    Args:
        rule: The layer's.
        g: Output gradients as the rule gives them, in a list.
        saved: What the forward pass saved; None: no inputs, of which only the constant of the bias is left.
        m: Number of examples.
        anew: These examples were not there before.
    """
    first = [part[:, :m].detach().clone() for part in g]
    if rule.tokens and saved is not None:
        a = [saved[0][:m].reshape(first[0].shape[1:3])]
    elif saved is None or not rule.d_in:
        a = [part.new_empty(*part.shape[:-1], 0) for part in first]
    else:
        found = rule.inputs(*saved)
        parts = [part[None] for part in found] if isinstance(found, tuple) else [found]
        a = [part[:, :m].detach().to(first[0].dtype).clone() for part in parts]
    return Kept(a, first, g[0].shape[1], anew)


def same_examples(layers: Sequence[Sequence[Kept]]) -> bool:
    """Whether all layers kept the same examples of the same passes; they do not where a layer ran twice."""
    seen = {tuple((kept.m, kept.n, kept.anew) for kept in layer) for layer in layers}
    return len(seen) == 1 and () not in seen


def gram(layer: Sequence[Kept], rule: LayerRule, weight: bool, bias: bool) -> Tensor:
    """K of one layer over the examples of all passes.

    Args:
        layer: What it kept, at least one pass.
        rule: The layer's.
        weight: The weight is trained.
        bias: The bias is trained.
    """
    K = layer[0].g[0].new_zeros(())
    for j in range(len(layer[0].g)):
        inputs, outputs, owners, at, a = [], [], [], 0, layer[0].a[j]
        for kept in layer:
            a = kept.a[j] if kept.anew else a
            g = kept.g[j]
            if not rule.d_in:  # rows (x̂ g, g) of a norm layer
                g = g[..., [i for i, trained in enumerate((weight, bias)) if trained and i < g.shape[-1]]]
            one = g.new_ones(*g.shape[:-1], 1)
            columns = a[None, ..., None] if rule.tokens else torch.cat([a] * weight + [one] * bias, -1)
            inputs.append(columns.flatten(1, 2))
            outputs.append(g.flatten(1, 2))
            owners.append(torch.arange(at, at + g.shape[1], device=g.device).repeat_interleave(g.shape[2]))
            at += g.shape[1]
        owner = torch.cat(owners)
        member = torch.nn.functional.one_hot(owner, at).to(K.dtype)
        K = K + member.mT @ _pairs(torch.cat(inputs, 1), torch.cat(outputs, 1), rule) @ member
    return K


def _pairs(A: Tensor, G: Tensor, rule: LayerRule) -> Tensor:  # (k, T, d_in), (k, T, d_out) -> (T, T)
    """Inner products of the rows' gradients, summed over the groups."""
    if rule.tokens:
        return (A[0] == A[0].mT) * (G[0] @ G[0].mT)
    if not rule.d_in:
        flat = G.transpose(0, 1).flatten(1)
        return flat @ flat.mT
    total = A.new_zeros(A.shape[1], A.shape[1])
    for a, g in zip(A, G, strict=True):
        total = total + (a @ a.mT) * (g @ g.mT)
    return total
