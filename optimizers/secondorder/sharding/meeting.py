"""What the processes tell each other once: which parameters there are, who stores what of them, with which options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from secondorder.sharding.regions import Holding, holding

_PREFIXES = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


class Meeting:
    """The parameters of all processes, compared.

    Attributes:
        names: Their names, without what wrappers put into them.
        positions: For each parameter, its place in the order of the first process.
        shapes: Their shapes.
        held: For each parameter, what each process stores of it.
        first: For each parameter, whether this process is the first that stores what it stores of it.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._known: Any = None
        self.names: list[str] = []
        self.positions: list[int] = []
        self.shapes: list[tuple[int, ...]] = []
        self.held: list[list[Holding]] = []
        self.first: list[bool] = []

    def meet(self, who: str, params: Sequence[Tensor], names: Sequence[str], facts: Mapping[str, Any]) -> None:
        """See `Plan.meet`. Where nothing is new, nobody is asked; else every process must come."""
        names = [_canonical(name) for name in names]
        placed = [(p.shape, p.dtype, getattr(p, "placements", None)) for p in params]
        if self._known == (names, placed):
            return
        mine = {
            "parameters": {
                name: {"shape": tuple(p.shape), "dtype": str(p.dtype)} for name, p in zip(names, params, strict=True)
            },
            "facts": {**facts, "class": who, "torch": torch.__version__.split("+")[0]},
            "held": {name: holding(p) for name, p in zip(names, params, strict=True)},
        }
        world, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        every: list[Any] = [mine] * world
        if world > 1:
            dist.all_gather_object(every, mine, group=self._group)
        for other, theirs in enumerate(every):
            _compare(who, every[0], theirs, other)
        places = {name: i for i, name in enumerate(every[0]["parameters"])}
        self.positions = [places[name] for name in names]
        self.names, self.shapes = names, [tuple(p.shape) for p in params]
        self.held = [[theirs["held"][name] for theirs in every] for name in names]
        self.first = [stored.index(stored[rank]) == rank for stored in self.held]
        self._known = names, placed


def _canonical(name: str) -> str:
    """The name without what wrappers put into it."""
    for prefix in _PREFIXES:
        name = name.replace(prefix, "")
    return name


def _compare(who: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], rank: int) -> None:
    missing = ours["parameters"].keys() ^ theirs["parameters"].keys()
    if missing:
        name = min(missing)
        where = ("0", str(rank)) if name in ours["parameters"] else (str(rank), "0")
        raise ValueError(f"{who}: process {where[0]} has a parameter {name!r}, process {where[1]} has not")
    for name, facts in ours["parameters"].items():
        for field, value in facts.items():
            _same(who, f"{field} of parameter {name!r}", value, theirs["parameters"][name][field], rank)
    compare_facts(who, ours["facts"], theirs["facts"], rank)


def compare_facts(who: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], rank: int) -> None:
    """Raise ValueError for what is not the same on process 0 (`ours`) and on process `rank`."""
    for field in sorted(ours.keys() | theirs.keys()):
        _same(who, field, ours.get(field), theirs.get(field), rank)


def _same(who: str, what: str, ours: Any, theirs: Any, rank: int) -> None:
    if ours != theirs:
        raise ValueError(f"{who}: {what} differs: {ours!r} on process 0, {theirs!r} on process {rank}")
