"""LayerOptimizer: optimizers whose statistics come from layer inputs and output gradients.

Between two steps the taps of `curvature.capture` collect raw sums; the step takes them as one more stream. All else is
`PreconditionedOptimizer`.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secondorder import _factors, linalg
from secondorder import _layer_blocks as blocks
from secondorder._layer_scale import applied, loss_scale, loss_terms, references, unclipped
from secondorder._optimizer import Group, PreconditionedOptimizer
from secondorder._options import LAYERS
from secondorder._roles import unwrapped
from secondorder.curvature.capture import Capture, all_reduced
from secondorder.curvature.fisher import Kind, Loss, fisher_vectors, terms
from secondorder.curvature.layer import Sums
from secondorder.curvature.site import Site, Wants
from secondorder.layout.blocks import Treatment, whole
from secondorder.layout.buckets import Bucket, factor_dtype
from secondorder.layout.faces import Layout
from secondorder.layout.plan import Flags
from secondorder.preconditioner.protocol import Method
from secondorder.sharding.frames import Frames, bases
from secondorder.sharding.statistics import Reduction, mirrored

_NO_MODULE = "no module= was given, so there are no layer statistics"
_DETACHED = "the optimizer was copied or unpickled: call attach(module)"
_UNCAPTURED = "no statistics: not called as a module, no backward(), or compiled and run before the optimizer was made"
_RECALLED = "had no layer statistics when its state was saved: its layer's forward pass had not come by"


class LayerOptimizer(PreconditionedOptimizer):
    """Base class of layer methods.

    Args beyond those of `PreconditionedOptimizer`:
        grad_scaler: The `GradScaler` in use, where gradients are unscaled *and* clipped before the step; else the loss
            scale is found by comparing captured gradients with `p.grad`.

    Raw sums are added up over the ranks whose gradients are averaged: those of `process_group`, of the plan where
    parameters are sharded, of the DDP wrapper that is given as module or in whose forward pass the network is seen to
    run uncompiled; else there is this process alone. Where blocks have owners, matrices go to these alone. With a loss
    that is a sum, DDP's average is that of a loss over the number of ranks: multiply it back.
    """

    shared_options = LAYERS
    factors = _factors.factors

    def __init__(self, params: Any, own: Mapping[str, Any], options: Mapping[str, Any], *, grad_scaler: Any) -> None:
        self._replicas, self._grad_scaler = None, grad_scaler
        self._capture: Capture | None = None
        self._release: Any = None
        self._reset(_NO_MODULE)
        super().__init__(params, own, options)
        module = self._module() if self._module is not None else None
        if module is None:
            warnings.warn(
                f"{type(self).__name__}: {_NO_MODULE}; all parameters are trained by {self._fallback({}).name}. Pass "
                "module=model, or call attach(model)",
                stacklevel=3,
            )
        else:
            self.attach(module)

    def _reset(self, why: str) -> None:
        self._why_detached = why
        self._uncaptured: dict[Tensor, str] = {}
        self._kinds: dict[Tensor, Any] = {}
        self._facts: tuple[Any, ...] = ()
        self._where: dict[int, int] = {}
        self._captured: set[Site] = set()
        self._fresh = True  # taps were set after the last forward pass that could have used them
        self._scaled: blocks.Scales | None = None  # what normalised this step's statistics
        self._reduction: Reduction | None = None  # what travels where processes own blocks
        self._frames: Frames | None = None

    # ------------------------------------------------------------------ the network

    def attach(self, module: nn.Module) -> None:
        """Take the statistics from this network: after a deepcopy or unpickling, or where none was given.

        Args:
            module: The network whose parameters are optimized; wrappers (DDP, `torch.compile`) are seen through.

        Raises:
            TypeError: If it is no module.
            ValueError: If it has none of the optimizer's parameters.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        module, ranks = unwrapped(module)
        mine = {id(p) for g in self.param_groups for p in g["params"]}
        if mine and not any(id(p) in mine for p in module.parameters()):
            raise ValueError("module has none of the optimizer's parameters")
        if self._release is not None:
            self._release()
        self._replicas = ranks
        trained_otherwise = self._why_detached == _NO_MODULE
        self._reset("")
        self._module = weakref.ref(module)
        self._relabel()
        self._capture = Capture(module)
        self._release = weakref.finalize(self, self._capture.release)
        if trained_otherwise:
            self._kinds = dict.fromkeys(self.state)
        else:
            self._uncaptured = {p: _RECALLED for p, entry in self.state.items() if self._is_fallbacks(p, entry)}
        self._follow()
        self._layout.forget()
        if self.state:  # the next backward pass needs the eigenbases
            with torch.no_grad():
                self._current()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `PreconditionedOptimizer`; layers are captured from the next forward pass on."""
        super().add_param_group(param_group)
        if self._capture is not None:
            self._follow()

    def _follow(self) -> None:
        """Bring sites and taps in line with groups and parameters."""
        self._facts = self._seen()
        self._where = {id(p): gi for gi, g in enumerate(self.param_groups) for p in g["params"]}
        if self._capture is None:
            return
        self._capture.scan()
        weights: dict[int, tuple[Treatment, Group]] = {}
        for gi, group in enumerate(self.param_groups):
            for pi, p in enumerate(group["params"]):
                if p.requires_grad and not is_lazy(p):
                    weights[id(p)] = (self._treat(p, group, gi, pi)[1], group)
        wanted: dict[Site, Wants] = {}
        dtypes: dict[Site, torch.dtype] = {}
        for site in self._capture.sites:
            lead, bias = (None if p is None else weights.get(id(p)) for p in (site.weight, site.bias))
            kept = lead if lead is not None and not lead[0].fallback else None
            apart = bias if bias is not None and not bias[0].fallback and bias[0].follows is None else None
            if kept is None and apart is None:
                continue
            group = (kept or apart)[1]  # type: ignore[index]
            site.sharing, site.limit = blocks.sharing(group, site), blocks.limit(group)
            moment = "moment" in self._method(group).statistics((1, 1), (0, 1), ())
            wanted[site] = blocks.wants(site, kept and kept[0], apart and apart[0], moment)
            dtypes[site] = factor_dtype((site.weight if kept is not None else site.bias).dtype)  # type: ignore[union-attr]
            site.active = site.active or not site.leaves
        self._references = references(self._capture.sites, wanted, weights)
        self._capture.install(wanted, dtypes)
        self._sums.follow(leaf for site in wanted for leaf in site.flat)
        self._fresh = True

    def _seen(self) -> tuple[Any, ...]:
        return tuple(
            (id(g), g["sharing"] == "none", *((id(p), p.requires_grad, is_lazy(p)) for p in g["params"]))
            for g in self.param_groups
        )

    def _treat(self, p: Tensor, group: Group, group_index: int, index: int) -> tuple[Method, Treatment]:
        found = self._layer_treatment(p, group, group_index, index)
        if isinstance(found, Treatment):
            return self._method(group), found
        return self._fallback(group), whole(tuple(p.shape), found)

    def _layer_treatment(self, p: Tensor, group: Group, group_index: int, index: int) -> Treatment | str:
        """How a parameter is treated, or why it is left to the fallback."""
        if self._capture is None:
            return self._why_detached
        if group["sharing"] == "none":
            return "sharing='none'"
        if p in self._uncaptured:
            return self._uncaptured[p]
        sites = self._capture.leads.get(id(p))
        if sites:
            bias = sites[0].bias
            joined = bias is not None and self._joins(bias, sites, group_index)
            role = group.get("role") or self._label(group_index, index).role
            return blocks.weight_blocks(sites[0], group, role, id(bias) if joined else None, self._diagonal(group))
        sites = self._capture.biases.get(id(p))
        if not sites:
            return self._capture.reasons.get(id(p), "not a parameter of the module")
        weight = sites[0].weight
        if weight is None or not weight.requires_grad or id(weight) not in self._where:
            why = "the weight is not trained here"
            return blocks.bias_blocks(sites[0], group, None, why, self._diagonal(group)[1])
        at = self._where[id(weight)]
        if self._joins(p, self._capture.leads[id(weight)], at):
            return blocks.follower(sites[0], id(weight))
        where = next(i for i, q in enumerate(self.param_groups[at]["params"]) if q is weight)
        treated = self._layer_treatment(weight, self.param_groups[at], at, where)
        why = "in another group than the weight" if at != group_index else "the weight is used elsewhere too"
        led = None if isinstance(treated, str) else treated
        return blocks.bias_blocks(sites[0], group, led, why, self._diagonal(group)[1])

    def _diagonal(self, group: Group) -> tuple[bool, bool]:
        """Whether the input, the output side of a weight has a diagonal factor whatever its size."""
        del group
        return False, False

    def _joins(self, bias: Tensor, sites: list[Site], group_index: int) -> bool:
        """Whether a bias is a column of the block of the weight that is used at these sites, in this group."""
        assert self._capture is not None
        weight = sites[0].weight
        return (
            bias.requires_grad
            and self._where.get(id(bias)) == group_index
            and all(site.bias is bias for site in sites)
            and len(self._capture.biases[id(bias)]) == len(sites)
            and weight not in self._uncaptured
            and bias not in self._uncaptured
        )

    def _ranks(self) -> Any:
        """The process group over which sums are added up, or None."""
        given = self._sharing.process_group or self._layout.plan.group or self._replicas
        if given is not None or self._capture is None:
            return given
        return next((site.replicas for site in self._capture.sites if site.replicas is not None), None)

    # ------------------------------------------------------------------ the step

    def _current(self) -> Layout:
        if self._why_detached == _DETACHED:
            raise RuntimeError(f"{type(self).__name__}: {_DETACHED} before anything else")
        if self._capture is not None:
            if self._seen() != self._facts:
                self._follow()
                self._layout.forget()
        before = self._layout.buckets
        layout = self._layout.current(self.param_groups, self.state, self._adopt, self._arrange)
        if self._capture is not None and layout.buckets is not before:
            self._bind_frames(layout)
            self._tap_next(layout)
        return layout

    def _adopt(self, p: Tensor, group: Group, group_index: int, index: int) -> tuple[Method, Treatment]:
        """`_treat`; a parameter that is treated otherwise than before starts afresh."""
        if self._capture is not None and p not in self._kinds and self._is_fallbacks(p, self.state.get(p)):
            self._uncaptured[p] = _RECALLED
        method, t = self._treat(p, group, group_index, index)
        kind = None if t.fallback else (t.joined is not None, t.follows is not None, t.view)
        if p in self._kinds and self._kinds[p] != kind and p in self.state:
            if self.state[p].get("step", 0) > 0 and "afresh" not in self._layout.warned:
                self._layout.warned.add("afresh")
                warnings.warn(
                    f"{type(self).__name__}: parameters are treated otherwise than before, and start afresh; "
                    f"{self._label(group_index, index).name}: {t.reason}",
                    stacklevel=2,
                )
            self.state[p].clear()
        self._kinds[p] = kind
        return method, t

    def _update(self, layout: Layout) -> None:
        if self._capture is not None and not self._fresh:
            self._mark_uncaptured()
            layout = self._current()
        super()._update(layout)

    def _mark_uncaptured(self) -> None:
        """Leave to the fallback what has a gradient, but whose layer's forward pass never came by."""
        assert self._capture is not None
        waiting = [s for s in self._capture.sites if s.leaves and s.active and s not in self._captured]
        if not waiting:
            return
        due = [float(any(p is not None and p.grad is not None for p in (s.weight, s.bias))) for s in waiting]
        came = [float(self._capture.received(s) is not None) for s in waiting]
        if self._ranks() is not None:
            device = waiting[0].flat[0].device
            both = all_reduced([torch.tensor([due, came], device=device)], self._ranks())[0]
            due, came = both.tolist()
        missed = []
        for site, here, got in zip(waiting, due, came, strict=True):
            if got:
                self._captured.add(site)
            elif here:
                missed.append(site)
        for site in missed:
            for p in (site.weight, site.bias):
                uses = [] if p is None else [*self._capture.leads.get(id(p), ()), *self._capture.biases.get(id(p), ())]
                if p is not None and all(use in missed for use in uses):
                    self._uncaptured[p] = f"{site.name}: {site.refused or _UNCAPTURED}"
        if missed:
            names = ", ".join(site.name for site in missed)
            warnings.warn(
                f"{type(self).__name__}: there are no statistics of layers that are used without their forward pass; "
                f"{self._fallback({}).name} trains {names}",
                stacklevel=5,
            )
            self._follow()
            self._layout.forget()

    def _is_fallbacks(self, p: Tensor, entry: Any) -> bool:
        """Whether the state of a layer's parameter was made by the fallback."""
        assert self._capture is not None
        served = id(p) in self._capture.leads or id(p) in self._capture.biases
        return served and bool(entry) and self._fallback({}).specs((), (), {}).keys() <= entry.keys()

    @contextlib.contextmanager
    def _expecting(self, state: Mapping[Tensor, Any]) -> Iterator[None]:
        """What the fallback trained while others had statistics goes on so; a state without any does not fit."""
        before = self._uncaptured, self._kinds
        if self._capture is not None:
            left = {p: _RECALLED for p, entry in state.items() if self._is_fallbacks(p, entry)}
            others = any(id(p) in self._capture.leads and p not in left for p, entry in state.items() if entry)
            self._uncaptured, self._kinds = left if others else {}, {}
        try:
            yield
        except Exception:
            self._uncaptured, self._kinds = before
            raise

    def _statistics(self, layout: Layout, flags: Flags) -> Mapping[int, Sums]:
        if self._capture is None:
            return {}
        at = {id(p): i for i, p in enumerate(layout.params)}
        mine = applied([site for site in self._references if site.active], at, layout.plan, flags)
        if self._reduction is not None:
            totals, mine = self._reduction.totals(self._capture, mine)
        else:
            totals = self._capture.totals(self._ranks())
            totals = mirrored(totals) if layout.plan.exact else totals
        self._captured.update(totals)
        out: dict[int, Sums] = {}
        if totals:
            self._scaled = self._scales(totals, mine)
            out = blocks.all_sums(layout, self._capture, totals, self._scaled)
        self._hold_back(layout, flags, out)
        return out

    def _hold_back(self, layout: Layout, flags: Flags, sums: Mapping[int, Sums]) -> None:
        """Until a layer's first statistics come its parameters are left alone, as without a gradient.

        Their clock does not start before, so that the schedule's first observation is not missed.
        """
        at = {id(p): i for i, p in enumerate(layout.params)}
        for i, (_, _, t) in enumerate(layout.treatments):
            lead = i if t.follows is None else at[t.follows]
            if not t.fallback and lead not in sums and layout.clock[lead] == 0:
                flags.leave_out(i)

    def _scales(self, totals: blocks.Totals, applied: Mapping[Site, Tensor]) -> blocks.Scales:
        assert self._capture is not None
        mean = self.param_groups[0]["loss_reduction"] == "mean"
        if self._capture.terms is not None:
            terms = self._capture.terms.clamp_min(1)
            one = torch.ones_like(terms)
            return blocks.Scales(1 / terms if mean else one, terms if mean else one)
        found = {site: totals[site] for site in self._references if site in totals}
        if not found:  # no reference took part in this step
            rows = next(iter(totals.values()))["rows"][0].sum()
            terms = rows if mean else torch.ones_like(rows)
            return blocks.Scales(terms, terms)
        terms = loss_terms([got["terms"][0] for got in found.values()])
        terms = terms if mean else torch.ones_like(terms)
        # Gradients are averaged over ranks: a term counts 1/world there, whether the local loss is a mean or a sum.
        world = 1 if self._ranks() is None else torch.distributed.get_world_size(self._ranks())
        probes = dict(zip(found, torch._foreach_div([got["probe"][0] for got in found.values()], world), strict=True))
        scale = loss_scale(probes, applied, None if self._from_residuals else self._grad_scaler)
        return blocks.Scales(terms / (scale * world) ** 2, terms, (probes, applied, scale))

    def _unclipped(self) -> Tensor | float:
        return 1.0 if self._scaled is None or self._scaled.probed is None else unclipped(*self._scaled.probed)

    def track(self, every: int = 1, samples: int = 0) -> None:
        """See `PreconditionedOptimizer.track`.

        Args:
            every: See there.
            samples: Examples of every backward pass (in this process) on which `diagnostics()` tells the largest
                eigenvalues of the curvature, exactly and over all tapped layers together, as `ggn_top_1` to
                `ggn_top_5`: of the empirical Fisher matrix; after `fisher_backward` of the generalised Gauss-Newton
                matrix (unless `kind="type-2"`, of a sample of it) for one loss term per example. Left out where the
                network is compiled, a layer runs twice, or layers differ in the number of examples. Default: 0.

        Raises:
            ValueError: If one of them is no whole number >= 0.
        """
        if not isinstance(samples, int) or samples < 0:
            raise ValueError(f"samples must be a whole number >= 0, got {samples!r}")
        super().track(every)
        self._watch.samples = int(samples)
        self._sample_next()

    def _sample_next(self) -> None:
        """Keep rows of examples in the next call, if it is measured."""
        wanted = self._watch.wants_statistics(1 + int(max(self._layout.clock.tolist(), default=0)))
        for site in self._capture.sites if self._capture is not None else ():
            site.samples = self._watch.samples if wanted else 0

    def _spectrum(self) -> Tensor | None:
        found = None if self._capture is None or self._scaled is None else self._capture.overlaps(self._where)
        if found is None or self._scaled is None:
            return None
        return linalg.eigh(found[None])[0][0] * (self._scaled.outputs * self._scaled.terms)

    def _after_step(self, layout: Layout) -> None:
        """Forget what was used."""
        if self._capture is not None:
            self._capture.finish()
            if self._frames is not None:
                self._frames.share_refreshed()
            self._fresh, self._scaled = False, None
            self._tap_next(layout)

    def _tap_next(self, layout: Layout) -> None:
        """Tap the layers that the next call observes."""
        assert self._capture is not None
        calls = {id(p): int(t) for p, t in zip(layout.params, layout.clock.tolist(), strict=True)}
        for site in self._capture.sites:
            if site.leaves:
                active = False
                for p in (site.weight, site.bias):
                    if p is not None and id(p) in calls:
                        group = self.param_groups[self._where[id(p)]]
                        active |= self._method(group).observes(calls[id(p)] + 1, group)
                site.active = active
        self._sample_next()

    def fisher_backward(
        self,
        outputs: Tensor,
        loss: Loss,
        kind: Kind = "mc",
        samples: int = 1,
        *,
        mask: Tensor | None = None,
        class_dim: int = -1,
        generator: torch.Generator | None = None,
    ) -> None:
        """Take this step's statistics from the model's own distribution (true Fisher) instead of from the labels.

        Call it between the forward pass and `loss.backward()`, in every micro-batch. No `p.grad` is touched, and no
        parameter's gradient computed; the statistics of `loss.backward()` are left out then. In calls of the schedule
        that observe nothing it returns at once.

        Args:
            outputs: Logits, or predictions for `"mse"`, with the graph of this forward pass: one loss term per row
                `(..., C)`. A vector `(N,)` counts as `(N, 1)`.
            loss: What the model is trained with: `"cross_entropy"`, `"mse"` or `"bce"` (of logits), as torch defines
                them, with the optimizer's `loss_reduction`.
            kind: `"type-2"` is exact and needs C backward passes; `"mc"` samples labels, `"curvature_prop"` signs.
            samples: Number of samples.
            mask: True for loss terms that count, of the shape of `outputs` without its class axis.
            class_dim: The axis of the C outputs of a term.
            generator: Source of randomness; default: torch's global one.

        Raises:
            ValueError: For a value that is not allowed, or outputs without a graph.
        """
        f = outputs.detach()
        f = f[:, None] if f.ndim == 1 else f.movedim(class_dim, -1)
        vectors = fisher_vectors(f, loss, kind, samples, self.param_groups[0]["loss_reduction"], mask, generator)
        if self._capture is None or not any(site.active and site.leaves for site in self._capture.sites):
            return
        if not outputs.requires_grad:
            raise ValueError("outputs must have the graph of the forward pass: call fisher_backward before backward()")
        back = (v[:, 0] if outputs.ndim == 1 else v.movedim(-1, class_dim) for v in vectors)
        self._capture.fisher(outputs, back, terms(f, mask))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; statistics of backward passes whose gradients go are dropped with them."""
        super().zero_grad(set_to_none)
        if self._capture is not None:
            self._capture.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_capture" not in self.__dict__:  # a copy: hooks stay with the original
            attached = self.__dict__.pop("_attached", False)
            self._replicas, self._grad_scaler, self._capture, self._release = None, None, None, None
            self._reset(_DETACHED if attached else _NO_MODULE)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_attached": self._capture is not None or self._why_detached == _DETACHED}

    def _bind_frames(self, layout: Layout) -> None:
        """Show the sites the eigenbases of their blocks; where others own blocks, lay out what travels for them."""
        assert self._capture is not None
        self._frames = self._reduction = None
        plan: Any = layout.plan
        if plan.group is None:
            found = [b for b in layout.buckets if isinstance(b, Bucket) and "moment" in b.s]
            blocks.bind_frames(layout, self._capture, (pair for b in found for pair in bases(b)))
            return
        device = next((p.device for p in layout.params), torch.device("cpu"))
        self._reduction = Reduction(plan, device, blocks.readers(layout, self._capture, plan.owner))
        self._frames = Frames(plan, layout)
        blocks.bind_frames(layout, self._capture, self._frames.bases())
        self._frames.share_all()
