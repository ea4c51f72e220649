"""Inverse-free roots: near-symmetric factors `K_i`, `K_i K_i^T ≈ S_i^-1`, moved by matrix products alone.

No root, eigenbasis, QR or inverse. One gradient `G` (N entries, k modes) moves all factors of its block together, each
from the factors as they were (Jacobi); `W = G ×_i K_i^T` is the whitened gradient, `avgtr(X) = tr(X) / d`:

    ρ    = max(factor_rate, min(1/2, fast_start / (t + 1)))        a fast start, then a long memory
    λ    = eps · average of mean(G²),   q_i = avgtr(K_i^T K_i)     damping: isotropic noise of variance λ in G
    w    = mean(W²) + λ Π_i q_i,   z = 1 - ρ + ρ w,   η = ρ w / z  1 - ρ + ρ H' = z (1 + η (H'/w - 1)): scale z, shape η
    H_i  = [ W_(i) W_(i)^T d_i / N + λ (Π_{j≠i} q_j) K_i^T K_i ] / w       avgtr(H_i) = 1
    e    = η / max(1, η λ_max(H_i))                                cap: K stays regular
    K_i <- [ K_i - (e/2) (K_i H_i - K_i) ] rotated towards its symmetric polar factor, times z^(-1/2k)

A mode may have a diagonal factor `a` instead: `a <- a (1 + η (h - 1))^(-1/2) z^(-1/2k)`, which is exact and needs no
cap. Afterwards the scales of the factors are balanced; only their product matters. All scalars are tensors per block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from secondorder import linalg
from secondorder.preconditioner.modes import along, gram, mean_square, mul, unfold
from secondorder.preconditioner.protocol import Context, Method, Modes, Spec, State, Streams, ema_, put_
from secondorder_kernels import add_gram_, multiply_update, symmetrise

_POWER_ITERATIONS = 4  # from the heaviest column; an exact λ_max in the cap trained no better


@dataclass(frozen=True)
class SymmetricRoot(Method):
    """The inverse-free root of a block: `root_i` per mode, one `gradient_scale`; momentum before the factors.

    The first usable gradient only measures: it sets the factors to `rms(G)^(-1/k) I`, and the parameter stays.
    """

    momentum: Literal["none", "gradient", "update"] = "gradient"
    lagged: bool = True
    first: Literal["observe", "apply", "skip", "measure"] = "measure"
    works = ("whitened",)

    def specs(
        self, shape: tuple[int, ...], modes: Modes, hp: Mapping[str, Any], diagonal: Modes = ()
    ) -> dict[str, Spec]:
        """See `Method`."""
        dense = {f"root_{i}": Spec((shape[i], shape[i])) for i in modes}
        return {**dense, **{f"root_{i}": Spec((shape[i],)) for i in diagonal}, "gradient_scale": Spec(())}

    def observes(self, t: int, hp: Mapping[str, Any]) -> bool:
        """Every `statistics_every` calls after `dense_steps` dense ones."""
        return t <= hp["dense_steps"] or t % int(hp["statistics_every"]) == 0

    def begin(self, s: State, x: Streams, c: Context) -> None:
        """`K_i = rms(G)^(-1/k) I`: the first whitened gradient has RMS 1."""
        G = x["grad"]
        k = len(c.modes) + len(c.diagonal)
        size = linalg.power(mean_square(G), -0.5 / k)
        for i in (*c.modes, *c.diagonal):
            root = s[f"root_{i}"]
            one = torch.ones(root.shape[-1], dtype=root.dtype, device=root.device)
            put_(root, c.expand(size, root) * (one if i in c.diagonal else torch.diag(one)), c.gate, c)

    def screen(self, s: State, x: Streams, c: Context) -> tuple[dict[str, Tensor], Tensor]:
        """Whiten the gradient once, and clip what is too large by the measure of the factors as they are."""
        W = self._whiten(s, x["grad"], c)
        size = mean_square(W).sqrt()
        finite = size.isfinite()
        limit = c.hp["clip"]
        shrink = torch.ones_like(size)
        if limit is not None:
            shrink = torch.where((size > limit) & (c.count >= 1), limit / size, shrink)
        factor, keep = c.expand(shrink, W), c.expand(finite, W)
        clipped = {"grad": x["grad"] * factor, "whitened": W.mul_(factor)}
        if not linalg.known(finite):
            clipped = {name: torch.where(keep, X, 0.0) for name, X in clipped.items()}
        return clipped, finite

    def apply(self, s: State, moment: Tensor, x: Streams, c: Context) -> Tensor:
        """`M ×_i K_i^T`; zero for the gradient that only measures."""
        U = self._whiten(s, moment, c)
        return torch.where(c.expand(c.count > 1, U), U, 0.0)

    def observe(self, s: State, x: Streams, c: Context) -> None:
        """Move all factors of a block by one gradient."""
        G, W = x["grad"], x["whitened"]
        modes = (*c.modes, *c.diagonal)
        t = c.count.clamp_min(1).to(W.dtype)
        rate = (c.hp["fast_start"] / (t + 1)).clamp(max=0.5).clamp_min(c.hp["factor_rate"])
        live = c.seen_gate > 0
        scale_rate = torch.maximum(rate, 1 / t) * c.seen_gate
        noise = c.hp["eps"] * ema_(s["gradient_scale"], mean_square(G), scale_rate, c)
        traces = {i: s[f"root_{i}"].flatten(1).square().sum(1) / W.shape[i + 1] for i in modes}
        volume = torch.stack([traces[i] for i in modes]).prod(0)
        w = mean_square(W) + noise * volume
        z = 1 - rate + rate * w
        eta = rate * w / z
        moved = {}
        for i in modes:
            damping = noise * volume / traces[i]
            move = _move_dense if i in c.modes else _move_diagonal
            moved[i] = move(s[f"root_{i}"], W, i, damping, w, eta)
        sizes = {i: (K.flatten(1).square().sum(1) / W.shape[i + 1]).sqrt() for i, K in moved.items()}
        k = len(modes)
        balanced = linalg.power(torch.stack([sizes[i] for i in modes]).prod(0), 1 / k) * linalg.power(z, -0.5 / k)
        new = {i: K.mul_(c.expand(balanced / sizes[i], K)) for i, K in moved.items()}
        good = torch.stack([linalg.finite(K) for K in new.values()]).all(0)
        s["failures"].add_((live & ~good).to(s["failures"].dtype))
        for i, K in new.items():
            put_(s[f"root_{i}"], K, live & good, c)

    def _whiten(self, s: State, X: Tensor, c: Context) -> Tensor:
        for i in c.modes:
            X = mul(s[f"root_{i}"].mT, X, i)
        for i in c.diagonal:
            X = X * along(s[f"root_{i}"], X, i)
        return X

    def spectra(self, s: State, c: Context) -> tuple[dict[int, Tensor], Tensor, Tensor]:
        """The symmetric polar factors of `K_i` and `(K_i K_i^T)^-1`, in their common eigenvectors."""
        bases = {}
        shape = [s[f"root_{i}"].shape[-1] for i in sorted((*c.modes, *c.diagonal))]
        spectrum = torch.ones(len(s["count"]), *shape, dtype=s["root_0"].dtype, device=s["root_0"].device)
        for i in (*c.modes, *c.diagonal):
            root = s[f"root_{i}"]
            values = root.abs()
            if i in c.modes:
                squares, bases[i], _ = linalg.eigh(root @ root.mT)
                values = squares.clamp_min(0).sqrt()
            spectrum = spectrum * along(values, spectrum, i)
        return bases, 1 / spectrum.square(), spectrum

    def conditions(self, s: State, c: Context) -> dict[int, Tensor]:
        """Condition numbers of `K_i K_i^T`."""
        out = {}
        for i in (*c.modes, *c.diagonal):
            root = s[f"root_{i}"]
            squares = linalg.eigh(root @ root.mT)[0] if i in c.modes else root.square()
            out[i] = squares.amax(-1) / squares.amin(-1).clamp_min(torch.finfo(root.dtype).tiny)
        return out


def _move_dense(K: Tensor, W: Tensor, mode: int, damping: Tensor, w: Tensor, eta: Tensor) -> Tensor:
    """`K - (e/2) (K H - K)`, rotated; `(n, d, d)`."""
    H = add_gram_(gram(W, mode, K.shape[1] / W[0].numel() / w), K.mT, damping / w)
    step = eta / (eta * _largest_eigenvalue(H)).clamp_min(1) / 2
    moved, _ = multiply_update(K, H, step, keep=1 + step)
    return symmetrise(moved)


def _move_diagonal(a: Tensor, W: Tensor, mode: int, damping: Tensor, w: Tensor, eta: Tensor) -> Tensor:
    """`a (1 + η (h - 1))^(-1/2)`; `(n, d)`."""
    h = (unfold(W, mode).square().mean(-1) + damping[:, None] * a.square()) / w[:, None]
    return a * (1 + eta[:, None] * (h - 1)).rsqrt()


def _largest_eigenvalue(H: Tensor) -> Tensor:
    """From below, `(n,)`: power iterations from each matrix's heaviest column; `d²` work."""
    heaviest = H.diagonal(dim1=-2, dim2=-1).argmax(-1)
    v = H.gather(2, heaviest.view(-1, 1, 1).expand(-1, H.shape[1], 1))
    for _ in range(_POWER_ITERATIONS):
        v = H @ (v / (v.norm(dim=1, keepdim=True) + 1e-30))
    return v.norm(dim=1).squeeze(1)
