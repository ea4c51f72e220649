"""The plan: which rank owns a block, and how gradients come to the owner and updates go back.

Five verbs: `own`, `flags`, `stage`, `commit`, `finish`. With one process a plan is close to the identity: every block
is owned here, gradients are gathered from `p.grad`, updates are written at once. A plan over several ranks is another
object with the same verbs; neither the step nor a method changes.
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
from secondorder.layout.buckets import BaseBucket, Piece, Strand, factor_dtype
from secondorder.linalg import known

Group = dict[str, Any]

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
    """

    grads: list[Tensor | None]
    ok: dict[torch.device, Tensor]
    gradient_norm: Tensor | None
    norms: list[tuple[list[int], Tensor, Tensor]]
    sums: Mapping[int, Sums] = field(default_factory=dict)

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
    """What the step asks of a plan."""

    def own(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces of one parameter that this process works on."""
        ...

    def flags(self, params: Sequence[Tensor]) -> Flags:
        """Decide, the same on every rank, whether this step takes place."""
        ...

    def stage(self, b: BaseBucket, params: Sequence[Tensor], flags: Flags) -> None:
        """Bring the bucket's streams into its workspaces, zeros where the step is refused."""
        ...

    def commit(self, b: BaseBucket, params: Sequence[Tensor], flags: Flags, hp: Group, rows: Sequence[int]) -> None:
        """Hand over the bucket's update for the given rows."""
        ...

    def finish(self) -> None:
        """Complete what `commit` began, after the last bucket."""
        ...


class SinglePlan:
    """One process: every block is owned here, updates are written at once."""

    def own(self, pieces: list[Piece]) -> list[Piece]:
        """See `Plan`."""
        return pieces

    def flags(self, params: Sequence[Tensor]) -> Flags:
        """See `Plan`. Norms are measured by one multi-tensor launch per device and dtype."""
        grads = [p.grad for p in params]
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        for i, g in enumerate(grads):
            if g is not None:
                kinds[g.device, g.dtype].append(i)
        norms, verdicts, squares = [], defaultdict(list), []
        for (device, dtype), members in kinds.items():
            wide = factor_dtype(dtype)
            chosen = [g for g in (grads[i] for i in members) if g is not None]
            measured = torch.stack(torch._foreach_norm(chosen, 2, dtype=wide))
            usable = measured < largest_norm(wide)  # nan compares as False
            norms.append((members, usable, measured))
            verdicts[device].append(usable.all())
            squares.append(measured.square().sum())
        own = {device: torch.stack(found).all() for device, found in verdicts.items()}
        ok = {device: torch.stack([v.to(device) for v in own.values()]).all() for device in own}
        total = torch.stack([q.to(squares[0].device).double() for q in squares]).sum().sqrt() if squares else None
        return Flags(grads, ok, total, norms)

    def stage(self, b: BaseBucket, params: Sequence[Tensor], flags: Flags) -> None:
        """See `Plan`."""
        found = [(j, strand, flags.grads[strand.index]) for j, (_, strand) in enumerate(b.strands)]
        here = [(j, strand.cut(g)) for j, strand, g in found if g is not None]
        if len(here) < len(found):
            b.work["grad"].zero_()
        torch._foreach_copy_([b.work_rows["grad"][j] for j, _ in here], [g for _, g in here])
        # A rate of 0 does not protect an average from a nan: lerp_(nan, 0) is nan. So bad streams become zeros first.
        ok = flags.ok[b.device]
        if not known(ok):
            b.work["grad"].masked_fill_(~ok, 0)
        if "param" in b.work:
            torch._foreach_copy_(b.work_rows["param"], [strand.cut(params[strand.index]) for _, strand in b.strands])
        if "arrived" in b.work:
            stage_statistics(b, flags)

    def commit(self, b: BaseBucket, params: Sequence[Tensor], flags: Flags, hp: Group, rows: Sequence[int]) -> None:
        """See `Plan`: `p <- (1 - lr wd) p - lr u`."""
        written = set(rows)
        present = flags.present
        chosen = [j for j, (r, strand) in enumerate(b.strands) if r in written and present[strand.index]]
        if chosen:
            lr = hp["lr"]
            if isinstance(lr, Tensor):
                b.work["update"].mul_(lr)
                lr = 1.0
            updates = [b.work_rows["update"][j] for j in chosen]
            write([b.strands[j][1] for j in chosen], params, updates, lr, _keep(b, flags, hp), b.method.decay_after)

    def finish(self) -> None:
        """See `Plan`."""


def _keep(b: BaseBucket, flags: Flags, hp: Group) -> Tensor | None:
    """What decoupled decay leaves of a parameter, 0-d; 1 in a refused step; None where there is no decay."""
    if hp["weight_decay"] == 0 or hp["weight_decay_kind"] != "decoupled":
        return None
    ok = flags.ok[b.device].to(b.dtype)
    return 1 - ok * (hp["lr"] * hp["weight_decay"])


def write(
    strands: Sequence[Strand],
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    lr: float,
    keep: Tensor | None,
    decay_after: bool,
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
    if keep is not None and not decay_after:
        torch._foreach_mul_(targets, keep)
    torch._foreach_add_(targets, list(updates), alpha=-lr)
    if keep is not None and decay_after:
        torch._foreach_mul_(targets, keep)
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
