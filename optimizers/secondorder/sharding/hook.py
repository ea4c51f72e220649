"""`sync="owner_hook"`: DDP's gradients go straight to the owners of their blocks, in place of its all-reduce.

Every bucket of DDP is one all-to-all: each process sends every other one what that one owns, and adds up what comes of
its own in a fixed tree. Elements that belong to no block are split evenly. A step then sends as many bytes as DDP's
all-reduce alone, 2 (W-1)/W of the gradients: half of them here, half as updates (and as sums of what is in no block).

After a backward pass `p.grad` is the mean gradient where this process is the owner, and zero elsewhere. These are the
*valid* parts, of which every element has one process.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from secondorder.layout.buckets import Strand
from secondorder.layout.faces import Layout
from secondorder.layout.plan import Norms, measure, square
from secondorder.sharding.regions import everything
from secondorder.sharding.routes import Patch, faces, patches
from secondorder.sharding.tree import summed

Shares = list[list[Patch]]  # by process, what it owns of a parameter
Loose = tuple[int, Patch, torch.dtype]

_TOLERANCE = 1e-2  # of squared norms before and after one factor; bfloat16 rounds to 4e-3 element by element


class OwnerHook:
    """DDP's communication hook, and what is known of the gradients that it left.

    Attributes:
        group: The processes.
        rank: This one in the group.
        world: How many there are.
        valid: The parts that this process owns.
        loose: `(process, part, dtype)` of what is in no block.
        arrived: Of these, what comes from others in a step, and where it then is.
        sent: Bytes that a backward pass in which all of the optimizer's parameters take part sends to others.
        counted: Bytes sent so far.
        warned: The user knows of uneven steps.
    """

    def __init__(self, optimizer: Any, group: Any) -> None:
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.valid: list[Patch] = []
        self.loose: list[Loose] = []
        self.arrived: list[tuple[Patch, Tensor]] = []
        self.sent = self.counted = 0
        self._optimizer = weakref.ref(optimizer)
        self._shares: dict[int, Shares] = {}
        self._params: list[Tensor] = []
        self._apart: set[int] = set()  # ids of parameters of whose gradients only the valid parts are there
        self._squares: dict[int, Tensor] = {}  # of the valid parts as they were left, by bucket
        self._uneven: Tensor | None = None
        self._handles: list[Any] = []
        self.warned = False

    # ------------------------------------------------------------------ which parts are whose

    def follow(self, layout: Layout, owners: Sequence[int]) -> None:
        """Another layout; what was left of gradients by the last one is made whole.

        Args:
            layout: Plain parameters and their blocks.
            owners: The owner of every candidate.
        """
        for p in self._params:
            if id(p) in self._apart and p.grad is not None:
                dist.all_reduce(p.grad, group=self.group)
        self._apart.clear()
        for handle in self._handles:
            handle.remove()
        found, self.loose = _shares(layout, owners, self.world)
        self._params = [layout.params[i] for i in sorted(range(len(found)), key=layout.plan.position)]
        self._shares = {id(p): share for p, share in zip(layout.params, found, strict=True)}
        self._handles = [p.register_hook(_again(weakref.ref(self), weakref.ref(p))) for p in layout.params]
        self.valid = [patch for share in found for patch in share[self.rank]]
        self.arrived = []
        sizes = [
            p.element_size() * sum(patch.numel for part in share for patch in part if part is not share[self.rank])
            for p, share in zip(layout.params, found, strict=True)
        ]
        self.sent = sum(sizes)

    def _owned(self, p: Tensor) -> Shares:
        """By process, what it gets of a parameter's gradient; all of it, where it is not the optimizer's."""
        found = self._shares.get(id(p))
        return [flat(-1, tuple(p.shape), 0, p.numel())] * self.world if found is None else found

    # ------------------------------------------------------------------ a backward pass

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP has a bucket of gradients; the future has the same memory with what this process owns, and zeros."""
        buffer, grads, params, number = bucket.buffer(), bucket.gradients(), bucket.parameters(), bucket.index()
        if self._optimizer() is None:  # whoever takes these gradients now expects all of them
            buffer.div_(self.world)
            summing = dist.all_reduce(buffer, group=self.group, async_op=True)
            return summing.get_future().then(lambda done: done.value()[0])
        if number == 0:
            self._squares = {}
        self._apart.update(id(p) for p in params if id(p) in self._shares)
        owned = [*zip(grads, map(self._owned, params), strict=True)]
        parts = [[(patch, g) for g, share in owned for patch in share[rank]] for rank in range(self.world)]
        sizes = [sum(patch.numel for patch, _ in part) for part in parts]
        own, exact = sizes[self.rank], self.world & (self.world - 1) == 0
        with torch.no_grad():
            send = buffer.new_empty(sum(sizes))
            every = [(patch, g) for part in parts for patch, g in part]
            _copy(_cut(send, [patch for patch, _ in every]), [patch.cut(g) for patch, g in every])
            if exact:
                send.mul_(1 / self.world)
            received = send.new_empty(self.world * own)
        work = dist.all_to_all_single(received, send, [own] * self.world, sizes, group=self.group, async_op=True)
        self.counted += (len(send) - own) * send.element_size()

        @torch.no_grad()
        def arrived(done: torch.futures.Future[Any]) -> Tensor:
            done.wait()
            total = summed(received.view(self.world, own))
            if not exact:
                total = total / self.world
            buffer.zero_()
            mine = parts[self.rank]
            values = _cut(total, [patch for patch, _ in mine])
            put([(patch, g, value) for (patch, g), value in zip(mine, values, strict=True)])
            ours = [value for (patch, _), value in zip(mine, values, strict=True) if patch.index >= 0]
            if (found := square(measure(ours)[0])) is not None:
                self._squares[number] = found
            return buffer

        return work.get_future().then(arrived)

    def again(self, p: Tensor) -> None:
        """A parameter gets more gradient: what it has must count once in the sum over processes, as in DDP's mean."""
        if id(p) in self._apart:
            self._apart.discard(id(p))
            if p.grad is not None:
                p.grad.mul_(self.world)

    # ------------------------------------------------------------------ a step

    def parts(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The valid parts of the gradients."""
        return [None if (g := grads[patch.index]) is None else patch.cut(g) for patch in self.valid]

    def ratio(self, params: Sequence[Tensor], norms: Norms) -> Tensor:
        """Squared length of the valid parts over that in which `reduce` left them, `(1,)` float64; 0 if not known.

        Args:
            params: The parameters.
            norms: Of `parts`.
        """
        now = square(norms, [id(params[patch.index]) in self._apart for patch in self.valid])
        if now is None or not self._squares:
            return torch.zeros(1, dtype=torch.float64, device=params[0].device)
        before = torch.stack([*self._squares.values()]).sum()
        return torch.where(before > 0, now / before, 0.0)[None]

    def complete(self, params: Sequence[Tensor], grads: Sequence[Tensor | None], norms: Norms, ratios: Tensor) -> Norms:
        """What is in no block has come from all processes: their gradients are whole.

        Args:
            params: The parameters.
            grads: Their gradients.
            norms: Of `parts`.
            ratios: The `ratio` of all processes, `(W,)`: they must be one number.

        Returns:
            The same norms, by parameter.
        """
        least = torch.where(ratios > 0, ratios, torch.inf).min()
        uneven = ratios.max() > (1 + _TOLERANCE) * least
        self._uneven = uneven if self._uneven is None else self._uneven | uneven
        self._squares = {}
        put([(patch, g, value) for patch, value in self.arrived if (g := grads[patch.index]) is not None])
        self._apart.difference_update(id(params[patch.index]) for _, patch, _ in self.loose)
        return [([self.valid[i].index for i in members], usable, measured) for members, usable, measured in norms]

    def told(self, wait: bool) -> bool:
        """Whether a step was uneven so far; False where a device would have to be asked, and `wait` is not set."""
        known = self._uneven is not None and (wait or self._uneven.device.type == "cpu")
        return known and bool(self._uneven)

    def norm(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Length of the whole gradient, 0-d, the same on all processes."""
        total = square(measure(self.parts(grads))[0])
        if total is None:
            total = torch.zeros((), dtype=torch.float64, device=self._params[0].device)
        dist.all_reduce(total, group=self.group)
        return total.sqrt()


def _shares(layout: Layout, owners: Sequence[int], world: int) -> tuple[list[Shares], list[Loose]]:
    """For every parameter, what each process owns of it; and what is in no block."""
    found: list[Shares] = [[[] for _ in range(world)] for _ in layout.params]
    for c, owner in zip(layout.candidates, owners, strict=True):
        for strand in c.piece.strands:
            shape = tuple(layout.params[strand.index].shape)
            found[strand.index][owner] += patches(strand, shape, everything(shape))
    # What is in no block, end to end in the order that all share, is cut into equal parts.
    left = [i for i, (_, method, _) in enumerate(layout.treatments) if method.elementwise]
    left.sort(key=layout.plan.position)
    loose: list[Loose] = []
    total, start = sum(layout.params[i].numel() for i in left), 0
    for i in left:
        shape = tuple(layout.params[i].shape)
        stop = start + layout.params[i].numel()
        for rank in range(world):
            first, last = max(total * rank // world, start), min(total * (rank + 1) // world, stop)
            if first < last:
                found[i][rank] = flat(i, shape, first - start, last - start)
                loose += [(rank, patch, layout.params[i].dtype) for patch in found[i][rank]]
        start = stop
    return found, loose


def flat(index: int, shape: tuple[int, ...], first: int, last: int) -> list[Patch]:
    """Some elements of a parameter, numbered row by row."""
    n = torch.Size(shape).numel()
    return patches(Strand(index, (n,), (slice(first, last),), True), shape, everything(shape))


def put(found: Sequence[tuple[Patch, Tensor, Tensor]]) -> None:
    """Write `(patch, tensor, value)`: a value into a patch of a tensor."""
    with faces([(patch, tensor) for patch, tensor, _ in found]) as targets:
        _copy(targets, [value for _, _, value in found])


def _cut(whole: Tensor, parts: Sequence[Patch]) -> list[Tensor]:
    """A flat tensor as tensors of the shapes of patches."""
    pieces = whole.split([patch.numel for patch in parts]) if parts else ()
    return [piece.view(patch.shape) for piece, patch in zip(pieces, parts, strict=True)]


def _copy(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), list(values))


def _again(hook: weakref.ref[OwnerHook], at: weakref.ref[Tensor]) -> Any:
    def before(_: Tensor) -> None:
        found, p = hook(), at()
        if found is not None and p is not None:
            found.again(p)

    return before
