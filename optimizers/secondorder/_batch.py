"""`batch_size="count"`: the batch factor B, counted from the network's forward passes.

    B = Σ samples of the passes since the last step: micro-batches, and the ranks of `process_group`, of a DDP
        wrapper's group, or of all that share sharded parameters (under tensor parallelism a sample so counts on every
        one of its processes: give a number there)

A pass is a call of `module` in training mode with gradients enabled; its samples are the first axis of its first tensor
argument. Sizes are Python numbers on the host: nothing waits for a device. A compiler traces the addition into its
graph instead, as one to a tensor (a number on the host would be a guard, and every batch a new graph), and a step after
a compiled pass has a 0-d tensor for B.

Passes are counted when they are made, since a loss may join several: one that no loss uses belongs under `no_grad`.
Those whose gradients went without a step (a gradient scaler skipped it) are dropped: when `zero_grad` takes gradients
that came after the last step, and when a pass begins (a compiled one does not look) after gradients came and went.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secondorder._optimizer import Group, PreconditionedOptimizer
from secondorder._roles import unwrapped
from secondorder.curvature.capture import all_reduced
from secondorder.curvature.site import Nothing
from secondorder.layout.buckets import factor_dtype
from secondorder.layout.faces import Layout
from secondorder.layout.plan import Flags


class BatchCounting(PreconditionedOptimizer):
    """Base class of methods with the option `batch_size`.

    The module's hook goes with the optimizer; copies of either count nothing, until `attach`.
    """

    _counter: BatchCounter | None = None
    _batch: float | Tensor | None = None  # the last one that was counted
    _release: Any = None

    def attach(self, module: nn.Module) -> None:
        """Count the passes of this network: after a deepcopy or unpickling, or where none was given.

        Args:
            module: The network whose parameters are optimized; wrappers (DDP, `torch.compile`) are seen through.

        Raises:
            TypeError: If it is no module.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        if self._release is not None:
            self._release()
        self._module, self._counter = weakref.ref(module), None
        self._follow()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `PreconditionedOptimizer`.

        Raises:
            ValueError: For `batch_size="count"` without `module`, too.
        """
        if isinstance(param_group, dict) and _counts({**self.defaults, **param_group}) and self._network() is None:
            raise ValueError("batch_size='count' needs the network whose samples are counted: pass module=model")
        super().add_param_group(param_group)
        self._follow()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; passes whose gradients go without a step are not counted."""
        super().zero_grad(set_to_none)
        if self._counter is not None and self._counter.arrived:
            self._counter.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow()

    def _network(self) -> nn.Module | None:
        return None if self._module is None else self._module()

    def _follow(self) -> None:
        """Count from the next pass on, if a group asks for it and there is a network."""
        module = self._network()
        trained = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        if self._counter is None and module is not None and trained and any(map(_counts, self.param_groups)):
            self._counter = BatchCounter(module, trained[0])
            self._release = weakref.finalize(self, self._counter.release)

    def _groups(self) -> Sequence[Group]:
        B = 1.0 if self._batch is None else self._batch
        return [{**g, "batch_size": B} if _counts(g) else g for g in self.param_groups]

    def _statistics(self, layout: Layout, flags: Flags) -> Mapping[int, Any]:
        if any(map(_counts, self.param_groups)):
            self._follow()
            if self._counter is not None:
                given = self._sharing.process_group or self._counter.replicas or layout.plan.group
                self._batch = self._counter.take(self._batch, given)
            if self._batch is None and "batch" not in layout.warned:
                layout.warned.add("batch")
                warnings.warn(
                    f"{type(self).__name__}: batch_size='count', but no forward pass of the module was counted: B is "
                    "1. They count in training mode, with gradients enabled and a tensor as an argument, unless they "
                    "were compiled before. An optimizer that was copied or unpickled has no module: call "
                    "attach(module)",
                    stacklevel=8,
                )
        return super()._statistics(layout, flags)


class BatchCounter:
    """A forward pre-hook that counts samples. Copies of the module have none.

    Attributes:
        samples: Of passes since the last step.
        traced: The same of compiled passes, `(1,)`: a compiler takes a 0-d tensor for a number.
        witness: A trained parameter, which tells whether gradients are there.
        arrived: It has received a gradient since the last step.
        replicas: The process group of the DDP wrapper that the module was given in, or last seen to run in; or None.
    """

    def __init__(self, module: nn.Module, witness: Tensor) -> None:
        network, self.replicas = unwrapped(module)
        self.witness, self.samples, self.arrived = witness, 0, False
        self.traced = torch.zeros(1, dtype=torch.int64, device=witness.device)
        self._version = self.traced._version
        self._handles = [
            network.register_forward_pre_hook(self, with_kwargs=True),
            witness.register_post_accumulate_grad_hook(self._arrive),
        ]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook."""
        x = _first_tensor(args, kwargs) if module.training and torch.is_grad_enabled() else None
        if x is None or torch.compiler.is_exporting() or torch.jit.is_tracing():
            return
        if torch.compiler.is_compiling():
            self.traced.add_(x.size(0))
            return
        if self.arrived and self.witness.grad is None:
            self.clear()
        wrapper = nn.parallel.DistributedDataParallel._get_active_ddp_module()
        self.replicas = self.replicas if wrapper is None else wrapper.process_group
        self.samples += x.size(0)

    def __deepcopy__(self, memo: Any) -> Nothing:
        return Nothing()

    def __reduce__(self) -> Any:
        return Nothing, ()

    def _arrive(self, p: Tensor) -> None:
        self.arrived = True

    def take(self, before: float | Tensor | None, group: Any) -> float | Tensor | None:
        """B of this step, then begin anew.

        Args:
            before: What it is if no pass was counted.
            group: Ranks that are summed, or None.

        Returns:
            A number, or a 0-d tensor after compiled passes and where ranks are summed.
        """
        total: int | Tensor = self.samples
        if self._version != self.traced._version:  # some compiled pass was here
            total = self.traced + total
        self.clear()
        dtype = factor_dtype(self.witness.dtype)
        if group is not None and torch.distributed.get_world_size(group) > 1:
            total = all_reduced([torch.zeros_like(self.traced) + total], group)[0]
            return torch.where(total > 0, total.to(dtype), 1.0 if before is None else before).view(())
        if isinstance(total, Tensor):
            return total.to(dtype).view(())
        return float(total) if total else before

    def clear(self) -> None:
        """Drop what was counted."""
        self.samples, self.arrived = 0, False
        if self._version != self.traced._version:
            self.traced.zero_()
            self._version = self.traced._version

    def release(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


def _counts(group: Mapping[str, Any]) -> bool:
    return isinstance(group["batch_size"], str)


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor with an axis: positional, else by keyword, else in a tuple, list or dict among them."""
    given = [*args, *kwargs.values()]
    inside = [x.values() if isinstance(x, Mapping) else x for x in given if isinstance(x, (tuple, list, Mapping))]
    every = [*given, *(x for items in inside for x in items)]
    return next((x for x in every if isinstance(x, Tensor) and x.ndim > 0), None)
