"""What tests of adaptive steps share: small networks with data in float64, optimizers, and closures."""

import torch
import torch.nn.functional as F
from torch import nn

import secondorder
from cases import normal

CLASSES = [secondorder.KFAC, secondorder.EKFAC]
BASE = dict(
    lr=0.1,
    damping=1e-2,
    weight_decay=0.0,
    kl_clip=None,
    norm_clip=None,
    max_update_rms=None,
    momentum="update",
    refresh_every=1,
    nesterov=False,
)
LOSSES = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy, "bce": F.binary_cross_entropy_with_logits}


def linear(d_in=3, d_out=2):
    """A linear layer on data to which it does not fit: with mse the loss is quadratic."""
    model = nn.Linear(d_in, d_out).double()
    model.weight.data, model.bias.data = normal(d_out, d_in, seed=1), normal(d_out, seed=2)
    return model, normal(12, d_in, seed=3), normal(12, d_out, seed=4)


def tanh(loss="cross_entropy"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    y = {
        "cross_entropy": torch.arange(12) % 3,
        "mse": normal(12, 3, seed=4),
        "bce": (normal(12, 3, seed=4) > 0).double(),
    }
    return model, normal(12, 4, seed=3), y[loss]


def optimize(model, cls=secondorder.KFAC, **options):
    return cls(model.parameters(), module=model, **{**BASE, **options})


def closure_of(optimizer, model, x, y, loss="mse", kind="type-2", seen=None, after=lambda loss: loss):
    """The closure of a step; `after` is what the second evaluation makes of the loss."""

    def closure():
        optimizer.zero_grad(set_to_none=False)
        outputs = model(x)
        value = LOSSES[loss](outputs, y)
        if seen is not None:
            seen.append((torch.is_grad_enabled(), outputs.requires_grad))
        if kind is not None:
            optimizer.fisher_backward(outputs, loss, kind)
        value.backward(retain_graph=True)
        return (value if torch.is_grad_enabled() else after(value)), outputs

    return closure


def least_squares(x, y):
    """The smallest mean squared error of a linear layer."""
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return F.mse_loss(ones @ torch.linalg.lstsq(ones, y).solution, y)
