"""Which kind of layer a module is, if any, and where its weight and bias are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from secondorder.curvature.layers.attention import attention_rule, swap
from secondorder.curvature.layers.conv import conv_rule, conv_transpose_rule
from secondorder.curvature.layers.embedding import embedding_rule
from secondorder.curvature.layers.linear import linear_rule, transposed_linear_rule
from secondorder.curvature.layers.norm import norm_rule
from secondorder.curvature.layers.protocol import LayerRule


class Kind(NamedTuple):
    """A kind of layer.

    Attributes:
        bases: Modules of these classes, and of subclasses that leave `forward` alone; a class of a package that may be
            absent is given by its qualified name.
        rule: Makes the rule of a module; a ValueError says why there is none.
        names: Attributes of weight and bias.
    """

    bases: tuple[type[nn.Module] | str, ...]
    rule: Callable[[Any], LayerRule]
    names: tuple[str, str] = ("weight", "bias")


ATTENTION = Kind((nn.MultiheadAttention,), attention_rule, ("in_proj_weight", "in_proj_bias"))
KINDS = [
    Kind((nn.Linear,), linear_rule),
    Kind(("transformers.pytorch_utils.Conv1D",), transposed_linear_rule),  # GPT-2's linear layers
    Kind((nn.Conv1d, nn.Conv2d, nn.Conv3d), conv_rule),
    Kind((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), conv_transpose_rule),
    Kind((nn.Embedding,), embedding_rule),
    Kind((nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), norm_rule),
]


_PARAMETRIZED = "parametrized: what is trained is not what is applied"


def kind_of(module: nn.Module) -> tuple[Kind, LayerRule] | str:
    """Kind and rule of a module, or why it has none. Attention layers are made ready to be tapped."""
    name = type(module).__name__
    if isinstance(module, ParametrizationList):
        return _PARAMETRIZED
    if isinstance(module, nn.MultiheadAttention):
        refused = swap(module)
        return f"{name}: {refused}" if refused else _ruled(ATTENTION, module)
    for kind in KINDS:
        named = (c for c in type(module).__mro__ if c in kind.bases or f"{c.__module__}.{c.__qualname__}" in kind.bases)
        base: Any = next(named, None)
        if base is None:
            continue
        if is_parametrized(module):
            return f"{name}: {_PARAMETRIZED}"
        if type(module).forward is not base.forward or "forward" in module.__dict__:
            return f"{name} has a forward pass of its own"
        if any(key not in module._parameters and hasattr(module, key) for key in kind.names):
            return f"a parameter of {name} is computed from others"
        return _ruled(kind, module)
    return f"no layer statistics are known for {name}"


def _ruled(kind: Kind, module: nn.Module) -> tuple[Kind, LayerRule] | str:
    try:
        return kind, kind.rule(module)
    except ValueError as refusal:
        return f"{type(module).__name__}: {refusal}"
