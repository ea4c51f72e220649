"""Replays of recorded gradients through the published root-free RMSProp and AdamW: parameters, and the last state."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peers.root_free import PeerRootFree

Found = dict[str, tuple[float, float]]

TOLERANCE = {"f64": 1e-14, "f32": 1e-6}
OURS = {"square_avg": "exp_avg_sq", "exp_avg_sq": "exp_avg_sq", "momentum_buffer": "momentum", "exp_avg": "exp_avg"}


def deviation(ours: Tensor, recorded: Any) -> float:
    theirs = torch.as_tensor(recorded)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    off = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-300))
    return off if off == off else float("inf")


def replay(z: Any) -> Found:
    meta = json.loads(str(z["meta"]))
    at = TOLERANCE[meta["dtype"]]
    params = {key[5:]: nn.Parameter(torch.tensor(z[key])) for key in z.files if key.startswith("init/")}
    optimizer = PeerRootFree(params.values(), batch_size=meta["batch_size"], **meta["hyper"], **meta["flags"])
    worst = dict.fromkeys(params, 0.0)
    for t in range(meta["steps"]):
        for name, p in params.items():
            p.grad = torch.tensor(z[f"grad/{name}"][t])
        optimizer.step()
        for name, p in params.items():
            worst[name] = max(worst[name], deviation(p.detach(), z[f"param/{name}"][t]))
    found = {f"param/{name}": (off, at) for name, off in worst.items()}
    for name, p in params.items():
        for theirs, ours in OURS.items():
            if f"{theirs}/{name}" in z.files:
                scale = optimizer.param_groups[0]["batch_size"] if ours == "exp_avg_sq" else None
                value = optimizer.state[p][ours] / (scale or 1)
                found[f"{theirs}/{name}"] = (deviation(value, z[f"{theirs}/{name}"][-1]), at)
    return found


REPLAYS: dict[str, Callable[[Any], Found]] = {"rfadamw_*": replay, "rfrmsprop_*": replay}
