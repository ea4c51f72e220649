"""Others' KL methods, with their quirks, as rows built from our vocabulary.

`PeerKL` is the authors' code (yorkerlin/KL-Methods). What differs from `secondorder.KLShampoo` and `KLSOAP`, and why
nobody should train so:

- the first gradient of a parameter chooses the basis, unwhitened, and is lost as a step (`first="skip"`);
- eigenvalues are averages of their own, from `init_factor` on, that a refresh leaves behind, as it does the second
  moment; their inverse roots are capped at max(10, min(d, 4000)), so that the gradient's scale matters;
- nothing is debiased; momentum of KL-Shampoo is scaled by R / (1 + eps R); bases are not sorted;
- the scales of the factors are not balanced; weight decay acts after the step, on the new parameter;
- `normalize_grads` normalises the update, `using_damping` adds noise of variance eps to the eigenvalues' statistics.

`PeerMetaKL` is Meta's (facebookresearch/optimizers): statistics whitened by the stored roots, whatever their exponent,
without the 1/d that fixes the factors' scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peers.meta import MetaKronecker, PeerShampoo
from peers.soap import PeerAdam
from secondorder import linalg
from secondorder.base import PreconditionedOptimizer
from secondorder.curvature.whitened import WhitenedGradient, along
from secondorder.layout.blocks import Treatment
from secondorder.preconditioner.kl_basis import Eigenvalues, KLBasis, KLKronecker
from secondorder.preconditioner.modes import mul, unfold
from secondorder.preconditioner.protocol import Context, Method, Modes, Spec, State, Streams, ema_


@dataclass(frozen=True)
class PeerBasis(KLBasis):
    """Eigenvalues of their own, without bias correction, floor, balance or order."""

    tie_break: float = 0.0
    init_factor: float = 0.1

    def specs(self, shape: tuple[int, ...], modes: Modes, hp: Mapping[str, Any]) -> dict[str, Spec]:
        own = {f"eigenvalues_{i}": Spec((shape[i],), self.init_factor) for i in modes}
        return {**super().specs(shape, modes, hp), **own}

    def begin(self, s: State, G: Tensor, c: Context) -> None:
        pass

    def absorb(self, s: State, roots: dict[int, Tensor], c: Context) -> None:
        beta = c.hp["betas"][1] if c.hp["factor_beta"] is None else c.hp["factor_beta"]
        rate = (1 - beta) * c.seen_gate
        noise = {i: root.square().mean(-1) for i, root in self.inverse_roots(s, c).items()}
        for i in c.modes:
            ema_(s[f"covariance_{i}"], roots[i] @ roots[i].mT, rate, c)
            values = roots[i].square().sum(-1)
            if c.hp["using_damping"]:
                others = torch.stack([noise[j] for j in c.modes if j != i]).prod(0)
                values = values + c.hp["eps"] * others[:, None]
            ema_(s[f"eigenvalues_{i}"], values, torch.where(c.seen > 1, rate, 0.0), c)

    def decompose(self, s: State, mode: int, c: Context) -> tuple[Tensor, Tensor | None, Tensor]:
        B, Q = s[f"covariance_{mode}"], s[f"basis_{mode}"]
        new, ok = linalg.orthogonalize(Q @ (linalg.eigh(B)[1] if c.initial else B))
        return new, None, ok

    def inverse_roots(self, s: State, c: Context) -> dict[int, Tensor]:
        out = {}
        for i in c.modes:
            root = s[f"eigenvalues_{i}"].rsqrt()
            if c.hp["using_clamping"]:
                root = root.clamp_max(max(10, min(root.shape[-1], c.hp["max_clamp_value"])))
            out[i] = torch.where(c.expand(c.count, root) > 0, root, 1.0)  # the first gradient is not whitened
        return out


@dataclass(frozen=True)
class PeerEigenvalues(Eigenvalues):
    """No bias correction; R / (1 + eps R) in place of R = ⊗ λ^(-1/2)."""

    def scale(self, s: State, X: Tensor, c: Context) -> Tensor:
        m = ema_(s["exp_avg"], X, (1 - c.hp["betas"][0]) * c.gate, c)
        R = torch.ones_like(m)
        for i, root in self.factor.inverse_roots(s, c).items():
            R = R * along(root, R, i)
        return m * (R / (1 + c.hp["eps"] * R))


@dataclass(frozen=True)
class PeerKLKronecker(KLKronecker):
    """Applies before it observes; decay after the step; the update normalised on request."""

    decay_after = True
    normalize: bool = False

    def observe(self, s: State, x: Streams, c: Context) -> None:
        super().observe(s, {**x, **self.screen(s, x, c)[0]}, c)  # nothing screens the gradient that is skipped

    def apply(self, s: State, moment: Tensor, x: Streams, c: Context) -> Tensor:
        u = super().apply(s, moment, x, c)
        return u / c.expand(u.flatten(1).square().mean(1).sqrt(), u) if self.normalize else u


class PeerKL(PreconditionedOptimizer):
    """Arguments and defaults of the authors' code."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        shampoo_beta: float = -1,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        init_factor: float = 0.1,
        using_klsoap: bool = False,
        using_clamping: bool = True,
        using_damping: bool = False,
        max_clamp_value: int = 4000,
        normalize_grads: bool = False,
        cast_dtype: str | None = None,
    ) -> None:
        del cast_dtype  # ours is the parameter's, at least float32
        own = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
        own.update(factor_beta=shampoo_beta if shampoo_beta >= 0 else None, clip=None, init_factor=init_factor)
        own.update(klsoap=using_klsoap, using_clamping=using_clamping, using_damping=using_damping)
        own.update(max_clamp_value=max_clamp_value, normalize_grads=normalize_grads)
        super().__init__(params, own, dict(nesterov=False, refresh_every=precondition_frequency, refresh="together"))

    def _method(self, group: dict[str, Any]) -> Method:
        factor = PeerBasis(init_factor=group["init_factor"])
        scaling = PeerAdam(correct_bias=False) if group["klsoap"] else PeerEigenvalues(factor)
        row = dict(lagged=True, first="skip", normalize=group["normalize_grads"])
        return PeerKLKronecker(WhitenedGradient(factor), factor, scaling, **row)

    def _blocks(self, shape: tuple[int, ...], group: Mapping[str, Any], role: str | None) -> Treatment:
        return Treatment(shape, tuple((d,) for d in shape), tuple(range(len(shape))), "as the authors' code does")


def inject(optimizer: PeerKL, p: Tensor, bases: Mapping[int, Tensor]) -> None:
    """Put recorded bases in the place of those that the first gradient gave."""
    state = optimizer.state[p]
    for mode, basis in bases.items():
        turn = basis.mT @ state[f"basis_{mode}"]
        state[f"covariance_{mode}"] = turn @ state[f"covariance_{mode}"] @ turn.mT
        state[f"basis_{mode}"] = basis


@dataclass(frozen=True)
class WhitenedByRoots:
    """The gradient with the stored roots of the other modes on it."""

    def __call__(self, s: State, x: Streams, c: Context) -> dict[int, Tensor]:
        out = {}
        for i in c.modes:
            X = x["grad"]
            for j in c.modes:
                X = X if i == j else mul(s[f"root_{j}"], X, j)
            out[i] = unfold(X, i)
        return out


class PeerMetaKL(PeerShampoo):
    """`DistributedShampoo` with its KL configuration."""

    def _method(self, group: dict[str, Any]) -> Method:
        row = super()._method(group)
        assert isinstance(row, MetaKronecker)
        return replace(row, statistic=WhitenedByRoots(), factor=replace(row.factor, missing="eye"))
