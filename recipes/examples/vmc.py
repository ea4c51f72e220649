"""Variational Monte Carlo for the hydrogen atom: SPRING and Adam on a small wave function, exact energy -0.5.

Every step moves 400 walkers by Metropolis from |ψ|², and takes local energies there; a step by residuals is then
stochastic reconfiguration, (S + λ I) δ = -½ ∂E/∂θ with S the covariance of ∂ log|ψ|/∂θ, and SPRING's momentum. Without
a line search: what that would compare, at walkers that stay where they are, is not the energy. Adam, at the learning
rate that was best of four, has the time of SPRING, which is three times as many steps.
"""

import time
from functools import partial

import torch
from torch import nn

import secondorder
from secondorder import taylor

WALKERS, MOVES, WIDTH = 400, 10, 0.7


class LogPsi(nn.Module):
    """log ψ(x) = MLP(x, |x|) - |x| / 2; ψ has a cusp at the nucleus, which the MLP has to find: ψ = exp(-|x|)."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x):
        r = x.square().sum(-1, keepdim=True).sqrt()
        return (self.mlp(torch.cat([x, r], -1)) - 0.5 * r).squeeze(-1)


def local_energy(log_psi, x):
    """(H ψ) / ψ = -½ (Δ log ψ + |∇ log ψ|²) - 1 / |x|."""
    _, gradient, laplacian = taylor.value_gradient_laplacian(log_psi, x)
    return -0.5 * (laplacian + gradient.square().sum(-1)) - 1 / x.norm(dim=-1)


@torch.no_grad()
def metropolis(log_psi, x, moves=MOVES):
    """Move every walker so many times, towards samples of |ψ|²."""
    now = log_psi(x)
    for _ in range(moves):
        proposal = x + WIDTH * torch.randn_like(x)
        there = log_psi(proposal)
        accepted = torch.rand_like(now).log() < 2 * (there - now)
        x, now = torch.where(accepted[:, None], proposal, x), torch.where(accepted, there, now)
    return x


def train(name, optimizer_of, steps=60, seed=0):
    """Train, and return the energy at 40 times as many samples."""
    torch.manual_seed(seed)
    log_psi = LogPsi().double()
    optimizer = optimizer_of(log_psi.parameters())
    x = metropolis(log_psi, torch.randn(WALKERS, 3, dtype=torch.float64), moves=100)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        x = metropolis(log_psi, x)
        with torch.no_grad():
            E = local_energy(log_psi, x)

        def closure(x=x, E=E):
            if isinstance(optimizer, secondorder.SPRING):
                return {"energy": secondorder.vmc_energy(log_psi(x), E)}
            optimizer.zero_grad()
            loss = 2 * ((E - E.mean()) * log_psi(x)).mean()  # has the energy's gradient
            loss.backward()
            return loss

        optimizer.step(closure)
        if step % (steps // 6) == 0:
            print(f"{name:<8}{step:>4}  energy {E.mean():9.5f}  variance {E.var():.1e}")
    seconds = time.perf_counter() - start
    with torch.no_grad():
        E = torch.cat([local_energy(log_psi, x := metropolis(log_psi, x)) for _ in range(40)])
    error = abs(E.mean() + 0.5) / 0.5
    print(
        f"{name:<8} ends at {E.mean():.5f}, relative error {error:.0e}, variance {E.var():.0e}, after {seconds:.1f} s"
    )
    return float(E.mean())


if __name__ == "__main__":
    torch.set_num_threads(1)
    train("SPRING", partial(secondorder.SPRING, lr=0.3, damping=1e-3, norm_constraint=1e-2))
    train("Adam", partial(torch.optim.Adam, lr=3e-2), steps=180)
