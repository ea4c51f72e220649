"""State with two faces: stacks inside, `state[p]` outside, and the rule by which they stay one.

The stacks of the buckets are the truth. `state[p]` is a plain dict of views into them (nested by tile for a split
parameter). Before each step an identity check looks whether anybody put something else in a view's place (a load, a
deepcopy, Accelerate, FSDP's swap of parameters); then fresh stacks are made and whatever `state[p]` holds is adopted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from secondorder.layout.blocks import Treatment, whole
from secondorder.layout.buckets import COUNTERS, BaseBucket, Bucket, Candidate, FlatBucket, cut_pieces, factor_dtype
from secondorder.layout.plan import Flags, Plan, is_distributed
from secondorder.layout.schedule import assign_phases
from secondorder.preconditioner.protocol import Method

Group = dict[str, Any]
ParamState = MutableMapping[Tensor, Any]
Treat = Callable[[Tensor, Group, int, int], tuple[Method, Treatment]]

_FLAT_LIMIT = 1 << 24  # elements of a flat bucket: bounds the workspaces of element-wise methods to 64 MiB each


class Layout:
    """Parameters, blocks and buckets of one optimizer; one object, mutated in place.

    In place, because wrappers (Lightning's) share an optimizer's attributes by reference: a rebinding is lost there.

    Attributes:
        plan: Which blocks are owned here, and how streams and updates travel.
        params: All parameters that are laid out, in group order.
        treatments: For each of them, `(group index, method, treatment)`.
        buckets: Stacked and flat buckets.
        candidates: Pieces with factors, those of all processes, in the order of the parameters.
        rows: Blocks with factors, those of all processes.
        clock: `(P,)` float32 on the CPU: for every parameter, the calls in which it had a gradient.
        refused: Refused steps so far, a 0-d device tensor per device.
        gradient_norm: Norm of all gradients of the last step, a 0-d device tensor, or None.
        warned: What has been warned about.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.params: list[Tensor] = []
        self.treatments: list[tuple[int, Method, Treatment]] = []
        self.buckets: list[BaseBucket] = []
        self.candidates: list[Candidate] = []
        self.rows = 0
        self.clock = torch.zeros(0)
        self.refused: dict[torch.device, Tensor] = {}
        self.gradient_norm: Tensor | None = None
        self.warned: set[str] = set()
        self._signature: tuple[Any, ...] | None = None
        self._flat: list[Tensor] = []
        self._places: list[dict[str, Any]] = []  # entry by entry, where in `state` it must be,
        self._keys: list[str] = []  # under which key,
        self._views: list[Tensor] = []  # and what it must be
        self._dicts: list[tuple[Tensor, dict[str, Any]]] = []
        self._own: list[dict[str, Any]] = []
        self._adopting: set[int] = set()  # parameters that bring state along
        self._workspaces: dict[tuple[Any, ...], Tensor] = {}

    def current(
        self, groups: Sequence[Group], state: ParamState, treat: Treat, arrange: Callable[[Layout], None] | None = None
    ) -> Layout:
        """Bring layout and state up to date; cheap when nothing changed.

        Args:
            groups: The groups.
            state: The optimizer's state.
            treat: How a parameter is treated.
            arrange: Gives a layout whose parameters are known its plan. None: it has one.
        """
        signature = _signature(groups)
        if signature != self._signature or not self._intact(state):
            self._rebuild(groups, state, treat, arrange, signature)
        return self

    def _intact(self, state: ParamState) -> bool:
        held = map(dict.get, self._places, self._keys)  # thousands of them in every step: no loop in Python
        return all(map(is_, held, self._views)) and all(state.get(p) is d for p, d in self._dicts)

    def _rebuild(
        self,
        groups: Sequence[Group],
        state: ParamState,
        treat: Treat,
        arrange: Callable[[Layout], None] | None,
        signature: tuple[Any, ...],
    ) -> None:
        flat = [p for g in groups for p in g["params"]]
        self._follow_replaced(flat, state)
        self._signature = None  # if anything below raises, the next call tries again
        self._places, self._keys, self._views = [], [], []
        self._dicts, self._own, self.buckets = [], [], []
        self.params, self.treatments, self._adopting = [], [], set()
        seen: set[int] = set()
        for gi, g in enumerate(groups):
            for pi, p in enumerate(g["params"]):
                if p.requires_grad and id(p) not in seen and not is_lazy(p):
                    seen.add(id(p))
                    method, treatment = treat(p, g, gi, pi)
                    self.params.append(p)
                    self.treatments.append((gi, method, treatment))
        if arrange is not None:
            arrange(self)
        self.buckets = self._make_buckets(groups)
        self.clock = torch.zeros(len(self.params))
        for i, p in enumerate(self.params):
            self._dicts.append((p, state[p]))
            if "step" in state[p]:
                self._adopting.add(i)
            self._own.append({})
            self._attach(i, None, "step", self.clock[i])
        for b in self.buckets:  # one bucket at a time: old stacks go when their last view is replaced
            b.allocate(groups[b.group])
            for name, views in b.columns().items():
                for piece, view in zip(b.pieces, views, strict=True):
                    if isinstance(b, FlatBucket) and name != "count":
                        view = self.plan.face(self.params[piece.index], view)
                    self._attach(piece.index, piece.key, name, view)
        self._bind_workspaces(groups)
        if arrange is not None:
            self._drop_foreign_entries()
            self.plan.bind(self)
        self._signature, self._flat = signature, flat

    def _follow_replaced(self, flat: list[Tensor], state: ParamState) -> None:
        """Same places, new objects (FSDP's and others' swap of parameters): state moves along by position."""
        if len(flat) != len(self._flat):
            return
        for old, new in zip(self._flat, flat, strict=True):
            if old is not new and old.shape == new.shape and old in state and new not in state:
                state[new] = state.pop(old)

    def _attach(self, index: int, tile: str | None, key: str, view: Tensor) -> None:
        """Make `view` an entry of the parameter's (tile's) state, holding what the entry held before."""
        d, own = self._dicts[index][1], self._own[index]
        if tile is not None:
            d, own = d.setdefault(tile, {}), own.setdefault(tile, {})
        held = d.get(key)
        if held is None and index in self._adopting:
            raise ValueError(
                f"the state of the parameter of shape {tuple(self.params[index].shape)} has no {tile or key!r}, it has "
                f"{', '.join(map(repr, d))}: it was made with other options (max_block_size and the like must stay as "
                "they were once there is state)"
            )
        if held is not None:
            held = torch.as_tensor(held)
            if held.shape != view.shape:
                raise ValueError(
                    f"state {key!r} of the parameter of shape {tuple(self.params[index].shape)} has shape "
                    f"{tuple(held.shape)}, expected {tuple(view.shape)}"
                )
            self.plan.fill(view, held)
        d[key] = own[key] = view
        self._places.append(d)
        self._keys.append(key)
        self._views.append(view)

    def _make_buckets(self, groups: Sequence[Group]) -> list[BaseBucket]:
        stacked: dict[Any, Bucket] = {}
        self.candidates = self._candidates(groups)
        for c in self.plan.own(self.candidates):
            stacked.setdefault(c.kind(), c.bucket).take(c)
        flat: dict[Any, list[FlatBucket]] = defaultdict(list)
        filled: dict[Any, int] = {}
        for i, (p, (gi, method, treatment)) in enumerate(zip(self.params, self.treatments, strict=True)):
            if not method.elementwise:
                continue
            local = self.plan.local(p)
            # The CPU's fused kernel rounds the last elements of a tensor otherwise than the rest.
            fusible = local.is_contiguous() and p.dtype == factor_dtype(p.dtype) and not self.plan.exact
            kind = (gi, method, treatment.fallback)
            where = (p.dtype, p.device)
            rows = flat[kind, where, fusible]
            if not rows or filled[kind, where, fusible] + p.numel() > _FLAT_LIMIT:
                rows.append(FlatBucket(*kind, (), (), *where, fusible=fusible))
                filled[kind, where, fusible] = 0
            filled[kind, where, fusible] += p.numel()  # of the whole: all processes have the same buckets
            rows[-1].pieces.extend(cut_pieces(i, local, whole(tuple(local.shape), "")))
        return [*stacked.values(), *(b for rows in flat.values() for b in rows)]

    def _candidates(self, groups: Sequence[Group]) -> list[Candidate]:
        """All pieces with factors, those of other processes too, in the order of the parameters."""
        at = {id(p): i for i, p in enumerate(self.params)}
        out = []
        for i, (p, (gi, method, treatment)) in enumerate(zip(self.params, self.treatments, strict=True)):
            if method.elementwise or treatment.follows is not None:
                continue
            other = None if treatment.joined is None else at[treatment.joined]
            joined = None if other is None else (other, self._whole(self.params[other]))
            for piece in cut_pieces(i, self._whole(p), treatment, joined):
                b = Bucket(
                    gi, method, treatment.fallback, treatment.modes, treatment.diagonal, p.dtype, p.device,
                    shape=piece.block, span=piece.span,
                )  # fmt: skip
                out.append(Candidate(piece, b, groups[gi]))
        out.sort(key=lambda c: (self.plan.position(c.piece.index), c.piece.at))
        rows = 0
        for c in out:
            c.position = rows
            rows += c.rows
        self.rows = rows
        assign_phases(out)
        return out

    def _whole(self, p: Tensor) -> Tensor:
        """The parameter, or where this process stores a part of it something of the same shape."""
        return p if self.plan.local(p) is p else torch.empty(p.shape, dtype=p.dtype, device="meta")

    def _drop_foreign_entries(self) -> None:
        """Forget what was loaded of blocks that other processes own."""
        here = {id(piece) for b in self.buckets for piece in b.pieces}
        for c in self.candidates:
            if id(c.piece) in here:
                continue
            d = self._dicts[c.piece.index][1]
            for key in (*COUNTERS, *c.bucket.specs(c.hp)) if c.piece.key is None else (c.piece.key,):
                d.pop(key, None)

    def _bind_workspaces(self, groups: Sequence[Group]) -> None:
        """Workspaces as large as the largest bucket, shared by all buckets of a device and dtype."""
        sizes: dict[tuple[Any, ...], int] = {}
        wanted = []
        for b in self.buckets:
            hp = groups[b.group]
            b.held = () if b.fallback else _held(hp)
            wanted.append([(name, n, place(b, name)) for name, n in streams(b, hp).items()])
            for _, n, key in wanted[-1]:
                sizes[key] = max(sizes.get(key, 0), n)
        self._workspaces = {k: torch.empty(n, dtype=k[1], device=k[0]) for k, n in sizes.items()}
        for b, names in zip(self.buckets, wanted, strict=True):
            b.bind({name: self._workspaces[key][:n] for name, n, key in names})

    @property
    def complete(self) -> bool:
        """Whether all blocks are worked on here, on parameters that are stored whole."""
        here = sum(len(b.pieces) for b in self.buckets if isinstance(b, Bucket))
        return here == len(self.candidates) and not any(map(is_distributed, self.params))

    def entries(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """`(parameter, its entries in the stacks, nested by tile)` of all parameters that are laid out."""
        return list(zip(self.params, self._own, strict=True))

    @classmethod
    def ghost(cls, plan: Plan, groups: Sequence[Group], treat: Treat) -> Layout:
        """The layout of these groups with fresh state on the meta device: shapes without memory.

        Its groups, parameters and entries correspond one to one, in order, to those of a real layout.
        """
        real: dict[int, tuple[Tensor, Group, int, int]] = {}
        known: dict[int, Tensor] = {}
        ghosts = []
        for gi, g in enumerate(groups):
            for pi, p in enumerate(g["params"]):
                if id(p) not in known and not is_lazy(p):
                    known[id(p)] = _ghost(p).requires_grad_(p.requires_grad)
                    real[id(known[id(p)])] = (p, g, gi, pi)
            ghosts.append({**g, "params": [known[id(p)] for p in g["params"] if id(p) in known]})
        layout = cls(plan)

        def treated(p: Tensor, g: Group, gi: int, pi: int) -> tuple[Method, Treatment]:
            method, treatment = treat(*real[id(p)])
            if treatment.joined is not None:
                treatment = replace(treatment, joined=id(known[treatment.joined]))
            return method, treatment

        layout.current(ghosts, defaultdict(dict), treated)
        layout.params = [real[id(p)][0] for p in layout.params]
        return layout

    def forget(self) -> None:
        """Look at `state` anew at the next call of `current`."""
        self._signature = None

    def count_refused(self, flags: Flags) -> None:
        """Keep the norm of this step's gradients, and count the step if it was refused."""
        self.gradient_norm = flags.gradient_norm
        for device, ok in flags.ok.items():
            refused = self.refused.get(device)
            self.refused[device] = ~ok + (0 if refused is None else refused)

    def failures(self, wait: bool) -> dict[str, int]:
        """Refused steps and failed refreshes so far; without `wait`, only what can be read without waiting."""

        def readable(device: torch.device) -> bool:
            return device.type == "cpu" or (wait and device.type != "meta")

        refused = max((int(r) for d, r in self.refused.items() if readable(d)), default=0)
        counts = [b.s["failures"] for b in self.buckets if "failures" in b.s]
        failed = sum(int(f.sum()) for f in counts if readable(f.device))
        everywhere = self.plan.failures
        if everywhere is not None and readable(everywhere.device):
            failed = max(failed, int(everywhere))
        return {"refused_steps": refused, "refresh_failures": failed}

    def tick(self, present: Sequence[bool]) -> None:
        """Count this call for the parameters that had a gradient."""
        if all(present):
            self.clock.add_(1)
        else:
            self.clock.add_(torch.tensor(present, dtype=self.clock.dtype))


def _ghost(p: Tensor) -> Tensor:
    """A parameter's shape and strides without memory, whole where this process stores a part of it."""
    if is_distributed(p):
        return torch.empty(p.shape, dtype=p.dtype, device="meta")
    return torch.empty_like(p, device="meta")


def streams(b: BaseBucket, hp: Group) -> dict[str, int]:
    """Workspaces of a bucket and how many elements each has.

    Gradient, update, the method's own, statistics, and the parameter where decay or the method reads it.
    """
    reads = "param" in b.method.streams or _reads_param(hp)
    names = ("grad", "update", *b.method.works, *(("param",) if reads else ()))
    return {
        **dict.fromkeys(names, b.numel),
        **{name: b.rows * torch.Size(shape).numel() for name, shape in b.streams().items()},
    }


def place(b: BaseBucket, name: str) -> tuple[Any, ...]:
    """The key of a workspace: shared by all buckets, but what is held is its bucket's own."""
    own = (id(b),) if name in b.held else ()
    return (b.device, b.dtype, name, *own)


def _held(hp: Group) -> tuple[str, ...]:
    """Streams of a bucket that are needed when all buckets have their directions."""
    if _modelled(hp):
        return ("update", "param", "grad")
    return () if hp.get("kl_clip") is None and hp.get("norm_clip") is None else ("update", "param")


def _modelled(hp: Group) -> bool:
    return bool(hp.get("adapt_damping")) or hp.get("quadratic_model") is not None


def _reads_param(hp: Group) -> bool:
    return hp["weight_decay"] != 0 and (hp["weight_decay_kind"] != "decoupled" or _modelled(hp))


def _signature(groups: Sequence[Group]) -> tuple[Any, ...]:
    """What a layout depends on that can change between two steps."""
    return tuple((*_settings(g), *map(_facts, g["params"])) for g in groups)


def _settings(g: Group) -> tuple[Any, ...]:
    return _reads_param(g), _held(g), g.get("refresh"), g.get("refresh_every")


def _facts(p: Tensor) -> tuple[Any, ...]:
    layout = () if is_lazy(p) else (p.shape, p.stride())
    return id(p), p.__class__, p.dtype, p.device, p.requires_grad, *layout
