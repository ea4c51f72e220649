"""Shampoo against a dense float64 transcript of its doc-string, and torch's AdamW as its graft; size of its updates."""

import io
import math
from itertools import product

import pytest
import torch
from torch import nn

import cases
from cases import assert_same_bits, gradient, parameters
from peers.meta import merged
from secondorder import Shampoo, linalg

DEFAULTS = dict(lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, factor_beta=0.8, factor_average="ema")
DEFAULTS.update(damping=1e-6, exponent=None, root_by="eigh", graft="adam", start_step=None, nesterov=True)
DEFAULTS.update(refresh_every=3)


class DenseShampoo:
    """One block `W (d_0, d_1)` with factors on the sides `modes`; refreshes together."""

    def __init__(self, W, modes, hp):
        self.W, self.modes, self.hp, self.t = W, modes, hp, 0
        self.C = [torch.zeros(d, d, dtype=W.dtype) for d in W.shape]
        self.R = [torch.eye(d, dtype=W.dtype) for d in W.shape]
        self.Q = [torch.eye(d, dtype=W.dtype) for d in W.shape]
        self.m, self.V = torch.zeros_like(W), torch.zeros_like(W)
        self.rooted = False

    def step(self, G):
        hp, b1 = self.hp, self.hp["betas"][0]
        self.t += 1
        start, period = hp["start_step"] or 1, hp["refresh_every"]
        for i in self.modes:
            gram = G @ G.T if i == 0 else G.T @ G
            if hp["factor_average"] == "sum":
                self.C[i] += gram
            else:
                self.C[i] += (1 - hp["factor_beta"]) / (1 - hp["factor_beta"] ** self.t) * (gram - self.C[i])
            if self.t % period == 0 and self.t >= start:
                self.R[i] = self.root(i, initial=self.t < start + 2 * period)
                self.rooted = True
        self.m = b1 * self.m + (1 - b1) * G
        m = self.m / (1 - b1**self.t)
        m = b1 * m + (1 - b1) * G if hp["nesterov"] else m
        U = self.lend(self.R[0] @ m @ self.R[1] if self.rooted or hp["graft"] is None else 0 * m, m, G)
        self.W -= hp["lr"] * hp["weight_decay"] * self.W
        self.W -= hp["lr"] * U

    def root(self, i, initial):
        C, hp = self.C[i], self.hp
        values, Q = torch.linalg.eigh(C)
        if hp["root_by"] == "tracked" and not initial:
            damped = C + 1e-6 * torch.diag(self.Q[i].T @ C @ self.Q[i]).max() * torch.eye(len(C))
            order = torch.diag(self.Q[i].T @ C @ self.Q[i]).argsort(descending=True)
            Q = torch.linalg.qr(damped @ self.Q[i][:, order]).Q
            values = torch.diag(Q.T @ C @ Q)
        self.Q[i] = Q
        e = hp["exponent"]
        e = 1 / (2 * len(self.modes)) if e is None else e[i] if isinstance(e, tuple) else e
        return Q @ torch.diag((values.clamp(min=0) + hp["damping"] * values.max()) ** -e) @ Q.T

    def lend(self, U, m, G):
        kind, b2 = self.hp["graft"], self.hp["betas"][1]
        if kind is None:
            return U
        self.V = self.V + G**2 if kind == "adagrad" else b2 * self.V + (1 - b2) * G**2
        V = self.V / (1 - b2**self.t) if kind == "adam" else self.V
        D = m if kind == "sgd" else m / (V.sqrt() + self.hp["eps"])
        return U * D.norm() / U.norm() if U.norm() > 0 else D


def assert_equals_dense(shape, tiles, modes, steps=14, atol=1e-9, **options):
    """Train one matrix with Shampoo, its `tiles` with the transcript, on the same gradients."""
    hp = {**DEFAULTS, **{k: v for k, v in options.items() if k in DEFAULTS}}
    (p,) = parameters([shape], dtype=torch.float64)
    dense = [(tile, DenseShampoo(p.detach()[tile].clone(), modes, hp)) for tile in tiles]
    optimizer = Shampoo([p], refresh="together", **{**hp, **options})
    for step in range(steps):
        p.grad = gradient(shape, step, dtype=torch.float64)
        optimizer.step()
        for tile, block in dense:
            block.step(p.grad[tile])
    for tile, block in dense:
        torch.testing.assert_close(p.detach()[tile], block.W, rtol=0, atol=atol)
    return optimizer


WHOLE = [(slice(0, 6), slice(0, 5))]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("root_by", ["eigh", "tracked"])
@pytest.mark.parametrize("graft", ["adam", "rmsprop", "adagrad", "sgd", None])
def test_shampoo_is_its_docstring(every, root_by, graft):
    assert_equals_dense((6, 5), WHOLE, (0, 1), refresh_every=every, root_by=root_by, graft=graft)


@pytest.mark.parametrize(
    "options",
    [
        dict(nesterov=False),
        dict(factor_average="sum", graft=None),
        dict(factor_average="sum", graft="adagrad", root_by="tracked"),
        dict(damping=1e-2),
        dict(exponent=0.5),
        dict(exponent=0.3, graft=None),
        dict(exponent=(0.5, 0.25)),
        dict(start_step=7),
        dict(start_step=7, graft=None, root_by="tracked"),
    ],
    ids=str,
)
def test_options_are_what_they_say(options):
    assert_equals_dense((6, 5), WHOLE, (0, 1), **options)


@pytest.mark.parametrize("root_by", ["newton", "newton_schulz"])
@pytest.mark.parametrize("exponent", [0.25, 0.5])
def test_iterative_roots_are_roots(root_by, exponent):
    """Their largest eigenvalue is an estimate, and with it the ridge; factors of full rank do not notice."""
    assert_equals_dense((4, 4), [(slice(0, 4), slice(0, 4))], (0, 1), root_by=root_by, exponent=exponent, atol=1e-6)


@pytest.mark.parametrize("every", [1, 3])
def test_blocks_are_separate_problems(every):
    rows, columns = (slice(0, 4), slice(4, 7)), (slice(0, 4), slice(4, 8), slice(8, 11))
    assert_equals_dense((7, 11), list(product(rows, columns)), (0, 1), max_block_size=5, refresh_every=every)


@pytest.mark.parametrize(("shape", "mode"), [((4, 20), 0), ((20, 4), 1)])
@pytest.mark.parametrize("every", [1, 3])
def test_wide_matrices_have_a_root_of_one_half_on_the_small_side(shape, mode, every):
    everything = [(slice(0, shape[0]), slice(0, shape[1]))]
    optimizer = assert_equals_dense(shape, everything, (mode,), refresh_every=every)
    (state,) = optimizer.state.values()
    assert f"root_{mode}" in state and f"root_{1 - mode}" not in state


@pytest.mark.parametrize(("exponent", "mode"), [((0.5, 0), 0), ((0, 0.25), 1)])
def test_a_side_with_exponent_zero_has_no_factor_and_is_not_cut(exponent, mode):
    cut = [slice(0, 6), slice(6, 12)]
    tiles = [tuple(c if i == mode else slice(0, 12) for i in (0, 1)) for c in cut]
    optimizer = assert_equals_dense((12, 12), tiles, (mode,), exponent=exponent, max_block_size=6)
    (row,) = optimizer.coverage()
    assert row.blocks == 2 and f"side {mode} only" in row.reason


def test_exponents_by_side_overrule_the_aspect():
    everything = [(slice(0, 4), slice(0, 20))]
    assert_equals_dense((4, 20), everything, (1,), exponent=(0, 0.5), one_sided_aspect=4.0)
    assert_equals_dense((4, 20), everything, (0, 1), exponent=(0.25, 0.25), one_sided_aspect=4.0)


@pytest.mark.parametrize("weight_decay_kind", ["decoupled", "l2"])
def test_before_the_first_root_a_step_is_that_of_the_graft(weight_decay_kind):
    """Adam's, to the end of the period: torch's AdamW (or Adam) is the oracle."""
    params, twins = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    common = dict(lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = Shampoo(params, nesterov=False, start_step=9, weight_decay_kind=weight_decay_kind, **common)
    other = (torch.optim.AdamW if weight_decay_kind == "decoupled" else torch.optim.Adam)(twins, **common)
    cases.train(optimizer, params, range(8))
    cases.train(other, twins, range(8))
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    cases.train(optimizer, params, range(8, 20))
    cases.train(other, twins, range(8, 20))
    assert (params[0] - twins[0]).abs().max() > 1e-3


def test_with_roots_a_step_is_as_long_as_that_of_the_graft():
    (p,), (q,) = parameters([(6, 5)], dtype=torch.float64), parameters([(6, 5)], dtype=torch.float64)
    ours = Shampoo([p], lr=0.1, refresh_every=1, nesterov=False, weight_decay=0.0)
    theirs = torch.optim.AdamW([q], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(12):
        before = p.detach().clone(), q.detach().clone()
        cases.train(ours, [p], [step])
        cases.train(theirs, [q], [step])
        lengths = [(now.detach() - then).norm() for now, then in zip((p, q), before, strict=True)]
        torch.testing.assert_close(*lengths, rtol=1e-10, atol=0)


def test_staggered_blocks_wait_for_all_of_their_roots():
    """One root alone has not the right scale: until the second the step is the graft's."""
    (p,), (q,) = parameters([(6, 5)], dtype=torch.float64), parameters([(6, 5)], dtype=torch.float64)
    ours = Shampoo([p], lr=0.1, refresh_every=4, refresh="staggered", nesterov=False, weight_decay=0.0)
    theirs = torch.optim.AdamW([q], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    same, rooted = [], []
    for step in range(6):
        cases.train(ours, [p], [step])
        cases.train(theirs, [q], [step])
        same.append(bool((p - q).abs().max() < 1e-12))
        rooted.append(sum(bool(ours.state[p][f"root_{i}"].any()) for i in (0, 1)))
    assert rooted == [1, 1, 1, 2, 2, 2]
    assert same == [roots < 2 for roots in rooted]


def test_curvature_is_the_product_of_the_covariances():
    square, wide = parameters([(6, 5), (3, 14)], dtype=torch.float64)
    optimizer = Shampoo([square, wide], refresh_every=1)
    cases.train(optimizer, [square, wide], range(9))
    C = [optimizer.state[square][f"covariance_{i}"] for i in (0, 1)]
    torch.testing.assert_close(optimizer.curvature(square).to_dense(), torch.kron(*C) / C[0].trace())
    one = torch.kron(optimizer.state[wide]["covariance_0"], torch.eye(14) / 14)
    torch.testing.assert_close(optimizer.curvature(wide).to_dense(), one)


def test_tracked_roots_stay_close_to_the_exact_ones():
    generator = torch.Generator().manual_seed(0)
    shape = (12, 12)
    turns = [torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q * torch.logspace(0, -1.5, 12) for _ in "ab"]
    params, twins = parameters([shape]), parameters([shape])
    tracked, exact = (Shampoo(ps, refresh_every=2, root_by=by) for ps, by in ((params, "tracked"), (twins, "eigh")))
    for _ in range(200):
        g = turns[0] @ torch.randn(shape, generator=generator) @ turns[1].T
        for (p,), optimizer in ((params, tracked), (twins, exact)):
            p.grad = g
            optimizer.step()
    probe = turns[0] @ torch.randn(shape, generator=generator) @ turns[1].T
    ours, theirs = (
        (optimizer.preconditioner(p) @ probe).flatten() for (p,), optimizer in ((params, tracked), (twins, exact))
    )
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.98


ALL_WAYS = [
    dict(root_by="tracked"),
    dict(root_by="newton"),
    dict(root_by="newton_schulz"),
    dict(graft="rmsprop"),
    dict(graft="adagrad", factor_average="sum"),
    dict(graft="sgd", exponent=(0.5, 0)),
    dict(graft=None),
]


@pytest.mark.parametrize("options", ALL_WAYS, ids=str)
def test_every_way_trains_saves_and_loads_with_the_same_bits(options):
    params = parameters()
    optimizer = Shampoo(params, refresh_every=2, **options)
    cases.train(optimizer, params, range(7))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = Shampoo(twins, refresh_every=2, **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    cases.train(optimizer, params, range(7, 14))
    cases.train(other, twins, range(7, 14))
    assert_same_bits(params, twins)
    assert all(torch.isfinite(p).all() for p in params)
    assert optimizer.diagnostics()["refresh_failures"] == 0


@pytest.mark.filterwarnings("ignore:.*a step was refused")
@pytest.mark.parametrize("options", [dict(), *ALL_WAYS], ids=str)
def test_refused_steps_leave_every_way_as_it_is(options):
    params = parameters()
    optimizer = Shampoo(params, refresh_every=2, weight_decay=0.1, weight_decay_kind="l2", **options)
    cases.train(optimizer, params, range(4))
    bits, state = cases.values(params), cases.flat_state(optimizer)
    cases.train(optimizer, params, [4], before=lambda step: params[0].grad.fill_(math.nan))
    assert_same_bits(params, bits)
    cases.assert_same_state(cases.flat_state(optimizer), state, but="step")


@pytest.mark.parametrize("options", ALL_WAYS, ids=str)
def test_no_way_reads_the_device(options):
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in cases.SHAPES]
    optimizer = Shampoo(params, refresh_every=2, **options)
    for _ in range(7):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()


@pytest.mark.parametrize("options", [dict(), *ALL_WAYS], ids=str)
def test_preconditioner_is_what_a_step_applies(options):
    params = parameters(dtype=torch.float64)
    optimizer = Shampoo(params, 0.1, (0.0, 0.9), weight_decay=0.0, nesterov=False, refresh_every=4, **options)
    for step in range(7):
        before = cases.values(params)
        cases.train(optimizer, params, [step])
        for p, q in zip(params, before, strict=True):
            torch.testing.assert_close(
                0.1 * (optimizer.preconditioner(p) @ p.grad), q - p.detach(), rtol=1e-8, atol=1e-11
            )


@pytest.mark.filterwarnings("ignore:.*a decomposition failed")
@pytest.mark.parametrize("root_by", ["eigh", "tracked", "newton"])
def test_last_good_root_is_kept_and_the_failure_counted(root_by, monkeypatch):
    active = []

    def broken(function):
        def fails(*args):
            *results, ok = function(*args)
            if active:
                for result in results:
                    result[0] = math.nan
                ok[0] = False
            return *results, ok

        return fails

    for name in ("eigh", "orthogonalize", "newton_root"):
        monkeypatch.setattr(linalg, name, broken(getattr(linalg, name)))
    params, twins = parameters([(6, 5), (6, 5)]), parameters([(6, 5), (6, 5)])
    options = dict(refresh="together", refresh_every=2, root_by=root_by)
    failing, sound = Shampoo(params, **options), Shampoo(twins, **options)
    cases.train(sound, twins, range(9))
    cases.train(failing, params, range(7))
    before = cases.flat_state(failing)
    active.append(True)
    cases.train(failing, params, [7])
    active.clear()
    after = cases.flat_state(failing)
    kept = [key for key in before if key.startswith("0/") and ("root" in key or "basis" in key)]
    assert len(kept) == (4 if root_by == "tracked" else 2)
    assert all(torch.equal(before[key], after[key]) for key in kept)
    assert after["0/failures"] == 2 and after["1/failures"] == 0
    cases.train(failing, params, [8])
    assert_same_bits(params[1:], twins[1:])
    assert torch.isfinite(params[0]).all()


@pytest.mark.parametrize(
    ("root_by", "exponent"), [("newton", 0.4), ("newton_schulz", 1 / 3), ("newton_schulz", (1, 0))]
)
def test_exponents_that_an_iteration_cannot_make_are_refused(root_by, exponent):
    with pytest.raises(ValueError, match="exponent.*root_by"):
        Shampoo(parameters(), root_by=root_by, exponent=exponent)
    optimizer = Shampoo(parameters(), root_by=root_by)
    with pytest.raises(ValueError, match="exponent.*root_by"):
        optimizer.add_param_group({"params": parameters(), "exponent": exponent})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "bad",
    [dict(exponent=0.0), dict(exponent=(0, 0)), dict(exponent=(0.5,)), dict(exponent="half"), dict(damping=-1.0),
     dict(graft="lamb"), dict(root_by="svd"), dict(factor_average="mean"), dict(start_step=0)],
    ids=str,
)  # fmt: skip
def test_values_that_are_not_allowed_are_refused_by_name(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        Shampoo(parameters(), **bad)


@pytest.mark.parametrize("shape", [(48, 48), (96, 24)], ids=str)
@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("options", [dict(), dict(root_by="tracked")], ids=str)
def test_no_update_is_a_spike(shape, every, options):
    worst = cases.largest_update(Shampoo, shape, refresh_every=every, **options)
    assert 0.5 < worst <= 1.5


def test_meta_merges_axes_from_the_last_one():
    assert merged((32, 3, 64, 64), 8192, 1) == (96, 4096)
    assert merged((3, 4, 2, 2), 16, 1) == (3, 16)
    assert merged((3, 4, 2, 2), 64, 2) == (3, 16) and merged((3, 4, 2, 2), 64, 1) == (48,)
    assert merged((3, 1, 2), 64, math.inf) == (3, 1, 2) and merged((), 64, 1) == (1,)
