"""The plan: which rank owns a block, and how gradients come to the owner and updates go back.

Five verbs: `own`, `flags`, `stage`, `commit`, `finish`; and how this process stores parameters and their state. With
one process a plan is close to the identity: every block is owned here, gradients are gathered from `p.grad`, updates
are written at once. A plan over several ranks (`sharding/plan.py`) is another object with the same verbs; neither the
step nor a method changes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from secondorder.curvature.layer import Sums
from secondorder.curvature.site import is_distributed as is_distributed
from secondorder.layout.blocks import Fold
from secondorder.layout.buckets import BaseBucket, Candidate, Strand, factor_dtype
from secondorder.layout.noise import rounding_keys
from secondorder.linalg import known
from secondorder_kernels import apply_update_

Group = dict[str, Any]
Norms = list[tuple[list[int], Tensor, Tensor]]

# Grams, their products and traces of products must stay finite: a factor 2^12 on the norm leaves room for all of them.
_MARGIN = 2.0**12


@dataclass
class Flags:
    """Decisions of one step, taken before any state is touched.

    Attributes:
        grads: Gradient of every parameter, or None.
        ok: By device, a 0-d bool: all gradients are finite and their norms in the usable range.
        gradient_norm: 0-d, Euclidean norm of all gradients together.
        norms: `(indices of parameters, usable, their gradient norms)` by device and dtype, to name the culprits.
        sums: Layer statistics of this step by index of the leading parameter.
        differ: Processes are known to differ in which parameters have gradients, or in their rates: the step is no
            step, on none of them.
    """

    grads: list[Tensor | None]
    ok: dict[torch.device, Tensor]
    gradient_norm: Tensor | None
    norms: Norms
    sums: Mapping[int, Sums] = field(default_factory=dict)
    differ: bool = False

    @cached_property
    def present(self) -> list[bool]:
        """For every parameter, whether it has a gradient."""
        return [g is not None for g in self.grads]

    def leave_out(self, index: int) -> None:
        """Treat a parameter as one without a gradient."""
        self.grads[index] = None
        self.__dict__.pop("present", None)


def largest_norm(dtype: torch.dtype) -> float:
    """Above this gradient norm a step is refused: a Gram matrix would overflow."""
    return math.sqrt(torch.finfo(dtype).max) / _MARGIN


def smallest_norm(dtype: torch.dtype) -> float:
    """Below this norm of a block its statistics wait: a Gram matrix would vanish."""
    return math.sqrt(torch.finfo(dtype).tiny) * _MARGIN


class Plan(Protocol):
    """What the step asks of a plan.

    Attributes:
        group: The processes that share the blocks; None: there is no other.
        exact: No bit may depend on how parameters are stored.
        failures: Failed refreshes and statistics of all of them, 0-d; None where that is what the buckets count.
        candidates: All blocks, whoever works on them.
    """

    candidates: list[Candidate]
    exact: bool
    group: Any
    failures: Tensor | None

    def meet(self, who: str, params: Sequence[Tensor], names: Sequence[str], facts: Mapping[str, Any]) -> None:
        """Compare notes with the other processes.

        Args:
            who: Name of the optimizer.
            params: The parameters.
            names: Their names.
            facts: What must be the same everywhere, by what it is called.

        Raises:
            ValueError: On every process, if they differ.
        """
        ...

    def own(self, candidates: list[Candidate]) -> list[Candidate]:
        """The blocks, of those of all processes, that this process works on."""
        ...

    def flags(self, params: Sequence[Tensor], groups: Sequence[Group]) -> Flags:
        """Decide, the same on every rank, whether this step takes place."""
        ...

    def stage(self, b: BaseBucket, stored: Sequence[Tensor], flags: Flags) -> None:
        """Bring the bucket's streams into its workspaces, zeros where the step is refused."""
        ...

    def commit(self, b: BaseBucket, stored: Sequence[Tensor], flags: Flags, hp: Group, rows: Sequence[int]) -> None:
        """Hand over the bucket's update for the given rows."""
        ...

    def finish(self, stored: Sequence[Tensor], flags: Flags, groups: Sequence[Group], calls: Sequence[int]) -> None:
        """Complete what `commit` began, after the last bucket; in every step that came as far as `flags`."""
        ...

    def row_sums(self, index: int, grad: Tensor, view: tuple[int, ...], fold: Fold | None) -> Tensor:
        """A gradient summed over all axes of its view but the first: this process's part, which add up to the whole.

        Args:
            index: Position of the parameter.
            grad: What is stored here of its gradient.
            view: The shape in which it is seen.
            fold: How it becomes that where a reshape is not enough.
        """
        ...

    def merge(self, rows: Tensor) -> Tensor:
        """One number for each block of all processes, of which this one has filled in its own, else zero."""
        ...

    def rms(self, b: BaseBucket, update: Tensor) -> Tensor:
        """Root mean square of every row of a bucket's update, `(n,)`, wherever it is stored."""
        ...

    def agree(self, fault: Exception | None, who: str, facts: Mapping[str, Any]) -> None:
        """Raise on every process if one of them found a fault, or if facts differ that must be the same everywhere."""
        ...

    # How this process stores parameters.

    def position(self, index: int) -> int:
        """Place of a parameter in the order that all processes share."""
        ...

    def local(self, p: Tensor) -> Tensor:
        """What is stored here of a parameter, as a plain tensor that shares its memory."""
        ...

    def face(self, p: Tensor, entry: Tensor) -> Tensor:
        """State that lies as the parameter's local tensor does, as it is shown in `state[p]`."""
        ...

    def fill(self, entry: Tensor, held: Tensor) -> None:
        """Copy a loaded value into an entry of `state[p]`."""
        ...

    def bind(self, layout: Any) -> None:
        """The layout has its buckets and workspaces."""
        ...


class SinglePlan:
    """One process: every block is owned here, updates are written at once."""

    group: Any = None
    failures: Tensor | None = None

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact
        self.candidates: list[Candidate] = []

    def meet(self, who: str, params: Sequence[Tensor], names: Sequence[str], facts: Mapping[str, Any]) -> None:
        """See `Plan`."""

    def own(self, candidates: list[Candidate]) -> list[Candidate]:
        """See `Plan`."""
        return candidates

    def flags(self, params: Sequence[Tensor], groups: Sequence[Group]) -> Flags:
        """See `Plan`."""
        grads = [p.grad for p in params]
        norms, own = measure(grads)
        ok = {device: torch.stack([v.to(device) for v in own.values()]).all() for device in own}
        total = square(norms)
        return Flags(grads, ok, None if total is None else total.sqrt(), norms)

    def stage(self, b: BaseBucket, stored: Sequence[Tensor], flags: Flags) -> None:
        """See `Plan`."""
        found = [(j, strand, flags.grads[strand.index]) for j, (_, strand) in enumerate(b.strands)]
        here = [(j, strand.cut(g)) for j, strand, g in found if g is not None]
        if len(here) < len(found):
            b.work["grad"].zero_()
        torch._foreach_copy_([b.work_rows["grad"][j] for j, _ in here], [g for _, g in here])
        if "param" in b.work:
            torch._foreach_copy_(b.work_rows["param"], [strand.cut(stored[strand.index]) for _, strand in b.strands])
        refuse(b, flags)

    def commit(self, b: BaseBucket, stored: Sequence[Tensor], flags: Flags, hp: Group, rows: Sequence[int]) -> None:
        """See `Plan`: `p <- (1 - lr wd) p - lr u`."""
        chosen = moved(b, flags, rows)
        if chosen:
            lr = scaled(b, hp)
            updates = [b.work_rows["update"][j] for j in chosen]
            keep = kept(b.dtype, flags.ok[b.device], hp)
            keys = rounding_keys(b, chosen, hp)
            write([b.strands[j][1] for j in chosen], stored, updates, lr, keep, b.method.decay_after, keys)

    def finish(self, stored: Sequence[Tensor], flags: Flags, groups: Sequence[Group], calls: Sequence[int]) -> None:
        """See `Plan`."""

    def row_sums(self, index: int, grad: Tensor, view: tuple[int, ...], fold: Fold | None) -> Tensor:
        """See `Plan`."""
        viewed = grad.reshape(view) if fold is None else fold.apply(grad, view)
        return viewed if len(view) == 1 else viewed.flatten(1).sum(1)

    def merge(self, rows: Tensor) -> Tensor:
        """See `Plan`."""
        return rows

    def rms(self, b: BaseBucket, update: Tensor) -> Tensor:
        """See `Plan`."""
        return b.norms(update).to(update.dtype) / b.row_numel() ** 0.5

    def agree(self, fault: Exception | None, who: str, facts: Mapping[str, Any]) -> None:
        """See `Plan`."""
        if fault is not None:
            raise fault

    def position(self, index: int) -> int:
        """See `Plan`."""
        return index

    def local(self, p: Tensor) -> Tensor:
        """See `Plan`."""
        return p

    def face(self, p: Tensor, entry: Tensor) -> Tensor:
        """See `Plan`."""
        return entry

    def fill(self, entry: Tensor, held: Tensor) -> None:
        """See `Plan`."""
        entry.copy_(held)

    def bind(self, layout: Any) -> None:
        """See `Plan`."""
        self.candidates = layout.candidates


def measure(grads: Sequence[Tensor | None]) -> tuple[Norms, dict[torch.device, Tensor]]:
    """Norms of gradients by one multi-tensor launch per device and dtype, and by device whether all are usable."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for i, g in enumerate(grads):
        if g is not None:
            kinds[g.device, g.dtype].append(i)
    norms, verdicts = [], defaultdict(list)
    for (device, dtype), members in kinds.items():
        wide = factor_dtype(dtype)
        chosen = [g for g in (grads[i] for i in members) if g is not None]
        measured = torch.stack(torch._foreach_norm(chosen, 2, dtype=wide))
        usable = measured < largest_norm(wide)  # nan compares as False
        norms.append((members, usable, measured))
        verdicts[device].append(usable.all())
    return norms, {device: torch.stack(found).all() for device, found in verdicts.items()}


def square(norms: Norms, counts: Sequence[bool] | None = None) -> Tensor | None:
    """Squared norm of all gradients together, 0-d float64; None where there are none.

    Args:
        norms: Their norms.
        counts: For every parameter, whether its gradient counts; None: all do.
    """
    squares = []
    for members, _, measured in norms:
        chosen = list(range(len(members))) if counts is None else [k for k, i in enumerate(members) if counts[i]]
        if chosen:
            kept = measured if len(chosen) == len(members) else measured[chosen]
            squares.append(kept.square().sum().double())
    return torch.stack([q.to(squares[0].device) for q in squares]).sum() if squares else None


def refuse(b: BaseBucket, flags: Flags) -> None:
    """Zeros for gradients of a refused step; statistics where they came.

    A rate of 0 does not protect an average from a nan: lerp_(nan, 0) is nan. So bad streams become zeros first.
    """
    ok = flags.ok[b.device]
    if not known(ok):
        b.work["grad"].masked_fill_(~ok, 0)
    if "arrived" in b.work:
        stage_statistics(b, flags)


def moved(b: BaseBucket, flags: Flags, rows: Sequence[int]) -> list[int]:
    """Strands of these rows whose parameter has a gradient."""
    written = set(rows)
    return [j for j, (r, strand) in enumerate(b.strands) if r in written and flags.present[strand.index]]


def scaled(b: BaseBucket, hp: Group) -> float:
    """The learning rate; a tensor is multiplied into the update, and 1 is left of it."""
    lr = hp["lr"]
    if isinstance(lr, Tensor):
        b.work["update"].mul_(lr)
        return 1.0
    return float(lr)


def kept(dtype: torch.dtype, ok: Tensor, hp: Group) -> Tensor | None:
    """What decoupled decay leaves of a parameter, 0-d; 1 in a refused step; None where there is no decay."""
    if hp["weight_decay"] == 0 or hp["weight_decay_kind"] != "decoupled":
        return None
    return 1 - ok.to(dtype) * (hp["lr"] * hp["weight_decay"])


def write(
    strands: Sequence[Strand],
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    lr: float,
    keep: Tensor | None,
    decay_after: bool,
    keys: Tensor | None = None,
) -> None:
    """Apply updates to regions of parameters, whatever the parameters' memory layout."""
    copies: dict[int, Tensor] = {}
    targets = []
    for strand in strands:
        if strand.viewable:
            targets.append(strand.cut(params[strand.index]))
            continue
        # Writing through a reshape would change a copy: work on one copy per parameter, and bring it back.
        if strand.index not in copies:
            copies[strand.index] = strand.unfold(params[strand.index])
        copy = copies[strand.index]
        targets.append(copy if strand.region is None else copy[strand.region])
    apply_update_(targets, updates, lr=lr, keep=keep, decay_after=decay_after, keys=keys)
    folds = {strand.index: strand.fold for strand in strands}
    for index, copy in copies.items():
        p, fold = params[index], folds[index]
        p.copy_(copy.view(p.shape) if fold is None else fold.undo(copy, tuple(p.shape)))


def stage_statistics(b: BaseBucket, flags: Flags) -> None:
    """Bring the layer statistics of this step into the bucket's workspaces, normalised; zeros where there are none.

    A statistic that is not finite does not arrive: its rows keep what they have, and count a failure.
    """
    arrived = b.work["arrived"]
    sums = [flags.sums.get(piece.index) for piece in b.pieces]
    span = b.rows // len(b.pieces)
    if None not in sums:  # as usual: then nothing comes from the host, and a graph can capture the step
        arrived.copy_(flags.ok[b.device])
    else:
        came = torch.tensor([float(found is not None) for found in sums], dtype=b.dtype).to(b.device)
        arrived.copy_(came.repeat_interleave(span) * flags.ok[b.device])
    sent = arrived.clone()
    names = [name for name in b.streams() if name != "arrived"]
    for name in names:
        work, places = b.work[name], b.work_rows[name]
        found = [(r, known.of(name, b.pieces[r].at)) for r, known in enumerate(sums) if known is not None]
        here = [(r, *value) for r, value in found if value is not None]
        if len(here) < len(sums):
            work.zero_()
        if not here:
            continue
        sources = [raw.expand(places[r].shape) if raw.ndim == 0 else raw.view(places[r].shape) for r, raw, _ in here]
        torch._foreach_copy_([places[r] for r, _, _ in here], sources)
        scales = torch.stack([scale.expand(span) for _, _, scale in here]).to(b.dtype)
        if len(here) < len(sums):
            every = torch.zeros(len(sums), span, dtype=b.dtype, device=b.device)
            every[[r for r, _, _ in here]] = scales
            scales = every
        work.mul_(b.expand(scales.view(-1), work))
        arrived.mul_(work.reshape(b.rows, -1).sum(1).isfinite())
    b.s["failures"].add_((sent > arrived).to(b.s["failures"].dtype))
    for name in names:
        b.work[name].masked_fill_(b.expand(arrived, b.work[name]) == 0, 0)
