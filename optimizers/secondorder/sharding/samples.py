"""Residuals whose samples are spread over processes: one loss of all of them.

    L = ½ Σ_t (w_t / N_t) Σ_ranks |r_t|²       N_t: samples of all ranks

That is what one process computes which has all samples, and DDP's mean of means where ranks have equally many. Its
r and J are those of `jacobian`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from secondorder.curvature.capture import all_reduced
from secondorder.residuals.centred import centred
from secondorder.residuals.factored import Factored
from secondorder.residuals.linearization import Linearization, Memory, linearize
from secondorder.residuals.terms import Term, Terms, residual_terms
from secondorder.sharding.jacobian import Facts, Gathered, gathered, lengths

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def several(group: Any) -> bool:
    """Whether there are other processes in the group; None: no group."""
    return group is not None and dist.get_world_size(group) > 1


@dataclass
class Learned(Memory):
    """Memory of a closure whose samples are spread.

    Attributes:
        divisors: By what every term's sum of squares was divided the last time: N_t of all processes, or 1. None: this
            process stands alone.
    """

    divisors: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Spread(Terms):
    """The terms of this process, among those of all.

    Their weights are divided by N_t and their reduction is "sum", and from centred ones the mean of all processes is
    subtracted: a scaled residual is what it is in one process that has all samples.

    Attributes:
        divisors: N_t of all processes for means, 1 for sums.
        losses: Every term's part of the loss of all processes, 0-d, without a graph.
        group: The processes.
    """

    divisors: tuple[int, ...]
    losses: tuple[Tensor, ...]
    group: Any

    @classmethod
    def of(cls, terms: Terms, group: Any) -> Spread:
        """Add up squares and samples of all processes; one all-reduce, and one before it where terms are centred."""
        terms = _without_means(terms, group)
        own = torch.stack([t.loss().detach().double() * t.count for t in terms.entries])
        samples = own.new_tensor([len(r) for r in terms.residuals])
        squares, samples = all_reduced([own, samples], group)
        means = [t.reduction == "mean" for t in terms.entries]
        divisors = [max(int(n), 1) if mean else 1 for n, mean in zip(samples.tolist(), means, strict=True)]
        dtype = terms.loss().dtype
        losses = [(square / n).to(dtype) for square, n in zip(squares, divisors, strict=True)]
        return cls(terms.names, divided(terms, divisors), tuple(divisors), tuple(losses), group)

    def own(self) -> Tensor:
        """This process's part of r, with its graph."""
        return super().vector()

    def vector(self) -> Tensor:
        """The residual r of all processes `(N,)`, without a graph; all of them must ask."""
        own = self.own().detach()
        return gathered(own, lengths(own, self.group), self.group)

    def loss(self) -> Tensor:
        """½ ‖r‖² of all processes, 0-d, without a graph."""
        first, *others = self.losses
        return sum(others, start=first)

    def by_term(self) -> dict[str, Tensor]:
        """See `Terms`."""
        return dict(zip(self.names, self.losses, strict=True))


def divided(terms: Terms, divisors: Sequence[int]) -> tuple[Term, ...]:
    """The same entries as sums with weights w_t / N_t."""
    return tuple(replace(t, weight=t.weight / n, reduction="sum") for t, n in zip(terms.entries, divisors, strict=True))


def _without_means(terms: Terms, group: Any) -> Terms:
    """The same terms, uncentred ones of residuals from which the means over all processes are subtracted."""
    if not any(t.center for t in terms.entries):
        return terms
    values = [t.residual.double() for t in terms.entries if t.center]
    samples = values[0].new_tensor([len(r) for r in values])
    *sums, samples = all_reduced([*(r.detach().sum(0) for r in values), samples], group)
    means = iter([total / n.clamp_min(1) for total, n in zip(sums, samples, strict=True)])
    entries = [
        replace(t, residual=(t.residual.double() - next(means)).to(t.values.dtype), center=False) if t.center else t
        for t in terms.entries
    ]
    return Terms(terms.names, tuple(entries))


def _centred_rows(terms: Terms, group: Any) -> list[tuple[Tensor, int]]:
    """As `Terms.centred_rows`, in r of all processes; one all-gather where terms are centred."""
    if not any(t.center for t in terms.entries):
        return []
    own = torch.tensor([[r.numel() for r in terms.residuals]], device=terms.residuals[0].device)
    counts = gathered(own, [1] * dist.get_world_size(group), group)
    first = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts).tolist()
    found = []
    for k, t in enumerate(terms.entries):
        starts = [row[k] for row in first]
        ranges = zip(starts, counts[:, k].tolist(), strict=True)
        rows = torch.cat([torch.arange(start, start + n, device=own.device) for start, n in ranges])
        if t.center and len(rows):
            found.append((rows, math.prod(t.residual.shape[1:])))
    return found


def linearized(
    closure: Callable[[], Any], params: Sequence[Tensor], memory: Learned, group: Any
) -> tuple[Terms, Linearization, Any]:
    """Linearize the residuals of all processes.

    Every process calls its own closure, which may see any number of samples, none included; how often, is its own
    affair. The back-end is "matvec" if it is on one of them.

    Args:
        closure: As of `linearize`.
        params: Parameters θ, the same bits on all processes.
        memory: Of this process.
        group: The processes; None: those of the DDP module with some of the parameters that the closure calls, if it
            calls one, else this one alone.

    Returns:
        The terms, the linearization, and the group; None in place of the latter where one process stands alone.

    Raises:
        Exception: What `linearize` raises.
        RuntimeError: If that fails on another process.
        ValueError: If processes differ in parameters or in terms.
    """
    last: list[Terms | None] = []

    def noted() -> Any:
        returned = closure()
        last[:] = [terms := residual_terms(returned)]
        if terms is not None and not any(r.numel() for r in terms.residuals):
            raise _NoSamples
        if terms is None:
            return returned
        terms = terms.uncentred()  # means are those of all processes
        if memory.divisors is not None and len(memory.divisors) == len(terms.names):
            return dict(zip(terms.names, divided(terms, memory.divisors), strict=True))
        return dict(zip(terms.names, terms.entries, strict=True))

    def found() -> tuple[Terms, Linearization]:
        linear: Linearization | None = None
        with contextlib.suppress(_NoSamples):
            linear = linearize(noted, params, memory=memory)
        (terms,) = last
        assert terms is not None
        return terms, linear or Factored(terms.vector().detach(), params, [[] for _ in params])

    own, fault = None, None
    with unsynchronized(params) as wrappers:
        try:
            own = found()
        except Exception as error:
            fault = error
        if group is None and wrappers:
            group = wrappers[0].process_group
        if several(group):
            _meet(own, fault, params, group)
        elif fault is not None:
            raise fault
        assert own is not None
        if not several(group):
            return own[0], centred(own[1], params, own[0].centred_rows), None
        spread = Spread.of(own[0], group)
        if memory.divisors != spread.divisors:
            memory.divisors = spread.divisors
            own = found()
        (terms, local) = own
        facts = Facts.of(local, memory.reason, group)
        if facts.matvec:
            memory.reason = facts.reason
            if isinstance(local, Factored):
                _, local = found()
    linear = Gathered(local, params, group, facts)
    return spread, centred(linear, params, _centred_rows(terms, group)), group


class _NoSamples(Exception):
    """No term has a residual on this process: J has no rows."""


@contextlib.contextmanager
def unsynchronized(params: Sequence[Tensor] = ()) -> Iterator[list[nn.parallel.DistributedDataParallel]]:
    """DDP modules that are called inside send no buffers, and wait for no backward pass.

    Processes call their closures differently often; what they send must not depend on it.

    Args:
        params: Modules that have some of them are told.

    Yields:
        Those modules, in the order of their first call.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield []
        return
    met: list[nn.parallel.DistributedDataParallel] = []
    before: dict[nn.parallel.DistributedDataParallel, tuple[bool, bool]] = {}
    known = set(map(id, params))

    def enter(module: nn.Module, args: Any) -> None:
        if isinstance(module, nn.parallel.DistributedDataParallel) and module not in before:
            before[module] = module.require_backward_grad_sync, module.require_forward_param_sync
            module.require_backward_grad_sync = module.require_forward_param_sync = False
            if any(id(p) in known for p in module.parameters()):
                met.append(module)

    handle = nn.modules.module.register_module_forward_pre_hook(enter)
    try:
        yield met
    finally:
        handle.remove()
        for module, (backward, forward) in before.items():
            module.require_backward_grad_sync, module.require_forward_param_sync = backward, forward


def _meet(
    own: tuple[Terms, Linearization] | None, fault: Exception | None, params: Sequence[Tensor], group: Any
) -> None:
    """Raise if a closure has failed, or they do not belong together."""
    told = bits = 0
    if own is not None:
        facts = [
            (t.weight, t.reduction, t.center, tuple(t.residual.shape[1:]), t.residual.dtype) for t in own[0].entries
        ]
        text = repr((own[0].names, facts, [(tuple(p.shape), p.dtype, p.requires_grad) for p in params]))
        told = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
        sums = [p.detach().contiguous().view(_BITS[p.element_size()]).sum(dtype=torch.int64) for p in params]
        bits = int(torch.stack([x.to(params[0].device) for x in sums]).sum())
    words = torch.tensor([int(own is None), told, bits], device=params[0].device)
    every = words.new_empty(dist.get_world_size(group) * len(words))
    dist.all_gather(list(every.split(len(words))), words, group=group)
    failed, *others = every.view(-1, len(words)).T.tolist()
    if fault is not None and all(failed):
        raise fault
    if any(failed):
        ranks = [rank for rank, word in enumerate(failed) if word]
        raise RuntimeError(f"closures raised, or returned no residuals, on ranks {ranks} and not on others") from fault
    what = ("terms (names, weights, reductions, shapes), their centring and parameters' shapes", "values of parameters")
    for name, values in zip(what, others, strict=True):
        if ranks := [rank for rank, value in enumerate(values) if value != values[0]]:
            raise ValueError(
                f"processes with a common least-squares loss must have the same {name}: ranks {ranks} and 0 differ"
            )
