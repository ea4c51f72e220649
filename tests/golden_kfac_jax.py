"""Replays of recorded kfac-jax trajectories: a tanh network, exact Fisher, 20 steps on a batch each.

Compared at every step: loss (its L2 term included), learning rate, momentum, damping, ρ (with the steps in which there
is none) and the predicted change; parameters and factors in the steps that were recorded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.kfac_jax import PeerKFAC

Found = dict[str, tuple[float, float]]  # by what was compared: relative deviation and tolerance

TOLERANCE = 1e-9


def network(z: Any) -> nn.Sequential:
    sizes = [z["init/l0/w"].shape[0], *(z[f"init/l{i}/w"].shape[1] for i in range(2))]
    model = nn.Sequential(nn.Linear(*sizes[:2]), nn.Tanh(), nn.Linear(*sizes[1:])).double()
    for i, layer in enumerate((model[0], model[2])):
        layer.weight.data = torch.tensor(z[f"init/l{i}/w"]).mT.contiguous()
        layer.bias.data = torch.tensor(z[f"init/l{i}/b"])
    return model


def objective(kind: str, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and outputs of which it is torch's functional.

    The peer's squared error is a mean over examples of a sum over outputs: the sum, for outputs over the root of N.
    """
    if kind == "cross_entropy":
        return F.cross_entropy(outputs, y), outputs
    scale = len(y) ** -0.5
    return F.mse_loss(outputs * scale, y * scale, reduction="sum"), outputs * scale


def replay(z: Any) -> Found:
    meta = json.loads(str(z["meta"]))
    kind = "cross_entropy" if meta["case"].startswith("ce") else "mse"
    model = network(z)
    optimizer = PeerKFAC(
        model,
        l2_reg=meta["l2_reg"],
        ema=meta["curvature_ema"],
        loss=kind,
        options=meta["opt"],
        fixed=meta["step"],
        loss_reduction="mean" if kind == "cross_entropy" else "sum",
    )
    X, Y = torch.tensor(z["X"]), torch.tensor(z["Y"])
    worst: dict[str, float] = {}

    def see(what: str, ours: Tensor | float, recorded: Any) -> None:
        recorded = torch.as_tensor(recorded)
        ours = torch.as_tensor(ours, dtype=recorded.dtype)
        if recorded.isnan().any() or ours.isnan().any():
            off = 0.0 if torch.equal(recorded.isnan(), ours.isnan()) else math.inf
        else:
            off = float((ours - recorded).norm() / recorded.norm().clamp_min(1e-30)) if (ours != recorded).any() else 0
        worst[what] = max(worst.get(what, 0.0), off)

    for t, (x, y) in enumerate(zip(X, Y, strict=True)):

        def closure(x: Tensor = x, y: Tensor = y) -> tuple[Tensor, Tensor]:
            optimizer.zero_grad()
            loss, outputs = objective(kind, model(x), y)
            optimizer.fisher_backward(outputs, kind, "type-2")
            loss.backward(retain_graph=True)
            return loss, outputs

        group = optimizer.param_groups[0]
        damping = group["damping"]
        penalty = meta["l2_reg"] / 2 * sum(float(p.detach().square().sum()) for p in model.parameters())
        found = optimizer.step(closure)
        loss = float((found[0] if isinstance(found, tuple) else found).detach()) + penalty
        told = optimizer.diagnostics()
        see("loss", loss, z["trace/loss"][t])
        see("damping", damping, z["trace/damping"][t])
        see("learning_rate", told.get("lr", group["lr"]), z["trace/learning_rate"][t])
        see("momentum", told.get("momentum", group["betas"][0]), z["trace/momentum"][t])
        see("rho", told.get("rho", math.nan), z["trace/rho"][t])
        see("quad_model_change", told.get("predicted_change", math.nan), z["trace/quad_model_change"][t])
        for i, layer in enumerate((model[0], model[2]) if f"step{t}/param/l0/w" in z.files else ()):
            see(f"l{i}/w", layer.weight.detach().mT, z[f"step{t}/param/l{i}/w"])
            see(f"l{i}/b", layer.bias.detach(), z[f"step{t}/param/l{i}/b"])
            state = optimizer.state[layer.weight]
            shape = state["covariance_1"].shape  # the peer numbers blocks as it likes
            block = next(j for j in range(2) if z[f"step{t}/block{j}/factor0"].shape == shape)
            see(f"l{i}/A", state["covariance_1"], z[f"step{t}/block{block}/factor0"])
            see(f"l{i}/G", state["covariance_0"], z[f"step{t}/block{block}/factor1"])
    return {what: (off, TOLERANCE) for what, off in worst.items()}


REPLAYS: dict[str, Callable[[Any], Found]] = {"trace_kfacjax_*": replay}
