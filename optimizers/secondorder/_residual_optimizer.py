"""ResidualOptimizer: optimizers that step by all residuals of a least-squares loss, not by its gradient alone.

    closure -> r, J at θ -> damped system -> increment δ -> step size α, by looking at the loss again -> θ + α δ

A subclass says what δ is: by `_system`, what is solved with J; by `_increment`, what it makes of r with it. What a step
needs besides is here: the closure several times, groups, state, and what becomes of steps that fail. Without residuals
(a closure that returns a loss, or none) the engine takes the step, by AdamW.

All groups share one system: its options, the damping that adapts, the last step size and the number of steps by
residuals are values of every group, the same in all, so that they are saved with them.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from secondorder._optimizer import Group, PreconditionedOptimizer
from secondorder._options import BLOCKS, COMMON, CommonOptions, Option, is_count, is_number, one_of, optional
from secondorder._reports import Coverage
from secondorder._residual_step import SEARCHES, Attempt, Evaluation, Path, Replay, norm
from secondorder._roles import unwrapped
from secondorder.layout.blocks import Treatment, elementwise_blocks
from secondorder.layout.faces import Layout
from secondorder.layout.plan import Flags
from secondorder.preconditioner.elementwise import AdamWMethod
from secondorder.preconditioner.protocol import Method, Modes, Spec
from secondorder.residuals.ladder import MOST, larger_wins, rung
from secondorder.residuals.linearization import Linearization
from secondorder.residuals.solve import DAMPING_KINDS
from secondorder.residuals.system import FORMS, SOLVERS, System, system
from secondorder.residuals.terms import Terms, residual_terms
from secondorder.sharding.samples import Learned, linearized

ROUNDED = 1e-6  # damping where parameters are less than float64


class ResidualOptions(CommonOptions, total=False):
    """Options of every optimizer that steps by residuals (see `RESIDUAL`)."""

    fallback_lr_scale: float


# What a step by residuals can have of some options, and why; AdamW has all of them.
SUITABLE: dict[str, tuple[Any, str]] = {
    "weight_decay_kind": ("decoupled", "an l2 penalty is a residual of its own, term(p, weight_decay, 'sum')"),
    "maximize": (False, "a sum of squares is minimized"),
    "max_update_rms": (None, "the step size is found, or bounded, for all parameters together"),
    "param_rounding": ("nearest", "a step size is judged at the parameters that are written"),
}

RESIDUAL: dict[str, Option] = {
    **COMMON,
    **{
        name: COMMON[name]._replace(doc=f"{COMMON[name].doc} Of AdamW; steps by residuals need {suitable!r}: {why}.")
        for name, (suitable, why) in SUITABLE.items()
    },
    "on_nonfinite": COMMON["on_nonfinite"]._replace(
        doc="what becomes of a step whose residuals are not finite, or whose system cannot be solved: leave state and "
        "parameters as they are and count it, or raise RuntimeError."
    ),
    "process_group": COMMON["process_group"]._replace(
        doc="the processes whose samples make one loss: each one's closure returns the residuals of its own samples, "
        "N_t are all of them, and all processes must call step(). None: those of the DDP module that is `module` or "
        "that the closure calls, else this process alone."
    ),
    "module": COMMON["module"]._replace(
        doc="the network, for the names of its parameters, and so that J is checked anew when `train()` or `eval()` "
        "changed it."
    ),
    "fallback_lr_scale": BLOCKS["fallback_lr_scale"]._replace(
        default=1e-3, doc="learning rate of AdamW, where the closure returns a loss, relative to `lr`."
    ),
}

SYSTEM: dict[str, Option] = {
    "line_search": Option(None, f"None, {one_of(*SEARCHES)[0]}", optional(one_of(*SEARCHES)[1]), ""),
    "damping": Option(None, "None or a number >= 0", optional(lambda v: is_number(v) and v >= 0), ""),
    "damping_kind": Option(None, *one_of(*DAMPING_KINDS), ""),
    "form": Option(None, *one_of(*FORMS), ""),
    "solver": Option(None, *one_of(*SOLVERS), ""),
    "rank": Option(None, "None or an int >= 1", optional(is_count), ""),
}

PROGRESS: dict[str, Option] = {  # no arguments: what the last step leaves to the next
    "step_size": Option(0.0, "a number >= 0", lambda v: is_number(v) and v >= 0, ""),
    # Pairs of an adaptive damping's level and α. No dict: torch's checkpoints take one apart, and an empty one is gone.
    "step_sizes": Option((), "a tuple", lambda v: isinstance(v, tuple), ""),
    "level": Option(0, "an int", lambda v: is_number(v), ""),
    "trend": Option(1, "1 or -1", lambda v: v in (1, -1), ""),  # which of its neighbours is next to compete
    "residual_steps": Option(0, "a number >= 0", lambda v: is_number(v) and v >= 0, ""),
    "effective_dimension": Option(None, "None or a number >= 0", optional(lambda v: is_number(v) and v >= 0), ""),
}


@dataclass(frozen=True)
class Remembering(AdamWMethod):
    """AdamW, with room for what the residual method keeps of a parameter.

    Attributes:
        memory: Name of an entry shaped like the parameter; None: nothing is kept.
    """

    memory: str | None = None

    def specs(
        self, shape: tuple[int, ...], modes: Modes, hp: Mapping[str, Any], diagonal: Modes = ()
    ) -> dict[str, Spec]:
        """See `Method`."""
        kept = {} if self.memory is None else {self.memory: Spec(shape)}
        return {**super().specs(shape, modes, hp, diagonal), **kept}


class ReturnsLoss(Exception):
    """The closure returned a loss where residuals were expected."""


class ResidualOptimizer(PreconditionedOptimizer):
    """Base class of methods that step by residuals.

    Class attributes that a subclass sets:
        own_options: Checks of its own keyword arguments, those of the system (`SYSTEM`) among them; all of them are the
            same in all groups.
        memory: Name of what it keeps in `state[p]`, shaped like the parameter; None: nothing.
        exact_damping: Where parameters are float64 and damping is None.
    """

    shared_options = RESIDUAL
    own_options = SYSTEM
    memory: ClassVar[str | None] = None
    exact_damping: ClassVar[float] = 1e-10
    _expected = False  # the last closure returned residuals
    _learned: tuple[Any, Learned] | None = None  # about the closure, and about which parameters and modules
    _evaluation: Evaluation | None = None  # of the step that is being taken
    _report: Mapping[str, Any] | None = None
    _backend: str | None = None  # how J was computed in the last step by residuals

    def __init__(self, params: Any, own: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        if own.get("solver", "cholesky") != "cholesky" and own["form"] != "auto":
            raise ValueError(f"form must be 'auto' with solver={own['solver']!r}, got {own['form']!r}")
        super().__init__(params, {**own, **{name: option.default for name, option in PROGRESS.items()}}, options)

    # ------------------------------------------------------------------ what a subclass says

    def _system(self, linear: Linearization, params: Sequence[Tensor], hp: Group) -> System:
        """What is solved with J: by default the damped system of all parameters."""
        how = (self._damping(params, hp["level"]), hp["damping_kind"], hp["form"], hp["solver"], hp["rank"])
        seed = hp["residual_steps"] + 1
        return system(linear, params, *how, dimension=hp["effective_dimension"], step=seed)

    def _increment(self, linear: Linearization, system: System, step: int) -> Sequence[Tensor]:
        """δ, one tensor a parameter; `step` counts steps by residuals, from 1."""
        return system.apply(-linear.residual)

    def _factor(self, lr: float, length: Tensor, step: int) -> Tensor | float:
        """By what a δ of this length is multiplied without a line search."""
        return lr

    def _keep(self, increment: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        """The step takes place: keep of δ what the next one needs."""

    def _damping(self, params: Sequence[Tensor], level: int) -> float:
        """The factor of λ; of an adaptive one, that of a level."""
        hp, exact = self.param_groups[0], all(p.dtype == torch.float64 for p in params)
        usual = self.exact_damping if exact else ROUNDED
        adaptive = hp.get("damping_kind") == "adaptive"
        if hp["damping"] is not None:
            damping = float(hp["damping"])
        else:
            damping = math.sqrt(usual * MOST) if adaptive else usual
        return rung(damping, level, usual / 10) if adaptive and hp["line_search"] is not None else damping

    # ------------------------------------------------------------------ groups

    def _checks(self) -> dict[str, Option]:
        return {**super()._checks(), **PROGRESS}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time.

        Raises:
            TypeError: For complex parameters, and what torch refuses.
            ValueError: For a hyper-parameter that is not allowed, or one of the common system that differs.
        """
        if isinstance(param_group, dict) and self.param_groups:
            for name in (*self.own_options, *PROGRESS):
                shared = self.param_groups[0][name]
                if param_group.setdefault(name, shared) != shared:
                    raise ValueError(
                        f"{name} must be {shared!r} in all groups, which share one system, got {param_group[name]!r}"
                    )
        super().add_param_group(param_group)

    def _put(self, **values: Any) -> None:
        """Values of all groups."""
        for g in self.param_groups:
            g.update(values)

    def _method(self, group: Group) -> Method:
        return Remembering(self.memory)

    def _blocks(self, shape: tuple[int, ...], group: Group, role: str | None) -> Treatment:
        why = "by residuals; where the closure returns a loss, by AdamW"
        return replace(elementwise_blocks(shape, group, role), reason=why)

    def _groups(self) -> Sequence[Group]:
        """As AdamW reads them."""
        return [{**g, "lr": g["lr"] * g["fallback_lr_scale"]} for g in self.param_groups]

    # ------------------------------------------------------------------ evaluation

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Returns residuals r, by name or in a list (see `residuals.terms`), and calls no backward. It is
                evaluated several times, at different parameters; random numbers of torch's global generators are the
                same every time. With a closure that returns a loss after its `backward()`, or without one, AdamW
                takes the step from `p.grad`.

        Returns:
            The loss before the step, ½ |r|², without a graph; `p.grad` is `Jᵀ r` there. Of a closure with a loss, what
            it returned; without one, None.

        Raises:
            TypeError: For residuals that make no least-squares loss.
            ValueError: The same; or for options that steps by residuals cannot have.
            RuntimeError: With `on_nonfinite="raise"`, for a step that cannot be taken. In a group of processes, for a
                closure that raised on another one; all of them are told, but not of its very first evaluation.
        """
        try:
            return super().step(None if closure is None else partial(self._evaluate, closure))
        finally:
            self._evaluation = None

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """What the closure returns; of residuals, `_evaluation` as well."""
        with torch.no_grad():
            params = self._current().params
        replay = Replay(closure, {p.device for p in params})
        found = None
        if not self._expected:  # as its caller wrote it, for it may be a loss, whose DDP sends gradients
            found = replay()
            self._expected = residual_terms(found) is not None
        if self._expected:
            try:
                with _unchanged_gradients(params):
                    return self._linearized(replay, params)
            except ReturnsLoss:
                self._expected, self._learned = False, None
                return replay()
        return found

    def _linearized(self, replay: Replay, params: Sequence[Tensor]) -> Any:
        """The residuals as the closure returned them last; `_evaluation` is theirs."""
        last: list[Any] = []

        def evaluate() -> Any:
            last[:] = [replay()]
            if (terms := residual_terms(last[0])) is None:
                raise ReturnsLoss
            self._check_suitable(self._layout)
            terms.check_search(self.param_groups[0]["line_search"])
            return last[0]

        group = self._sharing.process_group or self._replicas()
        terms, linear, replay.group = linearized(evaluate, params, self._memory(params), group)
        self._backend = linear.backend
        if linear.backend == "matvec":
            what = "no rows of J can be had from this closure, so that every product with it takes a pass of autograd"
            self._say(self._layout, "matvec", f"{what}: {linear.reason}")
        (found,) = last
        self._evaluation = Evaluation(replay, linear, terms.loss().detach())
        return found

    def _replicas(self) -> Any:
        """The processes of the DDP module that was given; those of one that the closure calls need not be known."""
        module = self._module() if self._module is not None else None
        return None if module is None else unwrapped(module)[1]

    def _memory(self, params: Sequence[Tensor]) -> Learned:
        """What is known of the closure, as long as parameters and modes of modules are the same."""
        module = self._module() if self._module is not None else None
        key = tuple(map(id, params)), () if module is None else tuple(m.training for m in module.modules())
        if self._learned is None or self._learned[0] != key:
            self._learned = key, Learned()
        return self._learned[1]

    def _differentiate(self, terms: Terms) -> Tensor:
        assert self._evaluation is not None
        self.zero_grad()
        for p, part in zip(self._layout.params, self._evaluation.linear.gradient, strict=True):
            p.grad = part.clone()
        return self._evaluation.loss

    # ------------------------------------------------------------------ the step

    def _update(self, layout: Layout) -> None:
        if self._evaluation is None:
            super()._update(layout)
            return
        flags = layout.plan.flags(layout.params, self.param_groups)
        if any(g["on_nonfinite"] == "raise" for g in self.param_groups):
            self._raise_if_refused(layout, flags)
        if all(bool(ok) for ok in flags.ok.values()):
            self._move(self._evaluation, layout, flags)
        layout.tick(flags.present)
        layout.count_refused(flags)
        self._warn(layout, wait=False)

    def _check_suitable(self, layout: Layout) -> None:
        if layout.plan.group is not None:
            raise ValueError(f"{type(self).__name__} needs parameters that one process keeps whole, got sharded ones")
        for g in self.param_groups:
            for name, (suitable, why) in SUITABLE.items():
                if g[name] != suitable:
                    raise ValueError(
                        f"{name} must be {suitable!r} where the closure returns residuals ({why}), got {g[name]!r}"
                    )

    def _move(self, found: Evaluation, layout: Layout, flags: Flags) -> None:
        """Solve, search, and write; nothing is written where the system cannot be solved."""
        params, hp = layout.params, self.param_groups[0]
        groups = [self.param_groups[at] for at, _, _ in layout.treatments]
        rates = [float(g["lr"]) for g in groups]
        lr = max(rates)
        if lr == 0:
            return
        step = hp["residual_steps"] + 1
        shares = [rate / lr for rate in rates]  # groups of smaller lr go a part of the way, in a search too
        before = self._watch.before(params, step)
        measured = before is not None or (hp.get("solver") == "nystrom" and hp["rank"] is None)
        attempt = partial(self._attempt, found, params, shares=shares, lr=lr, step=step, measured=measured)
        progress: dict[str, Any] = {}
        solved = self._system(found.linear, params, hp)
        again = solved.again
        taken = attempt(solved, hp["level"])
        del solved  # one factor at a time: each has as many numbers as the matrix
        if hp.get("damping_kind") == "adaptive" and hp["line_search"] is not None and again is not None:
            taken, progress = self._compete(found, taken, again, attempt, params)
        if not taken.possible:
            self._fail(layout, flags)
            return
        taken.path.place(taken.factor, [1 - rate * g["weight_decay"] for rate, g in zip(rates, groups, strict=True)])
        torch.autograd.graph.increment_version(params)
        self._keep(taken.increment, params)
        self._put(residual_steps=step, **progress)
        if taken.found is not None:
            alpha = taken.found.alpha
            self._put(step_sizes=_with(hp["step_sizes"], hp["level"], alpha), step_size=alpha)
        report: dict[str, Any] = {"loss": found.loss, "damping": taken.damping, "increment_norm": taken.length}
        if taken.dimension is not None:
            self._put(effective_dimension=float(taken.dimension))
            report["effective_dimension"] = taken.dimension
        if self._watch.every:
            self._watch.after(layout, flags, self.param_groups, before, self._unclipped, self._spectrum)
        if taken.found is not None:
            report["evaluations"] = taken.evaluations
        self._report = {**report, "step_size": taken.factor}

    def _attempt(
        self,
        found: Evaluation,
        params: Sequence[Tensor],
        solved: System,
        level: int,
        *,
        shares: Sequence[float],
        lr: float,
        step: int,
        measured: bool,
    ) -> Attempt:
        """What becomes of a step with this system; the parameters are where they were."""
        hp = self.param_groups[0]
        increment = self._increment(found.linear, solved, step)
        length = norm(increment)
        path = Path(params, [p if share == 1 else p.mul(share) for p, share in zip(increment, shares, strict=True)])
        search = hp["line_search"]
        possible = bool(solved.ok & torch.isfinite(length))
        dimension = solved.effective_dimension() if measured and possible else None
        if search is None or not possible:
            factor = self._factor(lr, length, step) if search is None else 0.0
            return Attempt(solved.damping, dimension, increment, length, possible, path, factor, None, 0)
        last = dict(hp["step_sizes"]).get(level, hp["step_size"])
        if search == "geodesic":
            path.bend(found, solved, last, shares)
        best, factor = path.search(found, search, last, lr)
        evaluations = best.evaluations + (search == "geodesic")
        return Attempt(solved.damping, dimension, increment, length, True, path, factor, best, evaluations)

    def _compete(
        self,
        found: Evaluation,
        first: Attempt,
        again: Callable[[float], System],
        attempt: Callable[[System, int], Attempt],
        params: Sequence[Tensor],
    ) -> tuple[Attempt, dict[str, Any]]:
        """The better step of the last winner's damping and of one beside it, and what the next step must know."""
        hp = self.param_groups[0]
        level, trend = hp["level"] + hp["trend"], hp["trend"]
        damping = self._damping(params, level)
        if damping == self._damping(params, hp["level"]):
            return first, {"trend": -trend}
        second = attempt(again(damping), level)
        smaller, larger = (first, second) if trend > 0 else (second, first)
        won = first if first.possible else second
        if smaller.found is not None and larger.found is not None:
            losses = (float(found.loss), float(smaller.found.loss), float(larger.found.loss))
            won = larger if larger_wins(*losses) else smaller
        progress: dict[str, Any] = {"level": level} if won is second else {"trend": -trend}
        lost, at = (first, hp["level"]) if won is second else (second, level)
        if lost.found is not None:
            progress["step_sizes"] = _with(hp["step_sizes"], at, lost.found.alpha)
        return replace(won, evaluations=first.evaluations + second.evaluations), progress

    # ------------------------------------------------------------------ what is said

    def coverage(self) -> Coverage:
        """How every parameter is trained and, after the first step by residuals, how J is computed.

        By "expand": all rows at once, by copies of parameters. By "matvec": products by autograd.
        """
        rows = super().coverage()
        if self._backend is None:
            return rows
        return Coverage([replace(row, reason=f"{row.reason}; J by {self._backend!r}") for row in rows])

    def _after_step(self, layout: Layout) -> None:
        what = "the closure returns a loss, or there is none: AdamW takes the step. Return the residuals by name"
        self._say(layout, "loss", what)

    def _fail(self, layout: Layout, flags: Flags) -> None:
        """The system cannot be solved, or its solution is not finite."""
        what = "the damped system of a step could not be solved"
        if any(g["on_nonfinite"] == "raise" for g in self.param_groups):
            raise RuntimeError(f"{type(self).__name__}: {what}. State and parameters are unchanged.")
        flags.ok = {device: torch.zeros_like(ok) for device, ok in flags.ok.items()}
        self._say(layout, "refused_steps", f"{what}: parameters are as they were; a larger damping helps")

    def _say(self, layout: Layout, kind: str, what: str) -> None:
        if kind not in layout.warned:
            layout.warned.add(kind)
            warnings.warn(f"{type(self).__name__}: {what}", stacklevel=4)

    def diagnostics(self, full: bool = False) -> dict[str, float]:
        """As of every optimizer, and of the last step that residuals took.

            loss: before the step
            damping: λ
            increment_norm: |δ|
            step_size: the factor of δ, with lr; 0 where a search found no smaller loss
            effective_dimension: tr K (K + λ I)^-1, where `track` measured: directions that the residuals determine
            evaluations: of the closure, for the step size

        Args:
            full: Look at eigenvalues too; there are none.
        """
        return {**super().diagnostics(full), **{name: float(value) for name, value in (self._report or {}).items()}}


def _with(pairs: tuple[tuple[int, float], ...], level: int, alpha: float) -> tuple[tuple[int, float], ...]:
    """Pairs by level, one of them new."""
    return tuple(sorted({**dict(pairs), level: alpha}.items()))


@contextlib.contextmanager
def _unchanged_gradients(params: Sequence[Tensor]) -> Iterator[None]:
    """A loss that is met unexpectedly must not add to gradients: its closure is called again."""
    grads = [p.grad for p in params]
    for p in params:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
