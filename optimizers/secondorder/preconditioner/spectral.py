"""Spectral factorisation: eigenbasis and eigenvalues are what is stored, and a gradient moves them by products alone.

    S = α ⊗_i S_i,   S_i = B_i diag(d_i) B_i^T,   det S_i = 1        no covariance, no decomposition, no inverse

One gradient (N entries, `V = G ×_i d_i^(-1/2) B_i^T` the whitened one) moves all factors of its block together, each
from the factors as they were; avg is the mean over entries, r = min(1/2, max(1 - β, fast_start / (t + 1))):

    w_g  = batch_size · avg(V²) / α,   v = eps · Π_i avg(d_i) avg(1/d_i)          damping: eps of S's mean eigenvalue
    w    = w_g + v,   z = 1 - r + r w,   η = min(1/2, r w / z)             1 - r + r H = z (1 + η (H/w - 1))
    H_i  = (w_g/w) V_(i) V_(i)^T d_i / (N avg(V²)) + (v/w) diag(1/d_i) / avg(1/d_i)      avgtr(H_i) = 1
    d_i <- e = d_i (1 + η (diag H_i - 1)),   α <- z α,   then det S_i moves to α
    t_jl = 2b / (g ± √(g² + 4b²)),   b = η √(d_j d_l) (H_i)_jl,   g = e_l - e_j,  ± as g      gap floor |b|
    M    = (t - t^T)/2 from what is below the diagonal, scaled so that |M|_2 <= 1/2           norm cap
    B_i <- B_i (I + M)(I + M + M²)                      Cayley's (I + M)(I - M)^-1 up to |M|³; stretches by √(1 + |M|⁶)
    refresh:  B_i <- B_i (3 I - B_i^T B_i) / 2          one Newton-Schulz step towards B_i^T B_i = I

To second order in r this is the step `S <- (1 - r) S + r H`, `H = batch_size · vec(G) vec(G)^T`, projected onto the
form of S in the affine-invariant metric; with one factor it is that average itself. t is the tangent of Jacobi's angle,
45° for equal eigenvalues.
Lin et al., *Spectral-factorized Positive-definite Curvature Learning for NN Training* (2025, arXiv:2502.06268); what of
this is theirs and what is derived, the doc-string of `SpectralFactorized` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from secondorder import linalg
from secondorder.preconditioner.modes import along, gram, mean_square, mul
from secondorder.preconditioner.protocol import Context, Method, Modes, Spec, State, Streams, put_
from secondorder.preconditioner.root_free import batch_factor

_LARGEST_RATE = 0.5  # of one gradient, in scale and in shape: a rank-one statistic must not be believed wholly
# |M|_2: 53° at most; a step then stretches a basis by at most 0.8 %. The deep autoencoder of the recipes ends 300 steps
# at 0.58 with 0.35, 0.54 with 0.5 and 0.51 with 0.7, which would stretch by 6 % (SOAP: 0.87).
_LARGEST_TURN = 0.5
_SMALLEST_EIGENVALUE = 1e-8  # of a factor, relative to its largest one


@dataclass(frozen=True)
class SpectralFactors(Method):
    """`basis_i (d, d)` and `log_eigenvalues_i (d,)` per mode, one `scale` α; momentum before the factors."""

    momentum: Literal["none", "gradient", "update"] = "gradient"

    def specs(
        self, shape: tuple[int, ...], modes: Modes, hp: Mapping[str, Any], diagonal: Modes = ()
    ) -> dict[str, Spec]:
        """See `Method`."""
        return {
            **{f"basis_{i}": Spec((shape[i], shape[i]), "eye") for i in modes},
            **{f"log_eigenvalues_{i}": Spec((shape[i],)) for i in modes},
            "scale": Spec(()),
        }

    def begin(self, s: State, x: Streams, c: Context) -> None:
        """`α = batch_size · avg(G²)`: nothing begins at the identity's scale."""
        size, G = _unit(x["grad"], c)
        put_(s["scale"], size.square() * (mean_square(G) * batch_factor(c.hp)), c.gate, c)

    def observe(self, s: State, x: Streams, c: Context) -> None:
        """Move all factors of a block by one gradient."""
        rate = self.rate(c)
        d = {i: _exp(s[f"log_eigenvalues_{i}"]) for i in c.modes}
        V = x["grad"]
        for i in c.modes:
            V = mul(s[f"basis_{i}"].mT, V, i) * along(d[i].rsqrt(), V, i)
        size, V = _unit(V, c)
        square = mean_square(V)
        # One gradient may be 1e30 times as large as those before it: its square over α needs float64's range.
        whitened = linalg.wide(size).square() * (linalg.wide(square * batch_factor(c.hp)) / linalg.wide(s["scale"]))
        inverse = {i: d[i].reciprocal().mean(1) for i in c.modes}
        damping = c.hp["eps"] * torch.stack([d[i].mean(1) * inverse[i] for i in c.modes]).prod(0)
        w = whitened + damping
        z = 1 - rate + rate * w
        eta = (rate * w / z).clamp_max(_LARGEST_RATE).to(V.dtype)
        share = (damping / w).to(V.dtype)
        scale = linalg.wide(s["scale"]) * z
        for i in c.modes:
            H = gram(V, i, (1 - share) * V.shape[i + 1] / (square * V[0].numel()))
            diagonal = H.diagonal(dim1=1, dim2=2) + (share / inverse[i])[:, None] / d[i]
            moved = d[i] * (1 + eta[:, None] * (diagonal - 1))
            basis = s[f"basis_{i}"]
            b = H * (d[i].sqrt() * eta[:, None])[:, :, None] * d[i].sqrt()[:, None, :]
            put_(basis, basis + basis @ _turn(b, moved), c.seen_gate, c)
            logs = _log(moved.maximum(_SMALLEST_EIGENVALUE * moved.amax(1, keepdim=True)))
            centre = logs.mean(1)
            put_(s[f"log_eigenvalues_{i}"], logs - centre[:, None], c.seen_gate, c)
            scale = scale * linalg.wide(centre).exp()
        put_(s["scale"], scale.to(V.dtype), c.seen_gate, c)

    def rate(self, c: Context) -> Tensor:
        """Rate `(n,)` at which the factors forget: a fast start, then a long memory."""
        beta = c.hp["betas"][1] if c.hp["factor_beta"] is None else c.hp["factor_beta"]
        fast = c.hp["fast_start"] / (c.seen.to(c.gate.dtype) + 1)
        return fast.clamp_min(1 - beta).clamp_max(_LARGEST_RATE) * c.seen_gate

    def refresh(self, s: State, c: Context) -> None:
        """Bring the bases that are due back to orthogonality."""
        for i in c.modes:
            B = s[f"basis_{i}"]
            put_(B, 1.5 * B - 0.5 * B @ gram(B, 1), c.gate, c)

    def apply(self, s: State, moment: Tensor, x: Streams, c: Context) -> Tensor:
        """`S^(-exponent) m`: two products per mode."""
        X, exponent = moment, c.hp["exponent"]
        for i in c.modes:
            X = mul(s[f"basis_{i}"].mT, X, i) * along(_exp(s[f"log_eigenvalues_{i}"] * -exponent), X, i)
        X = X * c.expand(linalg.wide(s["scale"]).pow(-exponent).to(X.dtype), X)
        for i in c.modes:
            X = mul(s[f"basis_{i}"], X, i)
        return X

    def refresh_cost(self, shape: tuple[int, ...], mode: int) -> float:
        """Two products."""
        return 4.0 * shape[mode] ** 3

    def spectra(self, s: State, c: Context) -> tuple[dict[int, Tensor], Tensor, Tensor]:
        """`α ⊗ d_i` and its power; nothing and the identity before the first gradient."""
        spectrum = torch.ones_like(s["momentum"])
        for i in c.modes:
            spectrum = spectrum * along(_exp(s[f"log_eigenvalues_{i}"]), spectrum, i)
        curvature = spectrum * c.expand(s["scale"], spectrum)
        applied = torch.where(curvature > 0, linalg.power(curvature, -c.hp["exponent"]), 1.0)
        return {i: s[f"basis_{i}"] for i in c.modes}, curvature, applied

    def conditions(self, s: State, c: Context) -> dict[int, Tensor]:
        """Largest over smallest eigenvalue of every factor."""
        found = {i: s[f"log_eigenvalues_{i}"] for i in c.modes}
        return {i: _exp(logs.amax(1) - logs.amin(1)) for i, logs in found.items()}


def _turn(b: Tensor, e: Tensor) -> Tensor:
    """`R - I (n, d, d)`, R the rotation towards the eigenvectors of `diag(e) + b`; of `b` only off-diagonals count."""
    gap = e[:, None, :] - e[:, :, None]
    root = torch.hypot(gap, 2 * b)
    both = torch.where(gap < 0, gap - root, gap + root)
    M = torch.where(both == 0, 0.0, b / both).tril(-1)
    M = M - M.mT
    MM = M @ M
    # Squares of singular values of an antisymmetric matrix are eigenvalues of -M², and come in pairs: a bound of |M|_2.
    bound = (MM.flatten(1).norm(dim=1) / 2**0.5).sqrt()
    shrink = (_LARGEST_TURN / bound.clamp_min(torch.finfo(MM.dtype).tiny)).clamp_max(1.0).view(-1, 1, 1)
    M, MM = shrink * M, shrink.square() * MM
    return 2 * (M + MM) + M @ MM


def _unit(X: Tensor, c: Context) -> tuple[Tensor, Tensor]:
    """Largest absolute entry of each row `(n,)`, and `X` divided by it."""
    size = X.flatten(1).abs().amax(1).clamp_min(torch.finfo(X.dtype).tiny)
    return size, X / c.expand(size, X)


def _log(x: Tensor) -> Tensor:
    return linalg.wide(x).log().to(x.dtype)


def _exp(x: Tensor) -> Tensor:
    return linalg.wide(x).exp().to(x.dtype)
