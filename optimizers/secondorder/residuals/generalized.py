"""Terms whose rows are given with them, instead of being the derivatives of their residuals.

A convex loss ℓ of a network's outputs f `(N, M)`, by generalised Gauss-Newton steps:

    g_n = ∂ℓ/∂f_n,   ∂²ℓ/∂f_n² = L_n L_nᵀ
    r_n = L_n^-1 g_n,   rows L_nᵀ ∂f_n/∂θ

    Jᵀ r = Σ_n (∂f_n/∂θ)ᵀ g_n                         the gradient of Σ_n ℓ(f_n)
    Jᵀ J = Σ_n (∂f_n/∂θ)ᵀ L_n L_nᵀ ∂f_n/∂θ            its generalised Gauss-Newton matrix

The energy of a wave function ψ sampled from |ψ|², by stochastic reconfiguration:

    r_n = E_n - mean E,   rows ∂ log|ψ_n|/∂θ - mean of them
    2 Jᵀ r = the gradient of the energy,   Jᵀ J = the quantum geometric tensor

These are what a step δ = -(Jᵀ J + λ I)^-1 Jᵀ r needs. But ½ |r|² is not the loss: it is half the squared Newton
decrement in f, or half the variance of the energy.

Schraudolph, *Fast curvature matrix-vector products for second-order gradient descent* (2002); Sorella, *Green function
Monte Carlo with stochastic reconfiguration* (1998).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from secondorder import linalg
from secondorder.residuals.terms import Reduction, Term, checked


def convex_loss(
    outputs: Tensor,
    loss: Callable[..., Tensor],
    *targets: Tensor,
    weight: float = 1.0,
    reduction: Reduction = "mean",
) -> Term:
    """A convex loss of a network's outputs, as an entry of what a closure returns.

        {"nll": convex_loss(logits, torch.nn.functional.cross_entropy, labels)}

    Steps by residuals are generalised Gauss-Newton steps, natural gradients for losses that are negative
    log-likelihoods of an exponential family; other optimizers get the loss and its gradient. A line search is "bracket"
    or "grid".

    Args:
        outputs: f `(N, M)`, with its graph.
        loss: Convex ℓ of one sample, from f_n `(M,)` and its targets to a 0-d tensor, twice differentiable by
            `torch.func`.
        targets: Tensors `(N, ...)`, of which it gets the n-th entries.
        weight: Multiplies the term in the loss, finite and at least 0. Default: 1.
        reduction: Whether ℓ is averaged over samples (`"mean"`, default) or summed (`"sum"`).

    Returns:
        The term. The gradient is exact; curvature below rounding errors of the batch's largest, or negative, counts as
        such an error.

    Raises:
        TypeError: If the outputs are no floating-point tensor, or the weight no number.
        ValueError: If the outputs have no two axes, targets another number of samples, or weight or reduction are not
            allowed.
    """
    term = checked("outputs", outputs, weight, reduction)
    if outputs.ndim != 2 or not outputs.shape[1] or any(t.ndim == 0 or len(t) != len(outputs) for t in targets):
        shapes = [tuple(t.shape) for t in targets]
        raise ValueError(f"outputs must be (N, M) and targets (N, ...), got {tuple(outputs.shape)} and {shapes}")
    if not len(outputs):
        return replace(term, exact=False, losses=outputs.sum(1))
    f, *y = (linalg.wide(t.detach()) if t.is_floating_point() else t for t in (outputs, *targets))
    g = vmap(grad(loss))(f, *y)
    eigenvalues, Q, ok = linalg.eigh(vmap(jacrev(grad(loss)))(f, *y))
    # Roundings, and not zero: a saturated sample would lose its gradient with its curvature.
    largest = eigenvalues.amax().nan_to_num(0.0)
    least = f.shape[1] * torch.finfo(f.dtype).eps * torch.where(largest > 0, largest, 1.0)
    root = torch.where(ok[:, None], eigenvalues, torch.nan).clamp_min(least).sqrt()
    value = (Q * g.unsqueeze(-1)).sum(-2) / root
    L = (Q * root.unsqueeze(-2)).to(outputs.dtype)
    r = value.to(outputs.dtype) + ((outputs - outputs.detach()).unsqueeze(-1) * L).sum(-2)
    return replace(term, residual=r, exact=False, losses=vmap(loss)(outputs, *targets))


def vmc_energy(log_psi: Tensor, local_energy: Tensor, weight: float = 1.0) -> Term:
    """The energy of a wave function by samples of |ψ|², as an entry of what a closure returns.

        {"energy": vmc_energy(log_psi, local_energy)}

    Steps by residuals without a line search are stochastic reconfiguration; with `SPRING`, SPRING. `p.grad` is half
    the gradient of the energy, the loss half its variance, which is zero for an eigenfunction. It is the same as
    `term(E + log_psi - log_psi.detach(), weight, center=True)` with E = `local_energy.detach()`.

    Args:
        log_psi: log|ψ| at the samples `(N,)`, with its graph.
        local_energy: (H ψ) / ψ there `(N,)`; its graph is not used, outliers may have been clipped.
        weight: Multiplies the term in the loss, finite and at least 0. Default: 1.

    Raises:
        TypeError: If one of both is no floating-point tensor, or the weight no number.
        ValueError: If they are not of one shape `(N,)`, or the weight is not allowed.
    """
    term = checked("log_psi", log_psi, weight, "mean", True)
    E = checked("local_energy", local_energy, 1.0, "mean").residual.detach().to(log_psi.dtype)
    if log_psi.ndim != 1 or log_psi.shape != E.shape:
        raise ValueError(
            f"log_psi and local_energy must be (N,), got {tuple(log_psi.shape)} and {tuple(local_energy.shape)}"
        )
    return replace(term, residual=E + (log_psi - log_psi.detach()), exact=False)
