"""Inverse-free factors in matrix groups, one per axis of a tensor: `K_i K_i^T ≈ S_i^-1`, moved by products alone.

One gradient `G` (N entries, axes of length d_i) moves all factors of its block, each from the factors as they were; `B`
is the number of samples whose mean the loss is, `Π` the projection of a structure, `avgtr(X) = tr(X) / d`:

    T    = √B G ×_i K_i^T                                               the gradient, whitened
    λ    = damping · average of B mean(G²)                              damping: isotropic noise in G
    Δ_i  = 1/2 [ Π(T_(i) T_(i)^T) d_i / N + λ (Π_{j≠i} avgtr(K_j^T K_j)) Π(K_i^T K_i) - I ]
    m_i <- average of Δ_i                                               (factor_momentum, debiased)
    ρ_i  = rate of a debiased average, so small that ρ_i ‖m_i‖_2 <= 1/2 (factor_rate; a bound of the norm is used)
    K_i <- K_i (I - ρ_i m_i)
    U    = G ×_i K_i K_i^T                                              (normalize: times B √(average of mean(G²)))

To second order in ρ, `S_i = (K_i K_i^T)^-1` is the average of what the other factors leave of `B G G^T`, damped: a
Shampoo whose factors are inverted, not rooted. Structures are closed under products. As no eigenvalue of `ρ m` exceeds
1/2, `K_i` stays regular, whatever comes. The first gradient sets the scale of the factors: RMS(T) = 1; before, they are
zero.

Source: Lin et al., *Can We Remove the Square-Root in Adaptive Gradient Methods?* (2024, arXiv:2402.03496), section on
Shampoo; *Structured Inverse-Free Natural Gradient Descent* (2024, arXiv:2312.05705) for the structures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from secondorder import linalg
from secondorder.preconditioner.group_factor import apply_squares, square_spectrum, whitened_grams
from secondorder.preconditioner.modes import mean_square
from secondorder.preconditioner.protocol import (
    FACTOR_DTYPES,
    Context,
    Method,
    Modes,
    Spec,
    State,
    Streams,
    ema_,
    put_,
)
from secondorder.preconditioner.root_free import batch_factor
from secondorder.preconditioner.structures import Structure, structure, structure_names


@dataclass(frozen=True)
class LieFactor(Method):
    """`factor_i` and `factor_momentum_i` of every axis, one `gradient_scale`; momentum where the row says.

    Attributes:
        momentum: `"gradient"`, before the factors, or `"update"`, after them.
    """

    momentum: Literal["none", "gradient", "update"] = "update"

    def specs(
        self, shape: tuple[int, ...], modes: Modes, hp: Mapping[str, Any], diagonal: Modes = ()
    ) -> dict[str, Spec]:
        """See `Method`."""
        dtype, found = FACTOR_DTYPES[hp["factor_dtype"]], {}
        for i, kind in _structures(len(shape), modes, diagonal, hp).items():
            found[f"factor_{i}"] = Spec(kind.shape(shape[i]), dtype=dtype)
            if hp["factor_momentum"]:
                found[f"factor_momentum_{i}"] = Spec(kind.shape(shape[i]), dtype=dtype)
        return {**found, "gradient_scale": Spec(())}

    def begin(self, s: State, x: Streams, c: Context) -> None:
        """`K_i = (√B rms(G))^(-1/k) I`: the first whitened gradient has RMS 1."""
        square = put_(s["gradient_scale"], batch_factor(c.hp) * mean_square(x["grad"]), c.gate, c)
        self.reset(s, x["grad"], linalg.power(square, -0.5 / len((*c.modes, *c.diagonal))), c)

    def reset(self, s: State, G: Tensor, size: Tensor, c: Context) -> None:
        """Multiples `size (n,)` of the identity as factors of the rows that begin."""
        for i, kind in _kinds(G, c).items():
            stored = s[f"factor_{i}"]
            one = kind.eye(G.shape[i + 1], dtype=G.dtype, device=G.device)
            put_(stored, c.expand(size, stored) * one, c.gate, c, seed=i)

    def observe(self, s: State, x: Streams, c: Context) -> None:
        """Move all factors of a block by one gradient."""
        G, kinds = x["grad"], _kinds(x["grad"], c)
        K = {i: s[f"factor_{i}"].to(G.dtype) for i in kinds}
        B = batch_factor(c.hp)
        grams = whitened_grams(kinds, K, G * B**0.5)
        traces = {i: kind.frobenius(K[i]).square() / G.shape[i + 1] for i, kind in kinds.items()}
        noise = self.noise(s, B * mean_square(G), c) * torch.stack(list(traces.values())).prod(0)
        new: dict[str, Tensor] = {}
        for i, kind in kinds.items():
            d = G.shape[i + 1]
            gram = grams[i] * (d / G[0].numel())
            gram = gram + c.expand(noise / traces[i], gram) * kind.self_gram(K[i])
            m = (gram - kind.eye(d, dtype=G.dtype, device=G.device)) / 2
            if c.hp["factor_momentum"]:
                rate = self.momentum_rate(c)
                m = new[f"factor_momentum_{i}"] = s[f"factor_momentum_{i}"].to(G.dtype).lerp(m, c.expand(rate, m))
            new[f"factor_{i}"] = kind.step(K[i], m, self.rate(kind, m, c))
        live = c.seen_gate > 0
        good = torch.stack([linalg.finite(value) for value in new.values()]).all(0)
        s["failures"].add_((live & ~good).to(s["failures"].dtype))
        for seed, (name, value) in enumerate(new.items()):
            put_(s[name], value, live & good, c, seed)

    def apply(self, s: State, moment: Tensor, x: Streams, c: Context) -> Tensor:
        """`M ×_i K_i K_i^T`."""
        kinds = _kinds(moment, c)
        U = apply_squares(kinds, {i: s[f"factor_{i}"].to(moment.dtype) for i in kinds}, moment)
        U = U * c.expand(self.unit(s, c), U)
        # After a jump by many orders of magnitude factors need some steps to follow.
        finite = linalg.finite(U)
        return U if linalg.known(finite) else torch.where(c.expand(finite, U), U, 0.0)

    def noise(self, s: State, mean_square: Tensor, c: Context) -> Tensor:
        """`λ (n,)`."""
        return c.hp["damping"] * ema_(s["gradient_scale"], mean_square, c.rate(1 - c.hp["factor_rate"], c.seen), c)

    def momentum_rate(self, c: Context) -> Tensor:
        """Rate `(n,)` of the average `m_i`."""
        return c.rate(c.hp["factor_momentum"], c.seen)

    def rate(self, kind: Structure, m: Tensor, c: Context) -> Tensor:
        """`ρ_i (n,)`."""
        return torch.minimum(c.rate(1 - c.hp["factor_rate"], c.seen), 0.5 / kind.spectral_bound(m))

    def unit(self, s: State, c: Context) -> Tensor:
        """What updates are multiplied by, `(n,)`."""
        scale = s["gradient_scale"]
        return (scale * batch_factor(c.hp)).sqrt() if c.hp["normalize"] else torch.ones_like(scale)

    def spectra(self, s: State, c: Context) -> tuple[dict[int, Tensor], Tensor, Tensor]:
        """`⊗ (K_i K_i^T)^-1`, which contains the damping, and what is applied, in their common eigenvectors."""
        moment = s["momentum"]
        spectrum, bases = torch.ones_like(moment), {}
        for i, (values, vectors) in self._eigen(s, c).items():
            if vectors is not None:
                bases[i] = vectors
            spectrum = spectrum * values.view(len(values), *(-1 if j == i else 1 for j in range(moment.ndim - 1)))
        return bases, 1 / spectrum, spectrum * c.expand(self.unit(s, c), spectrum)

    def conditions(self, s: State, c: Context) -> dict[int, Tensor]:
        """Condition numbers of `K_i K_i^T`."""
        return {i: values.amax(-1) / values.amin(-1) for i, (values, _) in self._eigen(s, c).items()}

    def _eigen(self, s: State, c: Context) -> dict[int, tuple[Tensor, Tensor | None]]:
        """Eigenvalues, positive, and (unless diagonal) eigenvectors of `K_i K_i^T` by axis."""
        dtype = s["momentum"].dtype
        return {i: square_spectrum(kind, s[f"factor_{i}"].to(dtype)) for i, kind in _kinds(s["momentum"], c).items()}


@dataclass(frozen=True)
class RareLieFactor(LieFactor):
    """The same, with factors that are moved ever more rarely, at last in every `statistics_every`-th call."""

    def observes(self, t: int, hp: Mapping[str, Any]) -> bool:
        """In every k-th call once there were 4^k, `k <= statistics_every`, counted from the last one before."""
        t, k, start, most = t - 1, 1, 0, int(hp["statistics_every"])
        while k < most and t >= 4 ** (k + 1) - 1:
            start += -(-(4 ** (k + 1) - 1 - start) // k) * k
            k += 1
        return t >= start and (t - start) % k == 0


def _kinds(X: Tensor, c: Context) -> dict[int, Structure]:
    return _structures(X.ndim - 1, c.modes, c.diagonal, c.hp)


def _structures(axes: int, modes: Modes, diagonal: Modes, hp: Mapping[str, Any]) -> dict[int, Structure]:
    """The structure of every axis with a factor."""
    names = structure_names(hp["structures"] if axes > 1 else hp["vectors"], axes)
    return {i: structure("diagonal" if i in diagonal else names[i]) for i in sorted((*modes, *diagonal))}
