"""Replays of what kfac-pytorch was recorded to do: whole trainings, and single preconditioned gradients."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.kfac_pytorch import PeerKFAC

Found = dict[str, tuple[float, float]]  # relative deviation of what was compared, and its tolerance

TRACE, ONE_STEP = 1e-9, 1e-5  # the recorded single steps went through decompositions in float32


def trace_model(kind: str) -> nn.Sequential:
    if kind == "mlp":
        return nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 6, bias=False), nn.Tanh(), nn.Linear(6, 4))
    if kind == "conv":
        first, second = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    assert kind == "seq"
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 4))


def one_step_model(kind: str) -> nn.Sequential:
    """Networks of the single steps; layers are those that the recorded shapes, losses and gradients fit."""
    if kind == "conv":
        first, second = nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Conv2d(3, 4, 2, bias=False)
        return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def loss_of(out: Tensor, y: Tensor) -> Tensor:
    if y.dtype.is_floating_point:
        return F.mse_loss(out, y)
    return F.cross_entropy(out.flatten(0, -2), y.flatten())


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, layer) for name, layer in model.named_modules() if hasattr(layer, "weight"))


def joint(weight: Any, bias: Any) -> Tensor:
    """`[W | b]`."""
    W = torch.as_tensor(weight).flatten(1)
    return W if bias is None else torch.cat([W, torch.as_tensor(bias)[:, None]], 1)


def of(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Copies of weight and bias."""
    return layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone()


def deviation(ours: Tensor, recorded: Any) -> float:
    theirs = torch.as_tensor(recorded)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    off = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-300))
    return off if off == off else float("inf")


def started(model: nn.Module, z: Any, prefix: str) -> nn.Module:
    model.double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.tensor(z[f"{prefix}/{name}"]))
    return model


class Worst:
    """The largest deviation of everything of a kind."""

    def __init__(self) -> None:
        self.found: Found = {}

    def see(self, what: str, off: float, tolerance: float) -> None:
        self.found[what] = (max(off, self.found.get(what, (0.0, 0.0))[0]), tolerance)


def moved(optimizer: PeerKFAC, weight: Tensor, before: dict[Tensor, Tensor], decayed: Tensor) -> Tensor:
    """What came into the momentum in this step, without weight decay: the preconditioned and clipped gradient."""
    (group,) = optimizer.param_groups
    old = before.get(weight, torch.zeros(()))
    return optimizer.state[weight]["momentum"] - group["betas"][0] * old - group["weight_decay"] * decayed


def replay_trace(z: Any) -> Found:
    """20 steps: losses, gradients, averaged factors, preconditioned gradients, parameters."""
    meta = json.loads(str(z["meta"]))
    pre = dict(damping=1e-3, factor_decay=0.95, kl_clip=1e-3, factor_update_steps=1, inv_update_steps=1)
    pre.update({key: int(v) if key.endswith("steps") else v for key, v in meta["pre"].items()})
    pre.update({key: float(pre[key]) for key in ("damping", "factor_decay", "kl_clip")})
    accumulated = meta.get("accum", 1)
    model = started(trace_model(meta["model"]), z, "init")
    optimizer = PeerKFAC(model, pre, {key: float(v) for key, v in meta["sgd"].items()})
    X, Y, worst = torch.tensor(z["X"]), torch.tensor(z["Y"]), Worst()
    for t in range(len(z["losses"])):
        optimizer.zero_grad()
        total = 0.0
        for i in range(t * accumulated, (t + 1) * accumulated):
            loss = loss_of(model(X[i]), Y[i]) / accumulated
            loss.backward()
            total += float(loss.detach())
        worst.see("losses", abs(total / z["losses"][t] - 1), TRACE)
        recorded = f"step{t}/grad/0.weight" in z.files
        layers = dict(blocks(model))
        old = {layer: joint(*of(layer)) for layer in layers.values()}
        before = {p: s["momentum"].clone() for p, s in optimizer.state.items() if "momentum" in s}
        if recorded:
            for name, p in model.named_parameters():
                worst.see(f"grad/{name}", deviation(p.grad, z[f"step{t}/grad/{name}"]), TRACE)
        optimizer.step()
        for name, layer in layers.items() if recorded else ():
            here = optimizer.state[layer.weight]
            bias = None if layer.bias is None else z[f"step{t}/pgrad/{name}.bias"]
            pgrad = moved(optimizer, layer.weight, before, old[layer])
            worst.see(f"pgrad/{name}", deviation(pgrad, joint(z[f"step{t}/pgrad/{name}.weight"], bias)), TRACE)
            worst.see(f"A/{name}", deviation(here["covariance_1"], z[f"step{t}/A/{name}"]), TRACE)
            worst.see(f"G/{name}", deviation(here["covariance_0"], z[f"step{t}/G/{name}"]), TRACE)
        for name, p in model.named_parameters() if recorded else ():
            worst.see(f"param/{name}", deviation(p.detach(), z[f"step{t}/param/{name}"]), TRACE)
    return worst.found


def replay_one_step(z: Any) -> Found:
    """Factors after one step, and the clipped preconditioned gradient of both kinds of damping."""
    meta = json.loads(str(z["meta"]))
    kind = {4: "conv", 2: "mlp", 3: "seq"}[z["X"].ndim]
    worst = Worst()
    for how in ("eigen", "inverse"):
        model = started(one_step_model(kind), z, "param")
        pre = dict(damping=meta["damping"], factor_decay=meta["factor_decay"], kl_clip=meta["kl_clip"])
        pre.update(factor_update_steps=1, inv_update_steps=1, compute_method=how)
        optimizer = PeerKFAC(model, pre, dict(lr=meta["lr"], momentum=0.0, weight_decay=0.0))
        loss = loss_of(model(torch.tensor(z["X"])), torch.tensor(z["y"]))
        loss.backward()
        worst.see("loss", abs(float(loss.detach()) / float(z["loss"]) - 1), TRACE)
        for name, p in model.named_parameters():
            worst.see(f"grad/{name}", deviation(p.grad, z[f"grad/{name}"]), TRACE)
        optimizer.step()
        for name, layer in blocks(model):
            here = optimizer.state[layer.weight]
            bias = None if layer.bias is None else z[f"pgrad_{how}_klclip/{name}.bias"]
            pgrad = joint(z[f"pgrad_{how}_klclip/{name}.weight"], bias)
            worst.see(f"pgrad_{how}/{name}", deviation(here["momentum"], pgrad), ONE_STEP)
            worst.see(f"A/{name}", deviation(here["covariance_1"], z[f"{name}/A_ema"]), TRACE)
            worst.see(f"G/{name}", deviation(here["covariance_0"], z[f"{name}/G_ema"]), TRACE)
    return worst.found


REPLAYS: dict[str, Callable[[Any], Found]] = {
    "trace_kfacpytorch_*": replay_trace,
    "kfacpytorch_onestep_*": replay_one_step,
}
