"""Replays of recorded gradients through SIRFShampoo and the original IF-Shampoo: parameters, factors, their momenta."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peers.sirf import STRUCTURES, PeerIFShampoo, PeerSIRFShampoo
from secondorder.preconditioner.structures import structure

Found = dict[str, tuple[float, float]]

TOLERANCE = {"f64": 1e-12, "f32": 2e-5}
# bfloat16: they compute in it and round to nearest, we round stochastically what is stored; an ulp is 2^-7
LOOSE = 5e-2


def deviation(ours: Tensor, recorded: Any) -> float:
    theirs = torch.as_tensor(recorded)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    off = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-300))
    return off if off == off else float("inf")


def started(z: Any) -> dict[str, nn.Parameter]:
    return {key[5:]: nn.Parameter(torch.tensor(z[key])) for key in z.files if key.startswith("init/")}


def steps(z: Any, params: dict[str, nn.Parameter], optimizer: Any) -> Iterator[int]:
    for t in range(len(z["loss"])):
        for name, p in params.items():
            p.grad = torch.tensor(z[f"grad/{name}"][t])
        optimizer.step()
        yield t


def dense(stored: Tensor, name: str) -> Tensor:
    kind = structure(name)
    return kind.to_dense(stored[None].float() if stored.dtype == torch.bfloat16 else stored[None])[0]


def compare(found: Found, what: str, off: float, tolerance: float) -> None:
    found[what] = (max(off, found.get(what, (0.0, 0.0))[0]), tolerance)


def replay_sirf(z: Any) -> Found:
    """20 steps of every structure, alone or with the bias as a column of the weight, in float64, float32, bfloat16."""
    meta, params, found = json.loads(str(z["meta"])), started(z), {}
    joint = [(params[w], params[b]) for w, b in (g for g in meta["groups"] if len(g) == 2)]
    dtype = meta["preconditioner_dtype"] or "float32"
    optimizer = PeerSIRFShampoo(
        params.values(), meta["structures"], joint, dtype, batch_size=meta["batch_size"], **meta["hyper"]
    )
    named, snaps = STRUCTURES[meta["structures"]], [int(t) - 1 for t in z["snap_steps"]]
    tolerance = LOOSE if dtype == "bfloat16" else TOLERANCE[meta["dtype"]]
    for t in steps(z, params, optimizer):
        for name, p in params.items():
            compare(found, f"param/{name}", deviation(p.detach(), z[f"param/{name}"][t]), tolerance)
        for g, members in enumerate(meta["groups"]) if t in snaps else ():
            state, axis = optimizer.state[params[members[0]]], 0
            while f"K/{g}/{axis}" in z.files:
                at = snaps.index(t)
                K = dense(state[f"factor_{axis}"], named)
                compare(found, f"K/{g}/{axis}", deviation(K, z[f"K/{g}/{axis}"][at]), tolerance)
                if f"mK/{g}/{axis}" in z.files:
                    m = dense(state[f"factor_momentum_{axis}"], named)
                    compare(found, f"mK/{g}/{axis}", deviation(m, z[f"mK/{g}/{axis}"][at]), tolerance)
                axis += 1
    return found


def replay_if(z: Any) -> Found:
    """20 steps of the original; the calls in which its factors moved."""
    meta, params, found = json.loads(str(z["meta"])), started(z), {}
    optimizer = PeerIFShampoo(list(params.items()), batch_size=meta["batch_size"], **meta["hyper"])
    snaps, tolerance = [int(t) - 1 for t in z["snap_steps"]], TOLERANCE[meta["dtype"]]
    for t in steps(z, params, optimizer):
        for name, p in params.items():
            compare(found, f"param/{name}", deviation(p.detach(), z[f"param/{name}"][t]), tolerance)
            state = optimizer.state[p]
            assert int(state["seen"]) == int(z["updated"][: t + 1].sum()), "factors move in other calls"
            for axis in range(p.ndim) if t in snaps else ():
                key = f"{name}_dim-{p.ndim - axis}"
                at = snaps.index(t)
                compare(found, f"K/{key}", deviation(state[f"factor_{axis}"], z[f"K/{key}"][at]), tolerance)
                m = state[f"factor_momentum_{axis}"]
                compare(found, f"mK/{key}", deviation(m, z[f"mK/{key}"][at]), tolerance)
    return found


REPLAYS: dict[str, Callable[[Any], Found]] = {"sirf_*": replay_sirf, "ifshampoo_orig_*": replay_if}
