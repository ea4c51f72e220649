"""Trainers that build the optimizer themselves: they have the network, and layer methods need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

Class = TypeVar("Class", bound=Optimizer)


def for_trainer(cls: Callable[..., Class]) -> Callable[[], Callable[..., Class]]:
    """A class of this package as Hugging Face's `Trainer` takes optimizers that need to see the network.

        Trainer(model, args, optimizer_cls_and_kwargs=(for_trainer(KFAC), {"lr": 1e-2}), ...)

    The optimizer gets `module=model`, and two groups as `Trainer` makes them: biases, norm layers and all other
    parameters of one axis are not decayed (so layer methods treat a bias apart from its weight). `weight_decay` is an
    argument like the others; that of `TrainingArguments`, like its `learning_rate`, does not come by here.

    Args:
        cls: The optimizer's class.

    Returns:
        What `Trainer` calls without arguments, to get what it calls with the network and the arguments.
    """

    def build(model: nn.Module, **arguments: Any) -> Class:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        decayed = {"params": [(name, p) for name, p in trained if p.ndim >= 2]}
        plain = {"params": [(name, p) for name, p in trained if p.ndim < 2], "weight_decay": 0.0}
        return cls([group for group in (decayed, plain) if group["params"]], **arguments, module=model)

    return lambda: build
