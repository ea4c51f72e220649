"""Meta's Distributed Shampoo (facebookresearch/optimizers), with its quirks, as rows built from our vocabulary.

What differs from `secondorder.Shampoo` and `secondorder.EigenvalueCorrectedShampoo`, and why nobody should train so:

- axes are merged from the last one on, by default until one is left: small tensors are one vector with a full matrix;
  blocks have a fixed size with a rest, and vectors and scalars have factors too;
- the ridge is absolute, and eigenvalues are shifted where rounding took one below it;
- β2 = 1 is the sum of all statistics; bias corrections can be off; a matrix can be scaled by its trace;
- everything that is not grafted is the plain filtered gradient before the first refresh, in call `start`;
- the clock is the group's: steps in which a parameter has no gradient count in its bias corrections;
- the learning rate passes through float32; decay goes through the search direction (and its momentum), by kinds that
  depend on the learning rate of the constructor;
- eigenvalue correction: the basis is refreshed before it is used, sorted ascending, and the second moment stays where
  it was. A refresh by QR is one step of the unshifted QR algorithm, which the ascending order undoes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secondorder import linalg
from secondorder.base import PreconditionedOptimizer
from secondorder.curvature.gradient import GradientStatistic
from secondorder.layout.blocks import Treatment
from secondorder.preconditioner.eigenbasis import EigenBasis
from secondorder.preconditioner.grafts import GRAFTS, SGDGraft
from secondorder.preconditioner.inverse_root import InverseRoot, RootKronecker
from secondorder.preconditioner.protocol import Context, Method, State, Streams
from secondorder.preconditioner.second_moment import CorrectedKronecker, SecondMoment


def order(s: State) -> int:
    """Number of axes of the blocks."""
    return s["momentum"].ndim - 1


def per_order(overrides: Mapping[str, Any], axes: int, mode: int | None, default: float) -> float:
    """An exponent from `{order: value}` or `{order: {mode: value}}`."""
    found = overrides.get(str(axes), default)
    return found.get(str(mode), default) if isinstance(found, Mapping) else found


def nearly_diagonal(B: Tensor, tolerance: float) -> Tensor:
    """Whether the part off the diagonal is at most `tolerance` of a matrix, `(n,)`."""
    norm, diagonal = torch.linalg.matrix_norm(B), torch.linalg.vector_norm(B.diagonal(dim1=-2, dim2=-1), dim=-1)
    return (norm.square() - diagonal.square()).clamp_min(0).sqrt() <= tolerance * norm


def decompose(A: Tensor, Q: Tensor, how: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """`(eigenvalues, basis, ok)`, ascending; the old basis where it is still good to `tolerance`."""
    B = Q.mT @ A @ Q
    if how["__class__"] == "QREigendecompositionConfig":
        assert (how["max_iterations"], how["tolerance"]) == (1, 0.0)
        turn, upper = torch.linalg.qr(B)
        values, index = (upper @ turn).diagonal(dim1=-2, dim2=-1).sort(dim=-1, stable=True)
        new = torch.gather(Q @ turn, 2, index[:, None].expand_as(Q))
        return values, new, torch.ones_like(values[:, 0], dtype=torch.bool)
    values, new, ok = linalg.eigh(A)
    values, new = values.flip(-1), new.flip(-1)
    if how["tolerance"] > 0:
        keep = nearly_diagonal(B, how["tolerance"])
        values = torch.where(keep[:, None], B.diagonal(dim1=-2, dim2=-1), values)
        new = torch.where(keep[:, None, None], Q, new)
    return values, new, ok


def higher_order_root(A: Tensor, exponent: float, how: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Coupled iteration with the series of `(I - R)^(-1/p)` up to R^(order - 1); the first step is Newton's."""
    p = round(1 / exponent)
    identity = torch.eye(A.shape[-1], dtype=A.dtype)
    ridge = (how["rel_epsilon"] * A.abs().sum(-1).amax(-1)).clamp_min(how["abs_epsilon"])
    A = A + ridge[:, None, None] * identity
    z = 1 / A.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    X, M = z ** (1 / p) * identity, z * A
    for iteration in range(how["max_iterations"]):
        R = identity - M
        active = (R.abs().amax((-2, -1)) > how["tolerance"])[:, None, None]
        T, term, weight = identity, identity, 1.0
        for i in range(1, 2 if iteration == 0 else how["order"]):
            weight *= (1 + (i - 1) * p) / (i * p)
            term = term @ R
            T = T + weight * term
        X, M = torch.where(active, X @ T, X), torch.where(active, torch.linalg.matrix_power(T, p) @ M, M)
    return X, (M - identity).abs().amax((-2, -1)) <= how["tolerance"]


@dataclass(frozen=True)
class MetaRoot(InverseRoot):
    """Absolute ridge, exponents by order, roots by four algorithms, two of them stored as eigenvalues and basis."""

    def rate(self, c: Context) -> Tensor:
        if c.hp["factor_average"] == "ema" and not c.hp["use_bias_correction"]:
            return (1 - c.hp["factor_beta"]) * c.seen_gate
        return super().rate(c)

    def matrix(self, s: State, mode: int, c: Context) -> Tensor:
        A = super().matrix(s, mode, c)
        config = c.hp["preconditioner"]
        if config["use_trace_scaling"]:
            trace = A.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(c.hp["ridge"])
            A = A * trace[:, None, None] ** -config["trace_scaling_exponent"]
        return A

    def exponent(self, s: State, mode: int, c: Context) -> float:
        overrides = c.hp["preconditioner"]["inverse_exponent_override"]
        return per_order(overrides, order(s), mode, 1 / (2 * order(s)))

    def renew(self, s: State, mode: int, c: Context) -> tuple[dict[str, Tensor], Tensor]:
        A, e = self.matrix(s, mode, c), self.exponent(s, mode, c)
        how = c.hp["preconditioner"]["amortized_computation_config"]
        if how["__class__"] == "CoupledHigherOrderConfig":
            root, ok = higher_order_root(A, e, how)
            return {"root": root}, ok
        epsilon = c.hp["ridge"]
        A = A + epsilon * torch.eye(A.shape[-1], dtype=A.dtype)
        if how["__class__"] == "CoupledNewtonConfig":
            root, ok = linalg.newton_root(A, e, how["max_iterations"], how["tolerance"])
            return {"root": root}, ok
        values, Q, ok = decompose(A, s.get(f"basis_{mode}", torch.zeros_like(A)), how)
        low = values.amin(-1, keepdim=True)
        values = torch.where(low < epsilon, values - low + epsilon, values)
        root = Q * values.pow(-e)[:, None] @ Q.mT
        return ({"root": root, "basis": Q} if self.by == "tracked" else {"root": root}), ok


@dataclass(frozen=True)
class MetaKronecker(RootKronecker):
    """Momentum without bias correction on request."""

    def apply(self, s: State, moment: Tensor, x: Streams, c: Context) -> Tensor:
        if self.momentum == "gradient" and not c.hp["use_bias_correction"]:
            moment = moment * c.expand(c.weight(c.hp["betas"][0], c.count), moment)
        return super().apply(s, moment, x, c)


@dataclass(frozen=True)
class MetaBasis(EigenBasis):
    """Bases sorted ascending, of a matrix with an absolute ridge."""

    def decompose(self, s: State, mode: int, c: Context) -> tuple[Tensor, None, Tensor]:
        A = s[f"covariance_{mode}"]
        A = A + c.hp["ridge"] * torch.eye(A.shape[-1], dtype=A.dtype)
        _, Q, ok = decompose(A, s[f"basis_{mode}"], c.hp["preconditioner"]["amortized_computation_config"])
        return Q, None, ok


@dataclass(frozen=True)
class MetaSecondMoment(SecondMoment):
    """A second moment that stays where it was when the basis turns."""

    def denominator(self, s: State, c: Context) -> Tensor:
        e = per_order(c.hp["preconditioner"]["inverse_exponent_override"], order(s), None, 0.5)
        return s["exp_avg_sq"].pow(e) + c.hp["ridge"]

    def move(self, s: State, moves: dict[int, Any], c: Context) -> None:
        pass


@dataclass(frozen=True)
class MetaCorrected(CorrectedKronecker):
    """Refreshed before use; with a graft, which gives all of the step before the first refresh."""

    graft: SGDGraft | None = None

    def specs(self, shape: Any, modes: Any, hp: Any, diagonal: Any = ()) -> dict[str, Any]:
        return {**super().specs(shape, modes, hp, diagonal), **(self.graft.specs(shape) if self.graft else {})}

    def apply(self, s: State, moment: Tensor, x: Streams, c: Context) -> Tensor:
        u = super().apply(s, moment, x, c)
        if self.graft is None:
            return u
        started = c.expand(c.count, u) >= self.start
        return self.graft.lend(s, torch.where(started, u, 0.0), moment, x["grad"], c)


def merged(shape: tuple[int, ...], limit: float, target: float) -> tuple[int, ...]:
    """Merge axes from the last on, while more than `target` would be left and the product stays within the limit."""
    if target == math.inf:
        return shape
    sides = [d for d in reversed(shape) if d != 1] or [1]
    out = sides[:1]
    for i, d in enumerate(sides[1:], 1):
        if len(out) + len(sides) - i > target and out[-1] * d <= limit:
            out[-1] *= d
        else:
            out.append(d)
    return tuple(reversed(out))


def chunks(size: int, limit: int) -> tuple[int, ...]:
    """Pieces of exactly `limit`, and a rest."""
    return (limit,) * (size // limit) + ((size % limit,) if size % limit else ())


class PeerShampoo(PreconditionedOptimizer):
    """`DistributedShampoo` with its constructor's names; configurations are dicts with their class's name."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 1.0),
        epsilon: float = 1e-12,
        weight_decay: float = 0.0,
        weight_decay_type: str = "WeightDecayType.DECOUPLED",
        precondition_frequency: int = 1,
        max_preconditioner_dim: int = 1024,
        use_bias_correction: bool = True,
        grafting_config: Mapping[str, Any] | None = None,
        iterate_averaging_config: Mapping[str, Any] | None = None,
        preconditioner_config: Mapping[str, Any] | None = None,
        distributed_config: Mapping[str, Any] | None = None,
    ) -> None:
        beta1, beta2 = betas
        assert preconditioner_config is not None and preconditioner_config["drop_weighting_factor_on_gsquare"] is False
        if iterate_averaging_config is not None:  # classic momentum, after the factor
            assert beta1 == 0 and not iterate_averaging_config["dampening"] + iterate_averaging_config["use_nesterov"]
            beta1 = iterate_averaging_config["momentum"]
        graft = grafting_config or {}
        own = dict(lr=lr, betas=(beta1, graft.get("beta2", beta2 if beta2 < 1 else 0.0)), weight_decay=weight_decay)
        own.update(eps=graft.get("epsilon", 0.0), ridge=epsilon, peak_lr=lr, decay=weight_decay)
        own.update(decay_type=weight_decay_type.rpartition(".")[2], use_bias_correction=use_bias_correction)
        own.update(factor_beta=beta2, factor_average="sum" if beta2 == 1 else "ema")
        own.update(graft=graft.get("__class__", "").removesuffix("PreconditionerConfig").lower() or None)
        own.update(averaging=iterate_averaging_config is not None, preconditioner=preconditioner_config)
        own.update(target=float((distributed_config or {}).get("target_parameter_dimensionality", 1)))
        shared = dict(nesterov=False, refresh_every=precondition_frequency, refresh="together")
        shared.update(max_block_size=max_preconditioner_dim, weight_decay_kind="coupled")
        super().__init__(params, own, shared)

    def _method(self, group: dict[str, Any]) -> Method:
        kind, start = group["preconditioner"]["__class__"], group["refresh_every"]
        graft = GRAFTS[group["graft"]]() if group["graft"] else None
        if kind.startswith("EigenvalueCorrected"):
            basis = MetaBasis(tie_break=0.0)
            return MetaCorrected(GradientStatistic(), basis, MetaSecondMoment(), start=start, graft=graft)
        stored = "tracked" if kind.startswith("Eigendecomposed") else "eigh"
        factor = MetaRoot(by=stored, missing=0.0 if graft else "eye")
        momentum = "update" if group["averaging"] else "gradient"
        return MetaKronecker(GradientStatistic(), factor, momentum=momentum, start=start, graft=graft)

    def _blocks(self, shape: tuple[int, ...], group: Mapping[str, Any], role: str | None) -> Treatment:
        limit, config = group["max_block_size"], group["preconditioner"]
        view = merged(shape, limit, group["target"])
        ignored = config.get("ignored_basis_change_dims", {}).get(str(len(view)), [])
        overrides = config["inverse_exponent_override"]
        modes = tuple(i for i in range(len(view)) if i not in ignored and per_order(overrides, len(view), i, 1.0) != 0)
        view = view or (1,)
        return Treatment(view, tuple(chunks(d, limit) for d in view), modes, "as Meta's does")

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32).item()
            share = {"DECOUPLED": 1.0, "CORRECTED": group["lr"] / group["peak_lr"], "INDEPENDENT": 1 / group["peak_lr"]}
            group["weight_decay"] = group["decay"] * share[group["decay_type"]]
        return super().step(closure)

    def count_missed(self, p: Tensor) -> None:
        """Let the group's clock go on for a parameter that had no gradient: its sums stay, their weights grow."""
        (group,) = self.param_groups
        betas = dict(momentum=group["betas"][0], graft_exp_avg_sq=group["betas"][1])
        for entry in entries(self.state[p]):
            t = int(entry["count"])
            for key, value in entry.items():
                beta = group["factor_beta"] if key.startswith("covariance") else betas.get(key)
                if beta is not None:
                    value.mul_((1 - beta**t) / (1 - beta ** (t + 1)))
            for clock in ("count", "seen"):
                entry[clock].add_(1)
        self.state[p]["step"].add_(1)


def entries(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The blocks of one parameter's state."""
    tiles = [value for value in state.values() if isinstance(value, dict)]
    yield from tiles or [state]
