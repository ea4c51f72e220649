"""A site: one module of the network at which statistics are captured, and the leaves that receive them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.curvature.layer import Side, input_sums, moment_sums, output_sums
from secondorder.curvature.layers.protocol import LayerRule
from secondorder.curvature.samples import Kept, keep
from secondorder.curvature.tap import leaf, make_tap

Frames = Sequence[tuple[Tensor | None, Tensor | None]]
_TENSOR_PARALLEL = "its output is distributed (tensor parallelism): a process sees a part of each row"


@dataclass(frozen=True)
class Wants:
    """What is to be captured at a site.

    Attributes:
        inputs: The input side, None where no parameter asks for it.
        outputs: The output side, None for forward-only statistics.
        moment: Eigenbases of every tile are given, and squares of gradients in them are wanted.
        reference: The loss terms are counted here, and the loss scale is measured: None, or `"bias"` or `"weight"`,
            with whose gradient the captured one is compared.
    """

    inputs: Side | None
    outputs: Side | None
    moment: bool = False
    reference: str | None = None


class Site:
    """A module whose forward hook taps the output. Copies of the module are not tapped.

    Attributes:
        module: Weak reference to the module.
        rule: How it maps to the normal form.
        sharing: A callable that gives `"expand"` or `"reduce"` when asked.
        limit: A callable that gives the number of rows of which statistics are taken, or None for all.
        active: Whether the next forward pass is captured.
        quiet: A captured forward pass hands over nothing in its backward pass (Fisher statistics came before).
        with_inputs: Input factors are wanted in this backward pass (not in the later ones of a Fisher pass).
        replicas: The process group of the DDP wrapper in whose forward pass the module was last seen, or None.
        refused: Why a forward pass that came by could not be captured, or None.
        arrived: Gradients came since statistics were dropped; asked only where FSDP2 shards the parameters.
        frames: Eigenbases of the tiles, where squares in them are wanted.
        leaves: What receives the statistics, by name; `flat`: the same in one list.
        samples: Of how many examples of a backward pass rows are kept, in `kept`; not in a compiled one.
    """

    def __init__(self, name: str, module: nn.Module, rule: LayerRule, names: tuple[str, str]) -> None:
        self.name, self.rule, self.names = name, rule, names
        self.module = weakref.ref(module)
        self.weight, self.bias = (getattr(module, key, None) for key in names)
        held = (self.weight, self.bias)
        self._parts = [tuple(p.shape) if p is not None and is_distributed(p) else None for p in held]
        self.sharing: Callable[[], str] = lambda: "expand"
        self.limit: Callable[[], int | None] = lambda: None
        self.active, self.quiet, self.with_inputs = False, False, True
        self.replicas: Any = None
        self.refused: str | None = None
        self.arrived = False
        self.frames: Frames = ()
        self.wants, self.dtype = Wants(None, None), torch.float32
        self.leaves: dict[str, list[Tensor]] = {}
        self.flat: list[Tensor] = []
        self.samples, self.kept = 0, list[Kept]()
        self._tap = make_tap(self.statistics)

    def configure(self, wants: Wants, dtype: torch.dtype, device: torch.device) -> None:
        """Make leaves for what is wanted; what others had is dropped."""
        rule, k = self.rule, self.rule.groups
        if self.flat and (wants, dtype, device) == (self.wants, self.dtype, self.flat[0].device):
            return

        def matrices(side: Side) -> list[Tensor]:
            square = [(d,) if side.diagonal else (d, d) for d in side.sizes()]
            return [leaf((k, *shape), dtype, device) for shape in square]

        self.wants, self.dtype = wants, dtype
        self.leaves = {"rows": [leaf((k,), dtype, device)]}
        if wants.inputs is not None:
            self.leaves["inputs"] = matrices(wants.inputs)
        if wants.outputs is not None:
            self.leaves["outputs"] = matrices(wants.outputs)
        if wants.moment and wants.inputs is not None and wants.outputs is not None:
            tiles = [(k, d, width) for d in wants.outputs.sizes() for width in wants.inputs.sizes()]
            if rule.tokens:
                tiles = [(k, width, d) for _, d, width in tiles]
            self.leaves["moment"] = [leaf(shape, dtype, device) for shape in tiles]
        if wants.reference is not None:
            self.leaves["terms"] = [leaf((1,), dtype, device)]  # a compiler takes a 0-d float for a Python number
            self.leaves["probe"] = [leaf((k, rule.d_out), dtype, device)]
        self.flat = [t for group in self.leaves.values() for t in group]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """The forward hook."""
        if not self.active or not isinstance(out, Tensor) or not out.requires_grad:
            return None
        if _transformed() or not self.owns(module):
            return None
        if not torch.compiler.is_compiling() and is_distributed(out):
            self.refused = _TENSOR_PARALLEL
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        return self.tap(module, x, (out,))

    def tap(self, module: nn.Module, x: Any, outs: tuple[Tensor, ...]) -> Any:
        """Tap outputs of the module for the input `x`."""
        if not torch.compiler.is_compiling():
            self._drop_abandoned()
            wrapper = nn.parallel.DistributedDataParallel._get_active_ddp_module()
            self.replicas = self.replicas if wrapper is None else wrapper.process_group
        cast = self.rule.d_in > 0  # norm layers leave their input in its own precision
        seen = _as_seen if self._needs_rows or self.rule.tokens or not cast else _shape_of
        x = tuple(seen(t, cast) for t in x) if isinstance(x, tuple) else seen(x, cast)
        return self._tap(outs, self.rule.save(module, x), self.flat)

    @property
    def _needs_rows(self) -> bool:
        return not self.rule.tokens and (self.wants.inputs is not None or self.wants.reference == "weight")

    def _drop_abandoned(self) -> None:
        """Drop statistics of backward passes whose gradients are gone.

        A gradient scaler skips a step with infinite gradients, and `model.zero_grad()` does not pass by the optimizer.
        Under FSDP2, passes without synchronisation leave no gradient yet: it must have come, and gone.
        """
        held = [p for p in (self.weight, self.bias) if p is not None]
        if all(p.grad is None for p in held) and (self.arrived or self._parts == [None, None]):
            self.clear()

    def arrive(self, p: Tensor) -> None:
        """A hook: a gradient of the parameter is there."""
        self.arrived = True

    def clear(self) -> None:
        """Drop what backward passes handed over."""
        self.kept, self.arrived = [], False
        for t in self.flat:
            t.grad = None

    def attention(self, module: nn.Module, inputs: tuple[Tensor, ...], outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tap of projections (see `layers.attention`)."""
        if _transformed() or not self.owns(module) or not all(out.requires_grad for out in outs):
            return outs
        if any(map(is_distributed, outs)):
            self.refused = _TENSOR_PARALLEL
            return outs
        return self.tap(module, inputs, outs)

    def owns(self, module: nn.Module) -> bool:
        """Whether this is the module that the site was made for, with the parameters that it had.

        It is not where parameters were replaced, or torch.func calls the module with others. FSDP2 puts the whole
        parameter in the place of the sharded one, from before a forward pass until it is sharded again.
        """
        weight, bias = (getattr(module, key, None) for key in self.names)
        return (weight is self.weight or _is_whole(weight, self._parts[0])) and (
            bias is self.bias or _is_whole(bias, self._parts[1])
        )

    def __deepcopy__(self, memo: Any) -> Nothing:
        return Nothing()  # a copied module's hooks are copies too, and the optimizer belongs to the original

    def __reduce__(self) -> Any:
        return Nothing, ()

    def statistics(self, gs: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> list[Tensor | None]:
        """One value per leaf."""
        if self.quiet:
            return [None] * len(self.flat)
        rule, reduce = self.rule.bound(gs[0].shape, *saved), self.sharing() == "reduce"
        by_group = rule.outputs(gs if len(gs) > 1 else gs[0], *saved)
        apart = isinstance(by_group, tuple)
        chunks = [g[None] for g in by_group] if isinstance(by_group, tuple) else [by_group]
        if self.samples and not torch.compiler.is_compiling():
            known = saved if self._needs_rows or rule.tokens else None
            rows = [chunk.to(self.dtype) for chunk in chunks]
            self.kept.append(keep(rule, rows, known, self.samples, self.with_inputs))
        inputs: list[Any] = [None] * len(chunks)
        if self._needs_rows and (self.with_inputs or "moment" in self.leaves):
            if reduce and not (apart or rule.masks or "moment" in self.leaves or self.wants.reference == "weight"):
                inputs = [rule.mean_inputs(*saved)[:, :, None]]
            else:
                found = rule.inputs(*saved)
                inputs = [a[None] for a in found] if isinstance(found, tuple) else [found]
        parts: list[dict[str, list[Tensor]]] = []
        for j, (g, a) in enumerate(zip(chunks, inputs, strict=True)):
            parts.append(self._chunk(g.to(self.dtype), None if a is None else a.to(self.dtype), reduce, saved, j))
        out: list[Tensor | None] = []
        for name, leaves in self.leaves.items():
            for i in range(len(leaves)):
                values = [part[name][i] for part in parts if name in part]
                out.append(None if not values else values[0] if len(values) == 1 else torch.cat(values))
        return out

    def _chunk(
        self, g: Tensor, a: Tensor | None, reduce: bool, saved: tuple[Tensor, ...], group: int
    ) -> dict[str, list[Tensor]]:
        """Statistics of groups that have the same positions."""
        rule, total = self.rule, g.shape[1] if reduce else g.shape[1] * g.shape[2]
        counted = g.abs().amax(-1) != 0 if rule.masks or self.wants.reference is not None else None  # (k, n, s)
        here = counted if rule.masks else None
        limit = None if rule.tokens or not rule.d_in else self.limit()
        if limit is None or total <= limit:
            out = self._sums(g, a, here, reduce, saved, group)
        else:
            some = evenly(total, limit, g.device)
            few, few_a, few_here = (
                None if x is None else x[:, some] if reduce else x.flatten(1, 2)[:, some, None] for x in (g, a, here)
            )
            assert few is not None
            out = self._sums(few, few_a, few_here, reduce, saved, group)
            rows, seen = _count(g, here, reduce), _count(few, few_here, reduce)
            share = torch.where(seen > 0, rows / seen.clamp_min(1), 0.0)
            out = {name: [x * share.view(-1, *[1] * (x.ndim - 1)) for x in sums] for name, sums in out.items()}
            if self.with_inputs:
                out["rows"] = [rows]
        if self.wants.reference is not None and counted is not None:
            out["terms"] = [counted[0].sum().to(g.dtype)[None]]
            probed = g if self.wants.reference == "bias" or a is None else g * a.sum(-1, keepdim=True)
            out["probe"] = [probed.sum((1, 2))]
        return out

    def _sums(
        self,
        g: Tensor,
        a: Tensor | None,
        here: Tensor | None,
        reduce: bool,
        saved: tuple[Tensor, ...],
        group: int,
    ) -> dict[str, list[Tensor]]:
        """Sums over rows; `here (k, n, s)` tells which positions count, None: all."""
        rule, wants, out = self.rule, self.wants, {}
        rows = _count(g, here, reduce)
        if self.with_inputs:
            out["rows"] = [rows]
        if wants.outputs is not None:
            out["outputs"] = output_sums(g.sum(2) if reduce else g.flatten(1, 2), wants.outputs)
        if wants.inputs is not None and self.with_inputs:
            if rule.tokens:
                out["inputs"] = [rule.token_sums(here, reduce, *saved, dtype=g.dtype)[None]]  # type: ignore[attr-defined]
            else:
                assert a is not None
                if not reduce:
                    flat = a.flatten(1, 2)
                elif here is None:
                    flat = a.mean(2)
                else:
                    flat = (a * here[..., None]).sum(2) / here.sum(2, keepdim=True).clamp_min(1)
                counts = None if here is None else (here.any(2) if reduce else here.flatten(1)).to(flat.dtype)
                out["inputs"] = input_sums(flat, counts, wants.inputs)
        if "moment" in self.leaves:
            every = self.frames or [(None, None)] * len(self.leaves["moment"])  # before the first step
            frames = [tuple(None if q is None else q[group : group + len(g)] for q in pair) for pair in every]
            assert wants.inputs is not None and wants.outputs is not None
            if rule.tokens:
                tiles = [g[..., start:stop] for start, stop in wants.outputs.cuts]
                turned = [t if Q is None else t @ Q[:, None] for t, (_, Q) in zip(tiles, frames, strict=True)]
                out["moment"] = [rule.token_moment(t.square(), *saved)[None] for t in turned]  # type: ignore[attr-defined]
            else:
                assert a is not None
                out["moment"] = moment_sums(a, g, (wants.inputs, wants.outputs), frames, reduce)  # type: ignore[arg-type]
        return out


def _count(g: Tensor, here: Tensor | None, reduce: bool) -> Tensor:
    """How many rows count, `(k,)`."""
    k, n, positions = g.shape[:3]
    if here is None:
        return g.new_full((k,), n if reduce else n * positions)
    return (here.any(2) if reduce else here.flatten(1)).sum(1).to(g.dtype)


def evenly(total: int, count: int, device: torch.device) -> Tensor:
    """`count` of `total` rows, one of each of as many equal stretches, so that they keep to no position of a sample."""
    i = torch.arange(count, device=device)
    start, stop = i * total // count, (i + 1) * total // count
    turn = i * 40503 % 65536  # multiples of the golden section of 2^16: spread evenly, and after no period
    return start + turn * (stop - start) // 65536


class Nothing:
    """What a copied or pickled module has in a hook's place."""

    def __call__(self, *args: Any) -> None:
        """See `Site`."""
        return None


def is_distributed(t: Tensor) -> bool:
    """Whether this process has a part of the tensor (a DTensor: FSDP2, tensor parallelism)."""
    return any(base.__name__ == "DTensor" for base in type(t).__mro__)


def _is_whole(found: Any, shape: tuple[int, ...] | None) -> bool:
    """Whether this may be what FSDP2 made of its parts of a parameter of this shape; None: there are no parts."""
    return shape is not None and isinstance(found, nn.Parameter) and tuple(found.shape) == shape


def _transformed() -> bool:
    """Whether the forward pass is one of torch.func, or of forward-mode differentiation."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _as_seen(x: Tensor, cast: bool) -> Tensor:
    """The input as the layer sees it.

    Under autocast that is a copy, which autograd keeps too; the tensor itself may be changed in place later on.
    """
    x = x.detach()
    kind = x.device.type
    if cast and x.is_floating_point() and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _shape_of(x: Tensor, cast: bool) -> Tensor:
    """A stand-in for an input of which no statistics are wanted: it may be changed in place, and is not kept."""
    return x.new_empty([1] * x.ndim).expand(x.shape)
