"""Optimizers by name: which there are, which arguments they take, and how one is built for a model.

A name is a public class of `secondorder` or, after `torch.`, of `torch.optim`; upper and lower case are the same. The
arguments are those of the class's own signature, so that no hyperparameter is written twice. A variant has a name of
its own and says which class it is (`configs/optim_soap_reference.yaml`).
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from config import Spec
from convert import convert, suggestion
from errors import RecipeError
from muon import MuonWithAdamW

# Where it is not installed, the torch.* names still work.
secondorder: Any = importlib.import_module("secondorder") if importlib.util.find_spec("secondorder") else None

_UNFIT = ("Optimizer", "SparseAdam")  # the second needs sparse gradients
NEED_CLOSURE = ("torch.lbfgs",)  # for tasks with residuals


def classes() -> dict[str, type[torch.optim.Optimizer]]:
    """All optimizers by their lower-case names."""
    ours = {name.lower(): getattr(secondorder, name) for name in getattr(secondorder, "__all__", ())}
    torchs = {f"torch.{name.lower()}": value for name, value in vars(torch.optim).items() if name not in _UNFIT}
    torchs["torch.muon"] = MuonWithAdamW
    return {
        name: value
        for name, value in {**ours, **torchs}.items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }


@dataclass(frozen=True)
class Argument:
    """A keyword argument of an optimizer's class."""

    hint: Any
    default: Any


def arguments(name: str) -> dict[str, Argument]:
    """The keyword arguments that a config may give to an optimizer."""
    cls = classes()[name]
    hints = _hints(cls)
    known = {}
    for key, parameter in inspect.signature(cls).parameters.items():
        given_by_loop = key in ("params", "module")
        if not given_by_loop and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            hint, default = hints.get(key, Any), parameter.default
            if hint is Any and type(default) in (bool, float, str):
                hint = type(default)
            known[key] = Argument(hint, default)
    return known


def _hints(cls: type) -> dict[str, Any]:
    """The types of a constructor's arguments, those of `**options: Unpack[SomeTypedDict]` included."""
    try:
        hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    except NameError:  # an annotation that exists for the type checker only
        return {}
    for hint in list(hints.values()):
        for inner in typing.get_args(hint):
            if typing.is_typeddict(inner):
                hints |= typing.get_type_hints(inner)
    return hints


def check(name: str, given: Mapping[str, Any], variant_of: str = "") -> Spec:
    """An optimizer by name with its arguments, typed and known to be accepted by the class.

    Args:
        name: Of the class, or of the variant.
        given: Keyword arguments, as text or values.
        variant_of: The class of a variant; empty where `name` is the class's own.

    Raises:
        RecipeError: No such optimizer, no such argument, or a value that the class refuses.
    """
    name, variant_of = name.lower(), variant_of.lower()
    cls, key = (variant_of, "class") if variant_of else (name, "name")
    if cls not in classes():
        install = "" if secondorder else " (secondorder is not installed: pip install -e .)"
        raise RecipeError(
            f"optimizer.{key}: expected one of {', '.join(sorted(classes()))}, "
            f"got {cls!r}{suggestion(cls, classes())}{install}"
        )
    if variant_of and (name in classes() or not re.fullmatch(r"\w[\w.-]*", name)):
        raise RecipeError(
            f"optimizer.name: a variant of {variant_of} needs a name of its own, of letters and digits, got {name!r}"
        )
    known = arguments(cls)
    typed = {}
    for key, value in given.items():
        if key not in known:
            raise RecipeError(f"unknown key 'optimizer.{key}': {cls} takes {', '.join(known)}{suggestion(key, known)}")
        typed[key] = convert(value, known[key].hint, f"optimizer.{key}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said again when the real one is built
            classes()[cls]([nn.Parameter(torch.zeros(2, 2))], **typed)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"optimizer {name}: {' '.join(str(error).split())}") from error
    return Spec(name, typed, variant_of)


def build(spec: Spec, model: nn.Module, shared: bool = False) -> torch.optim.Optimizer:
    """The optimizer for all parameters of `model`; vectors and scalars are not decayed.

    Args:
        spec: Class and arguments.
        model: Its parameters may be shards.
        shared: Several processes hold copies of it. Where the class can, each does a part of the optimizer's work.
    """
    cls = classes()[spec.class_name]
    known = inspect.signature(cls).parameters
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [pair for pair in named if pair[1].ndim >= 2]}]
    groups.append({"params": [pair for pair in named if pair[1].ndim < 2]})
    if "weight_decay" in known:
        groups[1]["weight_decay"] = 0.0
    if spec.class_name in NEED_CLOSURE:  # it takes one group
        groups = [{"params": [pair for group in groups for pair in group["params"]]}]
    extra: dict[str, Any] = {"module": model} if "module" in known else {}
    if shared and "sharding" in known:
        extra["sharding"] = "owners"
    return cls([group for group in groups if group["params"]], **{**extra, **spec.arguments})


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state."""

    def count(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        return sum(map(count, value.values())) if isinstance(value, Mapping) else 0

    return sum(count(state) for state in optimizer.state.values())
