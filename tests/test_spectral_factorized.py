"""SpectralFactorized against dense algebra: order of accuracy, invariants, guards.

Accuracy is measured as an order: the error of one step of rate r against the exact one must fall as r².
"""

import math

import pytest
import torch
from torch import Tensor, nn

import cases
from cases import gradient, normal
from secondorder import SpectralFactorized

F64 = torch.float64
ONE_SIDED, BOTH = (5, 40), (7, 5)  # factors of size 5; of sizes 7 and 5
RATES = (1e-3, 5e-4, 2.5e-4)


def orthogonal(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def spectrum(d: int, spread: float) -> Tensor:
    """Logarithms of eigenvalues with product 1, no two alike."""
    logs = torch.linspace(-1, 1, d, dtype=F64) * spread + 0.1 * torch.arange(d, dtype=F64).sin()
    return logs - logs.mean()


def started(shape, turn=lambda mode, B: B, **options):
    """An optimizer whose state is that of the middle of a training: known factors, no counters at zero."""
    p = nn.Parameter(torch.zeros(shape, dtype=F64))
    quiet = dict(lr=1.0, betas=(0.0, 0.9), eps=0.0, weight_decay=0.0, fast_start=0.0, refresh_every=1000)
    optimizer = SpectralFactorized([p], **{**quiet, "nesterov": False, **options})
    optimizer.state_dict()
    state = optimizer.state[p]
    state["count"].fill_(9)
    state["seen"].fill_(9)
    state["scale"].fill_(0.7)
    for mode, d in enumerate(shape):
        if f"basis_{mode}" in state:
            state[f"basis_{mode}"].copy_(turn(mode, orthogonal(d, seed=mode + 1)))
            state[f"log_eigenvalues_{mode}"].copy_(spectrum(d, 1.0 + mode))
    return optimizer, p


def factors(state) -> list[Tensor]:
    """The dense `S_i`, the identity of size 1 for a mode without a factor left out."""
    names = [f"basis_{i}" for i in (0, 1) if f"basis_{i}" in state]
    logs = [state[name.replace("basis", "log_eigenvalues")] for name in names]
    return [state[n] @ torch.diag(v.exp()) @ state[n].T for n, v in zip(names, logs, strict=True)]


def dense(state) -> Tensor:
    S = state["scale"].clone().view(1, 1)
    for factor in factors(state):
        S = torch.kron(S, factor)
    return S


def power(S: Tensor, exponent: float) -> Tensor:
    values, Q = torch.linalg.eigh(S)
    return Q @ torch.diag(values**exponent) @ Q.T


def moved(shape, rate: float, G: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The dense S before and after one gradient."""
    optimizer, p = started(shape, factor_beta=1 - rate, **options)
    before = dense(optimizer.state[p])
    p.grad = G.clone()
    optimizer.step()
    return before, dense(optimizer.state[p])


def order(error) -> float:
    errors = [error(rate) for rate in RATES]
    return min(math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False))


class TestAccuracy:
    def test_one_factor_follows_the_exact_average_to_second_order(self):
        G = normal(*ONE_SIDED, seed=3)

        def error(rate):
            before, after = moved(ONE_SIDED, rate, G)
            return float((after - ((1 - rate) * before + rate * G @ G.T / ONE_SIDED[1])).norm())

        assert order(error) > 1.95

    def test_one_factor_in_its_own_basis_is_the_exact_average(self):
        """Where nothing turns there is no error at all."""
        optimizer, p = started(ONE_SIDED, turn=lambda mode, B: torch.eye(len(B), dtype=F64), factor_beta=0.9)
        before = dense(optimizer.state[p])
        G = torch.zeros(ONE_SIDED, dtype=F64)
        G[range(5), range(5)] = torch.arange(1.0, 6.0, dtype=F64)
        p.grad = G
        optimizer.step()
        wanted = 0.9 * before + 0.1 * G @ G.T / ONE_SIDED[1]
        torch.testing.assert_close(dense(optimizer.state[p]), wanted, rtol=1e-12, atol=1e-12)

    def test_two_factors_follow_the_projected_average_to_second_order(self):
        """`S^(1/2) [(w - 1) + X_0 ⊗ I + I ⊗ X_1] S^(1/2)`, `X_i = W_(i) W_(i)^T / d_-i - w I`, w = avg W²."""
        G = normal(*BOTH, seed=3)
        optimizer, p = started(BOTH)
        (S0, S1), scale = factors(optimizer.state[p]), optimizer.state[p]["scale"]
        W = power(S0, -0.5) @ G @ power(S1, -0.5) / scale.sqrt()
        w, (I0, I1) = W.square().mean(), (torch.eye(d, dtype=F64) for d in BOTH)
        X0, X1 = W @ W.T / BOTH[1] - w * I0, W.T @ W / BOTH[0] - w * I1
        root = torch.kron(power(S0, 0.5), power(S1, 0.5)) * scale.sqrt()
        step = root @ ((w - 1) * torch.eye(35, dtype=F64) + torch.kron(X0, I1) + torch.kron(I0, X1)) @ root

        def error(rate):
            before, after = moved(BOTH, rate, G)
            return float((after - before - rate * step).norm())

        assert order(error) > 1.95

    def test_what_is_left_of_the_average_is_normal_to_all_such_curvatures(self):
        """Affine-invariant metric: `tr(S^-1 (H - S - step) S^-1 T) = 0` for every tangent T of the form of S."""
        G, rate = normal(*BOTH, seed=3), 1e-7
        before, after = moved(BOTH, rate, G)
        H = torch.outer(G.flatten(), G.flatten())
        inverse = torch.linalg.inv(before)
        left = inverse @ (H - before - (after - before) / rate) @ inverse
        optimizer, p = started(BOTH)
        S0, S1 = factors(optimizer.state[p])
        for seed in range(5):
            E0, E1 = (M + M.T for M in (normal(d, d, seed=10 + seed) for d in BOTH))
            T = torch.kron(E0, S1) + torch.kron(S0, E1)
            assert abs((left * T).sum()) < 1e-5 * left.norm() * T.norm()

    def test_batch_size_multiplies_the_statistic(self):
        G = normal(*BOTH, seed=3)
        _, some = moved(BOTH, 0.05, G, batch_size=9)
        _, same = moved(BOTH, 0.05, 3 * G)
        torch.testing.assert_close(some, same, rtol=1e-12, atol=1e-12)

    def test_constant_gradient_has_a_fixed_point(self):
        """One factor, full rank: S becomes `G G^T / m`, from an identity with all eigenvalues equal."""
        G = torch.diag(torch.logspace(0, -1, 5, dtype=F64)) @ normal(*ONE_SIDED, seed=4)
        p = nn.Parameter(torch.zeros(ONE_SIDED, dtype=F64))
        optimizer = SpectralFactorized([p], lr=0.0, eps=0.0)
        for _ in range(400):
            p.grad = G.clone()
            optimizer.step()
        torch.testing.assert_close(dense(optimizer.state[p]), G @ G.T / ONE_SIDED[1], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("exponent", [0.5, 1.0])
    @pytest.mark.parametrize("shape", [(24, 16), (12, 60)], ids=str)
    def test_whitens_gradients_of_a_kronecker_covariance(self, shape, exponent):
        """Cosine of the preconditioned gradient with that of the true covariance."""
        generator = torch.Generator().manual_seed(0)
        spreads = [torch.logspace(0, -a, d, dtype=F64) for a, d in zip((1.5, 1.0), shape, strict=True)]
        bases = [orthogonal(d, seed=5 + i) for i, d in enumerate(shape)]
        if shape[1] > 4 * shape[0]:
            spreads[1], bases[1] = torch.ones(60, dtype=F64), torch.eye(60, dtype=F64)
        L0, L1 = (Q * s for Q, s in zip(bases, spreads, strict=True))
        p = nn.Parameter(torch.zeros(shape))
        optimizer = SpectralFactorized([p], lr=0.0, betas=(0.0, 0.98), exponent=exponent)
        for _ in range(600):
            noise = torch.randn(shape, generator=generator, dtype=F64)
            p.grad = (L0 @ noise @ L1.T).float()
            optimizer.step()
        G = normal(*shape, seed=9)
        wanted = power(L0 @ L0.T, -exponent) @ G @ power(L1 @ L1.T, -exponent)
        found = (optimizer.preconditioner(p) @ G.float()).double()
        assert float((found * wanted).sum() / found.norm() / wanted.norm()) > 0.99


class TestInvariants:
    @pytest.mark.parametrize("shape", [(6, 5), (3, 14)], ids=str)
    def test_determinants_stay_one(self, shape):
        p = nn.Parameter(torch.zeros(shape, dtype=F64))
        optimizer = SpectralFactorized([p])
        for step in range(200):
            p.grad = gradient(shape, step, dtype=F64) * 10 ** math.sin(step)
            optimizer.step()
            logs = [v for k, v in optimizer.state[p].items() if k.startswith("log_eigenvalues")]
            assert logs and all(abs(float(v.sum())) < 1e-12 for v in logs)

    @pytest.mark.parametrize(("every", "steps"), [(1, 2000), (10, 500)])
    def test_bases_stay_orthogonal(self, every, steps):
        """Half of the gradients are rank one, their sizes span four decades; in float32.

        The guards bound `|B^T B - I|` by (1/64)² after a refresh, by 10/64 ten steps later, whatever the gradients are.
        """
        shape = (12, 9)
        p = nn.Parameter(torch.zeros(shape))
        optimizer = SpectralFactorized([p], lr=1e-3, refresh_every=every)
        generator, worst = torch.Generator().manual_seed(0), 0.0
        for step in range(steps):
            G = torch.randn(shape, generator=generator)
            if step % 2:
                G = torch.outer(G[:, 0], G[0])
            p.grad = G * 10 ** (2 * math.sin(0.37 * step))
            optimizer.step()
            for mode, d in enumerate(shape):
                B = optimizer.state[p][f"basis_{mode}"]
                worst = max(worst, float((B.T @ B - torch.eye(d)).abs().max()))
        assert worst < {1: 2e-4, 10: 0.1}[every]

    def test_a_refresh_is_a_newton_schulz_step(self):
        """A basis that is off by δ is off by about δ² afterwards."""
        optimizer, p = started(BOTH, turn=lambda mode, B: 1.05 * B, refresh_every=1, factor_beta=1 - 1e-12)
        p.grad = normal(*BOTH, seed=3)
        optimizer.step()
        for mode in (0, 1):
            stretch = torch.linalg.svdvals(optimizer.state[p][f"basis_{mode}"])
            torch.testing.assert_close(stretch, torch.full_like(stretch, 1.5 * 1.05 - 0.5 * 1.05**3))

    def test_rotations_of_rows_and_columns_rotate_everything(self):
        """`G -> P G R^T` with bases `P B_0` and `R B_1`: all steps are rotated with it."""
        turns = [orthogonal(d, seed=20 + i) for i, d in enumerate(BOTH)]
        a, p = started(BOTH, eps=1e-4, fast_start=3.0, betas=(0.9, 0.95), nesterov=True)
        b, q = started(BOTH, lambda i, B: turns[i] @ B, eps=1e-4, fast_start=3.0, betas=(0.9, 0.95), nesterov=True)
        for step in range(20):
            p.grad = gradient(BOTH, step, dtype=F64)
            q.grad = turns[0] @ p.grad @ turns[1].T
            a.step()
            b.step()
        torch.testing.assert_close(q.detach(), turns[0] @ p.detach() @ turns[1].T, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
    def test_update_is_a_power_of_the_curvature(self, exponent):
        optimizer, p = started(BOTH, exponent=exponent, factor_beta=0.999, refresh_every=1)
        for step in range(5):
            before = p.detach().clone()
            p.grad = gradient(BOTH, step, dtype=F64)
            optimizer.step()
        S = optimizer.curvature(p).to_dense()
        torch.testing.assert_close(S, dense(optimizer.state[p]))
        wanted = (power(S, -exponent) @ p.grad.flatten()).view(BOTH)
        torch.testing.assert_close(before - p.detach(), wanted, rtol=1e-9, atol=1e-9)

    def test_factors_rest_between_statistics(self):
        p = nn.Parameter(torch.zeros(BOTH))
        optimizer = SpectralFactorized([p], statistics_every=4, refresh_every=1000)
        cases.train(optimizer, [p], range(5))
        before = {k: v.clone() for k, v in optimizer.state[p].items() if k.startswith(("basis", "log", "scale"))}
        cases.train(optimizer, [p], range(5, 8))
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in before.items())
        cases.train(optimizer, [p], [8])
        assert not torch.equal(optimizer.state[p]["basis_0"], before["basis_0"])


class TestGuards:
    def test_equal_eigenvalues_turn_to_the_right_axes(self):
        """All gaps are zero and the statistic is far from diagonal: a finite turn, towards its eigenvectors."""
        d = 6
        Q = orthogonal(d, seed=7)
        G = (Q * torch.arange(1.0, d + 1, dtype=F64)) @ torch.linalg.qr(normal(40, d, seed=8)).Q.T
        p = nn.Parameter(torch.zeros(d, 40, dtype=F64))
        optimizer = SpectralFactorized([p], lr=0.0)
        off = []
        for _ in range(20):
            p.grad = G.clone()
            optimizer.step()
            B = optimizer.state[p]["basis_0"]
            D = B.T @ (G @ G.T) @ B
            off.append(float((D - torch.diag(D.diagonal())).norm() / D.norm()))
        first = G @ G.T
        assert off[0] < 0.8 * float((first - torch.diag(first.diagonal())).norm() / first.norm())
        assert off[-1] < 0.05

    @pytest.mark.parametrize("shape", [(6, 5), (3, 14)], ids=str)
    def test_two_equal_eigenvalues_far_from_others(self, shape):
        optimizer, p = started(shape)
        for mode in (0, 1):
            if f"basis_{mode}" in optimizer.state[p]:
                logs = optimizer.state[p][f"log_eigenvalues_{mode}"]
                logs[1] = logs[2]
                logs.sub_(logs.mean())
        for step in range(5):
            p.grad = gradient(shape, step, dtype=F64)
            optimizer.step()
        assert all(torch.isfinite(v).all() for v in optimizer.state[p].values())
        assert optimizer.diagnostics(full=True)["condition_max"] < 1e6

    @pytest.mark.parametrize("exponent", [0.5, 1.0])
    @pytest.mark.parametrize("eps", [0.0, 1e-8])
    def test_rank_one_gradients_of_all_sizes_stay_finite(self, exponent, eps):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.zeros(shape)) for shape in [(6, 5), (3, 14)]]
        optimizer = SpectralFactorized(params, lr=1e-3, exponent=exponent, eps=eps)
        for _ in range(150):
            size = 10.0 ** (28 * float(torch.rand((), generator=generator)) - 20)
            for p in params:
                u, v = (torch.randn(d, generator=generator) for d in p.shape)
                p.grad = size * torch.outer(u, v)
            optimizer.step()
        for value in (v for p in params for v in (p, *optimizer.state[p].values())):
            assert torch.isfinite(value).all()

    def test_directions_without_gradients_do_not_run_away(self):
        """A constant rank-one gradient: eps bounds the condition of S, a longer training does not raise it."""
        G = torch.outer(normal(6, seed=1), normal(5, seed=2))
        p = nn.Parameter(torch.zeros(6, 5, dtype=F64))
        optimizer = SpectralFactorized([p], lr=0.0, eps=1e-4)
        spreads = []
        for step in range(1000):
            p.grad = G.clone()
            optimizer.step()
            if step in (499, 999):
                spreads.append(float(optimizer.curvature(p).condition()))
        assert spreads[1] <= spreads[0] < 100 / 1e-4

    def test_without_damping_eigenvalues_have_a_floor(self):
        """The same with eps = 0 and a short memory: unbounded, the smallest one would be 2^-400."""
        p = nn.Parameter(torch.zeros(6, 5))
        optimizer = SpectralFactorized([p], lr=1e-3, eps=0.0, factor_beta=0.5)
        for _ in range(400):
            p.grad = torch.outer(normal(6, seed=1), normal(5, seed=2)).float()
            optimizer.step()
        assert optimizer.diagnostics(full=True)["condition_max"] < 1.01e8
        assert torch.isfinite(p).all()

    def test_one_gradient_changes_the_shape_of_a_factor_by_a_bounded_factor(self):
        """However large it is: from 1/2 to (d + 1)/2, while the scale follows it wholly."""
        p = nn.Parameter(torch.zeros(6, 5))
        optimizer = SpectralFactorized([p])
        cases.train(optimizer, [p], range(50))
        before, scale = optimizer.diagnostics(full=True)["condition_max"], float(optimizer.curvature(p).trace())
        p.grad = 1e8 * torch.outer(normal(6, seed=1), normal(5, seed=2)).float()
        optimizer.step()
        assert optimizer.diagnostics(full=True)["condition_max"] <= 7 * before
        assert float(optimizer.curvature(p).trace()) > 1e12 * scale

    def test_a_spike_is_forgotten(self):
        """One gradient 1000 times too large: the update it makes is bounded, later ones recover."""
        shape = (12, 9)
        p = nn.Parameter(torch.zeros(shape))
        optimizer = SpectralFactorized([p], lr=1.0, weight_decay=0.0)
        sizes = []
        for step in range(600):
            before = p.detach().clone()
            p.grad = gradient(shape, step) * (1e3 if step == 200 else 1.0)
            optimizer.step()
            sizes.append(float((p.detach() - before).square().mean().sqrt()))
        assert max(sizes) < 10
        assert sizes[-1] == pytest.approx(sum(sizes[150:200]) / 50, rel=0.5)


def test_trains_faster_than_adam_where_directions_are_mixed():
    """Least squares behind two rotations with condition 1e4: the curvature has the Kronecker form."""
    losses = {}
    L0, L1 = (orthogonal(d, seed=30 + d) * torch.logspace(0, -1, d, dtype=F64) for d in (16, 12))
    for cls, lr in ((SpectralFactorized, 1e-2), (torch.optim.AdamW, 1e-2)):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.zeros(16, 12, dtype=F64))
        optimizer = cls([p], lr=lr, weight_decay=0.0)
        target = normal(16, 12, seed=40)
        for _ in range(300):
            noise = 0.01 * torch.randn(16, 12, generator=generator, dtype=F64)
            residual = L0.T @ (p.detach() - target) @ L1 + noise
            p.grad = L0 @ residual @ L1.T
            optimizer.step()
        losses[cls] = float((L0.T @ (p.detach() - target) @ L1).square().sum())
    assert losses[SpectralFactorized] < 0.3 * losses[torch.optim.AdamW], losses
