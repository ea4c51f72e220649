"""Step size, momentum and damping from a quadratic model of the loss.

    M(d) = gᵀd + ½ dᵀ(C + η)d       predicted change of the loss along a step d; η: L2 decay, which is part of g too
    quadratic_model    d = -(α u + μ v),   u = P g, v the last step's opposite; (α, μ) minimize M(d) + ½ dᵀΛd with the
                       exact C = JᵀHJ of the batch (generalized Gauss-Newton) and the damping Λ
    adapt_damping      every T calls   ρ = (L(θ + d) - L(θ)) / M(d)   on the same batch, ω = 0.9^T:
                       λ / ω where ρ < 1/4 or NaN, λ ω where ρ > 3/4, never below 1e-8;
                       where the rate is fixed, C is the Kronecker-factored curvature

J v is what differentiating Jᵀu, linear in u, once more gives. Λ is λ I, or with relative damping λ times the mean
curvature of every block. Martens and Grosse (2015, arXiv:1503.05671), sections 6.5, 6.6 and 7, as in kfac-jax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secondorder._reports import resting
from secondorder._step import Held
from secondorder.curvature.fisher import hessian_product
from secondorder.curvature.site import Site
from secondorder.layout.plan import write
from secondorder.preconditioner.damped import LayerKronecker
from secondorder.residuals.terms import residual_terms

Group = dict[str, Any]

_DECAY = 0.9
_LEAST_DAMPING = 1e-8


class Trial:
    """One step with a model: what its phases hand on to each other.

    Attributes:
        due: The step is to be judged: the loss at its end is wanted.
        residuals: The closure returns residuals.
        report: What the step chose and found: `lr`, `momentum`, `predicted_change`, `rho`.
    """

    def __init__(self, groups: Sequence[Group], over_ranks: Callable[[Tensor], Tensor]) -> None:
        self._groups, self._over_ranks = groups, over_ranks
        self.due = self.residuals = False
        self.report: dict[str, float] = {}
        self._loss: Any = None
        self._outputs: Tensor | None = None  # (..., C), without a graph
        self._u: Tensor | None = None
        self._pulled: dict[int, Tensor] = {}  # by id of a parameter, its part of Jᵀu
        self._predicted: list[Tensor] = []  # 0-d, they add up
        self._decay: list[Tensor] = []  # change of the L2 term, likewise

    @classmethod
    def of(
        cls, name: str, groups: Sequence[Group], closure: Any, over_ranks: Callable[[Tensor], Tensor]
    ) -> Trial | None:
        """A trial where a group asks for one, else None.

        Raises:
            TypeError: Without the closure that it needs.
            ValueError: For options that do not go together.
        """
        steered = [g for g in groups if g["quadratic_model"] is not None]
        adapting = [g for g in groups if g["adapt_damping"]]
        if not steered and not adapting:
            return None
        if closure is None:
            asks = "quadratic_model" if steered else "adapt_damping"
            returns = "(loss, outputs)" if steered else "the loss"
            raise TypeError(f"{name} with {asks} needs step(closure), with a closure that returns {returns}")
        if steered and groups[0]["loss"] is None:
            raise ValueError("quadratic_model needs loss='cross_entropy', 'mse' or 'bce', got None")
        for g in steered:
            if g["weight_decay"] != 0 and g["weight_decay_kind"] != "l2":
                kind = g["weight_decay_kind"]
                raise ValueError(f"quadratic_model needs weight_decay_kind='l2' or weight_decay=0, got {kind!r}")
        if any(g["maximize"] for g in (*steered, *adapting)):
            raise ValueError("quadratic_model and adapt_damping minimize: maximize must be False, got True")
        return cls(groups, over_ranks)

    def evaluate(self, closure: Callable[[], Any], sites: Iterable[Site]) -> Any:
        """Call the closure and return its loss or residuals; with a quadratic model, prepare products with J.

        Raises:
            TypeError: If it does not return what is needed.
            RuntimeError: If `loss.backward()` freed the graph of the outputs.
        """
        found = closure()
        params = [p for g in self._groups if g["quadratic_model"] is not None for p in g["params"]]
        terms = None if params else residual_terms(found)
        if terms is not None:
            self._loss, self.residuals = terms.loss().detach(), True
            return found
        self._loss, outputs = found if isinstance(found, tuple) else (found, None)
        if not params:
            return self._loss
        if not isinstance(outputs, Tensor) or not outputs.requires_grad:
            raise TypeError(
                "with quadratic_model the closure must return (loss, outputs), outputs with their graph: call "
                f"loss.backward(retain_graph=True); got {_kind(found)}"
            )
        params = [p for p in params if p.requires_grad and p.grad is not None]
        if not params:
            return self._loss
        quiet = {site: site.quiet for site in sites}
        for site in quiet:
            site.quiet = True  # this backward pass is not one of the data
        self._outputs, self._u = outputs.detach(), torch.zeros_like(outputs, requires_grad=True)
        try:
            parts = torch.autograd.grad(outputs, params, self._u, create_graph=True, allow_unused=True)
        finally:
            for site, before in quiet.items():
                site.quiet = before
        self._pulled = {id(p): part for p, part in zip(params, parts, strict=True) if part is not None}
        return self._loss

    def steer(self, held: Sequence[Held], params: Sequence[Tensor], call: int) -> None:
        """Learning rate and momentum for the directions that a model is wanted for; waits for the device."""
        observed = max(g["burn_in"] for g in self._groups)
        adapts = any(g["adapt_damping"] for g in self._groups) and any(h.rows for h in held)
        self.due = adapts and (call - observed) % self._groups[0]["adapt_every"] == 0
        steered = [h for h in held if h.hp["quadratic_model"] is not None and h.rows]
        if not steered:
            return
        vectors = [(h.bucket.work["update"], _taken(h, h.bucket.s["momentum"])) for h in steered]
        pushed = [self._push(steered, [pair[i] for pair in vectors], params) for i in range(2)]
        exact = self._over_ranks(self._gauss_newton(pushed))
        forms = [_forms(h, pair).to(exact) for h, pair in zip(steered, vectors, strict=True)]
        numbers = torch.cat([exact, torch.stack(forms).sum(0)]).cpu().double()
        gauss_newton, decay, damping = (_symmetric(numbers[i : i + 3]) for i in (0, 3, 6))
        curvature, slopes, hp = gauss_newton + decay, numbers[9:], steered[0].hp
        momentum = hp["betas"][0] if hp["quadratic_model"] == "lr" else None
        chosen = minimum(curvature + damping, slopes, momentum, torch.finfo(steered[0].bucket.dtype).eps)
        change = chosen @ (curvature @ chosen) / 2 - chosen @ slopes
        lr, mu = chosen.tolist()
        self.report = {"lr": lr, "momentum": mu, "predicted_change": float(change)}
        self._predicted.append(change)
        for h in steered:  # momentum then holds the last step's opposite
            h.bucket.work["update"].mul_(lr)
            own = {"lr": 1.0, "betas": (mu, h.hp["betas"][1]), "nesterov": False, "norm_clip": None, "kl_clip": None}
            h.hp = {**h.hp, **own}

    def foresee(self, held: Sequence[Held]) -> None:
        """Predicted change of the loss from final updates, where it is wanted."""
        for h in held if self.due else ():
            b, hp = h.bucket, h.hp
            if "grad" not in b.held:
                continue
            u, lr, decay = b.work["update"], hp["lr"], hp["weight_decay"]
            if decay != 0 and hp["weight_decay_kind"] == "decoupled":
                u, decay = u + decay * _taken(h, b.work["param"]), 0.0
            if hp["weight_decay_kind"] == "coupled":
                decay = 0.0
            square = (u * u).sum()
            if decay != 0:
                self._decay.append(decay * lr * (lr / 2 * square - (u * b.work["param"]).sum()))
            if hp["quadratic_model"] is None:
                curved = (u * _method(h).multiply(b.s, u, resting(b, hp, b.s))).sum() + decay * square
                self._predicted.append(lr * (lr / 2 * curved - (u * b.work["grad"]).sum()))

    def judge(self, after: Any) -> None:
        """Compare predicted and actual change, and change the groups' damping; waits for the device."""
        losses = torch.tensor([_number(self._loss), _number(after)], dtype=torch.float64)
        before, now = self._over_ranks(losses).tolist()
        change, predicted = now - before + _total(self._decay), _total(self._predicted)
        if predicted == 0 and math.isfinite(change):  # no step was taken
            return
        rho = change / predicted if predicted != 0 else math.nan
        self.report = {**self.report, "predicted_change": predicted, "rho": rho}
        omega = _DECAY ** self._groups[0]["adapt_every"]
        factor = omega if rho > 0.75 else 1.0 if rho >= 0.25 else 1 / omega
        for g in self._groups:
            if g["adapt_damping"]:
                g["damping"] = max(g["damping"] * factor, _LEAST_DAMPING)

    def _push(self, held: Sequence[Held], stacks: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
        """`J v`, of the shape of the outputs, for a vector in the shapes of the buckets."""
        spread = [torch.zeros_like(p) for p in params]
        for h, stack in zip(held, stacks, strict=True):
            b = h.bucket
            here = [(strand, r) for r, strand in b.strands if params[strand.index].grad is not None]
            parts = [strand.place(b.row(stack, r)) for strand, r in here]
            write([strand for strand, _ in here], spread, parts, -1.0, None, False)
        pairs = [(self._pulled[id(p)], v) for p, v in zip(params, spread, strict=True) if id(p) in self._pulled]
        assert self._u is not None
        pulled, v = zip(*pairs, strict=True)
        (found,) = torch.autograd.grad(pulled, self._u, v, retain_graph=True, materialize_grads=True)
        return found

    def _gauss_newton(self, pushed: Sequence[Tensor]) -> Tensor:
        """Upper triangle of `(J v_i)ᵀ H (J v_j)`, `(3,)`."""
        assert self._outputs is not None
        f, hp = self._outputs, self._groups[0]
        terms = [x[:, None] if f.ndim == 1 else x for x in (f, *pushed)]
        curved = [hessian_product(terms[0], hp["loss"], x, hp["loss_reduction"]) for x in terms[1:]]
        return torch.stack([(terms[1 + i] * curved[j]).sum() for i, j in _UPPER])


def minimum(M: Tensor, slopes: Tensor, momentum: float | None, precision: float) -> Tensor:
    """The minimizer `(2,)` of `½ cᵀMc - slopesᵀc`; zero where there is none.

    Args:
        M: `(2, 2)`, float64; a direction that is zero has zeros.
        slopes: `(2,)`, float64.
        momentum: The second coefficient, where it is fixed.
        precision: Relative error of what is given: directions that are equal to it count as one.
    """
    if not (M.isfinite().all() and slopes.isfinite().all()):
        return torch.zeros_like(slopes)
    if momentum is not None:
        c = torch.stack([(slopes[0] - momentum * M[0, 1]) / M[0, 0], torch.full_like(slopes[0], momentum)])
        return torch.where(M[0, 0] > 0, c, 0.0)
    scale = torch.where(M.diagonal() > 0, M.diagonal().rsqrt(), 0.0)
    inverse = torch.linalg.pinv(scale[:, None] * M * scale, rtol=10 * precision, hermitian=True)
    return scale * (inverse @ (scale * slopes))


def evaluate_again(closure: Callable[[], Any], sites: Sequence[Site], params: Sequence[Tensor], residuals: bool) -> Any:
    """The closure's loss, without gradients or statistics: its `backward()` does nothing, `p.grad` stays.

    Residuals may contain derivatives by inputs: their closure sees gradients enabled.
    """
    active, grads = [site.active for site in sites], [p.grad for p in params]
    for site in sites:
        site.active = False
    for p in params:
        p.grad = None
    try:
        with torch.set_grad_enabled(residuals), _WithoutBackward():
            found = closure()
    finally:
        for site, before in zip(sites, active, strict=True):
            site.active = before
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
    if residuals and (terms := residual_terms(found)) is not None:
        return terms.loss()
    return found[0] if isinstance(found, tuple) else found


class _WithoutBackward(TorchFunctionMode):
    """Makes `Tensor.backward` do nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if func is Tensor.backward else func(*args, **(kwargs or {}))


_UPPER = ((0, 0), (0, 1), (1, 1))


def _symmetric(upper: Tensor) -> Tensor:
    return upper[[0, 1, 1, 2]].view(2, 2)


def _forms(h: Held, vectors: tuple[Tensor, Tensor]) -> Tensor:
    """Upper triangles of the forms of L2 decay and of damping, and the slopes, `(8,)`."""
    b = h.bucket
    products = torch.stack([(vectors[i] * vectors[j]).flatten(1).sum(1) for i, j in _UPPER])
    ridge = _method(h).scaling.ridge(b.s, resting(b, h.hp, b.s))
    slopes = torch.stack([(v * b.work["grad"]).sum() for v in vectors])
    return torch.cat([h.hp["weight_decay"] * products.sum(1), (products * ridge).sum(1), slopes])


def _taken(h: Held, stack: Tensor) -> Tensor:
    """Zeros in rows that sit this step out."""
    return torch.where(h.bucket.expand(h.taken, stack) > 0, stack, 0.0)


def _method(h: Held) -> LayerKronecker:
    assert isinstance(h.bucket.method, LayerKronecker)
    return h.bucket.method


def _number(loss: Any) -> float:
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def _total(parts: Sequence[Tensor]) -> float:
    return sum(float(part) for part in parts)


def _kind(found: Any) -> str:
    if isinstance(found, tuple):
        return f"({', '.join(map(_kind, found))})"
    return f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
