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

from secondorder.layout.blocks import Treatment
from secondorder.layout.buckets import BaseBucket, Bucket, FlatBucket, cut_pieces, factor_dtype
from secondorder.layout.plan import Flags, Plan
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

    def current(self, groups: Sequence[Group], state: ParamState, treat: Treat) -> Layout:
        """Bring layout and state up to date; cheap when nothing changed."""
        signature = _signature(groups)
        if signature != self._signature or not self._intact(state):
            self._rebuild(groups, state, treat, signature)
        return self

    def _intact(self, state: ParamState) -> bool:
        held = map(dict.get, self._places, self._keys)  # thousands of them in every step: no loop in Python
        return all(map(is_, held, self._views)) and all(state.get(p) is d for p, d in self._dicts)

    def _rebuild(self, groups: Sequence[Group], state: ParamState, treat: Treat, signature: tuple[Any, ...]) -> None:
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
        self.buckets = self._make_buckets()
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
                    self._attach(piece.index, piece.key, name, view)
        self._bind_workspaces(groups)
        assign_phases([b for b in self.buckets if isinstance(b, Bucket)], groups)
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
            view.copy_(held)
        d[key] = own[key] = view
        self._places.append(d)
        self._keys.append(key)
        self._views.append(view)

    def _make_buckets(self) -> list[BaseBucket]:
        stacked: dict[Any, Bucket] = {}
        flat: dict[Any, list[FlatBucket]] = defaultdict(list)
        at = {id(p): i for i, p in enumerate(self.params)}
        for i, (p, (gi, method, treatment)) in enumerate(zip(self.params, self.treatments, strict=True)):
            kind = (gi, method, treatment.fallback)
            where = (p.dtype, p.device)
            if method.elementwise:
                fusible = p.is_contiguous() and p.dtype == factor_dtype(p.dtype)
                rows = flat[kind, where, fusible]
                if not rows or rows[-1].numel + p.numel() > _FLAT_LIMIT:
                    rows.append(FlatBucket(*kind, (), (), *where, fusible=fusible))
                rows[-1].pieces.extend(cut_pieces(i, p, treatment))
                continue
            if treatment.follows is not None:
                continue
            other = None if treatment.joined is None else at[treatment.joined]
            joined = None if other is None else (other, self.params[other])
            for piece in self.plan.own(cut_pieces(i, p, treatment, joined)):
                key = (kind, treatment.modes, treatment.diagonal, where, piece.block, piece.span)
                if key not in stacked:
                    modes = (treatment.modes, treatment.diagonal)
                    stacked[key] = Bucket(*kind, *modes, *where, shape=piece.block, span=piece.span)
                stacked[key].pieces.append(piece)
        return [*stacked.values(), *(b for rows in flat.values() for b in rows)]

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
                    known[id(p)] = torch.empty_like(p, device="meta").requires_grad_(p.requires_grad)
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
        readable = [r for d, r in self.refused.items() if d.type == "cpu" or (wait and d.type != "meta")]
        failed = [
            b.s["failures"]
            for b in self.buckets
            if "failures" in b.s and (b.device.type == "cpu" or (wait and b.device.type != "meta"))
        ]
        return {
            "refused_steps": max((int(r) for r in readable), default=0),
            "refresh_failures": sum(int(f.sum()) for f in failed),
        }

    def tick(self, present: Sequence[bool]) -> None:
        """Count this call for the parameters that had a gradient."""
        if all(present):
            self.clock.add_(1)
        else:
            self.clock.add_(torch.tensor(present, dtype=self.clock.dtype))


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
