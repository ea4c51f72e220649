"""Sums in one fixed order, an aligned binary tree, so that bits do not depend on who holds which of the terms.

Micro-batches 0 .. V-1 of a step are added up as ((g0 + g1) + (g2 + g3)) + ... Where V and the number W of processes are
powers of two and process r computes micro-batches [rV/W, (r+1)V/W), every process makes a whole subtree of it, and
what is left is the tree over processes. `tree` is that over what is there at once; `TreeSums` that over backward
passes that come one after the other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from secondorder.layout.plan import is_distributed


def tree(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Sums of lists of tensors, one list a rank, by neighbours, then by neighbours of those."""
    level = [list(part) for part in parts]
    while len(level) > 1 and level[0]:
        pairs = [list(torch._foreach_add(a, b)) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + (level[-1:] if len(level) % 2 else [])
    return level[0]


def summed(terms: Tensor) -> Tensor:
    """`(n, ...)` to `(...)`, by the same tree."""
    return tree([[term] for term in terms])[0]


class _Sum:
    """Backward passes of one parameter since its gradient was dropped.

    A binary counter: with n passes there is a partial sum for every bit of n. Where n is a power of two that is one,
    and `p.grad` is its memory.

    Attributes:
        passes: n.
        partial: The partial sums by bit, but for the one that is `p.grad`.
        grad: `p.grad` as the last pass left it.
        version: Its version then: whoever wrote into it since has begun another sum.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The next pass is the first."""
        self.passes, self.version = 0, -1
        self.partial: dict[int, Tensor] = {}
        self.grad: Tensor | None = None

    def before(self, p: Tensor, new: Tensor) -> Tensor | None:
        """What autograd is to add to `p.grad`, which becomes None where that is the whole sum."""
        if p.grad is None or p.grad is not self.grad or p.grad._version != self.version or torch.is_grad_enabled():
            self.forget()
        if self.passes == 0:
            return None
        if self.passes & (self.passes - 1) == 0:
            self.partial = {self.passes.bit_length() - 1: p.grad}  # type: ignore[dict-item]
        self.grad = p.grad = None
        bit = 0
        while bit in self.partial:
            new = self.partial.pop(bit) + new
            bit += 1
        if not self.partial:
            return new
        self.partial[bit] = new
        order = sorted(self.partial)
        total = self.partial[order[0]]
        for bit in order[1:]:
            total = self.partial[bit] + total
        return total

    def after(self, p: Tensor) -> None:
        """Autograd has written `p.grad`."""
        self.passes += 1
        self.grad = p.grad
        self.version = -1 if p.grad is None else p.grad._version


class TreeSums:
    """Lets the gradients of backward passes add up in `p.grad` as a binary tree.

    After any number of passes `p.grad` has their whole sum. Costs one gradient for every bit of that number, in all
    log2(V) of them. Parameters that are stored in parts are left out: FSDP2 writes their gradients itself.
    """

    def __init__(self, active: bool) -> None:
        self._active = active
        self._sums = WeakTensorKeyDictionary()
        self._hooks: list[Any] = []
        weakref.finalize(self, _remove, self._hooks)

    def follow(self, params: Iterable[Tensor]) -> None:
        """Take care of these parameters too."""
        for p in params:
            if self._active and p.requires_grad and p.is_leaf and not is_distributed(p) and p not in self._sums:
                self._sums[p] = found = _Sum()
                before, after = _hooks(weakref.ref(p), found)
                self._hooks += [p.register_hook(before), p.register_post_accumulate_grad_hook(after)]

    def forget(self) -> None:
        """The step is taken: what comes next is no part of these sums."""
        for found in self._sums.values():
            found.forget()


def _hooks(where: weakref.ref[Tensor], found: _Sum) -> tuple[Callable[[Tensor], Any], Callable[[Tensor], None]]:
    def before(new: Tensor) -> Tensor | None:
        p = where()
        return None if p is None else found.before(p, new)

    return before, found.after


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
