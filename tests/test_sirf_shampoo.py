"""SIRFShampoo and IFShampoo: against dense algebra, orders, fixed points, equivariances, and factors in bfloat16."""

import io
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cases import assert_same_bits, assert_same_state, feed, flat_state, gradient, parameters, train, values
from secondorder import IFShampoo, SIRFShampoo
from secondorder.layout.blocks import tensor_blocks
from secondorder.preconditioner import protocol
from secondorder.preconditioner.lie_factor import LieFactor, RareLieFactor
from secondorder.preconditioner.protocol import Context
from secondorder.preconditioner.structures import STRUCTURES, structure

F64 = torch.float64
PLAIN = dict(damping=0.0, factor_rate=0.1, factor_momentum=0.0, batch_size=None, factor_dtype="float32")
PLAIN.update(structures="dense", vectors="dense", normalize=True)


@dataclass(frozen=True)
class Constant(LieFactor):
    """A constant rate without a cap, and factors that start as identities."""

    def begin(self, s, x, c):
        self.reset(s, x["grad"], torch.ones_like(c.gate), c)

    def rate(self, kind, m, c):
        return c.hp["factor_rate"] * c.seen_gate


class Factors:
    """One block with a factor on some of its axes, moved by gradients."""

    def __init__(self, shape, modes, row=None, dtype=F64, **hp):
        self.hp, self.modes, self.row = {**PLAIN, **hp}, modes, row or LieFactor()
        self.s = {k: torch.zeros(1) for k in ("count", "seen", "failures")}
        for name, spec in self.row.specs(shape, modes, self.hp).items():
            self.s[name] = torch.zeros(1, *spec.shape, dtype=spec.dtype or dtype)

    def move(self, G, steps=1):
        for _ in range(steps):
            gate = torch.ones(len(G), dtype=G.dtype)
            c = Context(self.hp, self.modes, gate, gate, self.s["count"], self.s["seen"])
            if self.s["seen"][0] == 0:
                self.row.begin(self.s, {"grad": G}, c)
            self.s["seen"] += 1
            self.row.observe(self.s, {"grad": G}, c)
            self.s["count"] += 1
        return self

    def dense(self, mode):
        K = self.s[f"factor_{mode}"]
        return structure(self.hp["structures"]).to_dense(K.to(torch.promote_types(K.dtype, torch.float32)))


def times(G, matrices):
    for i, A in enumerate(matrices):
        G = torch.tensordot(A, G, dims=([1], [i])).movedim(0, i)
    return G


def unfolded(T, i):
    return T.movedim(i, 0).flatten(1)


def oracle(W, grads, names, lr, beta, damping, rate, alpha, B, limit):
    """The algorithm of the doc-string on one tensor, in dense matrices."""
    kinds = [structure(name) for name in names]
    k, N = W.ndim, W.numel()
    size = (B * grads[0].square().mean()) ** (-0.5 / k)
    K = [size * torch.eye(d, dtype=F64) for d in W.shape]
    momentum, scale, n = torch.zeros_like(W), 0.0, [0.0] * k
    for t, G in enumerate(grads, 1):
        r = rate / (1 - (1 - rate) ** t)
        scale = scale + r * (B * G.square().mean() - scale)
        T = times(math.sqrt(B) * G, [A.T for A in K])
        volume = [(A.T @ A).trace() / len(A) for A in K]
        new = []
        for i, kind in enumerate(kinds):
            d = W.shape[i]
            M = unfolded(T, i) @ unfolded(T, i).T * d / N
            M = M + damping * scale * math.prod(v for j, v in enumerate(volume) if j != i) * K[i].T @ K[i]
            N_i = kind.project(M[None]) - kind.project(torch.eye(d, dtype=F64)[None])
            n[i] = n[i] + (1 - alpha) / (1 - alpha**t) * (N_i / 2 - n[i])
            rho = min(r, 0.5 / float(kind.spectral_bound(n[i])))
            new.append(K[i] - rho * K[i] @ kind.to_dense(n[i])[0])
        K = new
        momentum = momentum + (1 - beta) / (1 - beta**t) * (G - momentum)
        ahead = beta * momentum + (1 - beta) * G
        U = times(ahead, [A @ A.T for A in K]) * torch.sqrt(B * scale)
        U = U * min(1.0, limit / float(U.square().mean().sqrt()))
        W = W - lr * U
    return W, K


class TestStep:
    @pytest.mark.parametrize("names", [*STRUCTURES, "block(3)", "hierarchical(2,1)", ("diagonal", "dense", "block(2)")])
    @pytest.mark.parametrize("shape", [(6, 5), (4, 3, 5)], ids=str)
    def test_step_is_that_of_dense_algebra(self, shape, names):
        grads = [gradient(shape, t, dtype=F64) * (30 if t == 4 else 1) for t in range(9)]
        (p,) = parameters([shape], dtype=F64)
        each = (names,) * len(shape) if isinstance(names, str) else names[: len(shape)]
        how = dict(damping=0.05, batch_size=7)
        W, K = oracle(p.detach().clone(), grads, each, 0.1, 0.9, 0.05, 0.1, 0.5, 7, 1.0)
        optimizer = SIRFShampoo([p], lr=0.1, factor_rate=0.1, structures=names, **how)
        for G in grads:
            p.grad = G
            optimizer.step()
        torch.testing.assert_close(p.detach(), W, rtol=1e-10, atol=1e-12)
        for i, name in enumerate(each):
            ours = structure(name).to_dense(optimizer.state[p][f"factor_{i}"][None])[0]
            torch.testing.assert_close(ours, K[i], rtol=1e-10, atol=1e-10)

    def test_vector_with_a_diagonal_factor_is_root_free_rmsprop_to_second_order(self):
        """1 / K² follows the average of G² + λ."""
        G = torch.rand(1, 12, dtype=F64) + 0.5
        for rate in (1e-2, 1e-3):
            f = Factors((12,), (0,), Constant(), factor_rate=rate, vectors="diagonal").move(G)
            average = 1 + rate * (G.square() - 1)
            assert (1 / f.s["factor_0"].square() - average).abs().max() < 6 * rate**2

    def test_update_is_what_the_preconditioner_says(self):
        (p,) = parameters([(5, 4)], dtype=F64)
        optimizer = SIRFShampoo([p], lr=1.0, betas=(0.0, 0.9), nesterov=False, max_update_rms=None)
        train(optimizer, [p], range(5))
        before = p.detach().clone()
        train(optimizer, [p], [5])
        expected = optimizer.preconditioner(p) @ p.grad
        torch.testing.assert_close(before - p.detach(), expected, rtol=1e-9, atol=1e-12)
        K = [optimizer.state[p][f"factor_{i}"] for i in range(2)]
        curvature = torch.kron(*(torch.linalg.inv(A @ A.T) for A in K))
        torch.testing.assert_close(optimizer.curvature(p).to_dense(), curvature, rtol=1e-9, atol=1e-9)

    def test_batch_size_counts_only_without_normalisation(self):
        def moved(**how):
            (p,) = parameters([(5, 4)], dtype=F64)
            start = p.detach().clone()
            train(SIRFShampoo([p], lr=0.1, max_update_rms=None, **how), [p], range(6))
            return p.detach() - start

        torch.testing.assert_close(moved(batch_size=64), moved(), rtol=1e-9, atol=1e-12)
        plain = moved(normalize=False)
        torch.testing.assert_close(moved(normalize=False, batch_size=64), plain / 64, rtol=1e-9, atol=1e-12)
        tensor = torch.tensor(64.0, dtype=F64)
        torch.testing.assert_close(moved(normalize=False, batch_size=tensor), plain / 64, rtol=1e-9, atol=1e-12)


class TestFactors:
    def test_inverse_follows_the_average_with_an_error_of_second_order(self):
        """One step of rate β: ‖(K Kᵀ)⁻¹ - ((1 - β) S + β (G Gᵀ / N + λ I))‖ falls as β²."""
        G = torch.randn(1, 6, 9, dtype=F64)
        S = G[0] @ G[0].T / 9 + 0.1 * G.square().mean() * torch.eye(6, dtype=F64)
        errors = []
        for rate in (4e-3, 2e-3, 1e-3):
            K = Factors((6, 9), (0,), Constant(), factor_rate=rate, damping=0.1).move(G).dense(0)[0]
            errors.append(float((torch.linalg.inv(K @ K.T) - torch.lerp(torch.eye(6, dtype=F64), S, rate)).norm()))
        for coarse, fine in zip(errors, errors[1:], strict=False):
            assert abs(math.log2(coarse / fine) - 2) < 0.05

    @pytest.mark.parametrize(("dtype", "limit"), [(F64, 1e-10), (torch.float32, 1e-5)])
    def test_constant_statistic_is_whitened_at_the_fixed_point(self, dtype, limit):
        G = torch.randn(1, 8, 20, dtype=F64).to(dtype) * 1e-3
        K = Factors((8, 20), (0,), dtype=dtype, damping=0.01, factor_rate=0.2).move(G, 200).dense(0)[0].double()
        S = (G[0] @ G[0].T / 20).double() + 0.01 * G.double().square().mean() * torch.eye(8, dtype=F64)
        assert (K.T @ S @ K - torch.eye(8)).norm() / math.sqrt(8) < limit

    def test_fixed_point_of_both_factors_whitens_both_sides(self):
        """d_i / N · T_(i) T_(i)ᵀ + damping = I for all axes at once."""
        G = torch.randn(1, 6, 6, dtype=F64)
        f = Factors((6, 6), (0, 1), factor_rate=0.1).move(G, 600)
        A, C = f.dense(0)[0], f.dense(1)[0]
        T = A.T @ G[0] @ C
        assert (T @ T.T / 6 - torch.eye(6)).norm() < 1e-8 and (T.T @ T / 6 - torch.eye(6)).norm() < 1e-8

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.floats(-12, 12), min_size=1, max_size=8), st.sampled_from([*STRUCTURES]))
    def test_factors_stay_regular_whatever_comes(self, exponents, name):
        """A step shrinks no direction by more than a half."""
        f = Factors((5, 4), (0, 1), factor_rate=0.9, structures=name)
        for t, exponent in enumerate(exponents):
            before = [f.dense(i)[0] for i in (0, 1)] if t else None
            f.move(gradient((5, 4), t, dtype=F64)[None] * 10**exponent)
            for i in (0, 1):
                K = f.dense(i)[0]
                assert K.isfinite().all() and torch.linalg.det(K) > 0
                if before is not None:
                    assert torch.linalg.svdvals(torch.linalg.solve(before[i], K)).min() > 0.5 - 1e-6
        assert f.s["failures"] == 0


class TestEquivariance:
    def run(self, shape, change=None, row=None, **how):
        (p,) = parameters([shape], dtype=F64)
        optimizer = type("Row", (SIRFShampoo,), {"_method": lambda self, g: row or LieFactor("gradient")})([p], **how)
        start = p.detach().clone()
        for t in range(6):
            G = gradient(shape, t, dtype=F64)
            p.grad = G if change is None else change(G)
            optimizer.step()
        return p.detach() - start

    def test_rotations_of_the_gradient_rotate_the_update(self):
        P, Q = (torch.linalg.qr(torch.randn(d, d, dtype=F64)).Q for d in (6, 4))
        row = Constant("gradient")
        turned = self.run((6, 4), lambda G: P @ G @ Q, row)
        torch.testing.assert_close(turned, P @ self.run((6, 4), row=row) @ Q, rtol=1e-9, atol=1e-12)

    def test_signed_permutations_permute_the_update(self):
        """The bound of the spectral norm follows them too."""
        order, signs = torch.randperm(6), torch.tensor([1.0, -1, 1, -1], dtype=F64)
        turned = self.run((6, 4), lambda G: G[order] * signs)
        torch.testing.assert_close(turned, self.run((6, 4))[order] * signs, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1)])
    def test_order_of_the_axes_does_not_matter(self, order):
        shape = (4, 3, 5)
        (p,), (q,) = parameters([shape], dtype=F64), parameters([shape], dtype=F64)
        q = nn.Parameter(q.detach().permute(order).contiguous())
        a, b = SIRFShampoo([p]), SIRFShampoo([q])
        for t in range(6):
            p.grad = gradient(shape, t, dtype=F64)
            q.grad = p.grad.permute(order).contiguous()
            a.step()
            b.step()
        torch.testing.assert_close(q.detach(), p.detach().permute(order), rtol=1e-9, atol=1e-12)

    def test_axes_of_size_one_are_no_axes(self):
        (p,), (q,) = parameters([(5, 4)]), parameters([(5, 1, 4)])
        a, b = SIRFShampoo([p]), SIRFShampoo([q])
        for t in range(4):
            p.grad = gradient((5, 4), t)
            q.grad = p.grad[:, None].clone()
            a.step()
            b.step()
        assert torch.equal(p, q[:, 0])


class TestBlocks:
    OPTIONS = dict(structures="dense", vectors="fallback", max_block_size=8, max_precond_dim=100)

    @pytest.mark.parametrize(
        ("shape", "role", "more", "cuts", "modes", "diagonal"),
        [
            ((6, 4), None, {}, ((6,), (4,)), (0, 1), ()),
            ((3, 1, 4, 2), None, {}, ((3,), (4,), (2,)), (0, 1, 2), ()),
            ((18, 5), None, {}, ((6, 6, 6), (5,)), (0, 1), ()),
            ((18, 5), None, dict(structures="block(4)"), ((18,), (5,)), (0, 1), ()),
            ((18, 5), None, dict(structures=("diagonal", "dense")), ((18,), (5,)), (1,), (0,)),
            ((200, 5), None, {}, ((200,), (5,)), (1,), (0,)),
            ((200, 5), "hidden", {}, ((8,) * 25, (5,)), (0, 1), ()),
            ((50, 5), "embedding", {}, ((50,), (5,)), (1,), (0,)),
            ((5, 50), "head", {}, ((5,), (50,)), (0,), (1,)),
            ((7,), None, dict(vectors="dense"), ((7,),), (0,), ()),
            ((7, 1), None, dict(vectors="diagonal"), ((7,),), (), (0,)),
        ],
        ids=str,
    )
    def test_axes_are_kept_and_those_with_a_dense_factor_cut(self, shape, role, more, cuts, modes, diagonal):
        found = tensor_blocks(shape, {**self.OPTIONS, **more}, role)
        assert not found.fallback and found.view == tuple(map(sum, cuts))
        assert (found.cuts, found.modes, found.diagonal) == (cuts, modes, diagonal)

    @pytest.mark.parametrize("shape", [(), (1, 1), (7,), (1, 7), (0, 3), (2,) * 7], ids=str)
    def test_scalars_vectors_and_what_has_too_many_axes_are_left_to_the_fallback(self, shape):
        found = tensor_blocks(shape, self.OPTIONS, None)
        assert found.fallback and found.reason and found.view == shape

    def test_reason_names_the_structures(self):
        hp = {**self.OPTIONS, "structures": ("block(4)", "diagonal")}
        assert tensor_blocks((9, 6, 5), hp, None).reason == "9 x 6 x 5: block(4) x diagonal x diagonal"
        assert "cut into 3 blocks of at most 8" in tensor_blocks((18, 5), self.OPTIONS, None).reason

    @pytest.mark.parametrize("bad", ["nonsense", "block(0)", (), ("dense", 3), 4, None])
    def test_structures_that_do_not_exist_are_refused(self, bad):
        with pytest.raises(ValueError, match="Invalid structures"):
            SIRFShampoo(parameters(), structures=bad)
        with pytest.raises(ValueError, match="Invalid vectors"):
            SIRFShampoo(parameters(), vectors=bad)


def residual(dtype, rate, row):
    """‖KᵀSK - I‖_F / √d where the statistic S is constant, after 8 / rate steps."""
    d = 32
    Q = torch.linalg.qr(torch.randn(d, d)).Q
    G = (Q * torch.logspace(-0.5, 0.5, d) * math.sqrt(d))[None]
    f = Factors((d, d), (0,), row, torch.float32, factor_rate=rate, factor_dtype=dtype)
    f.move(G, round(8 / rate))
    K, S = f.dense(0)[0].double(), (G[0] @ G[0].T / d).double()
    return float((K.T @ S @ K - torch.eye(d)).norm()) / math.sqrt(d)


def to_nearest(x, c, seed):
    return x.to(torch.bfloat16)


class TestBfloat16:
    @pytest.mark.parametrize(
        ("row", "rate", "stagnant"),
        [
            (LieFactor(), 0.01, 0.2),
            (Constant(), 0.01, 0.3),
            pytest.param(Constant(), 0.003, 0.5, marks=pytest.mark.slow),
        ],
        ids=str,
    )
    def test_factors_learn_on_where_rounding_to_nearest_stops(self, row, rate, stagnant, monkeypatch):
        assert residual("float32", rate, row) < 1e-2
        assert residual("bfloat16", rate, row) < 0.05
        monkeypatch.setattr(protocol, "_rounded", to_nearest)
        assert residual("bfloat16", rate, row) > stagnant

    def test_factors_are_half_as_large_and_nothing_else_is(self):
        params = parameters([(16, 12)])
        wide, narrow = (SIRFShampoo(params, factor_dtype=t) for t in ("float32", "bfloat16"))
        saved = 2 * (2 * (16**2 + 12**2))  # factors and their momenta, two bytes each
        assert wide.memory_report().state - narrow.memory_report().state == saved
        state = narrow.state_dict()["state"][0]
        assert state["factor_0"].dtype == torch.bfloat16 and state["momentum"].dtype == torch.float32

    @pytest.mark.parametrize("options", [{}, {"max_block_size": 3}, {"structures": "block(2)", "vectors": "diagonal"}])
    def test_resumed_run_has_the_same_bits(self, options):
        def made():
            params = parameters()
            return params, SIRFShampoo(params, factor_dtype="bfloat16", **options)

        params, whole = made()
        train(whole, params, range(5))
        file = io.BytesIO()
        torch.save((whole.state_dict(), values(params)), file)
        train(whole, params, range(5, 11))
        again, resumed = made()
        file.seek(0)
        state, at = torch.load(file, weights_only=True)
        with torch.no_grad():
            for p, value in zip(again, at, strict=True):
                p.copy_(value)
        resumed.load_state_dict(state)
        train(resumed, again, range(5, 11))
        assert_same_bits(values(again), values(params))
        assert_same_state(flat_state(resumed), flat_state(whole))

    def test_rounding_does_not_depend_on_what_shares_the_bucket(self):
        alone, together = parameters([(6, 5)]), parameters([(6, 5)] * 3)
        with torch.no_grad():
            together[0].copy_(alone[0])
        a, b = (SIRFShampoo(params, factor_dtype="bfloat16") for params in (alone, together))
        for step in range(6):
            for params, optimizer in ((alone, a), (together, b)):
                feed(params, step)
                optimizer.step()
        assert torch.equal(a.state[alone[0]]["factor_0"], b.state[together[0]]["factor_0"])


class TestIFShampoo:
    @pytest.mark.parametrize("longest", [1, 2, 3, 5, 10])
    def test_factors_move_after_the_logarithm_of_the_calls(self, longest):
        """Each time, the next one is after min(max(⌊log_4(calls so far)⌋, 1), longest) calls."""
        due, row, hp = 0, RareLieFactor(), {"statistics_every": longest}
        for t in range(5000):
            assert row.observes(t + 1, hp) == (t == due), t
            if t == due:
                due += min(max((t + 1).bit_length() - 1 >> 1, 1), longest)

    def test_is_sirf_shampoo_with_dense_factors_where_both_move(self):
        params, twins = parameters(), parameters()
        train(IFShampoo(params, statistics_every=1), params, range(6))
        train(SIRFShampoo(twins), twins, range(6))
        assert_same_bits(values(params), values(twins))
