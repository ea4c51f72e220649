"""EigenvalueCorrectedShampoo against a dense float64 transcript of its doc-string, SOAP; the size of its updates."""

from itertools import product

import pytest
import torch

import cases
from cases import gradient, parameters
from secondorder import SOAP, EigenvalueCorrectedShampoo

DEFAULTS = dict(lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, factor_beta=0.9, exponent=0.5, nesterov=True)
DEFAULTS.update(refresh_by="qr", refresh_every=3)


class DenseCorrected:
    """One block `W (d_0, d_1)` with factors on the sides `modes`; refreshes together."""

    def __init__(self, W, modes, hp):
        self.W, self.modes, self.hp, self.t = W, modes, hp, 0
        self.Q = [torch.eye(d, dtype=W.dtype) for d in W.shape]
        self.C = [torch.zeros(d, d, dtype=W.dtype) for d in W.shape]
        self.m, self.v = torch.zeros_like(W), torch.zeros_like(W)

    def step(self, G):
        hp, (b1, b2) = self.hp, self.hp["betas"]
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * G
        m = self.m / (1 - b1**self.t)
        m = b1 * m + (1 - b1) * G if hp["nesterov"] else m
        Y = self.Q[0].T @ G @ self.Q[1]
        self.v += (1 - b2) / (1 - b2**self.t) * (Y**2 - self.v)
        X = self.Q[0].T @ m @ self.Q[1] / (self.v ** hp["exponent"] + hp["eps"])
        self.W -= hp["lr"] * hp["weight_decay"] * self.W
        self.W -= hp["lr"] * self.Q[0] @ X @ self.Q[1].T
        for i, gram in enumerate((G @ G.T, G.T @ G)):
            self.C[i] += (1 - hp["factor_beta"]) / (1 - hp["factor_beta"] ** self.t) * (gram - self.C[i])
        for i in self.modes if self.t % hp["refresh_every"] == 0 else ():
            self.refresh(i)

    def refresh(self, i):
        old, d = self.Q[i], len(self.Q[i])
        C = self.C[i] + 1e-6 * self.C[i].trace() / d * torch.diag(torch.arange(d, 0, -1) / d)
        if self.t <= 2 * self.hp["refresh_every"] or self.hp["refresh_by"] == "eigh":
            new = torch.linalg.eigh(C).eigenvectors.flip(1)
        else:
            order = torch.diag(old.T @ C @ old).argsort(descending=True)
            new = torch.linalg.qr(C @ old[:, order]).Q
        R = new.T @ old
        self.v = R**2 @ self.v if i == 0 else self.v @ (R**2).T
        self.Q[i] = new


def assert_equals_dense(shape, tiles, modes, steps=20, **options):
    hp = {**DEFAULTS, **{k: v for k, v in options.items() if k in DEFAULTS}}
    (p,) = parameters([shape], dtype=torch.float64)
    dense = [(tile, DenseCorrected(p.detach()[tile].clone(), modes, hp)) for tile in tiles]
    optimizer = EigenvalueCorrectedShampoo([p], refresh="together", **{**hp, **options})
    for step in range(steps):
        p.grad = gradient(shape, step, dtype=torch.float64)
        optimizer.step()
        for tile, block in dense:
            block.step(p.grad[tile])
    for tile, block in dense:
        torch.testing.assert_close(p.detach()[tile], block.W, rtol=0, atol=1e-9)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("refresh_by", ["qr", "eigh"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("exponent", [0.5, 0.25, 0.4])
def test_eigenvalue_corrected_shampoo_is_its_docstring(every, refresh_by, nesterov, exponent):
    options = dict(refresh_every=every, refresh_by=refresh_by, nesterov=nesterov, exponent=exponent)
    assert_equals_dense((6, 6), [(slice(0, 6), slice(0, 6))], (0, 1), **options)


@pytest.mark.parametrize("every", [1, 3])
def test_blocks_are_separate_problems(every):
    rows, columns = (slice(0, 4), slice(4, 7)), (slice(0, 4), slice(4, 8), slice(8, 11))
    assert_equals_dense((7, 11), list(product(rows, columns)), (0, 1), max_block_size=5, refresh_every=every)


@pytest.mark.parametrize(("shape", "mode"), [((4, 20), 0), ((20, 4), 1)])
@pytest.mark.parametrize("every", [1, 3])
def test_wide_matrices_have_a_factor_on_the_small_side_only(shape, mode, every):
    everything = [(slice(0, shape[0]), slice(0, shape[1]))]
    assert_equals_dense(shape, everything, (mode,), refresh_every=every)


@pytest.mark.parametrize("refresh_by", ["qr", "eigh"])
def test_with_exponent_one_half_it_is_soap(refresh_by):
    """Rotating the averaged gradient is averaging the rotated ones, as long as the average turns with the basis."""
    params, twins = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    options = dict(lr=0.01, refresh_every=3, refresh_by=refresh_by, weight_decay=0.1, nesterov=False)
    cases.train(EigenvalueCorrectedShampoo(params, **options), params, range(25))
    cases.train(SOAP(twins, **options), twins, range(25))
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


@pytest.mark.parametrize("exponent", [0.0, 1.5, "half", (0.5, 0.5)], ids=str)
def test_exponents_out_of_range_are_refused_by_name(exponent):
    with pytest.raises(ValueError, match="exponent"):
        EigenvalueCorrectedShampoo(parameters(), exponent=exponent)


@pytest.mark.parametrize("shape", [(48, 48), (96, 24)], ids=str)
@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("refresh_by", ["qr", "eigh"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_no_update_is_a_spike(shape, every, refresh_by, nesterov):
    options = dict(refresh_every=every, refresh_by=refresh_by, nesterov=nesterov)
    assert 0.5 < cases.largest_update(EigenvalueCorrectedShampoo, shape, **options) <= 1.5
