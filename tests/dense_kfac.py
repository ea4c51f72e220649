"""KFAC on linear layers in plain dense algebra: the oracle of the tests, and the networks that it is tried on."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import secondorder
from capturing import factors, recorded

SETTINGS = dict(
    lr=1.0,
    betas=(0.0, 0.9),
    damping=0.03,
    weight_decay=0.0,
    kl_clip=None,
    norm_clip=None,
    max_update_rms=None,
    momentum="update",
    refresh_every=1,
    nesterov=False,
)


def mlp(*widths, bias=True):
    layers = [nn.Linear(a, b, bias=bias) for a, b in zip(widths, widths[1:], strict=False)]
    parts = [part for layer in layers for part in (layer, nn.Tanh())]
    return nn.Sequential(*parts[:-1]).double()


def kfac(model, cls=secondorder.KFAC, **options):
    return cls(model.parameters(), module=model, **{**SETTINGS, **options})


def batch(model, n=11, seed=0, shape=None):
    generator = torch.Generator().manual_seed(seed)
    first, last = model[0], model[-1]
    x = torch.randn(*(shape or (n,)), first.in_features, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, last.out_features, shape or (n,), generator=generator)


def cross_entropy(out, y, **how):
    return F.cross_entropy(out.flatten(0, -2), y.flatten(), **how)


def backward(model, x, y, loss_of=cross_entropy):
    model.zero_grad()
    loss_of(model(x), y).backward()


def linears(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def joint(layer, of=lambda p: p.detach()):
    """`[W | b]`, or that of the gradients."""
    W = of(layer.weight).flatten(1)
    return W.clone() if getattr(layer, "bias", None) is None else torch.cat([W, of(layer.bias)[:, None]], 1)


def gradient(layer):
    return joint(layer, lambda p: p.grad)


def stepped(opt, layers):
    """How far a step moved every layer, over lr."""
    before = [joint(layer) for layer in layers]
    opt.step()
    return [(b - joint(layer)) / opt.param_groups[0]["lr"] for b, layer in zip(before, layers, strict=True)]


def pairs(model, x, y, loss_of=cross_entropy, terms=None):
    """`(A, G)` of every linear layer, from rows recorded on a copy."""
    twin = copy.deepcopy(model)
    found = recorded(twin, lambda m: backward(m, x, y, loss_of))
    many = y.numel() if terms is None else terms
    return [factors(found[layer.weight], many, layer.bias is not None) for layer in linears(twin)]


def solved(A, G, grad, kind="relative", damping=SETTINGS["damping"]):
    """(curvature and damping)⁻¹ gradient, the matrix written out."""
    mean_A, mean_G = A.trace() / len(A), G.trace() / len(G)
    I_A, I_G = (torch.eye(len(M), dtype=M.dtype) for M in (A, G))
    if kind == "relative":
        M = torch.kron(G, A) + damping * mean_A * mean_G * torch.kron(I_G, I_A)
    elif kind == "absolute":
        M = torch.kron(G, A) + damping * torch.kron(I_G, I_A)
    elif kind == "pi":
        pi = (mean_A / mean_G).sqrt()
        M = torch.kron(G + damping**0.5 / pi * I_G, A + pi * damping**0.5 * I_A)
    else:
        M = torch.kron(G + damping * I_G, A + damping * I_A)
    return torch.linalg.solve(M, grad.reshape(-1)).view(grad.shape)


def assert_near(ours, theirs, tolerance=1e-9):
    assert ours.shape == theirs.shape
    error = float((ours - theirs).norm() / theirs.norm())
    assert error < tolerance, f"{error:.1e}"
