"""Random tensors that depend on a seed alone, and Gram matrices of them in float64."""

import torch

import cases


def randn(*shape, seed=0, dtype=torch.float64, device="cpu"):
    """Normal numbers: for one seed the same in every dtype, up to its rounding."""
    return cases.normal(*shape, seed=seed).to(device, dtype)


def symmetric(n, d, seed=1, dtype=torch.float64, device="cpu"):
    C = randn(n, d, d, seed=seed, device=device)
    return (C + C.mT).to(dtype)


def gram(X, weight=None, ones=False):
    """`X diag(weight) Xᵀ` in float64, and the same of absolute values, to which errors are relative."""
    X = X.double()
    if ones:
        X = torch.cat([X, torch.ones_like(X[:, :1])], 1)
    w = torch.ones_like(X[:, 0]) if weight is None else weight.double()
    S, scale = (torch.einsum("nik,nk,njk->nij", x, v, x) for x, v in ((X, w), (X.abs(), w.abs())))
    return S, scale


def near(actual, expected, scale, tolerance=2e-6):
    """Asserts that errors are at most `tolerance` times `scale`, entry by entry."""
    assert ((actual.double() - expected).abs() <= tolerance * scale + 1e-30).all()
