"""PreconditionedOptimizer: the contract of `torch.optim.Optimizer`, and the one step.

No mathematics here. A subclass gives the row of the table (`_method`), how parameters are cut (`_blocks`), its options,
and a constructor that spells out its own hyper-parameters.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn

from secondorder import _reports
from secondorder._inspection import Inspection
from secondorder._options import COMMON, FOREIGN_KEYS, KRONECKER, Option, expand_signature, resolve, validate
from secondorder._roles import Label, labels
from secondorder._step import Held, advance, commit, settle
from secondorder._watch import Watch
from secondorder.curvature.layer import Sums
from secondorder.layout import checkpoint
from secondorder.layout.blocks import Treatment, elementwise_blocks, matrix_blocks
from secondorder.layout.faces import Layout
from secondorder.layout.plan import Flags, SinglePlan
from secondorder.preconditioner.elementwise import AdamWMethod
from secondorder.preconditioner.protocol import Method
from secondorder.residuals.terms import Terms, residual_terms
from secondorder.sharding.choice import Sharing, check_rounding, chosen_plan, group_facts
from secondorder.sharding.sync import attach_hook, clip_grad_norm_, warn_uneven
from secondorder.sharding.tree import TreeSums

Group = dict[str, Any]


class PreconditionedOptimizer(Inspection):
    """Base class: everything that a method shares with all others.

    Class attributes that a subclass sets:
        shared_options: The table of options behind `**options`.
        own_options: Checks of its own keyword arguments, by name.
    """

    shared_options: ClassVar[Mapping[str, Option]] = KRONECKER
    own_options: ClassVar[Mapping[str, Option]] = {}
    clip_grad_norm_ = clip_grad_norm_
    _hook: Any = None
    _from_residuals = False  # this step is that of a residual closure, whose loss no GradScaler has scaled

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            expand_signature(cls, cls.shared_options)

    def __init__(self, params: Any, own: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Check everything, then build the groups.

        Args:
            params: Tensors, dicts of a group each, or `(name, tensor)` pairs.
            own: The subclass's own hyper-parameters, `lr`, `betas`, `eps` and `weight_decay` among them.
            options: What the user gave of `shared_options`.

        Raises:
            TypeError: For an unknown option, or `params` that are no iterable of tensors or groups.
            ValueError: For a value that is not allowed.
        """
        shared = {k: v for k, v in self.shared_options.items() if k not in own}
        resolved = resolve(type(self).__name__, shared, options)
        defaults = {**own, **resolved}
        validate(defaults, self._checks())
        module = defaults.pop("module")
        self._sharing = Sharing(*(defaults.pop(name) for name in Sharing._fields))
        if isinstance(params, nn.Module):
            raise TypeError(
                f"params must be an iterable of tensors or groups, got a {type(params).__name__}: pass "
                "its .parameters()"
            )
        if isinstance(params, dict):
            raise TypeError("params must be an iterable of tensors or groups, got one dict: pass a list of dicts")
        self._module = None if module is None else weakref.ref(module)
        self._labels: list[list[Label]] = []
        self._layout, self._watch, self._sums = Layout(SinglePlan()), Watch(), TreeSums(self._sharing.reproducible)
        super().__init__(params, defaults)
        attach_hook(self, module)

    # ------------------------------------------------------------------ what a subclass says

    def _method(self, group: Group) -> Method:
        """The row of the table, for a group's hyper-parameters."""
        raise NotImplementedError

    def _fallback(self, group: Group) -> Method:
        """The method of what is not preconditioned."""
        del group
        return AdamWMethod()

    def _blocks(self, shape: tuple[int, ...], group: Group, role: str | None) -> Treatment:
        """How a parameter is cut."""
        return matrix_blocks(shape, group, role)

    def _groups(self) -> Sequence[Group]:
        """The groups as methods read them: what was measured is in the place of the word that asks for it."""
        return self.param_groups

    def _statistics(self, layout: Layout, flags: Flags) -> Mapping[int, Sums]:
        """Layer statistics of this step, by index of the leading parameter."""
        del layout, flags
        return {}

    def _unclipped(self) -> Tensor | float:
        """By what the gradients must be multiplied to be those that this step's statistics saw."""
        return 1.0

    def _spectrum(self) -> Tensor | None:
        """Eigenvalues of the curvature on some examples of this step."""
        return None

    def _before_settling(self, layout: Layout, held: Sequence[Held], call: int) -> None:
        """All directions that wait for each other are there; `call` counts from 1."""

    def _before_commit(self, held: Sequence[Held]) -> None:
        """Their updates are final."""

    def _after_step(self, layout: Layout) -> None:
        """Called after every step that took place or was refused."""

    @contextlib.contextmanager
    def _expecting(self, state: Mapping[Tensor, Any]) -> Iterator[None]:
        """Around the check of a state that is to be loaded; if the check raises, all must be as it was."""
        yield

    # ------------------------------------------------------------------ groups

    def _checks(self) -> dict[str, Option]:
        return {**self.shared_options, **self.own_options}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time: its parameters start with clocks of their own.

        Raises:
            TypeError: For complex parameters, and what torch refuses.
            ValueError: For a hyper-parameter that is not allowed.
        """
        if isinstance(param_group, dict):
            validate({**self.defaults, **param_group}, self._checks())
            unknown = sorted(set(param_group) - set(self.defaults) - FOREIGN_KEYS)
            if unknown:
                warnings.warn(f"{type(self).__name__}: unknown keys in a parameter group: {unknown}", stacklevel=2)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for p in group["params"]:
                _refuse(type(self).__name__, p)
        except TypeError:
            self.param_groups.pop()
            raise
        module = self._module() if self._module is not None else None
        self._labels.append(labels(group, len(self.param_groups) - 1, module))
        self._sums.follow(group["params"])

    def _relabel(self) -> None:
        """Names and roles from the present module."""
        module = self._module() if self._module is not None else None
        self._labels[:] = [labels(group, gi, module) for gi, group in enumerate(self.param_groups)]

    def _label(self, group_index: int, index: int) -> Label:
        group, known = self.param_groups[group_index], self._labels[group_index : group_index + 1]
        if not known or index >= len(known[0]):  # somebody appended to group["params"], or to param_groups
            module = self._module() if self._module is not None else None
            self._labels[group_index : group_index + 1] = known = [labels(group, group_index, module)]
        return known[0][index]

    def _treat(self, p: Tensor, group: Group, group_index: int, index: int) -> tuple[Method, Treatment]:
        _refuse(type(self).__name__, p)
        role = group.get("role") or self._label(group_index, index).role
        treatment = self._blocks(tuple(p.shape), group, role)
        return (self._fallback(group) if treatment.fallback else self._method(group)), treatment

    def _current(self) -> Layout:
        return self._layout.current(self.param_groups, self.state, self._treat, self._arrange)

    def _chosen_plan(self, layout: Layout) -> Any:
        params = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        return chosen_plan(layout.plan, params, self._sharing, self._hook)

    def _arrange(self, layout: Layout) -> None:
        """Give the layout its plan, and let the processes compare what they have."""
        layout.plan = self._chosen_plan(layout)
        if layout.plan.group is not None:
            check_rounding(self.param_groups)
        names: dict[int, str] = {}
        for gi, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                names.setdefault(id(p), self._label(gi, i).name)
        facts = group_facts(self.param_groups, self._sharing)
        layout.plan.meet(type(self).__name__, layout.params, [names[id(p)] for p in layout.params], facts)

    # ------------------------------------------------------------------ the step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Reevaluates the model; called with gradients enabled. It returns the loss, after its `backward()`;
                or residuals r of a least-squares loss, by name or in a list (see `residuals.terms`). Then `step`
                itself clears the gradients of its parameters and leaves those of ½‖r‖², `Jᵀ r`, in them.

        Returns:
            The closure's loss (of residuals without a graph), or None.

        Raises:
            TypeError, ValueError: For residuals that make no least-squares loss.
            RuntimeError: For sparse gradients; with `on_nonfinite="raise"`, for gradients that are not usable.
        """
        loss = terms = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
                terms = residual_terms(loss)
                if terms is not None:
                    loss = self._differentiate(terms)
        self._from_residuals = terms is not None
        layout = self._current()
        self._sums.forget()
        if layout.params:
            with _full_precision(layout):
                self._update(layout)
        return loss

    def _differentiate(self, terms: Terms) -> Tensor:
        """The loss of residuals, whose gradients `Jᵀ r` are in `p.grad` then."""
        self.zero_grad()
        return terms.backward()

    def _update(self, layout: Layout) -> None:
        for p in layout.params:
            if (grad := p.grad) is not None and grad.layout is not torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients, please consider torch.optim.SparseAdam"
                )
        plan = layout.plan
        flags = plan.flags(layout.params, self._groups())
        if not flags.differ and (not any(flags.present) or self._is_empty(flags)):
            plan.finish([], flags, self._groups(), [])
            return
        flags.sums = self._statistics(layout, flags)
        present = flags.present
        if any(g["on_nonfinite"] == "raise" for g in self.param_groups):
            self._raise_if_refused(layout, flags)
        if flags.differ:
            plan.finish([], flags, self._groups(), [])
            layout.count_refused(flags)
            self._warn(layout, wait=False)
            return
        calls = [int(t) + here for t, here in zip(layout.clock.tolist(), present, strict=True)]
        stored, groups = [plan.local(p) for p in layout.params], self._groups()
        how = (plan, stored, flags, groups, calls)
        before = self._watch.before(layout.params, max(calls))
        held = advance([b for b in layout.buckets if b.held], *how)
        self._before_settling(layout, held, max(calls))
        settle(held, layout, groups)
        self._before_commit(held)
        # No parameter has changed yet: up to here, the graph of a forward pass can be gone through again.
        advance([b for b in layout.buckets if not b.held], *how)
        commit(held, plan, stored, flags)
        plan.finish(stored, flags, groups, calls)
        if self._watch.every:
            self._watch.after(layout, flags, self.param_groups, before, self._unclipped, self._spectrum)
        layout.tick(present)
        layout.count_refused(flags)
        self._after_step(layout)
        self._warn(layout, wait=False)

    def _is_empty(self, flags: Flags) -> bool:
        """The dry run by which checkpointing creates state: lr 0 in all groups, all gradients exactly zero.

        Only with lr 0 is the device asked; a learning rate that lives on a device is not.
        """
        for g in self.param_groups:
            if (isinstance(g["lr"], Tensor) and g["lr"].device.type != "cpu") or g["lr"] != 0:
                return False
        return flags.gradient_norm is not None and flags.gradient_norm.item() == 0

    def _raise_if_refused(self, layout: Layout, flags: Flags) -> None:
        if all(bool(ok) for ok in flags.ok.values()):
            return
        end = "State and parameters are unchanged."
        if flags.differ:
            raise RuntimeError(
                f"{type(self).__name__}: the processes differ in which parameters have gradients, or in lr or "
                f"weight_decay. {end}"
            )
        bad = []
        for members, usable, norms in flags.norms:
            bad += [(i, float(n)) for i, u, n in zip(members, usable.tolist(), norms.tolist(), strict=True) if not u]
        if not bad:
            raise RuntimeError(
                f"{type(self).__name__}: another process has a gradient that is not finite or too large, and says "
                f"which. {end}"
            )
        where = {}
        for gi, g in enumerate(self.param_groups):
            where.update({id(p): self._label(gi, pi).name for pi, p in enumerate(g["params"])})
        first, norm = bad[0]
        raise RuntimeError(
            f"{type(self).__name__}: {len(bad)} parameters have gradients that are not finite or too large; the first "
            f"is {where[id(layout.params[first])]} of shape {tuple(layout.params[first].shape)}, with "
            f"gradient norm {norm}. {end}"
        )

    def _warn(self, layout: Layout, wait: bool) -> None:
        """Warn once of each kind of failure; `wait`: also where a device must be asked."""
        for kind, count in layout.failures(wait).items():
            if count and kind not in layout.warned:
                layout.warned.add(kind)
                warnings.warn(f"{type(self).__name__}: {_reports.FAILURES[kind]} (see diagnostics())", stacklevel=4)
        warn_uneven(self, wait)

    # ------------------------------------------------------------------ state

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As in torch; entries are views into the stacks. Creates the state where there is none yet."""
        with torch.no_grad():
            layout = self._current()
        self._warn(layout, wait=True)
        return super().state_dict()

    @torch._disable_dynamo
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` saved. Dtypes stay ours, values are copied, devices follow the parameters.

        Raises:
            ValueError: Where the dict does not fit, on this process or on another that shares the blocks; nothing has
                changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        if self._chosen_plan(self._layout).group is not None:
            with torch.no_grad():
                self._current()  # who owns what
        fault: Exception | None = None
        try:
            groups = checkpoint.merged_groups(state_dict, self.param_groups, self.defaults)
            for group in groups:
                validate(group, self._checks())
            with self._expecting(checkpoint.by_parameter(state_dict, groups)):
                fits = Layout.ghost(self._layout.plan, groups, self._treat)
                checkpoint.check(state_dict, groups, fits)
                state = checkpoint.adoptable(state_dict, groups, fits)
        except Exception as error:
            fault = error
        facts = group_facts(self.param_groups if fault else groups, self._sharing)
        self._layout.plan.agree(fault, type(self).__name__, facts)
        self._layout.forget()
        self.__setstate__({"state": defaultdict(dict, state), "param_groups": groups})
        self._current()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # Views would drag their whole stack into a pickle, each of them.
        state = {p: _detached(entries) for p, entries in self.state.items()}
        sharing = self._sharing._replace(process_group=None, sync="ddp")
        kept = {"state": defaultdict(dict, state), "_labels": self._labels, "_sharing": sharing}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_layout" not in self.__dict__:
            self._layout, self._watch, self._sums = Layout(SinglePlan()), Watch(), TreeSums(self._sharing.reproducible)
            self._sums.follow(p for g in self.param_groups for p in g["params"])
            self._module = None


class ElementwiseOptimizer(PreconditionedOptimizer):
    """Base class of methods that act element by element: no blocks, no factors, no fallback."""

    shared_options = COMMON

    def _blocks(self, shape: tuple[int, ...], group: Group, role: str | None) -> Treatment:
        return elementwise_blocks(shape, group, role)


def _refuse(name: str, p: Tensor) -> None:
    """Refuse parameters that no method of the suite can take."""
    if p.is_complex():
        raise TypeError(f"{name} does not support complex parameters: optimize torch.view_as_real of them")


def _detached(value: Any) -> Any:
    """A copy of nested entries whose tensors have memory of their own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return {k: _detached(v) for k, v in value.items()} if isinstance(value, dict) else value


@contextlib.contextmanager
def _full_precision(layout: Layout) -> Iterator[None]:
    """Keep an ambient autocast away from our products."""
    with contextlib.ExitStack() as stack:
        for kind in {b.device.type for b in layout.buckets}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
