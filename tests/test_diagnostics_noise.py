"""Gradient noise from layer statistics, against gradients of every example by autograd."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

import secondorder
from cases import labels, normal

SETTINGS = dict(lr=0.0, betas=(0.0, 0.0), damping=0.1, weight_decay=0.0, refresh_every=2)
KEYS = ("sample_gradient_norm", "gradient_variance", "signal_to_noise")


class Vision(nn.Module):
    """A layer of most kinds; with `sharing="reduce"` every example has one row in each."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 2, groups=2), nn.LayerNorm(6)
        self.wide, self.out = nn.Linear(36, 6, bias=False), nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        return self.out(self.norm(self.wide(self.conv(x).tanh().flatten(1))))


def perceptron():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def examples(model, x, y):
    """By name, `(n, ...)`: the gradient of every example's loss."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values, x, y):
        return F.cross_entropy(functional_call(model, values, (x[None],)), y[None])

    return vmap(grad(loss), (None, 0, 0))(values, x, y)


def noise(E):
    """The three numbers for gradients of examples `(n, N)`: length, unbiased variance, unbiased ratio."""
    n, mean = len(E), E.mean(0)
    variance = E.var(0).sum()
    signal = mean.square().sum() - variance / n
    return {
        "sample_gradient_norm": E.square().sum(1).mean().sqrt(),
        "gradient_variance": variance,
        "signal_to_noise": signal.clamp_min(0) / (variance / n),
    }


def of(E, names):
    return torch.cat([E[name].flatten(1) for name in names], 1)


def agree(told, wanted, prefix="", rel=1e-9):
    for key in KEYS:
        assert told[prefix + key] == pytest.approx(float(wanted[key]), rel=rel, abs=1e-12), prefix + key


def step(model, optimizer, x, y, parts=1, reduction="mean", clip=None, scale=1.0):
    """One step on gradients that were accumulated over parts, scaled, unscaled and clipped."""
    optimizer.zero_grad()
    for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
        loss = F.cross_entropy(model(xs), ys, reduction=reduction)
        (loss * scale / (parts if reduction == "mean" else 1)).backward()
    for p in model.parameters():
        p.grad /= scale
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


def watched(cls, model, **options):
    optimizer = cls(model.parameters(), module=model, **{**SETTINGS, **options})
    optimizer.track()
    return optimizer


@pytest.mark.parametrize(
    "how",
    [{}, {"parts": 3}, {"clip": 1e-2}, {"scale": 1024.0}, {"parts": 2, "clip": 1e-2, "scale": 64.0}],
    ids=str,
)
def test_ekfac_is_exact_where_examples_have_one_row(how):
    model, x, y = perceptron(), normal(12, 5), labels(12)
    scaler = SimpleNamespace(get_scale=lambda: how["scale"]) if {"clip", "scale"} <= how.keys() else None
    optimizer = watched(secondorder.EKFAC, model, grad_scaler=scaler)
    for _ in range(3):  # before and after the bases turn
        step(model, optimizer, x, y, **how)
        told, E = optimizer.diagnostics(), examples(model, x, y)
        agree(told, noise(of(E, E)))
        agree(told, noise(of(E, ["0.weight", "0.bias"])), "bucket/group0.7x6/")
        agree(told, noise(of(E, ["2.weight", "2.bias"])), "bucket/group0.3x8/")


def test_ekfac_is_exact_with_positions_that_are_reduced():
    model, x, y = Vision(), normal(10, 2, 4, 4), labels(10)
    optimizer = watched(secondorder.EKFAC, model, sharing="reduce")
    step(model, optimizer, x, y)
    told, E = optimizer.diagnostics(), examples(model, x, y)
    agree(told, noise(of(E, E)))
    agree(told, noise(of(E, ["conv.weight", "conv.bias"])), "bucket/group0.2x5/")
    agree(told, noise(of(E, ["norm.weight", "norm.bias"])), "bucket/group0.2/")


def test_blocks_of_a_cut_weight_are_parts_of_it():
    model, x, y = perceptron(), normal(12, 5), labels(12)
    optimizer = watched(secondorder.EKFAC, model, max_block_size=4)
    assert "4 blocks" in str(optimizer.coverage()) or "blocks of at most 4" in str(optimizer.coverage())
    step(model, optimizer, x, y)
    E = examples(model, x, y)
    agree(optimizer.diagnostics(), noise(of(E, E)))


def test_bias_apart_has_one_factor_and_is_exact_for_kfac():
    model, x, y = perceptron(), normal(12, 5), labels(12)
    biases = [model[0].bias, model[2].bias]
    groups = [{"params": [model[0].weight, model[2].weight]}, {"params": biases}]
    optimizer = secondorder.KFAC(groups, module=model, **SETTINGS)
    optimizer.track()
    step(model, optimizer, x, y)
    E = examples(model, x, y)
    agree(optimizer.diagnostics(), noise(E["0.bias"]), "bucket/group1.7/")


def test_gradients_of_a_sum_are_divided_by_the_rows():
    model, x, y = perceptron(), normal(12, 5), labels(12)
    optimizer = watched(secondorder.EKFAC, model, loss_reduction="sum")
    step(model, optimizer, x, y, reduction="sum")
    E = examples(model, x, y)
    wanted = noise(of(E, E))
    wanted["sample_gradient_norm"] /= len(x)
    wanted["gradient_variance"] /= len(x) ** 2
    told = optimizer.diagnostics()
    n = told["sample_gradient_norm"] / float(wanted["sample_gradient_norm"])
    assert n == pytest.approx(len(x)), "that of one example, as it is in the sum"
    assert told["signal_to_noise"] == pytest.approx(float(wanted["signal_to_noise"]))


def test_expanded_positions_are_samples_of_their_own():
    model, x, y = perceptron(), normal(4, 3, 5), labels(12)
    optimizer = watched(secondorder.EKFAC, model, sharing="expand")
    optimizer.zero_grad()
    F.cross_entropy(model(x).flatten(0, 1), y).backward()
    optimizer.step()
    E = examples(model, x.flatten(0, 1), y)
    agree(optimizer.diagnostics(), noise(of(E, E)))


class TestKFAC:
    """q is N mean|a|² mean|g|² there."""

    def told_and_rows(self, x, y):
        model = nn.Sequential(nn.Linear(5, 3)).double()
        optimizer = watched(secondorder.KFAC, model)
        step(model, optimizer, x, y)
        return optimizer.diagnostics(), examples(model, x, y)

    def test_is_exact_where_all_inputs_are_of_one_length(self):
        x, y = F.normalize(normal(12, 5), dim=1), labels(12)
        told, E = self.told_and_rows(x, y)
        agree(told, noise(of(E, E)))

    def test_leaves_out_what_lengths_have_in_common(self):
        x, y = normal(12, 5), labels(12)
        told, E = self.told_and_rows(x, y)
        g2, a2 = E["0.bias"].square().sum(1), x.square().sum(1) + 1
        wanted = (g2.mean() * a2.mean()).sqrt()
        assert told["sample_gradient_norm"] == pytest.approx(float(wanted))
        shared = ((g2 - g2.mean()) * (a2 - a2.mean())).mean()
        exact = noise(of(E, E))["sample_gradient_norm"]
        assert float(exact) ** 2 == pytest.approx(told["sample_gradient_norm"] ** 2 + float(shared))


class TestHint:
    def test_is_the_simple_noise_scale(self):
        model, x = perceptron(), normal(64, 5)
        y = (x[:, 0] > 0).long()  # there is something to learn: the signal is above the noise
        optimizer = watched(secondorder.EKFAC, model)
        step(model, optimizer, x, y)
        E = of(examples(model, x, y), dict(model.named_parameters()))
        variance = E.var(0).sum()
        signal = E.mean(0).square().sum() - variance / len(E)
        assert signal > 0
        assert optimizer.diagnostics()["batch_size_hint"] == pytest.approx(float(variance / signal))

    def test_averages_numerator_and_denominator_apart(self):
        model, optimizer, parts = perceptron(), None, []
        optimizer = watched(secondorder.EKFAC, model)
        for seed in range(2):
            x = normal(64, 5, seed=seed)
            y = (x[:, 0] > 0).long()
            step(model, optimizer, x, y)
            E = of(examples(model, x, y), dict(model.named_parameters()))
            parts.append((E.var(0).sum(), E.mean(0).square().sum() - E.var(0).sum() / 64))
        (v0, s0), (v1, s1) = parts
        wanted = (0.9 * v0 + v1) / (0.9 * s0 + s1)
        assert optimizer.diagnostics()["batch_size_hint"] == pytest.approx(float(wanted))

    def test_refused_steps_leave_the_average(self):
        model, x = perceptron(), normal(64, 5)
        y = (x[:, 0] > 0).long()
        optimizer = watched(secondorder.EKFAC, model)
        step(model, optimizer, x, y)
        before = optimizer.diagnostics()["batch_size_hint"]
        with pytest.warns(UserWarning, match="refused"):
            step(model, optimizer, x * torch.inf, y)
        step(model, optimizer, x, y)
        assert optimizer.diagnostics()["batch_size_hint"] == pytest.approx(before)


def test_measured_steps_that_observe_nothing_pass_it_on_to_the_next_that_does():
    model, x, y = perceptron(), normal(12, 5), labels(12)
    optimizer = watched(secondorder.EKFAC, model, statistics_every=4)  # observes in calls 1, 5, 9
    optimizer.track(3)
    for _ in range(4):
        step(model, optimizer, x, y)
    assert "signal_to_noise" not in optimizer.diagnostics()
    step(model, optimizer, x, y)
    E = examples(model, x, y)
    agree(optimizer.diagnostics(), noise(of(E, E)))


def test_statistics_of_the_models_own_distribution_say_nothing_of_the_data():
    model, x, y = perceptron(), normal(12, 5), labels(12)
    optimizer = watched(secondorder.EKFAC, model)
    out = model(x)
    optimizer.fisher_backward(out, "cross_entropy")
    F.cross_entropy(out, y).backward()
    optimizer.step()
    told = optimizer.diagnostics()
    assert "update_norm" in told and not any(key in told for key in (*KEYS, "batch_size_hint"))


def test_one_sided_factors_do_not_tell():
    model, x, y = perceptron(), normal(12, 5), labels(12)
    optimizer = watched(secondorder.KFAC, model, sides="inputs")
    step(model, optimizer, x, y)
    assert not any(key in optimizer.diagnostics() for key in KEYS)


def test_a_batch_of_one_tells_no_variance():
    model, x, y = perceptron(), normal(1, 5), labels(1)
    optimizer = watched(secondorder.EKFAC, model)
    step(model, optimizer, x, y)
    told = optimizer.diagnostics()
    assert math.isnan(told["gradient_variance"]) and math.isnan(told["batch_size_hint"])


def test_watching_changes_no_bit():
    found = []
    for every in (0, 1):
        torch.manual_seed(0)
        model = perceptron()
        optimizer = secondorder.EKFAC(model.parameters(), module=model, lr=0.05)
        optimizer.track(every)
        for seed in range(5):
            step(model, optimizer, normal(12, 5, seed=seed), labels(12, seed=seed), clip=0.5)
        found.append((copy.deepcopy(model.state_dict()), optimizer.state_dict()["state"]))
    for name, value in found[0][0].items():
        assert torch.equal(value, found[1][0][name])
    for key, entry in found[0][1].items():
        assert all(torch.equal(value, found[1][1][key][name]) for name, value in entry.items())


def test_nothing_is_read_of_meta_parameters():
    model = perceptron().to("meta")
    optimizer = secondorder.EKFAC(model.parameters(), module=model, refresh_every=2)
    optimizer.track()
    for _ in range(4):
        optimizer.zero_grad()
        out = model(torch.empty(12, 5, device="meta", dtype=torch.float64))
        out.square().mean().backward()
        optimizer.step()
    assert math.isnan(optimizer.diagnostics()["batch_size_hint"])
