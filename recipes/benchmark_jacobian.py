"""What all rows of a residual's Jacobian cost: K = J Jᵀ of an unmodified closure against one gradient.

    python recipes/benchmark_jacobian.py [--rounds K] [--problems NAME ...] [--large]

CPU process time of one thread, in turn in one process, the least of K rounds, in float64: a gradient of the loss; the
linearisation; K; K by `torch.func`, `vmap(grad)` of a residual of one point, where the derivatives in x are `jacrev`
and `jacfwd`. The closure is textbook nested autograd. All kernels are compared before they are timed. "bound" is N² D
multiplications, half of them by symmetry, at the speed of a matrix product of that size: what K costs if J is formed.

`--large` measures the memory instead, in processes of its own: 5-256-256-128-128-1, N = 3500, D = 117k; how far the
resident set rises over that before the first evaluation, for a gradient, and for a step's kernel and its solutions for
the two dampings that compete. What is freed goes back to the system there (MALLOC_MMAP_THRESHOLD_): by its own defaults
glibc keeps some 300 MiB of it.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, vmap

from secondorder import taylor
from secondorder.residuals.expand import Memory
from secondorder.residuals.linearization import linearize
from secondorder.residuals.system import system


class Problem(NamedTuple):
    """Poisson's equation on the unit cube: -Δu = 1, u = 0 at the boundary."""

    sizes: tuple[int, ...]
    inside: int
    boundary: int


PROBLEMS = {
    "2d-64": Problem((2, 64, 1), 900, 120),
    "2d-deep": Problem((2, 64, 64, 48, 48, 1), 900, 120),
    "2d-deep-200": Problem((2, 64, 64, 48, 48, 1), 150, 50),
    "5d-deep": Problem((5, 64, 64, 48, 48, 1), 500, 100),
}
LARGE = Problem((5, 256, 256, 128, 128, 1), 3000, 500)


def network(sizes: tuple[int, ...]) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [part for i, o in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def points(problem: Problem) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    inside, boundary = (
        torch.rand(n, problem.sizes[0], dtype=torch.float64, generator=draw) for n in (problem.inside, problem.boundary)
    )
    boundary[:, 0] = boundary[:, 0].round()
    return inside, boundary


def textbook(net: nn.Module, inside: Tensor, boundary: Tensor) -> dict[str, Tensor]:
    x = inside.clone().requires_grad_(True)
    (du,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    columns = [torch.autograd.grad(du[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1])]
    return {"pde": torch.stack(columns).sum(0) + 1, "boundary": net(boundary)[:, 0]}


def by_taylor(net: nn.Module, inside: Tensor, boundary: Tensor) -> dict[str, Tensor]:
    return {"pde": taylor.laplacian(net, inside)[1][:, 0] + 1, "boundary": net(boundary)[:, 0]}


def by_vmap(net: nn.Module, inside: Tensor, boundary: Tensor) -> Tensor:
    """K from `vmap(grad)`: N × D numbers in memory."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def u(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, values, (x,))[0]

    def pde(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return jacfwd(jacrev(lambda y: u(values, y)))(x).trace()

    rows = []
    for r, x in ((pde, inside), (u, boundary)):
        parts = vmap(grad(r), (None, 0))(parameters, x)
        rows.append(torch.cat([part.flatten(1) for part in parts.values()], 1) / len(x) ** 0.5)
    J = torch.cat(rows)
    return J @ J.mT


def least(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, in turn."""
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds + 1):
        for name, way in ways.items():
            begun = time.process_time()
            way()
            found[name] = min(found[name], 1e3 * (time.process_time() - begun))
    return found


def compare(name: str, rounds: int) -> None:
    problem = PROBLEMS[name]
    net, (inside, boundary) = network(problem.sizes), points(problem)
    params, memory = list(net.parameters()), Memory()
    N, D = problem.inside + problem.boundary, sum(p.numel() for p in params)

    def closure() -> dict[str, Tensor]:
        return textbook(net, inside, boundary)

    def gradient() -> None:
        loss = torch.stack([r.square().mean() for r in closure().values()]).sum() / 2
        torch.autograd.grad(loss, params)

    linear = linearize(closure, params, memory=memory)
    torch.testing.assert_close(linear.kernel(), by_vmap(net, inside, boundary), rtol=1e-9, atol=1e-9)
    A = torch.rand(N, 2048, dtype=torch.float64)
    took = least(
        {
            "gradient": gradient,
            "linearize": lambda: linearize(closure, params, memory=memory),
            "kernel": lambda: linearize(closure, params, memory=memory).kernel(),
            "vmap": lambda: by_vmap(net, inside, boundary),
            "product": lambda: A @ A.mT,
        },
        rounds,
    )
    bound = took["product"] * D / 2048 / 2
    ratios = "".join(f"{took[way] / took['gradient']:11.2f}" for way in ("linearize", "kernel", "vmap"))
    print(f"{name:12}{N:6}{D:7}{took['gradient']:10.1f}{ratios}{bound / took['gradient']:9.2f}", flush=True)


def memory(what: str, closure_of: Callable[..., dict[str, Tensor]]) -> None:
    """Prints by how many MiB the resident set has risen at most."""
    net, (inside, boundary) = network(LARGE.sizes), points(LARGE)
    params = list(net.parameters())
    torch.linalg.cholesky(torch.eye(300, dtype=torch.float64))  # what the library itself sets up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if what == "gradient":
        loss = torch.stack([r.square().mean() for r in closure_of(net, inside, boundary).values()]).sum()
        torch.autograd.grad(loss, params)
    else:
        linear = linearize(lambda: closure_of(net, inside, boundary), params)
        solved = system(linear, params, 1e-10, "relative")
        again = solved.again
        for damping in (None, 1e-9):  # those of an adaptive one; one factor at a time
            solved = solved if damping is None else again(damping)
            assert bool(solved.ok) and len(solved.apply(linear.residual)) == len(params)
            del solved
    print(f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:.0f}")


CLOSURES = {"nested": textbook, "taylor": by_taylor}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Rows of Jacobians: time against a gradient, and memory")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5, metavar="K")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "CLOSURE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.measure:
        memory(args.measure[0], CLOSURES[args.measure[1]])
    elif args.large:
        print("MiB above the process before, N 3500, D 116865, float64")
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        for closure in CLOSURES:
            for what in ("gradient", "step"):
                command = [sys.executable, __file__, "--measure", what, closure]
                found = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.strip()
                print(f"{closure:8}{what:10}{found:>6}", flush=True)
    else:
        print(f"float64, torch {torch.__version__}; gradient in ms, the rest in gradients")
        print(f"{'':12}{'N':>6}{'D':>7}{'gradient':>10}{'linearize':>11}{'+ kernel':>11}{'vmap':>11}{'bound':>9}")
        for name in args.problems:
            compare(name, args.rounds)


if __name__ == "__main__":
    main()
