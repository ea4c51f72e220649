"""Factors of SINGD and IKFAC: their step against dense algebra, what it is invariant to, what cannot break it."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secondorder.preconditioner import protocol
from secondorder.preconditioner.inverse_free import InverseFree
from secondorder.preconditioner.protocol import Context
from secondorder.preconditioner.structures import STRUCTURES, structure

NAMES = [*STRUCTURES, "block(3)", "hierarchical(2,1)"]
D = (5, 7)  # outputs, inputs
SETTINGS = dict(damping=0.03, damping_kind="absolute", factor_rate=0.1, factor_momentum=0.0, factor_dtype="float32")


def spd(d, n=2, seed=0, spread=1.0):
    """Symmetric positive definite matrices `(n, d, d)`."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, d, d, generator=generator, dtype=torch.float64)).Q
    return Q * torch.logspace(-spread, spread, d, dtype=torch.float64) @ Q.mT


class Factors:
    """A method at work on statistics alone, two rows at a time."""

    def __init__(
        self, names=("dense", "dense"), coupled=True, diagonal=(), row=InverseFree, shape=D, dtype=torch.float64, **hp
    ):
        self.method = row(tuple(structure(name) for name in names), coupled)
        self.hp, self.diagonal, self.dtype = {**SETTINGS, **hp}, diagonal, dtype
        self.modes = tuple(i for i in range(len(shape)) if i not in diagonal)
        self.s = {"momentum": torch.zeros(2, *shape, dtype=dtype)}
        for name, spec in self.method.specs(shape, self.modes, self.hp, diagonal).items():
            start = spec.init(dtype=dtype) if callable(spec.init) else torch.zeros(spec.shape, dtype=dtype)
            self.s[name] = start.to(spec.dtype or dtype).expand(2, *spec.shape).clone()
        self.s["failures"] = torch.zeros(2)
        self.seen = torch.zeros(2)

    def kind(self, i):
        return self.method.structure(i, self.diagonal)

    def context(self):
        one = torch.ones(2, dtype=self.dtype)
        return Context(self.hp, self.modes, one, one, self.seen, self.seen, diagonal=self.diagonal)

    def observe(self, *grams, times=1):
        """Statistics `(2, d, d)` of every mode."""
        x = {f"gram_{i}": S.diagonal(dim1=1, dim2=2) if i in self.diagonal else S for i, S in enumerate(grams)}
        for _ in range(times):
            self.seen += 1
            self.method.observe(self.s, x, self.context())

    def K(self, i):
        return self.kind(i).to_dense(self.s[f"root_{i}"].double())

    def applied(self):
        """`⊗ K Kᵀ`."""
        left, right = (K @ K.mT for K in map(self.K, range(2)))
        return torch.einsum("nij,nkl->nikjl", left, right).flatten(3).flatten(1, 2)


def published(f, grams, rate):
    """`K <- K - β/2 K N` of all modes, with dense matrices but for the projection."""
    one = torch.eye
    H = [f.K(i).mT @ S @ f.K(i) for i, S in enumerate(grams)]
    M = [f.K(i).mT @ f.K(i) for i in range(len(grams))]

    def mean(X):
        return X.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)

    out = []
    for i, (S, h, m) in enumerate(zip(grams, H, M, strict=True)):
        ridge = f.hp["damping"]
        relative = f.hp["damping_kind"] == "relative"
        t = u = 1.0
        if f.method.coupled:
            t, u = mean(H[1 - i]), mean(M[1 - i])
            ridge = ridge * (mean(grams[0]) * mean(grams[1]) if relative else 1.0)
        elif relative:
            ridge = ridge * mean(S)
        kind = f.kind(i)
        N = kind.to_dense(kind.project((t * h + ridge * u * m).contiguous())) - one(S.shape[-1]).double()
        out.append(f.K(i) - rate / 2 * f.K(i) @ N)
    return out


def orders(errors):
    return [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]


class TestFactors:
    @pytest.mark.parametrize("coupled", [True, False])
    @pytest.mark.parametrize("kind", ["relative", "absolute"])
    @pytest.mark.parametrize("name", NAMES)
    def test_step_is_the_published_one_to_first_order(self, name, kind, coupled):
        grams = spd(D[0]), spd(D[1], seed=1)
        start = Factors((name, name), coupled, damping_kind=kind)
        start.observe(*(spd(d, seed=9) for d in D), times=3)
        errors = []
        for rate in (2e-3, 1e-3, 5e-4):
            f = copy.deepcopy(start)
            f.hp["factor_rate"] = rate
            f.seen += 1e6
            expected = published(f, grams, rate)
            f.observe(*grams)
            errors.append(max(float((f.K(i) - K).norm() / K.norm()) for i, K in enumerate(expected)))
        assert all(1.9 < order < 2.1 for order in orders(errors)), orders(errors)

    def test_diagonal_statistics_take_the_same_step_to_first_order(self):
        grams = spd(D[0]), spd(D[1], seed=1)
        start = Factors(("dense", "dense"), diagonal=(0, 1))
        start.observe(*(spd(d, seed=9) for d in D), times=3)
        errors = []
        for rate in (2e-3, 1e-3, 5e-4):
            f = copy.deepcopy(start)
            f.hp["factor_rate"] = rate
            f.seen += 1e6
            expected = published(f, grams, rate)
            f.observe(*grams)
            errors.append(max(float((f.K(i) - K).norm()) for i, K in enumerate(expected)))
        assert all(1.9 < order < 2.1 for order in orders(errors))

    def test_inverse_of_ikfac_is_the_damped_average_to_second_order(self):
        S = [spd(d, seed=5) for d in D]
        start = Factors(coupled=False)
        start.observe(*(spd(d, seed=9) for d in D), times=3)
        errors = []
        for rate in (0.04, 0.02, 0.01, 0.005):
            f = copy.deepcopy(start)
            f.hp["factor_rate"] = rate
            f.seen += 1e6
            before = [torch.linalg.inv(f.K(i) @ f.K(i).mT) for i in range(2)]
            f.observe(*S)
            worst = 0.0
            for i, d in enumerate(D):
                average = before[i].lerp(S[i] + 0.03 * torch.eye(d).double(), rate)
                found = torch.linalg.inv(f.K(i) @ f.K(i).mT)
                worst = max(worst, float((found - average).norm() / average.norm()))
            errors.append(worst)
        assert all(1.9 < order < 2.15 for order in orders(errors)), orders(errors)

    @pytest.mark.parametrize("name", NAMES)
    def test_whitened_statistic_becomes_the_identity(self, name):
        f = Factors((name, name), coupled=False, damping=0.0, factor_rate=0.3)
        S = [scale * spd(d, spread=0.5) for scale, d in zip((1e-6, 1e6), D, strict=True)]
        f.observe(*S, times=250)
        for i, d in enumerate(D):
            kind = f.kind(i)
            H = kind.to_dense(kind.project((f.K(i).mT @ S[i] @ f.K(i)).contiguous()))
            assert (H - torch.eye(d).double()).norm() < 1e-7

    def test_coupled_factors_invert_the_damped_product_where_it_is_one(self):
        """Without damping: K Kᵀ ⊗ C Cᵀ = (U ⊗ S)⁻¹, whatever the scales of U and S are."""
        S, U = 1e-4 * spd(D[0], spread=0.5), 1e3 * spd(D[1], seed=1, spread=0.5)
        f = Factors(damping=0.0, factor_rate=0.3)
        f.observe(S, U, times=150)
        product = torch.einsum("nij,nkl->nikjl", S, U).flatten(3).flatten(1, 2)
        torch.testing.assert_close(f.applied() @ product, torch.eye(35).double().expand(2, -1, -1), rtol=0, atol=1e-8)

    @pytest.mark.parametrize("kind", ["relative", "absolute"])
    @pytest.mark.parametrize("name", ["dense", "diagonal", "block(3)", "tril_toeplitz", "hierarchical(2,1)"])
    def test_coupled_factors_do_not_see_which_side_carries_a_scale(self, name, kind):
        one, other = (Factors((name, name), damping_kind=kind) for _ in range(2))
        for seed in range(6):
            S, U = spd(D[0], seed=seed), spd(D[1], seed=seed + 50)
            one.observe(S, U)
            other.observe(S / 128, U * 128)
        torch.testing.assert_close(one.applied(), other.applied(), rtol=1e-12, atol=0)
        assert not torch.allclose(one.K(0), other.K(0))

    @pytest.mark.parametrize("coupled", [True, False])
    def test_scale_of_a_statistic_is_followed_exactly(self, coupled):
        """Relative damping: statistics a times as large make the preconditioner a times smaller, in one call."""
        one, other = (Factors(coupled=coupled, damping_kind="relative") for _ in range(2))
        for seed in range(5):
            S, U = spd(D[0], seed=seed), spd(D[1], seed=seed + 50)
            one.observe(S, U)
            other.observe(1e-8 * S, 1e3 * U)
        torch.testing.assert_close(1e-5 * other.applied(), one.applied(), rtol=1e-10, atol=0)

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.floats(-30, 30), min_size=2, max_size=5), st.sampled_from(NAMES), st.booleans())
    def test_no_statistic_makes_a_factor_singular(self, exponents, name, coupled):
        """Of rank one, and of any scale in the range of float32: `K⁻¹ K_new` keeps its eigenvalues positive."""
        f = Factors((name, name), coupled, factor_rate=0.5, damping_kind="relative")
        for k, exponent in enumerate(exponents):
            before = [f.K(i) for i in range(2)]
            generator = torch.Generator().manual_seed(k)
            v = [torch.randn(2, d, 1, generator=generator, dtype=torch.float64) for d in D]
            f.observe(*(10.0**exponent * w @ w.mT for w in v))
            for i in range(2):
                turn = torch.linalg.solve(before[i], f.K(i))
                assert (torch.linalg.eigvals(turn).real > 0).all()
        assert not f.s["failures"].any()

    @pytest.mark.parametrize("name", NAMES)
    def test_spectral_bound_is_one(self, name):
        kind = structure(name)
        for seed in range(5):
            m = kind.project(spd(9, n=4, seed=seed) - 0.5 * spd(9, n=4, seed=seed + 100))
            norms = torch.linalg.matrix_norm(kind.to_dense(m), 2)
            assert (kind.spectral_bound(m) >= norms * (1 - 1e-12)).all()
            assert (kind.spectral_bound(m) <= kind.frobenius(m) * 3).all()

    @pytest.mark.parametrize("coupled", [True, False])
    def test_average_of_one_step_is_that_step(self, coupled):
        one, other = (Factors(coupled=coupled, factor_momentum=alpha) for alpha in (0.0, 0.9))
        for f in (one, other):
            f.observe(spd(D[0]), spd(D[1], seed=1))
        torch.testing.assert_close(other.applied(), one.applied(), rtol=1e-12, atol=0)

    def test_factor_momentum_averages_steps(self):
        """Statistics at which a factor rests: what is left of the last step comes in parts α, α², ..."""
        f = Factors(coupled=False, damping=0.0, factor_momentum=0.5, factor_rate=1e-3)
        S = [torch.eye(d).double().expand(2, d, d).contiguous() for d in D]
        f.observe(*S, times=2)
        f.seen += 1e6
        f.observe(*(spd(d, spread=0.3) for d in D))
        velocities = [f.s["velocity_0"].clone()]
        for _ in range(3):
            at_rest = [torch.linalg.inv(f.K(i) @ f.K(i).mT) for i in range(2)]
            f.observe(*at_rest)
            velocities.append(f.s["velocity_0"].clone())
        for a, b in zip(velocities, velocities[1:], strict=False):
            torch.testing.assert_close(b, 0.5 * a, rtol=1e-2, atol=1e-9)

    @pytest.mark.parametrize("momentum", [0.0, 0.5])
    def test_statistic_that_is_no_number_leaves_factors_and_their_momentum(self, momentum):
        f = Factors(factor_momentum=momentum)
        f.observe(spd(D[0]), spd(D[1]))
        before = {name: value.clone() for name, value in f.s.items()}
        bad = spd(D[0])
        bad[1] = torch.nan
        f.observe(bad, spd(D[1], seed=1))
        for name, value in f.s.items():
            if name not in ("momentum", "failures"):
                assert torch.equal(value[1], before[name][1]) and not torch.equal(value[0], before[name][0]), name
        assert f.s["failures"].tolist() == [0, 1]
        f.observe(spd(D[0]), spd(D[1]))
        assert not torch.equal(f.K(0)[1], before["root_0"][1]) and f.s["failures"].tolist() == [0, 1]


@dataclass(frozen=True)
class Constant(InverseFree):
    """At a constant rate from the first statistic on."""

    def rate(self, c):
        return c.hp["factor_rate"] * c.seen_gate


def residual(factor_dtype, row, rate, steps):
    """`‖Kᵀ S K - I‖_F / √d` of IKFAC, where S is constant and of condition number 100."""
    how = dict(coupled=False, damping=0.0, row=row, shape=(32,), dtype=torch.float32)
    f = Factors(factor_rate=rate, factor_dtype=factor_dtype, **how)
    S = spd(32)
    f.observe(S.float(), times=steps)
    return float((f.K(0).mT @ S @ f.K(0) - torch.eye(32)).norm(dim=(1, 2)).max()) / math.sqrt(32)


def to_nearest(x, c, seed):
    return x.to(torch.bfloat16)


class TestBfloat16:
    @pytest.mark.parametrize(
        ("row", "rate", "steps", "stagnant"),
        [
            pytest.param(InverseFree, 0.01, 500, 0.1, id="0.01"),
            pytest.param(InverseFree, 0.003, 800, 0.1, id="0.003"),
            pytest.param(Constant, 0.01, 800, 0.4, id="constant 0.01"),
            pytest.param(Constant, 0.003, 2700, 0.4, id="constant 0.003", marks=pytest.mark.slow),
        ],
    )
    def test_factors_learn_on_where_rounding_to_nearest_stops(self, row, rate, steps, stagnant, monkeypatch):
        assert residual("float32", row, rate, steps) < 5e-3
        assert residual("bfloat16", row, rate, steps) < 0.05
        monkeypatch.setattr(protocol, "_rounded", to_nearest)
        assert residual("bfloat16", row, rate, steps) > stagnant

    @pytest.mark.parametrize("name", NAMES)
    def test_every_structure_whitens_its_statistic(self, name):
        how = dict(coupled=False, damping=0.0, factor_rate=0.1, factor_momentum=0.5, dtype=torch.float32)
        f = Factors((name, name), factor_dtype="bfloat16", **how)
        S = [spd(d, spread=0.5) for d in D]
        f.observe(*(M.float() for M in S), times=150)
        for i, d in enumerate(D):
            assert f.s[f"root_{i}"].dtype == f.s[f"velocity_{i}"].dtype == torch.bfloat16
            kind = f.kind(i)
            H = kind.to_dense(kind.project((f.K(i).mT @ S[i] @ f.K(i)).contiguous()))
            assert (H - torch.eye(d)).norm(dim=(1, 2)).max() < 0.05 * math.sqrt(d)
