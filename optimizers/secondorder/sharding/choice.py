"""Which plan an optimizer works by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from secondorder.layout.plan import SinglePlan, is_distributed
from secondorder_kernels import fingerprint


class Sharing(NamedTuple):
    """Options of an optimizer, not of its groups (see `_options.COMMON`)."""

    sharding: str
    reproducible: bool
    process_group: Any
    sync: str


def chosen_plan(plan: Any, params: Sequence[Tensor], sharing: Sharing, hook: Any = None) -> Any:
    """The present plan where it serves, else another, to which an `OwnerHook` belongs where there is one."""
    sharding, reproducible, group, _ = sharing
    distributed = [p for p in params if is_distributed(p)]
    together = sharding == "owners" and dist.is_available() and dist.is_initialized()
    if together and not distributed:
        together = dist.get_world_size(group) > 1
    if not distributed and not together:
        return SinglePlan(reproducible) if plan.group is not None or plan.exact != reproducible else plan
    if group is None:
        group = _group_of(distributed) if distributed else dist.group.WORLD
    if plan.group is group:
        return plan
    # Imported here: torch's DTensor takes longer to load than all the rest, and one process has no use for it.
    from secondorder.sharding.plan import ShardedPlan

    return ShardedPlan(group, reproducible, hook)


def check_rounding(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what a plan over several processes cannot do: positions in a part of a parameter are not the whole's.

    Raises:
        ValueError: If a group asks for stochastic rounding.
    """
    for gi, group in enumerate(groups):
        if group["param_rounding"] != "nearest":
            raise ValueError(
                f"param_rounding of group {gi} must be 'nearest' where blocks are shared by several processes, "
                f"got {group['param_rounding']!r}"
            )


def _group_of(params: Sequence[Tensor]) -> Any:
    meshes = {p.device_mesh: None for p in params}  # type: ignore[attr-defined]
    largest = max(meshes, key=lambda mesh: mesh.size())
    ranks = set(largest.mesh.flatten().tolist())
    for mesh in meshes:
        if not ranks.issuperset(mesh.mesh.flatten().tolist()):
            raise ValueError("parameters are on meshes of which none contains all others: give process_group=")
    if largest.size() == dist.get_world_size():
        return dist.group.WORLD
    return largest.get_group() if largest.ndim == 1 else largest._flatten().get_group()


def group_facts(groups: Sequence[Mapping[str, Any]], sharing: Sharing) -> dict[str, Any]:
    """Hyper-parameters of all groups and what else must be the same everywhere, by what an error calls them."""
    out: dict[str, Any] = {"reproducible": sharing.reproducible, "sync": sharing.sync}
    if sharing.reproducible:
        out["number of threads"] = torch.get_num_threads()
        out["type of device"] = sorted({p.device.type for group in groups for p in group["params"]})
        out["kernels' mode and tables"] = fingerprint()  # other tiles round otherwise
    for gi, group in enumerate(groups):
        for key, value in group.items():
            if key not in ("params", "param_names"):
                told = isinstance(value, Tensor) and not value.is_meta  # repr would name the process's own device
                out[f"{key} of group {gi}"] = value.tolist() if told else repr(value)
    return out
