"""KFAC over several steps: averages, schedules, momentum, clipping; what counts as an observation; failures."""

import copy
import math

import pytest
import torch

import secondorder
from cases import assert_same_state, flat_state
from dense_kfac import (
    SETTINGS,
    assert_near,
    backward,
    batch,
    cross_entropy,
    gradient,
    joint,
    kfac,
    linears,
    mlp,
    pairs,
    solved,
    stepped,
)
from secondorder import linalg

# ---------------------------------------------------------------- averages, schedules, momentum, clip


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.8, False), (0.8, True)])
@pytest.mark.parametrize("kind", ["relative", "factor"])
def test_trajectory_is_that_of_dense_algebra(kind, momentum, nesterov):
    """Debiased averages of factors, solve, heavy ball on what comes out, decoupled decay."""
    model, beta, lr, decay = mlp(4, 5, 3), 0.8, 0.05, 0.1
    twin = copy.deepcopy(model)
    opt = kfac(model, lr=lr, betas=(momentum, beta), damping_kind=kind, nesterov=nesterov, weight_decay=decay)
    sums, buffers = None, [torch.zeros_like(joint(layer)) for layer in linears(twin)]
    for t in range(1, 6):
        x, y = batch(model, seed=t)
        backward(model, x, y)
        opt.step()
        new = pairs(twin, x, y)
        backward(twin, x, y)
        sums = [
            (beta * a + (1 - beta) * A, beta * g + (1 - beta) * G)
            for (a, g), (A, G) in zip(sums or [(0, 0)] * len(new), new, strict=True)
        ]
        for i, (layer, (A, G)) in enumerate(zip(linears(twin), sums, strict=True)):
            weight = 1 - beta**t
            u = solved(A / weight, G / weight, gradient(layer), kind)
            buffers[i] = momentum * buffers[i] + u
            change = u + momentum * buffers[i] if nesterov else buffers[i]
            new_joint = (1 - lr * decay) * joint(layer) - lr * change
            with torch.no_grad():
                layer.weight.copy_(new_joint[:, :-1])
                layer.bias.copy_(new_joint[:, -1])
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert_near(ours.detach(), theirs.detach())


def test_factors_are_debiased_averages_of_the_steps_that_observe():
    model = mlp(4, 5, 3)
    beta, every = 0.7, 3
    opt = kfac(model, lr=0.0, betas=(0.0, beta), statistics_every=every)
    seen = []
    for t in range(8):
        x, y = batch(model, seed=t)
        backward(model, x, y)
        opt.step()
        if t % every == 0:
            seen.append(pairs(model, x, y)[0])
    weights = torch.tensor([beta ** (len(seen) - 1 - k) for k in range(len(seen))], dtype=torch.float64)
    weights /= weights.sum()
    for i, key in enumerate(("covariance_1", "covariance_0")):
        expected = sum(w * pair[i] for w, pair in zip(weights, seen, strict=True))
        assert_near(opt.state[model[0].weight][key], expected, 1e-13)


def test_refreshes_together_apply_the_factors_of_the_last_period():
    model = mlp(4, 5, 3)
    opt = kfac(model, lr=1e-3, refresh_every=3, refresh="together")
    layer, applied = model[0], None
    state = opt.state[layer.weight]
    for t in range(1, 9):
        x, y = batch(model, seed=t)
        backward(model, x, y)
        g, (A, G) = gradient(layer), pairs(model, x, y)[0]
        if t == 1:  # before the first refresh: the diagonals of the first statistic
            applied = torch.diag(A.diagonal()), torch.diag(G.diagonal())
        U = stepped(opt, [layer])[0]
        state = opt.state[layer.weight]
        now = state["covariance_1"], state["covariance_0"]
        if t % 3 == 0:
            applied = now[0].clone(), now[1].clone()
        # in between they keep their shape, not their size
        assert_near(U, solved(*(C * N.trace() / C.trace() for C, N in zip(applied, now, strict=True)), g))


def test_staggered_refreshes_do_every_factor_once_a_period_and_never_all_at_once():
    model = mlp(4, 5, 6, 3)
    opt = kfac(model, lr=1e-3, refresh_every=4)
    keys = ("basis_0", "basis_1")
    calls = {}
    for t in range(8):
        backward(model, *batch(model, seed=t))
        before = {
            layer: [opt.state[layer.weight].get(key, torch.zeros(1)).clone() for key in keys]
            for layer in linears(model)
        }
        opt.step()
        for layer, old in before.items():
            for key, value in zip(keys, old, strict=True):
                if value.ndim > 1 and not torch.equal(value, opt.state[layer.weight][key]):
                    calls.setdefault((layer, key), []).append(t)
    second = [[t for t in found if t >= 4] for found in calls.values()]
    assert len(calls) == 6 and all(len(found) == 1 for found in second)
    assert len({found[0] for found in second}) == 4


def test_tracking_by_qr_converges_to_the_eigendecomposition():
    model = mlp(4, 5, 3)
    x, y = batch(model)
    layer, found = model[0], []
    opt = kfac(model, lr=0.0, betas=(0.0, 0.0), refresh_by="qr", refresh="together")
    for t in range(60):
        # the two initial eigendecompositions are of other batches: tracking starts from bases that it must leave
        backward(model, *(batch(model, seed=9 + t) if t < 2 else (x, y)))
        opt.step()
        found.append(opt.state[layer.weight]["momentum"].clone())
    A, G = pairs(model, x, y)[0]
    expected = solved(A, G, gradient(layer))
    errors = [float((u - expected).norm() / expected.norm()) for u in found[2:]]
    assert errors[0] > 1e-2 and errors[-1] < 1e-4


def test_tracking_by_cholesky_survives_inputs_that_are_always_zero(monkeypatch):
    monkeypatch.setattr(linalg, "orthogonalize", linalg.cholesky_qr)  # what other devices than the CPU do
    model = mlp(12, 8, 3)
    opt = kfac(model, lr=1e-3, refresh_by="qr", refresh="together")
    for t in range(6):
        x, y = batch(model, n=4, seed=t)
        x[:, :5] = 0
        backward(model, x, y)
        opt.step()
    assert opt.diagnostics()["refresh_failures"] == 0


def directions(opt, groups):
    """What a step moves, over the group's lr, by parameter."""
    before = {p: p.detach().clone() for group in groups for p in group["params"]}
    opt.step()
    return {p: (before[p] - p.detach()) / group["lr"] for group in groups for p in group["params"]}


def test_kl_clip_scales_all_blocks_of_all_groups_by_one_number():
    model = mlp(5, 7, 3)
    x, y = batch(model)
    twin = copy.deepcopy(model)
    clip, rates = 1e-3, (0.5, 0.1)
    found = []
    for network, how in ((model, clip), (twin, None)):
        groups = [
            dict(params=list(network[0].parameters()), lr=rates[0]),
            dict(params=list(network[2].parameters()), lr=rates[1]),
        ]
        opt = secondorder.KFAC(groups, module=network, **{**SETTINGS, "kl_clip": how})
        backward(network, x, y)
        grads = [p.grad.clone() for p in network.parameters()]
        found.append((list(directions(opt, opt.param_groups).values()), grads))
    (clipped, _), (free, grads) = found
    lrs = [rates[0]] * 2 + [rates[1]] * 2
    size = sum(lr**2 * float((u * g).sum()) for lr, u, g in zip(lrs, free, grads, strict=True))
    assert size > clip
    for ours, theirs in zip(clipped, free, strict=True):
        assert_near(ours, math.sqrt(clip / size) * theirs)


def test_kl_clip_leaves_short_steps_alone():
    model = mlp(5, 7, 3)
    twin = copy.deepcopy(model)
    for network, clip in ((model, 1e3), (twin, None)):
        opt = kfac(network, kl_clip=clip)
        backward(network, *batch(network))
        opt.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# ---------------------------------------------------------------- what counts


def held(opt, model):
    return [opt.state[layer.weight][f"covariance_{i}"].clone() for layer in linears(model) for i in (0, 1)]


def observed(model, run, **options):
    """Factors after one step that moves nothing."""
    opt = kfac(model, lr=0.0, **options)
    run(model)
    opt.step()
    return held(opt, model)


def test_ignored_targets_leave_no_trace():
    model = mlp(5, 7, 3)
    x, y = batch(model, shape=(4, 6))
    short = [4, 6, 1, 3]
    ignored = torch.arange(6)[None] >= torch.tensor(short)[:, None]
    padded = y.masked_fill(ignored, -100)
    x_padded = x.masked_fill(ignored[..., None], 1e3)  # what padding holds must not matter
    ours = observed(model, lambda m: backward(m, x_padded, padded))
    theirs = observed(model, lambda m: backward(m, x[~ignored], y[~ignored]))
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, 1e-13)


def test_uneven_micro_batches_of_a_sum_over_all_terms_are_one_batch():
    model = mlp(5, 7, 3)
    x, y = batch(model, n=11)

    def in_parts(m):
        m.zero_grad()
        for part in (slice(0, 2), slice(2, 9), slice(9, 11)):
            (cross_entropy(m(x[part]), y[part], reduction="sum") / len(x)).backward()

    for a, b in zip(observed(model, in_parts), observed(model, lambda m: backward(m, x, y)), strict=True):
        assert_near(a, b, 1e-13)


def test_step_is_the_same_for_the_sum_and_for_the_mean_of_the_loss():
    model = mlp(5, 7, 3)
    x, y = batch(model)
    twin = copy.deepcopy(model)
    ours, theirs = kfac(model), kfac(twin, loss_reduction="sum")
    backward(model, x, y)
    backward(twin, x, y, lambda out, y: cross_entropy(out, y, reduction="sum"))
    for a, b in zip(stepped(ours, linears(model)), stepped(theirs, linears(twin)), strict=True):
        assert_near(a, b)
    for a, b in zip(held(ours, model)[::2], held(theirs, twin)[::2], strict=True):
        assert_near(b, len(x) * a)


# ---------------------------------------------------------------- failures


def trained(steps=4, **options):
    model = mlp(5, 7, 3)
    opt = kfac(model, lr=0.01, **options)
    for t in range(steps):
        backward(model, *batch(model, seed=t))
        opt.step()
    return model, opt


@pytest.mark.filterwarnings("ignore:.*refused")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refused_step_changes_nothing_but_the_clock(bad):
    model, opt = trained()
    state, params = flat_state(opt), [p.detach().clone() for p in model.parameters()]
    x, y = batch(model, seed=7)
    x[0, 0] = bad
    backward(model, x, y)
    opt.step()
    assert_same_state(flat_state(opt), state, but="step")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), params, strict=True))
    backward(model, *batch(model, seed=8))
    opt.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_failed_decomposition_keeps_the_last_basis_and_is_counted(monkeypatch):
    model, opt = trained()
    W = model[0].weight
    old = {key: opt.state[W][key].clone() for key in ("basis_0", "eigenvalues_0", "basis_1", "eigenvalues_1")}

    def failing(A):
        values, Q, ok = real(A)
        return values, Q, ok & False

    real = linalg.eigh
    monkeypatch.setattr(linalg, "eigh", failing)
    backward(model, *batch(model, seed=7))
    with pytest.warns(UserWarning, match="decomposition failed"):
        opt.step()
    assert all(torch.equal(opt.state[W][key], value) for key, value in old.items())
    assert opt.diagnostics()["refresh_failures"] == 4
    assert all(p.isfinite().all() for p in model.parameters())


def test_statistic_that_overflows_is_dropped_and_counted():
    """Gradients that are finite can have squares that are not: then the factors stay, and the step is taken."""
    model = mlp(5, 3).float()
    opt = kfac(model, lr=1e-6, damping_kind="absolute")
    x, y = torch.randn(6, 5), torch.randint(0, 3, (6,))
    backward(model, x, y)
    opt.step()
    before, old = held(opt, model), model[0].weight.detach().clone()
    x[0] = 1e25  # of small weight in the loss, so that the gradient stays small, but not A
    backward(model, x, y, lambda out, y: cross_entropy(torch.cat([out[:1] * 1e-38, out[1:]]), y))
    with pytest.warns(UserWarning, match="statistic was not finite"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(held(opt, model), before, strict=True))
    assert not torch.equal(model[0].weight, old) and model[0].weight.isfinite().all()
    assert opt.diagnostics()["refresh_failures"] == 1
