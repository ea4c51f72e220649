"""Replays of what singd and the original INGD were recorded to do: 20 steps of small networks, real layers and losses.

Compared: losses, gradients and parameters of every step; factors and their momenta in the steps that were recorded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_structures import NAMES
from peers.singd import AveragedConv2d, PeerSINGD
from secondorder.preconditioner.structures import structure

Found = dict[str, tuple[float, float]]  # relative deviation of what was compared, and its tolerance

DOUBLE, SINGLE, HALF = 1e-10, 1e-4, 0.1  # HALF: the peer's factors are bfloat16 and rounded to nearest, ours are not

# Of the original: arguments that it hard-codes in the first 100 steps, and that it does not have.
ORIGINAL = dict(lr_cov=2e-4, weight_decay=0.0, T=1, kfac_like=False, normalize_lr_cov=False)


class MeanOverSequence(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def network(kind: str) -> nn.Sequential:
    """The recorded models; convolutions in groups as the peer sees them."""
    if kind in ("mlp", "seq"):
        sizes = (33, 32, 5) if kind == "mlp" else (6, 7, 4)
        return nn.Sequential(nn.Linear(*sizes[:2]), nn.Tanh(), nn.Linear(*sizes[1:]))
    if kind == "seqpool":
        return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), MeanOverSequence(), nn.Linear(5, 4))
    if kind == "conv":
        first, second = nn.Conv2d(2, 4, 3, padding=1), AveragedConv2d(4, 6, 3, 2, 1, groups=2, bias=False)
        return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(), nn.Linear(54, 3))
    assert kind == "convdil"
    first, second = nn.Conv2d(2, 4, (3, 2), padding=(2, 1), dilation=(2, 1)), nn.Conv2d(4, 5, 3, 2, 1)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(), nn.Linear(60, 3))


def deviation(ours: Tensor, recorded: Any) -> float:
    theirs = torch.as_tensor(recorded)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    off = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-300))
    return off if off == off else math.inf


def replay(z: Any) -> Found:
    meta = json.loads(str(z["meta"]))
    hyper = dict(meta["hyper"])
    if meta["optimizer"] == "INGD original":
        hyper.update(ORIGINAL, alpha1=hyper["beta2"])
    K, C = (NAMES[name] for name in meta.get("structures", ("dense", "dense")))
    half = meta.get("preconditioner_dtype") is not None
    tolerance = HALF if half else DOUBLE if meta["dtype"] == "f64" else SINGLE
    model = network(meta["model_kind"]).to(torch.tensor(z["x"]).dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.tensor(z[f"init/{name}"]))
    optimizer = PeerSINGD(model, (K, C), meta["reduction"], meta.get("kfac_approx", "expand"), hyper)
    found: Found = {}

    def see(what: str, ours: Tensor, recorded: Any) -> None:
        found[what] = (max(deviation(ours, recorded), found.get(what, (0.0, 0.0))[0]), tolerance)

    recorded_at = list(z["snap_steps"]) if "snap_steps" in z.files else [meta["steps"]]
    for t in range(meta["steps"]):
        optimizer.zero_grad()
        out = model(torch.tensor(z["x"][t]))
        y = torch.tensor(z["y"][t])
        loss = F.cross_entropy(out.flatten(0, -2), y.flatten(), reduction=meta["reduction"])
        loss.backward()
        see("loss", loss.detach(), z["loss"][t])
        for name, p in model.named_parameters():
            see(f"grad/{name}", p.grad, z[f"grad/{name}"][t])
        optimizer.step()
        for name, p in model.named_parameters():
            see(f"param/{name}", p.detach(), z[f"param/{name}"][t])
        if t + 1 not in recorded_at:
            continue
        for key in z.files:
            what, _, layer = key.partition("/")
            if what in ("K", "C", "mK", "mC"):
                mode = int(what[-1] == "K")
                state = optimizer.state[model[int(layer)].weight]
                stored = state[("velocity" if what[0] == "m" else "root") + f"_{mode}"]
                dense = structure((C, K)[mode]).to_dense(stored[None])[0]
                here = z[key] if z[key].ndim == 2 else z[key][recorded_at.index(t + 1)]
                see(key, dense, here)
    return found


REPLAYS: dict[str, Callable[[Any], Found]] = {"singd_*": replay, "ingd_original_*": replay}
