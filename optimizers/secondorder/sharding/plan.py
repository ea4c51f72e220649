"""The plan over several processes: every block has one owner, which alone keeps its factors and works on it.

Two collectives a step. The first brings to the owners what they do not store of their blocks' gradients, and to
everybody the words by which all processes take the same decision before any state is touched. The second brings the
updates to all who store the parameters. What lies on the owner already does not travel.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from secondorder.layout.blocks import Fold
from secondorder.layout.buckets import BaseBucket, Bucket, Candidate, factor_dtype
from secondorder.layout.faces import Layout
from secondorder.layout.plan import Flags, Group, SinglePlan, kept, measure, moved, refuse, scaled, square
from secondorder.layout.schedule import writes
from secondorder.sharding.costs import cost, phases, state_bytes
from secondorder.sharding.hook import OwnerHook, put
from secondorder.sharding.meeting import Meeting, compare_facts
from secondorder.sharding.owners import Item, assign
from secondorder.sharding.regions import cells
from secondorder.sharding.report import PlanReport, made_report
from secondorder.sharding.routes import Patch, holders
from secondorder.sharding.traffic import Traffic
from secondorder.sharding.wire import Wire

Key = tuple[int, tuple[int, ...]]


class ShardedPlan(SinglePlan):
    """Owners compute.

    Attributes:
        group: The processes.
        rank: This one in the group.
        world: How many there are.
        owners: By block, its owner. Blocks keep theirs when others come.
        traffic: Routes and buffers.
        inward: The first collective.
        outward: The second.
        failures: Failed refreshes and statistics on all processes, 0-d.
        hook: By which DDP's gradients come to the owners; None: they are whole.
    """

    def __init__(self, group: Any, exact: bool, hook: OwnerHook | None = None) -> None:
        super().__init__(exact)
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.owners: dict[Key, int] = {}
        self.meeting = Meeting(group)
        self.traffic: Traffic | None = None
        self.inward: Wire | None = None
        self.outward: Wire | None = None
        self.failures: Tensor | None = None
        self.hook = hook
        self._device = torch.device("cpu")
        self._said: tuple[Any, Tensor] = ((), torch.zeros(0))
        self._counters: list[Tensor] = []
        self._order: list[int] = []  # parameters, as all processes count them

    # ------------------------------------------------------------------ who owns what

    def own(self, candidates: list[Candidate]) -> list[Candidate]:
        """See `Plan`."""
        keys = [self._key(c) for c in candidates]
        known = {key: self.owners[key] for key in keys if key in self.owners}
        if len(known) < len(keys):
            self.owners.update(assign([self._item(c) for c in candidates], self.world, known))
        return [c for c, key in zip(candidates, keys, strict=True) if self.owners[key] == self.rank]

    def meet(self, who: str, params: Sequence[Tensor], names: Sequence[str], facts: Mapping[str, Any]) -> None:
        """See `Plan`."""
        self.meeting.meet(who, params, names, facts)

    def owner(self, c: Candidate) -> int:
        """The rank that works on a block."""
        return self.owners[self._key(c)]

    def report(self) -> PlanReport:
        """Who owns what, and what travels; printable."""
        steps = 0 if self.outward is None else self.outward.exchanges
        inward, outward = self.inward, self.outward
        measured = None if not steps or inward is None or outward is None else (inward.sent, outward.sent)
        owners = [self.owner(c) for c in self.candidates]
        words = (8 * (_WORDS + (self.hook is not None)), 8)
        parts = [] if self.hook is None else self.hook.loose
        loose = [(rank, patch.numel * dtype.itemsize) for rank, patch, dtype in parts]
        return made_report(self.candidates, owners, self.world, self.meeting, words, loose, measured, steps)

    def _key(self, c: Candidate) -> Key:
        return self.position(c.piece.index), c.piece.at

    def _item(self, c: Candidate) -> Item:
        held: dict[int, int] = defaultdict(int)
        everywhere = True
        for strand in c.piece.strands:
            stored = self.meeting.held[strand.index]
            if len(set(stored)) > 1:
                everywhere = False
                for rank, patch in holders(strand, self.meeting.shapes[strand.index], stored):
                    held[rank] += patch.numel
        return Item(self._key(c), cost(c), state_bytes(c), phases(c), None if everywhere else tuple(held.items()))

    def position(self, index: int) -> int:
        """See `Plan`."""
        return self.meeting.positions[index]

    # ------------------------------------------------------------------ how parameters are stored

    def local(self, p: Tensor) -> Tensor:
        """See `Plan`."""
        return p.to_local() if isinstance(p, DTensor) else p

    def face(self, p: Tensor, entry: Tensor) -> Tensor:
        """See `Plan`."""
        if not isinstance(p, DTensor):
            return entry
        return DTensor.from_local(entry, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())

    def fill(self, entry: Tensor, held: Tensor) -> None:
        """See `Plan`."""
        if isinstance(entry, DTensor):
            if not isinstance(held, DTensor):
                held = distribute_tensor(held.to(entry.device), entry.device_mesh, entry.placements, src_data_rank=None)
            elif held.placements != entry.placements or held.device_mesh != entry.device_mesh:
                held = held.redistribute(entry.device_mesh, entry.placements)
            entry.to_local().copy_(held.to_local())
        else:
            entry.copy_(held)

    # ------------------------------------------------------------------ routes

    def bind(self, layout: Layout) -> None:
        """See `Plan`: routes from storage to owners and back, and the buffers of both collectives."""
        super().bind(layout)
        words = (_WORDS + (self.hook is not None), 1)
        owners = [self.owner(c) for c in layout.candidates]
        who = self.group, self.rank, self.world
        self.traffic = Traffic(*who, layout, self.meeting, owners, self.hook, words)
        self.inward, self.outward = self.traffic.inward, self.traffic.outward
        self._device = layout.params[0].device if layout.params else torch.device("cpu")
        self._order = sorted(range(len(layout.params)), key=self.position)
        self._counters = [b.s["failures"] for b in layout.buckets if isinstance(b, Bucket)]
        self._said = ((), torch.zeros(0))

    # ------------------------------------------------------------------ a step

    def flags(self, params: Sequence[Tensor], groups: Sequence[Group]) -> Flags:
        """See `Plan`. Gradients leave for the owners, with what this process thinks of them."""
        assert self.traffic is not None and self.inward is not None and self.outward is not None
        grads = [self._local_grad(p) for p in params]
        norms, verdicts = measure(grads if self.hook is None else self.hook.parts(grads))
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        counted = square(norms, self.meeting.first if self.hook is None else None)
        ok = torch.stack([*verdicts.values()]).all() if verdicts else torch.ones_like(total, dtype=torch.bool)
        told = torch.stack([ok.to(total), total if counted is None else counted])
        self.traffic.load(grads, [self.local(p) for p in params])
        ratio = [] if self.hook is None else [self.hook.ratio(params, norms)]
        said = self.inward.exchange(torch.cat([told, self._agreed(grads, groups), *ratio]))
        agree = (said[:, 2:_WORDS] == said[:1, 2:_WORDS]).all()
        usable = (said[:, 0] > 0).all() & agree
        if not all(g is not None for g in grads):  # others may expect what no bucket of ours will write
            self.outward.clear()
        if self.hook is not None:
            norms = self.hook.complete(params, grads, norms, said[:, _WORDS])
        # A device is not asked: there all go through a step of zeros.
        differ = self._device.type == "cpu" and not bool(agree)
        return Flags(grads, {self._device: usable}, said[:, 1].sum().sqrt(), norms, differ=differ)

    def _agreed(self, grads: Sequence[Tensor | None], groups: Sequence[Group]) -> Tensor:
        """What must be the same everywhere, as two numbers: which parameters have gradients, and the groups' rates."""
        present = bytes(grads[i] is not None for i in self._order)
        rates = repr([[g[k] for k in _RATES if not isinstance(g.get(k), Tensor)] for g in groups])
        if (present, rates) != self._said[0]:
            words = [float(zlib.crc32(present)), float(zlib.crc32(rates.encode()))]
            self._said = (present, rates), torch.tensor(words, dtype=torch.float64).to(self._device)
        return self._said[1]

    def _local_grad(self, p: Tensor) -> Tensor | None:
        grad = p.grad
        if isinstance(grad, DTensor) and isinstance(p, DTensor):
            if grad.placements != p.placements:
                grad = grad.redistribute(placements=p.placements)
            return grad.to_local()
        return grad

    def stage(self, b: BaseBucket, stored: Sequence[Tensor], flags: Flags) -> None:
        """See `Plan`."""
        if not isinstance(b, Bucket):
            super().stage(b, stored, flags)
            return
        assert self.traffic is not None
        self.traffic.unload(b, flags.grads, stored)
        refuse(b, flags)

    def commit(self, b: BaseBucket, stored: Sequence[Tensor], flags: Flags, hp: Group, rows: Sequence[int]) -> None:
        """See `Plan`. Updates of what is stored here are written at once."""
        if not isinstance(b, Bucket):
            super().commit(b, stored, flags, hp, rows)
            return
        assert self.traffic is not None
        lr = scaled(b, hp)
        found = self.traffic.hand_over(b, set(moved(b, flags, rows)))
        self.traffic.write(found, stored, lr, kept(b.dtype, flags.ok[b.device], hp), b.method.decay_after)

    def finish(self, stored: Sequence[Tensor], flags: Flags, groups: Sequence[Group], calls: Sequence[int]) -> None:
        """See `Plan`: updates come back."""
        assert self.traffic is not None and self.outward is not None
        self.failures = self.outward.exchange(self._failed())[:, 0].sum()
        if not stored:
            return
        present = flags.present
        by_kind: dict[tuple[int, bool, torch.dtype], list[tuple[Patch, Tensor]]] = defaultdict(list)
        for c, patch, update in self.traffic.incoming:
            method, lead = c.bucket.method, c.piece.index
            if present[patch.index] and writes(method, groups[c.bucket.group], calls[lead]):
                by_kind[c.bucket.group, method.decay_after, c.bucket.dtype].append((patch, update))
        for (group, decay_after, dtype), found in by_kind.items():
            hp = groups[group]
            lr = 1.0 if isinstance(hp["lr"], Tensor) else float(hp["lr"])  # a tensor is in the update already
            self.traffic.write(found, stored, lr, kept(dtype, flags.ok[self._device], hp), decay_after)

    def _failed(self) -> Tensor:
        """Failures on this process so far, `(1,)`."""
        if not self._counters:
            return torch.zeros(1, dtype=torch.float64, device=self._device)
        return torch.cat(self._counters).sum(0, keepdim=True, dtype=torch.float64)

    # ------------------------------------------------------------------ together

    def row_sums(self, index: int, grad: Tensor, view: tuple[int, ...], fold: Fold | None) -> Tensor:
        """See `Plan`: nothing of what an earlier process stores too, or of what the hook left to others."""
        out = torch.zeros(view[0], dtype=factor_dtype(grad.dtype), device=grad.device)
        if self.hook is not None:
            whole, grad = grad, torch.zeros_like(grad)
            put([(patch, grad, patch.cut(whole)) for patch in self.hook.valid if patch.index == index])
        if self.hook is not None or self.meeting.first[index]:
            for cell in cells(self.meeting.shapes[index], view, fold, self.meeting.held[index][self.rank]):
                face = cell.face(grad)
                out[slice(*cell.box[0])] += face if len(view) == 1 else face.flatten(1).sum(1)
        return out

    def merge(self, rows: Tensor) -> Tensor:
        """See `Plan`. Where a number comes from one process alone, the sum has its bits."""
        if self.world > 1:
            dist.all_reduce(rows, group=self.group)
        return rows

    def rms(self, b: BaseBucket, update: Tensor) -> Tensor:
        """See `Plan`. Rows of which processes store parts cost a collective."""
        indices = [piece.index for piece in b.pieces]
        if isinstance(b, Bucket) or all(len(set(self.meeting.held[i])) == 1 for i in indices):
            return super().rms(b, update)
        norms = b.norms(update)
        first = torch.tensor([self.meeting.first[i] for i in indices], dtype=norms.dtype)
        sizes = torch.tensor([max(1, torch.Size(self.meeting.shapes[i]).numel()) for i in indices], dtype=update.dtype)
        whole = self.merge(norms.square() * first.to(norms.device)).sqrt()
        return whole.to(update.dtype) / sizes.to(update.device) ** 0.5

    def agree(self, fault: Exception | None, who: str, facts: Mapping[str, Any]) -> None:
        """See `Plan`."""
        mine: Any = (None if fault is None else str(fault), facts)
        every = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(every, mine, group=self.group)
        found = [f"process {rank}: {text}" for rank, (text, _) in enumerate(every) if text is not None]
        if found:
            raise ValueError("; ".join(found))
        for rank, (_, theirs) in enumerate(every):
            compare_facts(who, every[0][1], theirs, rank)


_RATES = ("lr", "weight_decay")
_WORDS = 4  # usable, squares of the gradients, which parameters have one, rates
