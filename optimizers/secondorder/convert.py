"""Checkpoints of other optimizers: the state of the reference SOAP and of singd, loaded into ours.

Training goes on from their curvature and momentum. Averages that began at zero have a weight W = 1 - β^n after n terms;
ours are stored without it (but those of the AdamW fallback):

    SOAP     Q_i -> basis_i,  GG_i / W -> covariance_i,  exp_avg / W and exp_avg_sq / W, in the basis
    singd    K -> root_1,  C -> root_0  of [W | b];  momentum_buffer -> momentum, where ours too averages updates

Parameters are matched by position and checked by shape; layers of singd are matched by name.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder._optimizer import PreconditionedOptimizer
from secondorder.preconditioner.structures import Structure, structure
from secondorder.singd import SINGD
from secondorder.soap import SOAP

Entry = dict[str, Any]
Group = Mapping[str, Any]

_WHOLE = "construct ours with max_block_size=None and one_sided_aspect=None"


class _Unfit(Exception):
    """Why the state of one parameter cannot be taken over."""


class _Place(NamedTuple):
    """A parameter of ours: its key in our state dict, name, group, and state (None: it has none)."""

    key: Any
    name: str
    p: Tensor
    group: Group
    ours: Entry | None


def load_soap(
    optimizer: SOAP, state_dict: Mapping[str, Any], *, rotated_momentum: bool = True, strict: bool = True
) -> None:
    """Load a checkpoint of the reference SOAP, the single file `soap.py` of nikhilvyas/SOAP.

    The next step is theirs, with three deviations: weight decay acts before the step, eps on the bias-corrected second
    moment, and bias is corrected whatever their `correct_bias`. Construct ours so that it has the factors that theirs
    has, `SOAP(params, nesterov=False, max_block_size=None, one_sided_aspect=None)`; hyper-parameters stay ours.

    A convolution's weight, which has a factor on every axis there, is a matrix here: basis and moments are taken over
    exactly, and the covariance of the merged axes is the Kronecker product of theirs, with their trace.

    Args:
        optimizer: Takes the state; it has the same groups of parameters, in the same order.
        state_dict: What their `state_dict()` gave.
        rotated_momentum: Their `exp_avg` is in the eigenbasis, as in the present file; False: in the parameter's own
            coordinates, as in its first versions.
        strict: Raise where the state of a parameter does not fit; False: warn, and leave that of ours as it is.

    Raises:
        TypeError: `optimizer` is no `SOAP`, or `state_dict` no mapping.
        ValueError: The state does not fit: which parameters, and why. Nothing has changed then.
    """
    _check(optimizer, SOAP, state_dict, ("state", "param_groups"), "the reference SOAP")
    ours = optimizer.state_dict()
    sizes = [[len(g["params"]) for g in groups] for groups in (state_dict["param_groups"], optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"their groups have {sizes[0]} parameters, ours have {sizes[1]}")
    theirs = [(state_dict["state"].get(i), g) for g in state_dict["param_groups"] for i in g["params"]]
    found = {}
    for place, (entry, group) in zip(_places(optimizer, ours), theirs, strict=True):
        if entry and place.ours:
            found[place.key] = _attempt(_soap_entry, place, entry, group["betas"], rotated_momentum)
    _load(optimizer, ours, found, strict)


def load_singd(optimizer: SINGD, state_dict: Mapping[str, Any], *, strict: bool = True) -> None:
    """Load a checkpoint of the package singd (f-dangel/singd) into `SINGD` or `IKFAC`.

    Their factors `K` and `C` are taken over as they are, so that the next step between two updates of the factors is
    theirs if ours is constructed with `momentum="update", nesterov=False, weight_decay_kind="coupled", norm_clip=None,
    max_update_rms=None`. With `momentum="gradient"`, the default, momentum starts afresh. The momenta of the factors
    start at zero; factors move on by our rules. Hyper-parameters stay ours.

    Args:
        optimizer: Takes the state; constructed with `module=`, with structures that hold theirs (`"block(30)"`,
            `"hierarchical(15,15)"` for their names), and with sides that are not cut (`max_block_size`).
        state_dict: What their `state_dict()` gave. A file of it contains objects of singd: `torch.load` needs the
            package and `weights_only=False`.
        strict: Raise where the state of a layer does not fit; False: warn, and leave that of ours as it is.

    Raises:
        TypeError: `optimizer` is no `SINGD`, or `state_dict` no mapping.
        ValueError: The state does not fit: which parameters, and why. Nothing has changed then.
    """
    _check(optimizer, SINGD, state_dict, ("steps", "Ks", "Cs", "state", "param_groups"), "singd")
    ours = optimizer.state_dict()
    places = {place.name: place for place in _places(optimizer, ours)}
    layers = {
        name: [places.get(f"{name}.{part}" if name else part) for part in ("weight", "bias")]
        for name in state_dict["Ks"]
    }
    missing = [name for name, (weight, _) in layers.items() if weight is None]
    if missing:
        raise ValueError(f"no parameters of the layers {missing} here, but {sorted(places)}; was module= given?")
    buffers = _momentum_buffers(state_dict, layers, list(places.values()))
    found: dict[Any, Entry | _Unfit] = {}
    for name, (weight, bias) in layers.items():
        assert weight is not None
        joined = bias if bias is not None and bias.ours is not None and bias.ours.keys() == {"step"} else None
        got = _attempt(_singd_entry, weight, joined, state_dict, name, buffers)
        found[weight.key] = got
        if joined is not None and not isinstance(got, _Unfit):
            found[joined.key] = {"step": got["step"]}
    _load(optimizer, ours, found, strict)


# ---------------------------------------------------------------------- what both need


def _check(optimizer: Any, cls: type, state_dict: Any, keys: Sequence[str], peer: str) -> None:
    if not isinstance(optimizer, cls):
        raise TypeError(f"optimizer must be a {cls.__name__}, got {type(optimizer).__name__}")
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
    missing = [key for key in keys if key not in state_dict]
    if missing:
        raise ValueError(f"state_dict is no checkpoint of {peer}: it has no {', '.join(map(repr, missing))}")


def _places(optimizer: PreconditionedOptimizer, ours: Mapping[str, Any]) -> list[_Place]:
    keys = [key for g in ours["param_groups"] for key in g["params"]]
    members = [(p, g) for g in optimizer.param_groups for p in g["params"]]
    names = [row.name for row in optimizer.coverage()]
    return [
        _Place(key, name, p, g, ours["state"].get(key)) for key, name, (p, g) in zip(keys, names, members, strict=True)
    ]


def _attempt(convert: Callable[..., Entry], *args: Any) -> Entry | _Unfit:
    try:
        return convert(*args)
    except _Unfit as unfit:
        return unfit


def _load(
    optimizer: PreconditionedOptimizer, ours: dict[str, Any], found: Mapping[Any, Entry | _Unfit], strict: bool
) -> None:
    """Put what was converted into the places of our state."""
    state, faults = dict(ours["state"]), []
    for place in _places(optimizer, ours):
        entry = found.get(place.key)
        if isinstance(entry, _Unfit):
            faults.append(f"{place.name} of shape {tuple(place.p.shape)}: {entry}")
        elif entry is not None:
            state[place.key] = {**state[place.key], **entry}
    told = f"the state does not fit: {'; '.join(faults)}"
    if faults and strict:
        raise ValueError(told)
    if faults:
        warnings.warn(f"{told}. These parameters keep the state they have", stacklevel=3)
    optimizer.load_state_dict({**ours, "state": state})


def _taken(entry: Mapping[str, Any], key: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of theirs, in our dtype."""
    value = entry.get(key)
    if not isinstance(value, Tensor):
        raise _Unfit(f"no tensor {key!r} (it has {', '.join(map(repr, entry))})")
    if not value.is_floating_point() or value.shape != torch.Size(shape):
        raise _Unfit(
            f"{key!r} is of dtype {value.dtype} and shape {tuple(value.shape)}, expected floating-point {tuple(shape)}"
        )
    return value.detach().to(dtype)


def _weight(beta: float, terms: int) -> float:
    """Total weight of an average that began at zero."""
    return 1 - float(beta) ** terms if terms else 1.0


# ---------------------------------------------------------------------- SOAP


def _soap_entry(place: _Place, theirs: Entry, betas: tuple[float, float], rotated: bool) -> Entry:
    p, group, ours = place.p, place.group, place.ours
    assert ours is not None
    if any(key.startswith("tile_") for key in ours):
        raise _Unfit(f"it is cut into blocks here: {_WHOLE}")
    for key in ("step", "GG", "Q"):
        if theirs.get(key) is None:
            raise _Unfit(f"no {key!r} (it has {', '.join(map(repr, theirs))})")
    dtype, block, updates = ours["exp_avg"].dtype, ours["exp_avg"].shape, int(theirs["step"])
    m, v = (
        _taken(theirs, key, p.shape, dtype) / _weight(beta, updates)
        for key, beta in zip(("exp_avg", "exp_avg_sq"), betas, strict=True)
    )
    found: Entry = {"step": updates + 1.0, "count": float(updates)}  # their first gradient made no step
    axes = _axes(p, theirs["Q"], dtype)
    modes = [i for i in (0, 1) if f"basis_{i}" in ours]
    if not modes:
        if any(basis is not None for _, basis in axes):
            raise _Unfit("it has factors there, and is left to AdamW here (coverage() tells why)")
        own = group["betas"] if group["fallback_betas"] is None else group["fallback_betas"]
        return {**found, "exp_avg": m * _weight(own[0], updates), "exp_avg_sq": v * _weight(own[1], updates)}
    bases = [_kron(side) for side in _sides(axes, block)]
    grams = [_kron(side, normalise=True) for side in _sides(_axes(p, theirs["GG"], dtype), block)]
    for what, side in (("Q", bases), ("GG", grams)):
        factored = [i for i, matrix in enumerate(side) if matrix is not None]
        if factored != modes:
            raise _Unfit(f"axes of {tuple(block)} with a factor: {factored} in their {what!r}, {modes} here; {_WHOLE}")
    m, v = m.reshape(block), v.reshape(block)
    beta = float(theirs.get("shampoo_beta", -1))
    seen = updates + 1
    for i in modes:
        basis, gram = bases[i], grams[i]
        assert basis is not None and gram is not None
        found[f"basis_{i}"] = basis
        found[f"covariance_{i}"] = gram / _weight(beta if beta >= 0 else betas[1], seen)
        if not rotated:
            m = torch.tensordot(basis, m, ([0], [i])).movedim(0, i)
    return {**found, "seen": float(seen), "exp_avg": m, "exp_avg_sq": v}


def _axes(p: Tensor, factors: Sequence[Any], dtype: torch.dtype) -> list[tuple[int, Tensor | None]]:
    """Length and factor of each axis of theirs that is longer than 1; what has no factor has an empty list there."""
    given = [f.detach().to(dtype) if isinstance(f, Tensor) and f.numel() else None for f in factors]
    if len(given) == p.ndim:
        lengths = list(p.shape)
    else:  # merged (merge_dims): what has no factor has the length that remains
        known = math.prod(len(f) for f in given if f is not None)
        lengths = [p.numel() // known if f is None else len(f) for f in given]
    wrong = any(f is not None and f.shape != (d, d) for d, f in zip(lengths, given, strict=True))
    if wrong or math.prod(lengths) != p.numel():
        raise _Unfit(f"factors of shapes {[None if f is None else tuple(f.shape) for f in given]}")
    return [(d, f) for d, f in zip(lengths, given, strict=True) if d > 1]


def _sides(axes: Sequence[tuple[int, Tensor | None]], block: Sequence[int]) -> list[list[tuple[int, Tensor | None]]]:
    """Their axes by the two axes of our block."""
    for cut in range(1, len(axes)):
        if math.prod(d for d, _ in axes[:cut]) == block[0]:
            return [list(axes[:cut]), list(axes[cut:])]
    raise _Unfit(f"axes {tuple(d for d, _ in axes)} there, {tuple(block)} here (merge_dims)")


def _kron(side: Sequence[tuple[int, Tensor | None]], normalise: bool = False) -> Tensor | None:
    """The factor of merged axes, the identity where one has none; None where none has one.

    Normalised, it has the trace of one of them: traces of the factors of one tensor are all the same.
    """
    known = [f for _, f in side if f is not None]
    if len(side) == 1 or not known:
        return known[0] if known else None
    out, tiny = known[0].new_ones(1, 1), torch.finfo(known[0].dtype).tiny
    for d, factor in side:
        f = torch.eye(d, dtype=out.dtype, device=out.device) if factor is None else factor
        out = torch.kron(out, f / f.trace().clamp_min(tiny) if normalise else f)
    return out * known[0].trace() if normalise else out


# ---------------------------------------------------------------------- singd


def _momentum_buffers(
    state_dict: Mapping[str, Any], layers: Mapping[str, Sequence[_Place | None]], places: Sequence[_Place]
) -> dict[Any, Tensor]:
    """Their momentum by our keys.

    They count either the parameters of their layers, layer by layer (constructed without `params`), or all.
    """
    keys = [key for g in state_dict["param_groups"] for key in g["params"]]
    trained = [place for pair in layers.values() for place in pair if place is not None]
    for counted in (trained, list(places)):
        if len(counted) == len(keys):
            saved = [state_dict["state"].get(key) or {} for key in keys]
            pairs = zip(counted, saved, strict=True)
            return {place.key: entry["momentum_buffer"] for place, entry in pairs if "momentum_buffer" in entry}
    raise ValueError(f"their groups have {len(keys)} parameters, their layers {len(trained)}, ours {len(places)}")


def _singd_entry(
    weight: _Place, bias: _Place | None, state_dict: Mapping[str, Any], layer: str, buffers: Mapping[Any, Tensor]
) -> Entry:
    ours, group = weight.ours or {}, weight.group
    if any(key.startswith("tile_") for key in ours):
        raise _Unfit("it is cut into blocks here: construct ours with max_block_size=None")
    if not {"root_0", "root_1"} <= ours.keys():
        raise _Unfit("it is left to AdamW here (coverage() tells why)")
    steps = int(state_dict["steps"])
    sides = (("Cs", group["structures"][1], 0), ("Ks", group["structures"][0], 1))
    block = ours["momentum"].shape
    if len(block) != 2:
        raise _Unfit("groups of a convolution have factors of their own here, and share one pair there")
    found: Entry = {key: torch.zeros_like(value) for key, value in ours.items() if "velocity" in key}
    found.update(step=float(steps), count=0.0)
    for name, kind, mode in sides:
        matrix = state_dict[name][layer].to_dense()
        if matrix.shape != (block[mode], block[mode]):
            raise _Unfit(f"{name[0]} is of shape {tuple(matrix.shape)}, and ours of {(block[mode],) * 2}")
        found[f"root_{mode}"] = _stored(structure(kind), kind, matrix.to(ours["momentum"].dtype), name[0])
    found["seen"] = float(-(-steps // int(state_dict["param_groups"][0]["T"])))
    if group["momentum"] == "update":
        like, columns = ours["momentum"], []
        for place in (weight, bias):
            if place is not None:
                theirs = {"momentum_buffer": buffers.get(place.key, torch.zeros_like(place.p))}
                taken = _taken(theirs, "momentum_buffer", place.p.shape, like.dtype)
                columns.append(taken.to(like.device).reshape(block[0], -1))
        found.update(momentum=torch.cat(columns, 1), count=float(steps))
    return found


def _stored(kind: Structure, name: str, matrix: Tensor, what: str) -> Tensor:
    """The element of a structure that represents a matrix: every stored number shows as some entries of it."""
    d = len(matrix)
    shape = kind.shape(d)
    labels = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64, device=matrix.device).view(1, *shape)
    shown = kind.to_dense(labels)[0].long()
    element = matrix.new_zeros(math.prod(shape) + 1)
    element[shown.flatten()] = matrix.flatten()
    element = element[1:].view(1, *shape)
    if not torch.equal(kind.to_dense(element)[0], matrix):
        raise _Unfit(f"{what} is no matrix of the structure {name!r}")
    return element[0]
