"""Linear layers whose weight is `(d_in, d_out)`, as GPT-2's in Hugging Face's `transformers`: what `nn.Linear` does."""

import pytest
import torch
from torch import nn

from layer_cases import every_row, make
from secondorder.curvature.layers.registry import kind_of


class Conv1D(nn.Module):
    """Computes what `transformers.pytorch_utils.Conv1D` does; the package need not be there."""

    def __init__(self, d_out, d_in):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out) / d_in**0.5)
        self.bias = nn.Parameter(torch.randn(d_out))

    def forward(self, x):
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


class Rescaled(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


def twins():
    """A network of transposed layers, and the same one of linear layers, in float64."""
    torch.manual_seed(0)
    transposed = nn.Sequential(Conv1D(7, 5), nn.Tanh(), Conv1D(3, 7)).double()
    linear = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    with torch.no_grad():
        for ours, theirs in zip(transposed[::2], linear[::2], strict=True):
            theirs.weight.copy_(ours.weight.T)
            theirs.bias.copy_(ours.bias)
    return transposed, linear


def backward(model, step, scale=1.0):
    g = torch.Generator().manual_seed(step)
    x = torch.randn(6, 4, 5, generator=g, dtype=torch.float64)  # positions share weights
    labels = torch.randint(3, (24,), generator=g)
    (nn.functional.cross_entropy(model(x).flatten(0, 1), labels) * scale).backward()


def train(model, opt, scale=1.0):
    for step in range(12):
        opt.zero_grad()
        backward(model, step, scale)
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= scale
        opt.step()


def assert_twins(transposed, linear):
    for ours, theirs in zip(transposed[::2], linear[::2], strict=True):
        torch.testing.assert_close(ours.weight.T, theirs.weight, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-10, atol=1e-12)


@every_row
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_trains_as_a_linear_layer_does(row, sharing):
    models = twins()
    for model in models:
        train(model, make(row, model, sharing=sharing, damping=0.1))
    assert_twins(*models)


def test_factors_are_those_of_a_linear_layer():
    found = []
    for model in twins():
        opt = make("KFAC", model, sharing="expand")
        train(model, opt)
        found.append(opt.factors())
    for name in ("0.weight", "2.weight"):
        ours, theirs = (factors[name] for factors in found)
        assert ours["fold"] is not None and theirs["fold"] is None
        assert ours["view"] == theirs["view"] and ours["sides"] == theirs["sides"] == ("output", "input")
        for a, b in zip(ours["blocks"][0]["factors"], theirs["blocks"][0]["factors"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_loss_scale_is_found_where_only_weights_are_trained():
    """The captured gradient is then compared with the weight's, summed over its inputs."""
    models = twins()
    for model, scale in zip(models, (1024.0, 1.0), strict=True):
        for layer in model[::2]:
            layer.bias.requires_grad_(False)
        train(model, make("KFAC", model), scale)
    assert_twins(*models)


def test_subclass_with_a_forward_pass_of_its_own_has_no_statistics():
    assert not isinstance(kind_of(Conv1D(3, 2)), str)
    assert kind_of(Rescaled(3, 2)) == "Rescaled has a forward pass of its own"
