"""Loading a state dict: everything is checked first, then copied into our own stacks.

torch's own load casts every state tensor to the parameter's dtype (a float32 factor of a bfloat16 parameter loses its
low bits, an integer its meaning) and keeps references into the given dict. Here dtypes stay ours and nothing aliases.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder.layout.faces import Layout

_SHOWN = 5


def merged_groups(
    state_dict: Mapping[str, Any], groups: Sequence[dict[str, Any]], defaults: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Saved groups with our parameters; keys that an older dict lacks come from the present groups.

    Raises:
        ValueError: For another number or size of groups.
    """
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups "
            f"({len(saved_groups)} instead of {len(groups)})"
        )
    # One copy of all groups at once: a tensor lr that groups share is still shared.
    taken = copy.deepcopy([{k: v for k, v in saved.items() if k != "params"} for saved in saved_groups])
    out = []
    for i, (ours, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(ours["params"]) != len(saved["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group "
                f"(group {i}: {len(saved['params'])} parameters instead of {len(ours['params'])})"
            )
        kept = {key: ours[key] for key in (*defaults, "param_names") if key in ours}
        out.append({**kept, **taken[i], "params": ours["params"]})
    return out


def check(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], layout: Layout) -> None:
    """Compare a state dict with the layout that is to take it (of the merged groups); nothing is changed.

    Raises:
        ValueError: For a missing entry, or a shape that differs.
    """
    faults: list[str] = []
    saved_ids = {id(p): i for i, p in _parameters_by_saved_id(state_dict, groups).items()}
    for p, own in layout.entries():
        entry = state_dict["state"].get(saved_ids.get(id(p)))
        if entry:  # a parameter that had no state when the dict was saved starts fresh
            _compare(f"parameter of shape {tuple(p.shape)}", own, entry, faults)
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ValueError(f"loaded state dict does not fit: {'; '.join(faults[:_SHOWN])}{more}")


def adoptable(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], layout: Layout) -> dict[Any, Any]:
    """A checked state dict by parameter, ready for the layout to adopt.

    Entries that are ours are only referenced, since adopting copies them into the stacks; all else is copied here.
    """
    own = {id(p): faces for p, faces in layout.entries()}
    by_id = _parameters_by_saved_id(state_dict, groups)
    out: dict[Any, Any] = {}
    for key, value in state_dict["state"].items():
        p = by_id.get(key)
        if p is None:
            out[key] = copy.deepcopy(value)
        else:
            out[p] = _take(value, own.get(id(p), {}), p.device)
    return out


def by_parameter(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, Any]:
    """The entries of a state dict by the parameter that they are for, as they are."""
    params = _parameters_by_saved_id(state_dict, groups)
    return {params[key]: entry for key, entry in state_dict["state"].items() if key in params}


def _take(saved: Mapping[str, Any], ours: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in saved.items():
        if key in ours:
            out[key] = _take(value, ours[key], device) if isinstance(value, Mapping) else value
        else:
            out[key] = value.detach().clone().to(device) if isinstance(value, Tensor) else copy.deepcopy(value)
    return out


def _parameters_by_saved_id(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[Any, Tensor]:
    ids = [i for g in state_dict["param_groups"] for i in g["params"]]
    params = [p for g in groups for p in g["params"]]
    return dict(zip(ids, params, strict=True))


def _compare(where: str, ours: Mapping[str, Any], saved: Mapping[str, Any], faults: list[str]) -> None:
    for key, value in ours.items():
        if key not in saved:
            faults.append(f"{where} has no {key!r} (it has {', '.join(map(repr, sorted(map(str, saved))))})")
        elif isinstance(value, dict):
            if isinstance(saved[key], Mapping):
                _compare(f"{where}, {key}", value, saved[key], faults)
            else:
                faults.append(f"{where}: {key!r} is no dict")
        elif not isinstance(saved[key], (Tensor, int, float)):
            faults.append(f"{where}: {key!r} is of type {type(saved[key]).__name__}")
        elif torch.as_tensor(saved[key]).shape != value.shape:
            shape = tuple(torch.as_tensor(saved[key]).shape)
            faults.append(f"{where}: {key!r} has shape {shape}, expected {tuple(value.shape)}")
