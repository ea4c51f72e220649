"""KLShampoo and KLSOAP against dense float64 transcripts, their criterion, and what they are invariant to."""

from itertools import product
from math import prod

import pytest
import torch

import cases
from cases import gradient, parameters
from secondorder import KLSOAP, SOAP, KLShampoo
from secondorder.layout.blocks import Treatment

F64 = torch.float64
BOTH = pytest.mark.parametrize("cls", [KLShampoo, KLSOAP])
WHOLE = dict(max_block_size=None, one_sided_aspect=None)


def on(A, X, mode):
    """A matrix on one mode of a tensor."""
    return torch.tensordot(A, X, ([1], [mode])).movedim(0, mode)


def unfold(X, mode):
    return X.movedim(mode, 0).flatten(1)


class DenseKL:
    """One block, covariances and momentum in the parameter's own coordinates, refreshes together.

    Args:
        W: The block, changed in place.
        modes: Modes with a factor.
        hp: Arguments of the optimizer.
        adam: KLSOAP; else KLShampoo.
    """

    def __init__(self, W, modes, hp, adam):
        self.W, self.modes, self.hp, self.adam, self.t = W, modes, hp, adam, 0
        self.Q = [torch.eye(d, dtype=W.dtype) for d in W.shape]
        self.m, self.v = torch.zeros_like(W), torch.zeros_like(W)
        self.S = None

    def power(self, mode, exponent):
        """What stands for `S^exponent`: exact if the basis were that of `S`."""
        values = torch.diag(self.Q[mode].T @ self.S[mode] @ self.Q[mode])
        return self.Q[mode] * values.clamp_min(self.hp["floor"] * values.max()) ** exponent @ self.Q[mode].T

    def whiten(self, X, modes, exponent=-0.5):
        for i in modes:
            X = on(self.power(i, exponent), X, i)
        return X

    def project(self, X):
        for i in self.modes:
            X = on(self.Q[i].T, X, i)
        return X

    def step(self, G):
        self.t += 1
        hp, (b1, b2), N = self.hp, self.hp["betas"], G.numel()
        if self.S is None:
            size = G.square().mean() ** (1 / len(self.modes))
            self.S = {i: size * torch.eye(G.shape[i], dtype=G.dtype) for i in self.modes}
        rms = self.whiten(G, self.modes).square().mean().sqrt()
        clipped = G * min(1.0, hp["clip"] / rms.item()) if hp["clip"] else G
        stats = {}
        for i in self.modes:
            X = unfold(self.whiten(clipped, [j for j in self.modes if j != i]), i)
            stats[i] = X @ X.T * G.shape[i] / N
        beta = hp["factor_beta"]
        for i in self.modes:
            self.S[i] = self.S[i] + (1 - beta) / (1 - beta ** (self.t + 1)) * (stats[i] - self.S[i])
        means = {i: S.diagonal().mean() for i, S in self.S.items()}
        for i in self.modes:
            self.S[i] = self.S[i] * prod(means.values()) ** (1 / len(means)) / means[i]
        if not self.adam:
            G = clipped
        self.m += (1 - b1) / (1 - b1**self.t) * (G - self.m)
        m = b1 * self.m + (1 - b1) * G if hp["nesterov"] else self.m
        if self.adam:
            self.v += (1 - b2) / (1 - b2**self.t) * (self.project(G) ** 2 - self.v)
            U = self.project(m) / (self.v.sqrt() + hp["eps"])
            for i in self.modes:
                U = on(self.Q[i], U, i)
        else:
            U = self.whiten(m, self.modes)
        self.W -= hp["lr"] * hp["weight_decay"] * self.W
        self.W -= hp["lr"] * U
        if self.t % hp["refresh_every"] == 0:
            for i in self.modes:
                self.refresh(i, self.t <= 2 * hp["refresh_every"] or hp["refresh_by"] == "eigh")

    def refresh(self, i, decompose):
        old, S, d = self.Q[i], self.S[i], len(self.Q[i])
        S = S + 1e-6 * S.trace() / d * old @ torch.diag(torch.arange(d, 0, -1) / d).to(S) @ old.T
        if decompose:
            new = torch.linalg.eigh(S).eigenvectors.flip(1)
        else:
            order = torch.diag(old.T @ S @ old).argsort(descending=True)
            new = torch.linalg.qr(S @ old[:, order]).Q
        self.v = on((new.T @ old) ** 2, self.v, i)
        self.Q[i] = new


def of_all_modes(cls):
    """The class with a factor on every axis of a tensor."""

    class AllModes(cls):
        def _blocks(self, shape, group, role):
            return Treatment(shape, tuple((d,) for d in shape), tuple(range(len(shape))), "all modes")

    return AllModes


def assert_equals_dense(cls, shape, modes, steps=25, make=None, **options):
    hp = dict(lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, factor_beta=0.9, floor=1e-6, clip=3.0)
    hp.update(nesterov=True, refresh_by="qr", refresh_every=4)
    hp.update({k: v for k, v in options.items() if k in hp})
    (p,) = parameters([shape], dtype=F64)
    dense = DenseKL(p.detach().clone(), modes, hp, cls is KLSOAP)
    optimizer = (make or cls)([p], refresh="together", **{**hp, **options})
    for step in range(steps):
        p.grad = gradient(shape, step, dtype=F64) * (100.0 if step == 12 else 1.0)
        dense.step(p.grad.clone())
        optimizer.step()
    torch.testing.assert_close(p.detach(), dense.W, rtol=0, atol=1e-9)
    return optimizer, p, dense


@BOTH
@pytest.mark.parametrize(("every", "by", "nesterov"), list(product((1, 4), ("qr", "eigh"), (True, False))))
def test_step_is_the_dense_algebra(cls, every, by, nesterov):
    options = dict(refresh_every=every, refresh_by=by, nesterov=nesterov)
    assert_equals_dense(cls, (6, 6), (0, 1), **WHOLE, **options)


@BOTH
@pytest.mark.parametrize("options", [dict(clip=None), dict(clip=1.0), dict(floor=0.1)], ids=str)
def test_clip_and_floor_are_the_dense_algebra(cls, options):
    assert_equals_dense(cls, (7, 5), (0, 1), **WHOLE, **options)


@BOTH
@pytest.mark.parametrize(("shape", "mode"), [((4, 20), 0), ((20, 4), 1)])
def test_one_sided_block_is_the_dense_algebra(cls, shape, mode):
    assert_equals_dense(cls, shape, (mode,))


@BOTH
def test_three_modes_are_the_dense_algebra(cls):
    assert_equals_dense(cls, (4, 3, 5), (0, 1, 2), make=of_all_modes(cls))


def test_curvature_is_the_kronecker_product_of_the_covariances():
    optimizer, p, dense = assert_equals_dense(KLShampoo, (4, 5), (0, 1), steps=9, **WHOLE)
    torch.testing.assert_close(optimizer.curvature(p).to_dense(), torch.kron(dense.S[0], dense.S[1]))
    preconditioner = torch.kron(dense.power(0, -0.5), dense.power(1, -0.5))
    torch.testing.assert_close(optimizer.preconditioner(p).to_dense(), preconditioner)


def covariances(optimizer, p):
    s = optimizer.state[p]
    return [s[f"basis_{i}"] @ s[f"covariance_{i}"] @ s[f"basis_{i}"].mT for i in range(p.ndim)]


def test_factors_are_stationary_points_of_the_divergence():
    """A cycle of gradients that no Kronecker product describes: E[G S_b^-1 G^T] / d_b = S_a, and the other way."""
    stream = [gradient((5, 4), step, dtype=F64) for step in range(20)]
    (p,) = parameters([(5, 4)], dtype=F64)
    optimizer = KLShampoo([p], lr=0.0, factor_beta=0.997, refresh_every=20, refresh_by="eigh", clip=None, **WHOLE)
    for step in range(700):
        p.grad = stream[step % len(stream)]
        optimizer.step()
    S_a, S_b = covariances(optimizer, p)
    G = torch.stack(stream)
    wanted = (G @ torch.linalg.inv(S_b) @ G.mT).mean(0) / 4, (G.mT @ torch.linalg.inv(S_a) @ G).mean(0) / 5
    for found, target in zip((S_a, S_b), wanted, strict=True):
        assert (found - target).norm() < 0.05 * target.norm()


def test_factors_find_the_covariance_of_kronecker_gaussians():
    generator = torch.Generator().manual_seed(0)

    def root(d):
        turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=F64)).Q
        return turn * torch.logspace(0, -1, d, dtype=F64)

    L, R = root(6), root(9)
    (p,) = parameters([(6, 9)], dtype=F64)
    optimizer = KLShampoo([p], lr=0.0, factor_beta=0.997, refresh_every=20, **WHOLE)
    for _ in range(1000):
        p.grad = L @ torch.randn(6, 9, generator=generator, dtype=F64) @ R.mT
        optimizer.step()
    S_a, S_b = covariances(optimizer, p)
    A, B = L @ L.mT, R @ R.mT
    # E[G S_b^-1 G^T] = A tr(B S_b^-1), in closed form
    assert (S_a - A * (B @ torch.linalg.inv(S_b)).trace() / 9).norm() < 0.05 * S_a.norm()
    assert (S_b - B * (A @ torch.linalg.inv(S_a)).trace() / 6).norm() < 0.05 * S_b.norm()
    found, truth = torch.kron(S_a, S_b), torch.kron(A, B)
    assert (found * truth).sum() > 0.995 * found.norm() * truth.norm()
    assert abs(found.trace() / truth.trace() - 1) < 0.1


def moves(cls, stream, shape, **options):
    """The parameter's change in every step."""
    (p,) = parameters([shape], dtype=F64)
    optimizer, out = cls([p], **{**dict(lr=1.0, eps=0.0, weight_decay=0.0, **WHOLE), **options}), []
    for G in stream:
        before = p.detach().clone()
        p.grad = G.clone()
        optimizer.step()
        out.append(p.detach() - before)
    return torch.stack(out)


def test_turned_gradients_turn_the_step():
    """From the second step on: the first one is taken in the parameter's own axes."""
    stream = [gradient((6, 6), step, dtype=F64) for step in range(20)]
    generator = torch.Generator().manual_seed(0)
    P, Q = (torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=F64)).Q for _ in range(2))
    options = dict(refresh_every=1, refresh_by="eigh")
    straight = moves(KLShampoo, stream, (6, 6), **options)
    turned = moves(KLShampoo, [P @ G @ Q for G in stream], (6, 6), **options)
    # The graded diagonal of weight 1e-6 has axes of its own.
    torch.testing.assert_close(turned[1:], (P @ straight @ Q)[1:], rtol=0, atol=1e-4)


@BOTH
@pytest.mark.parametrize("scale", [1e-8, 1e6])
def test_scale_of_gradients_does_not_matter(cls, scale):
    stream = [gradient((6, 4), step, dtype=F64) for step in range(25)]
    ours, scaled = (moves(cls, [G * s for G in stream], (6, 4), refresh_every=3) for s in (1.0, scale))
    torch.testing.assert_close(scaled, ours, rtol=0, atol=1e-7)


@BOTH
def test_order_of_modes_does_not_matter(cls):
    """All factors move from the factors as they were."""
    order, stream = (2, 0, 1), [gradient((3, 4, 5), step, dtype=F64) for step in range(20)]
    options = dict(refresh_every=3, refresh="together")
    make = of_all_modes(cls)
    (p,), (q,) = parameters([(3, 4, 5)], dtype=F64), parameters([(5, 3, 4)], dtype=F64)
    with torch.no_grad():
        q.copy_(p.permute(order))
    for r, turn in ((p, (0, 1, 2)), (q, order)):
        optimizer = make([r], **options)
        for G in stream:
            r.grad = G.permute(turn)
            optimizer.step()
    torch.testing.assert_close(q.detach(), p.detach().permute(order), rtol=0, atol=1e-9)


def test_first_step_is_adams():
    G = gradient((6, 4), 0, dtype=F64)
    torch.testing.assert_close(moves(KLSOAP, [G], (6, 4))[0], -G.sign())


def test_first_step_divides_by_row_and_column_sizes():
    """Both averaged with one isotropic gradient of the same size, the older one."""
    G = gradient((6, 4), 0, dtype=F64)
    size, beta = G.square().mean(), 0.9
    rows, columns = ((beta * size + G.square().mean(i, keepdim=True)) / (1 + beta) for i in (1, 0))
    found = moves(KLShampoo, [G], (6, 4), factor_beta=beta)[0]
    torch.testing.assert_close(found, -G * (size / rows / columns).sqrt())


@BOTH
@pytest.mark.parametrize(("shape", "every"), [((48, 48), 1), ((96, 24), 1), ((96, 24), 10)], ids=str)
def test_no_update_is_a_spike(cls, shape, every):
    assert 0.5 < cases.largest_update(cls, shape, refresh_every=every) <= 1.5


@BOTH
def test_factors_have_one_scale(cls):
    (p,) = parameters([(32, 4)])
    optimizer = cls([p], **WHOLE)
    cases.train(optimizer, [p], range(200))
    means = [optimizer.state[p][f"covariance_{i}"].diagonal().mean().item() for i in (0, 1)]
    assert means[0] == pytest.approx(means[1], rel=1e-5)


def test_a_row_that_wakes_up_does_not_swamp_the_others():
    """Its first gradient is clipped to what the factors hold possible; the others go on."""
    stream = [gradient((8, 6), step, dtype=F64) for step in range(120)]
    for step in range(100):
        stream[step][0] = 0
    found = moves(KLShampoo, stream, (8, 6)).square().mean(-1).sqrt()
    assert found[100:, 0].max() < 5 and found.max() < 5
    assert 0.3 < found[115:, 1:].mean() / found[80:100, 1:].mean() < 3


def test_a_spike_is_bounded_and_forgotten():
    stream = [gradient((8, 6), step, dtype=F64) for step in range(100)]
    usual = moves(KLShampoo, stream, (8, 6))
    stream[50] = 1e4 * stream[50]
    spiked = moves(KLShampoo, stream, (8, 6))
    assert spiked[50].square().mean().sqrt() < 1.5
    torch.testing.assert_close(spiked[75:].square().mean().sqrt(), usual[75:].square().mean().sqrt(), rtol=0.3, atol=0)


@BOTH
@pytest.mark.parametrize("by", ["qr", "eigh"])
def test_basis_stays_orthogonal(cls, by):
    (p,) = parameters([(12, 9)])
    optimizer = cls([p], refresh_every=1, refresh_by=by)
    cases.train(optimizer, [p], range(300))
    for mode, d in enumerate(p.shape):
        Q = optimizer.state[p][f"basis_{mode}"]
        assert (Q.T @ Q - torch.eye(d)).abs().max() < 1e-5


@BOTH
def test_state_is_no_larger_than_soaps(cls):
    ours, theirs = (c(parameters([(48, 40)])).memory_report().state for c in (cls, SOAP))
    assert ours <= theirs
