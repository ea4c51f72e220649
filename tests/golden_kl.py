"""Replays of recorded KL methods: trajectories, bases, covariances, eigenvalues and moments of the authors' code."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor, nn

from peers.kl import PeerKL, PeerMetaKL, inject

Found = dict[str, tuple[float, float]]

ILL_POSED = 1e-5  # recorded sensitivity from which on a trajectory hangs on rounding


def off(ours: Tensor, recorded: Any) -> float:
    """Largest absolute deviation."""
    found = (ours - torch.as_tensor(recorded)).abs().max().item()
    return found if found == found else math.inf


def with_state(z: Any) -> Found:
    """Recordings with all state after every step; compared up to the signs of eigenvectors."""
    meta = json.loads(str(z["meta"]))
    params = {name: nn.Parameter(torch.tensor(z[f"init/{name}"])) for name in meta["shapes"]}
    optimizer = PeerKL(params.values(), using_klsoap=meta["optimizer"] == "KL-SOAP", **meta["hyper"])
    single = meta["dtype"] == "f32"
    worst: dict[str, float] = {}
    for t in range(meta["steps"]):
        for name, p in params.items():
            p.grad = torch.tensor(z[f"grad/{name}"][t])
        optimizer.step()
        for name, p in params.items():
            if t == 0:
                inject(optimizer, p, {i: torch.tensor(z[f"Q/{name}/{i}"][0]) for i in (0, 1)})
            for what, deviation in compared(z, t, name, p, optimizer.state[p], capped(meta["hyper"])).items():
                worst[what] = max(worst.get(what, 0.0), deviation)
    # In float32 the directions of the smallest eigenvalues hang on rounding; the products with their bases do not.
    tolerances = dict.fromkeys(worst, 1e-5 if single else 1e-10) | ({"basis": math.inf} if single else {})
    return {what: (deviation, tolerances[what]) for what, deviation in worst.items()}


def capped(hyper: dict[str, Any]) -> Any:
    return lambda root: root.clamp_max(max(10, min(len(root), hyper["max_clamp_value"])))


def compared(z: Any, t: int, name: str, p: Tensor, s: dict[str, Tensor], cap: Any) -> dict[str, float]:
    out = {"parameter": off(p.detach(), z[f"param/{name}"][t])}
    m, v = s["exp_avg"], s.get("exp_avg_sq")
    back = [s[f"basis_{i}"] for i in (0, 1)]
    turns = [torch.tensor(z[f"Q/{name}/{i}"][t]).mT @ back[i] for i in (0, 1)]  # signs, on the diagonal
    for i in (0, 1):
        Q = back[i]
        relative = torch.tensor(z[f"S/{name}/{i}"][t]).abs().max().item()
        covariance = off(Q @ s[f"covariance_{i}"] @ Q.mT, z[f"S/{name}/{i}"][t]) / relative
        out["covariance"] = max(out.get("covariance", 0.0), covariance)
        out["basis"] = max(out.get("basis", 0.0), off(turns[i].abs(), torch.eye(len(Q))))
        root = off(cap(s[f"eigenvalues_{i}"].rsqrt()), z[f"inv_sqrt_eig/{name}/{i}"][t])
        out["inverse root"] = max(out.get("inverse root", 0.0), root / float(z[f"inv_sqrt_eig/{name}/{i}"][t].max()))
    if v is None:
        out["momentum"] = off(back[0] @ m @ back[1].mT, z[f"exp_avg/{name}"][t])
    else:
        out["momentum"] = off(turns[0] @ m @ turns[1].mT, z[f"exp_avg/{name}"][t])
        out["second moment"] = off(v, z[f"exp_avg_sq/{name}"][t])
    return out


def trajectory(z: Any) -> Found:
    """Recordings of parameters, with the sensitivity of each."""
    meta = json.loads(str(z["hp"]))
    names = [str(name) for name in z["names"]]
    params = {name: nn.Parameter(torch.tensor(z[f"init/{name}"])) for name in names}
    cls = {"KLOpt": PeerKL, "DistributedShampoo": PeerMetaKL}[meta["cls"]]
    optimizer = cls(params.values(), **meta["hp"])
    worst = dict.fromkeys(names, 0.0)
    for t in range(meta["steps"]):
        optimizer.param_groups[0]["lr"] = float(z["lr"][t])
        for name, p in params.items():
            p.grad = torch.tensor(z[f"grads/{name}"][t])
        optimizer.step()
        for name, p in params.items():
            recorded = [key for key in z.files if key.startswith(f"Qinit/{name}/")]
            if t == 0 and recorded:
                inject(optimizer, p, {int(key[-1]): torch.tensor(z[key]) for key in recorded})
            worst[name] = max(worst[name], off(p.detach(), z[f"traj/{name}"][t]))
    out = {}
    for name, deviation in worst.items():
        keys = ("sens_q0",) if f"sens_q0/{name}" in z.files else ("sens_eigh", "sens_grad")
        s = max(float(z[f"{key}/{name}"]) for key in keys)
        out[name] = (deviation, math.inf if s >= ILL_POSED else max(1e-10, 10 * s))
    return out


REPLAYS = {  # the first pattern that fits
    "kl*_proto_*": trajectory,
    "klshampoo_*": with_state,
    "klsoap_*": with_state,
    "meta_kl_*": trajectory,
}
