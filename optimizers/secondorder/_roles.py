"""Names and roles of parameters: what the network's own modules say about them, inside of its wrappers."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn


class Label(NamedTuple):
    """A parameter's name, and its role where it is known: `"embedding"`, `"head"` or `"hidden"`."""

    name: str
    role: str | None


def labels(group: dict[str, Any], index: int, module: nn.Module | None) -> list[Label]:
    """One label per parameter of a group; names come from the group, else from the module, else from the position."""
    known = {} if module is None else _module_labels(module)
    names = group.get("param_names")
    out = []
    for i, p in enumerate(group["params"]):
        name, role = known.get(id(p), Label(f"group{index}[{i}]", None))
        out.append(Label(names[i] if names else name, role))
    return out


def _module_labels(module: nn.Module) -> dict[int, Label]:
    """By `id` of the parameter.

    The last linear layer is an output head if some embedding has as many rows as it has outputs (only the last: a
    hidden layer may be as wide as a table of positions is long).
    """
    out = {id(p): Label(name, "hidden") for name, p in module.named_parameters()}
    vocabularies, last = set(), None
    for m in module.modules():
        if isinstance(m, nn.Embedding):
            vocabularies.add(m.num_embeddings)
            _set_role(out, m.weight, "embedding")
        elif isinstance(m, nn.Linear):
            last = m
    if last is not None and last.out_features in vocabularies:
        _set_role(out, last.weight, "head")
    return out


def _set_role(out: dict[int, Label], p: Any, role: str) -> None:
    known = out.get(id(p))
    if known is not None and known.role == "hidden":
        out[id(p)] = Label(known.name, role)


def unwrapped(module: nn.Module) -> tuple[nn.Module, Any]:
    """The network inside of wrappers that keep its parameters, and the process group of DDP among them."""
    ranks = None
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, nn.parallel.DistributedDataParallel):
            inner, ranks = module.module, module.process_group
        if inner is None:
            return module, ranks
        module = inner
