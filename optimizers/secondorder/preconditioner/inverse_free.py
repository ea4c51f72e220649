"""Inverse-free Kronecker factors: `K_i K_iᵀ` follows the inverse of a damped factor `S_i` by matrix products alone.

    H_i = Π(K_iᵀ S_i K_i),  M_i = Π(K_iᵀ K_i)       Π: projection onto the mode's structure; h_i, k_i: mean traces
    N_i = t_i H_i + λ u_i M_i - I                   coupled: t_i, u_i = products of the other modes' h, k; else 1
    K_i <- K_i (I - β N_i / 2)                      to first order in β; all modes from the factors as they were
    P(G) = G ×_i K_i K_iᵀ

Coupled, this is INGD or SINGD; not coupled, IKFAC: `(K Kᵀ)⁻¹` is the average of S + λI up to O(β²) a step. With the
mean trace w of N + I, and `H' = (N + I) / w`, the step is taken as

    z = 1 + β (w - 1),  η = β w / z      T <- average of η (H' - I)   (α, debiased)      K <- z^(-1/2) K (I - e T / 2)

which is exact where all that changes is the scale (log z is averaged as T is); e bounds ‖e T‖₂ by 1, so that K stays
regular however large a statistic is. Modes with diagonal statistics take `(I + T)^(-1/2)`, which is exact. The first
statistic sets the scale of K.

Lin et al., *Simplifying momentum-based positive-definite submanifold optimization* (2023, arXiv:2302.09738, INGD);
*Structured inverse-free natural gradient descent* (2024, arXiv:2312.05705, SINGD), figures 3 and 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from secondorder import linalg
from secondorder.preconditioner.group_factor import apply_squares, square_spectrum
from secondorder.preconditioner.layer_basis import outer
from secondorder.preconditioner.protocol import (
    FACTOR_DTYPES,
    Context,
    Method,
    Modes,
    Spec,
    State,
    Streams,
    put_,
)
from secondorder.preconditioner.structures import Dense, Diagonal, Structure

_FASTEST = 0.5  # rate of the first statistics


class Whitened(NamedTuple):
    """A statistic seen through its factor `K = √size · unit`.

    Attributes:
        unit: `K` with `‖unit‖_F² = d`.
        H: `Π(unitᵀ S unit)`, of mean trace 1.
        M: `Π(unitᵀ unit)`, of mean trace 1.
        trace: Mean trace of S, `(n,)`; this and all other scalars in float64: squares of the range of float32.
        size: Mean trace of `Kᵀ K`, `(n,)`.
        signal: Mean trace of `Kᵀ S K`, `(n,)`.
        dimension: d.
    """

    unit: Tensor
    H: Tensor
    M: Tensor
    trace: Tensor
    size: Tensor
    signal: Tensor
    dimension: int


@dataclass(frozen=True)
class InverseFree(Method):
    """`root_i` of every mode, an element of its structure; with Riemannian momentum, `velocity_i` and its scale.

    Attributes:
        structures: Of the factors of mode 0 and 1; modes with diagonal statistics have diagonal ones.
        coupled: Factors see each other's traces.
    """

    structures: tuple[Structure, Structure] = (Dense(), Dense())
    coupled: bool = True
    momentum: Literal["none", "gradient", "update"] = "gradient"

    def structure(self, mode: int, diagonal: Modes) -> Structure:
        """Of the factor of a mode."""
        return Diagonal() if mode in diagonal else self.structures[mode]

    def specs(
        self, shape: tuple[int, ...], modes: Modes, hp: Mapping[str, Any], diagonal: Modes = ()
    ) -> dict[str, Spec]:
        """See `Method`."""
        dtype, out = FACTOR_DTYPES[hp["factor_dtype"]], {}
        for i in (*modes, *diagonal):
            kind, d = self.structure(i, diagonal), shape[i]
            out[f"root_{i}"] = Spec(kind.shape(d), partial(kind.eye, d), dtype)
            if hp["factor_momentum"]:
                out[f"velocity_{i}"] = Spec(kind.shape(d), dtype=dtype)
                out[f"scale_velocity_{i}"] = Spec(())
        return out

    def statistics(self, shape: tuple[int, ...], modes: Modes, diagonal: Modes) -> dict[str, tuple[int, ...]]:
        """See `Method`."""
        dense = {f"gram_{i}": (shape[i], shape[i]) for i in modes}
        return {**dense, **{f"gram_{i}": (shape[i],) for i in diagonal}, "arrived": ()}

    def observe(self, s: State, x: Streams, c: Context) -> None:
        """Move all factors of a block by one statistic."""
        modes = sorted((*c.modes, *c.diagonal))
        seen = [self._whitened(s[f"root_{i}"], x[f"gram_{i}"], i, c) for i in modes]
        relative = c.hp["damping_kind"] == "relative"
        signal = torch.stack([v.signal for v in seen])  # (k, n), as all scalars here
        volume = torch.stack([v.size * v.trace if relative else v.size for v in seen])
        if self.coupled:
            signal, volume = (traces.prod(0).expand_as(traces) for traces in (signal, volume))
        ridge, rate = c.hp["damping"] * volume, linalg.wide(self.rate(c))
        w = signal + ridge
        z = 1 + rate * (w - 1)
        scalars = zip(rate * w / z, ridge / w, z.log(), strict=True)
        new: dict[str, Tensor] = {}
        for i, v, (eta, share, log_z) in zip(modes, seen, scalars, strict=True):
            new.update(self._moved(s, v, i, eta, share, log_z, c))
        good = torch.stack([linalg.finite(value.view(len(value), -1)) for value in new.values()]).all(0)
        live = c.seen_gate > 0
        s["failures"].add_((live & ~good).to(s["failures"].dtype))
        for seed, (name, value) in enumerate(new.items()):
            put_(s[name], value, live & good, c, seed)

    def rate(self, c: Context) -> Tensor:
        """The rate β, `(n,)`: that of a debiased average, but at most one half."""
        return c.rate(1 - c.hp["factor_rate"], c.seen).clamp(max=_FASTEST)

    def _whitened(self, K: Tensor, S: Tensor, mode: int, c: Context) -> Whitened:
        kind, is_diagonal = self.structure(mode, c.diagonal), mode in c.diagonal
        K = K.to(S.dtype)
        tiny = torch.finfo(S.dtype).tiny
        trace = linalg.wide((S if is_diagonal else S.diagonal(dim1=-2, dim2=-1)).mean(-1)).clamp_min(tiny)
        size = linalg.wide(kind.frobenius(K)).square() / S.shape[-1]
        unit = K * c.expand(size.rsqrt().to(K.dtype), K)
        size = torch.where(c.seen > 1, size, 1 / trace)  # the first statistic sets the scale
        S = S * c.expand((1 / trace).to(S.dtype), S)
        if is_diagonal:
            H = unit.square() * S
        else:
            H = kind.project(kind.apply_t(unit, kind.apply_t(unit, S).mT))
        spread = linalg.wide(kind.average_trace(H)).clamp_min(tiny)
        H = H * c.expand((1 / spread).to(H.dtype), H)
        return Whitened(unit, H, kind.self_gram(unit), trace, size, trace * size * spread, S.shape[-1])

    def _moved(
        self, s: State, v: Whitened, mode: int, eta: Tensor, share: Tensor, log_z: Tensor, c: Context
    ) -> dict[str, Tensor]:
        """State of a mode one step on; `share (n,)` of the mean trace of N + I is the damping's."""
        kind, alpha, new = self.structure(mode, c.diagonal), c.hp["factor_momentum"], {}
        dtype = v.unit.dtype
        eye = kind.eye(v.dimension, dtype=dtype, device=v.unit.device)
        T = v.H.lerp(v.M, c.expand(share.to(dtype), v.H)) - eye
        T = T * c.expand(eta.to(dtype), T)
        if alpha:
            rate = c.rate(alpha, c.seen)
            T = new[f"velocity_{mode}"] = s[f"velocity_{mode}"].to(dtype).lerp(T, c.expand(rate, T))
            new[f"scale_velocity_{mode}"] = s[f"scale_velocity_{mode}"].lerp(log_z.to(dtype), rate)
            log_z = linalg.wide(new[f"scale_velocity_{mode}"])
        scale = ((v.size.log() - log_z) / 2).exp().to(dtype)
        if mode in c.diagonal:
            K = v.unit * (1 + T).clamp_min(torch.finfo(dtype).eps).rsqrt()
        else:
            safe = 1 / kind.spectral_bound(T).clamp_min(1)
            K = kind.step(v.unit, T, (safe / 2).to(dtype))
        return {f"root_{mode}": K * c.expand(scale, K), **new}

    def apply(self, s: State, moment: Tensor, x: Streams, c: Context) -> Tensor:
        """`M ×_i K_i K_iᵀ`."""
        kinds = {i: self.structure(i, c.diagonal) for i in sorted((*c.modes, *c.diagonal))}
        return apply_squares(kinds, {i: s[f"root_{i}"].to(moment.dtype) for i in kinds}, moment)

    def spectra(self, s: State, c: Context) -> tuple[dict[int, Tensor], Tensor, Tensor]:
        """`(K K^T)^-1`, which contains the damping, and `K Kᵀ`."""
        bases, values = {}, {}
        for i in sorted((*c.modes, *c.diagonal)):
            values[i], vectors = self._eigen(s, i, c)
            if vectors is not None:
                bases[i] = vectors
        spectrum = outer(values, tuple(s["momentum"].shape[1:]))
        return bases, 1 / spectrum, spectrum

    def factors(self, s: State, c: Context) -> dict[int, Tensor]:
        """`(K Kᵀ)⁻¹`, damped."""
        found = {}
        for i in sorted((*c.modes, *c.diagonal)):
            values, Q = self._eigen(s, i, c)
            found[i] = 1 / values if Q is None else (Q / values[:, None]) @ Q.mT
        return found

    def conditions(self, s: State, c: Context) -> dict[int, Tensor]:
        """Condition numbers of `K Kᵀ`."""
        return {i: d.amax(-1) / d.amin(-1) for i in (*c.modes, *c.diagonal) for d in [self._eigen(s, i, c)[0]]}

    def _eigen(self, s: State, mode: int, c: Context) -> tuple[Tensor, Tensor | None]:
        """Eigenvalues, positive, and (unless diagonal) eigenvectors of `K Kᵀ`."""
        return square_spectrum(self.structure(mode, c.diagonal), s[f"root_{mode}"].to(s["momentum"].dtype))
