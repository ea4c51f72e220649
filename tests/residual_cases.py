"""Residual closures small enough for tests, and their dense algebra."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from secondorder.residuals.terms import residual_terms

GOLDEN = Path(__file__).parent / "golden"


def recorded(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as z:
        return {key: torch.from_numpy(z[key]) for key in z.files}


def mlp(*sizes, dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Linear(i, o) for i, o in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1]).to(dtype)


def grad(y, x):
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def flat(parts):
    return torch.cat([part.detach().flatten() for part in parts])


def off(x, y):
    return float((x - y).norm() / y.norm())


def poisson(net, x_in, f, x_out, g):
    x = x_in.clone().requires_grad_(True)
    first = grad(net(x), x)
    operator = sum(grad(first[:, i], x)[:, i] for i in range(x.shape[1])) + f[:, 0]
    return {"interior": operator, "boundary": net(x_out) - g}


def small(seed=0, dtype=torch.float64, n=14, net=None):
    """A problem of 2-6-1 (D = 25) that takes a millisecond; of a network that is there, or a new one."""
    net = mlp(2, 6, 1, dtype=dtype) if net is None else net
    draw = torch.Generator().manual_seed(seed)
    points = [torch.rand(k, 2, generator=draw, dtype=torch.float64).to(dtype) for k in (n, 5)]
    f, g = points[0].prod(1, keepdim=True), points[1].sin().sum(1, keepdim=True)
    return net, lambda: poisson(net, points[0], f, points[1], g)


def dense(closure, params):
    vector = residual_terms(closure()).vector()
    rows = [torch.autograd.grad(r, params, retain_graph=True, materialize_grads=True) for r in vector]
    return vector.detach(), torch.stack([flat(row) for row in rows])
