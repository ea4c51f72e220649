"""What the Laplacian of a network costs by collapsed Taylor mode, nested autograd and `vmap(hessian)`.

    python recipes/benchmark_taylor.py [--dimensions D ...] [--points N] [--rounds K] [--dtype float32|float64]

CPU process time of one thread, the three in turn in one process, the least of K rounds: of the Laplacian alone, and
with one backward pass of its mean square to the parameters, as a training step takes it. The network is
d-64-64-48-48-1 with tanh. All three are compared with each other before they are timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, vmap

from secondorder import taylor

Laplacian = Callable[[nn.Module, Tensor], Tensor]
WIDTHS = (64, 64, 48, 48)


def network(d: int, dtype: torch.dtype) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d_in, d_out in zip((d, *WIDTHS), WIDTHS, strict=False):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(WIDTHS[-1], 1)).to(dtype)


def ours(model: nn.Module, x: Tensor) -> Tensor:
    return taylor.laplacian(model, x)[1]


def nested(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (du,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    columns = [torch.autograd.grad(du[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1])]
    return torch.stack(columns).sum(0)[:, None]


def vmap_hessian(model: nn.Module, x: Tensor) -> Tensor:
    parameters = dict(model.named_parameters())

    def scalar(point: Tensor) -> Tensor:
        return functional_call(model, parameters, (point,))[0]

    return vmap(lambda point: hessian(scalar)(point).trace())(x)[:, None]


WAYS: dict[str, Laplacian] = {"ours": ours, "nested": nested, "vmap(hessian)": vmap_hessian}


def forward(way: Laplacian, model: nn.Module, x: Tensor) -> None:
    with torch.set_grad_enabled(way is nested):
        way(model, x)


def training(way: Laplacian, model: nn.Module, x: Tensor) -> None:
    torch.autograd.grad(way(model, x).square().mean(), [p for p in model.parameters() if p.dim() == 2])


def milliseconds(
    run: Callable[[Laplacian, nn.Module, Tensor], None], model: nn.Module, x: Tensor, rounds: int
) -> dict[str, float]:
    """Least time of each way, in turn."""
    least = dict.fromkeys(WAYS, float("inf"))
    for _ in range(rounds + 1):  # whatever the first round sets up, the others take the time without it
        for name, way in WAYS.items():
            begun = time.process_time()
            run(way, model, x)
            least[name] = min(least[name], time.process_time() - begun)
    return {name: 1e3 * seconds for name, seconds in least.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Laplacians: collapsed Taylor mode, nested autograd, vmap(hessian)")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[2, 5, 10, 100], metavar="D")
    parser.add_argument("--points", type=int, default=256, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="K")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    print(f"CPU milliseconds, {args.points} points, {args.dtype}, torch {torch.__version__}")
    print(f"{'d':>4} {'':10}" + "".join(f"{name:>15}" for name in WAYS) + f"{'nested/ours':>13}{'hessian/ours':>14}")
    for d in args.dimensions:
        model, x = network(d, dtype), torch.rand(args.points, d, dtype=dtype)
        results = [way(model, x).detach() for way in WAYS.values()]
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=1e-3, atol=1e-4 if args.dtype == "float32" else 1e-9)
        for name, run in (("forward", forward), ("+ backward", training)):
            took = milliseconds(run, model, x, args.rounds)
            ratios = took["nested"] / took["ours"], took["vmap(hessian)"] / took["ours"]
            times = "".join(f"{took[way]:15.2f}" for way in WAYS)
            print(f"{d:4} {name:10}{times}{ratios[0]:13.2f}{ratios[1]:14.2f}", flush=True)


if __name__ == "__main__":
    main()
