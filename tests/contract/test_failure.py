"""Failure is data: bad gradients and failing decompositions are refused, counted and survived, never spread."""

import itertools
import math

import pytest
import torch

import cases
import secondorder
from cases import assert_same_bits, assert_same_state, feed, flat_state, gradient, parameters, values
from secondorder import linalg
from secondorder.layout.buckets import Bucket

BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "too large": 1e30}


def poison(params, index, value):
    """Put one bad entry into one gradient."""
    params[index].grad.view(-1)[-1] = value


@pytest.mark.filterwarnings("ignore:.*a step was refused")
class TestRefusedSteps:
    @cases.variants(
        whole={}, split={"max_block_size": 3}, l2={"weight_decay_kind": "l2"}, clipped={"max_update_rms": 1.0}
    )
    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("at", [0, 2, 5, 6])  # the first step, around refreshes, between them
    def test_nothing_changes_but_the_clock(self, case, bad, at, options):
        params = parameters()
        optimizer = case.make(params, weight_decay=0.1, **options)
        for index in (0, 1, 4):  # a block, a vector and a scalar
            cases.train(optimizer, params, range(at))
            bits, state = values(params), flat_state(optimizer)
            cases.train(optimizer, params, [at], before=lambda step, index=index: poison(params, index, BAD[bad]))
            assert_same_bits(params, bits)
            after = flat_state(optimizer)
            assert_same_state(after, state, but="step")
            for key, value in state.items():
                if key.endswith("step"):
                    assert after[key] == value + 1

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_nothing_changes_in_other_precisions(self, case, dtype):
        params = parameters(dtype=dtype)
        optimizer = case.make(params, weight_decay=0.1)
        cases.train(optimizer, params, range(4))
        bits, state = values(params), flat_state(optimizer)
        cases.train(optimizer, params, [4], before=lambda step: poison(params, 0, math.nan))
        assert_same_bits(params, bits)
        assert_same_state(flat_state(optimizer), state, but="step")

    def test_training_goes_on(self, case):
        params = parameters()
        optimizer = case.make(params)
        bad = itertools.cycle([math.nan, 0.5, math.inf, 0.5, 0.5])
        cases.train(optimizer, params, range(30), before=lambda step: poison(params, step % 4, next(bad)))
        assert all(torch.isfinite(value).all() for value in [*params, *flat_state(optimizer).values()])
        assert optimizer.diagnostics()["refused_steps"] == 12
        assert {int(optimizer.state[p]["step"]) for p in params} == {30}

    def test_absent_gradients_do_not_hide_a_bad_one(self, case):
        params = parameters()
        optimizer = case.make(params)
        cases.train(optimizer, params, range(3))
        bits = values(params)
        feed(params, 3)
        params[0].grad = None
        poison(params, 6, math.nan)
        optimizer.step()
        assert_same_bits(params, bits)
        assert optimizer.state[params[0]]["step"] == 3

    def test_raise_names_the_parameter_and_changes_nothing(self, case):
        params = parameters()
        names = [f"layer.{i}.weight" for i in range(len(params))]
        optimizer = case.make(zip(names, params, strict=True), on_nonfinite="raise")
        cases.train(optimizer, params, range(4))
        bits, state = values(params), flat_state(optimizer)
        feed(params, 4)
        poison(params, 3, math.nan)
        poison(params, 5, math.inf)
        with pytest.raises(RuntimeError, match=r"2 parameters.*layer\.3\.weight.*\(4, 3, 2, 2\)"):
            optimizer.step()
        assert_same_bits(params, bits)
        assert_same_state(flat_state(optimizer), state)
        cases.train(optimizer, params, range(4, 6))

    def test_raise_in_one_group_is_enough(self, case):
        params = parameters()
        optimizer = case.make([{"params": params[:3], "on_nonfinite": "raise"}, {"params": params[3:]}])
        feed(params, 0)
        poison(params, 5, math.nan)
        with pytest.raises(RuntimeError, match=r"group1\[2\]"):
            optimizer.step()


class TestWarnings:
    def test_refused_steps_are_warned_about_once(self, case):
        params = parameters()
        optimizer = case.make(params)
        with pytest.warns(UserWarning, match=f"{case.cls.__name__}: a step was refused") as caught:
            for step in range(4):
                cases.train(optimizer, params, [step], before=lambda step: poison(params, 0, math.nan))
            optimizer.diagnostics()
            optimizer.state_dict()
        assert sum("a step was refused" in str(warning.message) for warning in caught) == 1


class TestRange:
    @cases.variants(default={}, often={"refresh_every": 1}, skip={"first": "skip", "refresh_every": 1})
    @pytest.mark.filterwarnings("ignore:.*a step was refused")
    def test_any_sequence_of_sizes_stays_finite(self, case, options):
        for scales in itertools.product((1e30, 1e-30, 0.0, 1.0), repeat=4):
            params = parameters([(4, 3), (3,)])
            optimizer = case.make(params, **options)
            for step, scale in enumerate((*scales, 1.0)):
                for i, p in enumerate(params):
                    p.grad = gradient(tuple(p.shape), step, i) * scale
                optimizer.step()
            for value in [*params, *flat_state(optimizer).values()]:
                assert torch.isfinite(value).all(), scales
            assert max(p.detach().abs().max() for p in params) < 10

    @pytest.mark.parametrize("exponent", [-44, -22, 22, 44])
    def test_size_of_the_gradient_does_not_matter(self, case, exponent):
        """Within the usable range the update does not depend on the gradient's size (eps apart); 2^k scales exactly.

        A root-free update is inverse to it: its learning rate makes up for that.
        """
        params, twins = parameters(), parameters()
        more = dict(lr=0.01 * 2.0**exponent, initial=None) if case.takes("initial") else {}
        a, b = case.make(params, eps=0.0, **more), case.make(twins, eps=0.0, **{**more, "lr": case.kwargs["lr"]})
        cases.train(a, params, range(9), before=lambda step: [p.grad.mul_(2.0**exponent) for p in params])
        cases.train(b, twins, range(9))
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)

    def test_zero_first_gradients_make_a_block_wait(self, case):
        """After zeros, a block does what it would have done without them (before any refresh), in a run of its own."""
        kwargs = dict(weight_decay=0.0)
        if case.takes("refresh"):
            kwargs.update(refresh_every=50, refresh="together")
        params, twins = parameters([(6, 5), (4, 3)]), parameters([(6, 5), (4, 3)])
        late, fresh = case.make(params, **kwargs), case.make(twins, **kwargs)
        for _ in range(3):
            for i, p in enumerate(params):
                p.grad = torch.zeros_like(p) if i == 0 else gradient((4, 3), 0, 1)
            late.step()
        assert torch.equal(params[0], twins[0]) and not torch.equal(params[1], twins[1])
        cases.train(late, params, range(6))
        cases.train(fresh, twins, range(6))
        waits = "seen" in late.state[params[0]]
        if waits:
            assert_same_bits(params[:1], twins[:1])
            assert late.state[params[0]]["count"] == 6 and late.state[params[0]]["step"] == 9
            assert late.diagnostics()["waiting_blocks"] == 0
        else:  # element-wise methods go on as torch does
            assert late.state[params[0]]["count"] == 9

    @pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-30])
    def test_statistics_wait_for_usable_gradients_while_the_update_goes_on(self, case, scale):
        """A Gram matrix of such a gradient is zero: averaging it would empty the factors."""
        (p,) = parameters([(6, 5)])
        optimizer = case.make([p], weight_decay=0.0)
        cases.train(optimizer, [p], range(4))
        state, before = dict(flat_state(optimizer)), p.detach().clone()
        cases.train(optimizer, [p], [4], before=lambda step: p.grad.mul_(scale))
        after = flat_state(optimizer)
        assert not torch.equal(p, before), "momentum goes on"
        assert after["0/count"] == 5 and after["0/step"] == 5
        assert not torch.equal(after[f"0/{case.average}"], state[f"0/{case.average}"])
        for key in state:
            if "covariance" in key or "root" in key or key.endswith("seen"):
                assert torch.equal(after[key], state[key]), key

    @cases.classes_with("refresh_every")
    def test_direction_of_a_waiting_block_may_be_undefined(self, case):
        """Zero over zero: with eps = 0 the direction is nan until the first usable gradient, and must not be used."""
        params = parameters([(6, 5), (6, 5)])
        optimizer = case.make(params, eps=0.0, weight_decay=0.0)
        before = values(params)
        for step in range(4):
            params[0].grad, params[1].grad = torch.zeros(6, 5), gradient((6, 5), step)
            optimizer.step()
        assert torch.equal(params[0], before[0]) and torch.isfinite(params[1]).all()
        cases.train(optimizer, params, range(4, 8))
        assert torch.isfinite(params[0]).all() and not torch.equal(params[0], before[0])

    def test_ill_conditioned_gradients_train(self, case):
        """Singular values over six decades: Gram matrices of condition 1e12, beyond float32."""
        (p,) = parameters([(12, 12)])
        optimizer = case.make([p])
        turns = [torch.linalg.qr(torch.randn(12, 12)).Q for _ in range(2)]
        scale = torch.logspace(0, -6, 12)
        for _ in range(60):
            p.grad = turns[0] * scale @ (torch.eye(12) + 0.3 * torch.randn(12, 12)) * scale @ turns[1]
            before = p.detach().clone()
            optimizer.step()
            assert torch.isfinite(p).all()
            assert (p.detach() - before).square().mean().sqrt() < 5 * 0.01
        for key, value in flat_state(optimizer).items():
            assert torch.isfinite(value).all(), key
            if "/basis_" in key:
                assert (value.T @ value - torch.eye(12)).abs().max() < 1e-4
        assert optimizer.diagnostics()["refresh_failures"] == 0

    def test_rank_one_gradients_of_any_size_train(self, case):
        for scale in (1e-15, 1e-5, 1.0, 1e8):
            (p,) = parameters([(7, 6)])
            optimizer = case.make([p])
            u, w = torch.randn(7, 1), torch.randn(1, 6)
            for _ in range(20):
                p.grad = scale * (u + 0.01 * torch.randn(7, 1)) @ w
                optimizer.step()
            assert torch.isfinite(p).all() and p.detach().abs().max() < 10


@pytest.mark.filterwarnings("ignore:.*a decomposition failed")
class TestDecompositions:
    """A failing decomposition: garbage and `ok = False` for one matrix of a stack, as `linalg` promises at worst."""

    @staticmethod
    def break_first_row(monkeypatch, active):
        eigh, orthogonalize = linalg.eigh, linalg.orthogonalize

        def broken_eigh(A):
            w, Q, ok = eigh(A)
            if active:
                w[0], Q[0], ok[0] = math.nan, math.nan, False
            return w, Q, ok

        def broken_orthogonalize(Y):
            Q, ok = orthogonalize(Y)
            if active:
                Q[0], ok[0] = math.nan, False
            return Q, ok

        monkeypatch.setattr(linalg, "eigh", broken_eigh)
        monkeypatch.setattr(linalg, "orthogonalize", broken_orthogonalize)

    @cases.variants(qr={"refresh_by": "qr", "refresh": "together"}, eigh={"refresh_by": "eigh", "refresh": "together"})
    @pytest.mark.parametrize("first", [False, True], ids=["later", "initial"])
    def test_last_good_basis_is_kept_and_the_failure_counted(self, case, options, first, monkeypatch):
        active = []
        self.break_first_row(monkeypatch, active)
        params, twins = parameters([(6, 5), (6, 5)]), parameters([(6, 5), (6, 5)])
        broken, sound = case.make(params, **options), case.make(twins, **options)
        period = broken.defaults["refresh_every"]
        at = period if first else 2 * period
        cases.train(broken, params, range(at - 1))
        before = flat_state(broken)
        active.append(True)
        cases.train(broken, params, [at - 1])
        active.clear()
        cases.train(sound, twins, range(at))
        after = flat_state(broken)
        assert all(torch.equal(before[key], after[key]) for key in ("0/basis_0", "0/basis_1"))
        assert after["0/failures"] == 2 and after["1/failures"] == 0
        assert not torch.equal(before["1/basis_0"], after["1/basis_0"])
        assert_same_bits(params[1:], twins[1:])
        assert broken.diagnostics()["refresh_failures"] == 2
        cases.train(broken, params, range(at, at + 2 * period))
        cases.train(sound, twins, range(at, at + 2 * period))
        assert_same_bits(params[1:], twins[1:])
        assert all(torch.isfinite(value).all() for value in [*params, *flat_state(broken).values()])
        assert not torch.equal(after["0/basis_0"], broken.state[params[0]]["basis_0"])
        assert broken.diagnostics()["refresh_failures"] == 2

    @cases.classes_with("refresh_by")
    def test_moments_stay_in_the_basis_that_is_kept(self, case, monkeypatch):
        """A run whose refreshes all fail is a run without refreshes."""
        active = [True]
        self.break_first_row(monkeypatch, active)
        params, twins = parameters([(6, 5)]), parameters([(6, 5)])
        cases.train(case.make(params, refresh_every=2), params, range(9))
        cases.train(case.make(twins, refresh_every=1000), twins, range(9))
        assert_same_bits(params, twins)

    @cases.classes_with("refresh_by")
    def test_lapack_that_raises_is_survived(self, case, monkeypatch):
        def raising(*args, **kwargs):
            raise torch.linalg.LinAlgError("did not converge")

        params = parameters([(6, 5), (6, 5)])
        optimizer = case.make(params)
        for name in ("eigh", "qr"):
            monkeypatch.setattr(torch.linalg, name, raising)
        monkeypatch.setattr(torch, "geqrf", raising)
        cases.train(optimizer, params, range(9))
        assert all(torch.isfinite(p).all() for p in params)
        assert optimizer.diagnostics()["refresh_failures"] > 0

    @pytest.mark.filterwarnings("ignore:.*was left out")
    def test_update_that_is_not_finite_is_left_out(self, case, monkeypatch):
        params = parameters([(6, 5), (6, 5)])
        optimizer = case.make(params, weight_decay=0.0)
        cases.train(optimizer, params, range(4))
        (bucket, *_) = [b for b in optimizer._current().buckets if isinstance(b, Bucket)] or [None]
        if bucket is None:
            pytest.skip("no blocks")
        apply, before = type(bucket.method).apply, values(params)

        def spoiled(self, s, moment, x, c):
            out = apply(self, s, moment, x, c).clone()
            out[0] = torch.inf
            return out

        with monkeypatch.context() as patch:
            patch.setattr(type(bucket.method), "apply", spoiled)
            cases.train(optimizer, params, [4])
        assert_same_bits([params[0]], [before[0]])
        assert not torch.equal(params[1], before[1])
        assert optimizer.diagnostics()["refresh_failures"] == 1

    def test_failures_are_warned_about_once(self, monkeypatch):
        active = [True]
        self.break_first_row(monkeypatch, active)
        params = parameters([(6, 5)])
        optimizer = secondorder.SOAP(params, refresh_every=1)
        with pytest.warns(UserWarning, match="a decomposition failed") as caught:
            cases.train(optimizer, params, range(5))
        assert len(caught) == 1
