"""Statistics as gradients: an identity on a layer's output whose backward pass hands over the layer's statistics.

    forward   out -> out, marked as changed in place, so that operations in place may follow
    backward  dL/dout -> dL/dout, and as "gradients" of leaf tensors whatever `statistics(dL/dout, saved)` returns

Leaves hold no memory (a single number, expanded), belong to no module and appear in no state dict. Autograd adds up
what reaches them: gradient accumulation, modules that run twice and both kinds of activation checkpointing count right,
a forward pass without a backward pass leaves no trace, and `torch.autograd.grad(outputs, leaves, v)` gives the
statistics of any vector `v` without the gradient of a single parameter. The whole is functional: a compiler can trace
it, without a graph break.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Statistics = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], Sequence[Tensor | None]]


def make_tap(statistics: Statistics) -> Callable[..., Any]:
    """A tap for one layer.

    Args:
        statistics: Maps output gradients and saved tensors to one value per leaf (None: nothing for this leaf).

    Returns:
        `tap(outs, saved, leaves)`, which returns `outs` as they are.
    """

    class Tap(torch.autograd.Function):
        # A class per layer: what a backward pass must know then needs no argument, which a compiler could not trace.
        @staticmethod
        def forward(ctx: Any, outs: int, saved: int, *tensors: Tensor) -> Any:
            ctx.outs, ctx.saved, ctx.leaves = outs, saved, len(tensors) - outs - saved
            ctx.save_for_backward(*tensors[outs : outs + saved])
            if torch.compiler.is_compiling():  # what a compiled function returns must not be a view; it copies nothing
                return tensors[0].clone() if outs == 1 else tuple(t.clone() for t in tensors[:outs])
            ctx.mark_dirty(*tensors[:outs])
            return tensors[0] if outs == 1 else tensors[:outs]

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            found: Sequence[Tensor | None] = [None] * ctx.leaves
            if torch.compiler.is_compiling() or _is_wanted(ctx.next_functions[-1][0]):
                with torch.no_grad():
                    found = statistics(tuple(g.detach() for g in gradients), ctx.saved_tensors)
            return (None, None, *gradients, *([None] * ctx.saved), *found)

    def tap(outs: tuple[Tensor, ...], saved: tuple[Tensor, ...], leaves: Sequence[Tensor]) -> Any:
        return Tap.apply(len(outs), len(saved), *outs, *saved, *leaves)

    return tap


def _is_wanted(leaf: Any) -> bool:
    """Whether this backward pass goes on to a leaf; `torch.autograd.grad` of something else does not."""
    try:
        return torch._C._will_engine_execute_node(leaf)
    except RuntimeError:  # it is asked for the gradient of the leaf itself
        return True


def leaf(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A leaf of any shape that holds a single number."""
    return torch.zeros([1] * len(shape), dtype=dtype, device=device).expand(shape).requires_grad_()
