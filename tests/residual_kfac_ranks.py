"""What every rank does in `test_residual_kfac.py`: steps by residuals of its own samples."""

import torch
import torch.distributed as dist
from torch import nn

from residual_cases import flat, grad, mlp
from residual_ranks import points
from secondorder import taylor
from secondorder.residual_kfac import ResidualKFAC


def trained(rank, world, ranks, shares, nested=False):
    """Parameters, factors and losses after some steps; one process has the samples of all."""
    net, nu = mlp(2, 6, 4, 1), nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    x, edge = points(rank, world, ranks, shares)
    opt = ResidualKFAC([*net.parameters(), nu], process_group=None if world == 1 else dist.group.WORLD)

    def laplacian():
        if not nested:
            return taylor.laplacian(net, x)[1]
        y = x.clone().requires_grad_(True)
        du = grad(net(y), y)
        return sum(grad(du[:, i], y)[:, i : i + 1] for i in range(2))

    losses = []
    for _ in range(4):
        terms = lambda: {"pde": nu * laplacian() + 1, "edge": net(edge) - edge.sum(1, keepdim=True)}  # noqa: E731
        losses.append(opt.step(terms))
    kept = {f"{i} {name}": x for i, p in enumerate(net.parameters()) for name, x in opt.state[p].items() if x.ndim}
    return {**kept, "theta": flat([*net.parameters(), nu]), "losses": torch.stack(losses)}
