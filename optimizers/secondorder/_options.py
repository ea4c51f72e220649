"""Options that all methods share: declared once, with default, allowed values and a line of documentation.

A constructor spells out what is its own and takes the rest as `**options: Unpack[KroneckerOptions]`;
`expand_signature` makes `inspect.signature` and `help` show the full list.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from secondorder.preconditioner.protocol import FACTOR_DTYPES


class Option(NamedTuple):
    """One option: its default, what is allowed in words, the check, one line of documentation."""

    default: Any
    allowed: str
    check: Callable[[Any], bool]
    doc: str


class CommonOptions(TypedDict, total=False):
    """Options of every optimizer (see `COMMON`)."""

    weight_decay_kind: Literal["decoupled", "l2", "coupled"]
    maximize: bool
    max_update_rms: float | None
    on_nonfinite: Literal["skip", "raise"]
    param_rounding: Literal["nearest", "stochastic"]
    sharding: Literal["auto", "owners"]
    reproducible: bool
    process_group: Any
    sync: Literal["ddp", "owner_hook"]
    module: nn.Module | None


class BlockOptions(CommonOptions, total=False):
    """Options of every optimizer that works on blocks (see `BLOCKS`)."""

    nesterov: bool
    statistics_every: int
    max_block_size: int | None
    one_sided_aspect: float | None
    max_precond_dim: int | None
    fallback_betas: tuple[float, float] | None
    fallback_lr_scale: float


class KroneckerOptions(BlockOptions, total=False):
    """Options of every optimizer with factors that are refreshed (see `KRONECKER`)."""

    refresh_every: int
    refresh: Literal["staggered", "together"]


class LayerOptions(KroneckerOptions, total=False):
    """Options of every optimizer with layer statistics (see `LAYERS`)."""

    statistic_rows: int | None
    sharing: Literal["auto", "expand", "reduce", "none"]
    sides: Literal["both", "inputs"]
    loss_reduction: Literal["mean", "sum"]
    momentum: Literal["gradient", "update"]
    norm_clip: float | None
    kl_clip: float | None
    burn_in: int
    adapt_damping: bool
    adapt_every: int
    quadratic_model: Literal["lr", "lr_and_momentum"] | None
    loss: Literal["cross_entropy", "mse", "bce"] | None


def is_number(v: Any) -> bool:
    """A finite real number that is not a bool."""
    return isinstance(v, Real) and not isinstance(v, bool) and math.isfinite(v)


def is_count(v: Any) -> bool:
    """A positive int."""
    return isinstance(v, Integral) and not isinstance(v, bool) and int(v) >= 1


def one_of(*values: str) -> tuple[str, Callable[[Any], bool]]:
    """`allowed` and `check` of a choice."""
    return " or ".join(map(repr, values)), lambda v: isinstance(v, str) and v in values


def optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The same check, None allowed."""
    return lambda v: v is None or check(v)


def is_beta(v: Any) -> bool:
    """A decay rate in [0, 1)."""
    return is_number(v) and 0 <= v < 1


def is_betas(v: Any) -> bool:
    """A pair of decay rates."""
    return isinstance(v, (tuple, list)) and len(v) == 2 and all(map(is_beta, v))


def is_positive(v: Any) -> bool:
    """A number above zero."""
    return is_number(v) and v > 0


def is_bool(v: Any) -> bool:
    """True or False."""
    return isinstance(v, bool)


def _is_batch_size(v: Any) -> bool:
    if isinstance(v, Tensor):
        return v.numel() == 1 and (v.device.type != "cpu" or bool(v > 0))
    return v is None or (isinstance(v, str) and v == "count") or (is_number(v) and v > 0)


BATCH_SIZE = Option(
    None,
    "None, 'count', a number > 0 or a 1-element tensor",
    _is_batch_size,
    "samples whose mean the loss is, so that batch_size·g² estimates the curvature; None: 1; 'count': counted "
    "from the forward passes of `module`.",
)

FACTOR_DTYPE = Option("float32", *one_of(*FACTOR_DTYPES), "in what factors are stored.")
FACTOR_BETA = Option(None, "None or a number in [0, 1)", optional(is_beta), "decay rate of the factors; None: β2.")
REFRESH_BY = Option("qr", *one_of("qr", "eigh"), "how a basis is refreshed.")

KL: dict[str, Option] = {
    "factor_beta": FACTOR_BETA,
    "floor": Option(1e-6, "a number in [0, 1)", is_beta, "smallest eigenvalue of a factor, relative to its largest."),
    "clip": Option(3.0, "None or a number > 0", optional(is_positive), "largest RMS of a whitened gradient."),
    "refresh_by": REFRESH_BY,
}

COMMON: dict[str, Option] = {
    "weight_decay_kind": Option(
        "decoupled",
        *one_of("decoupled", "l2", "coupled"),
        "where weight decay acts: on the parameter before the step, on the gradient, or on the update (before "
        "momentum that lives after the factor).",
    ),
    "maximize": Option(False, "True or False", is_bool, "maximize the objective instead of minimizing it."),
    "max_update_rms": Option(
        None,
        "None or a number > 0",
        optional(is_positive),
        "largest root mean square of an update (per block; not of the fallback's), before the learning rate; larger "
        "ones are scaled down.",
    ),
    "on_nonfinite": Option(
        "skip",
        *one_of("skip", "raise"),
        "what becomes of a step with a gradient that is not finite or too large for a Gram matrix: leave state and "
        "parameters as they are and count it, or raise RuntimeError (which waits for the device in every step).",
    ),
    "param_rounding": Option(
        "nearest",
        *one_of("nearest", "stochastic"),
        "how parameters in bfloat16 are written. To nearest, updates below half a unit in the last place are lost, "
        'however often they come; "stochastic": they move it with the right probability, so that bfloat16 parameters '
        "train without a float32 copy. For parameters that one process keeps whole.",
    ),
    "sharding": Option(
        "auto",
        *one_of("auto", "owners"),
        '"owners": a block\'s factors are kept and refreshed by one process alone; all processes must take part in '
        'every step, state_dict() and load. "auto": so for DTensor parameters (FSDP2, HSDP, tensor parallel), while '
        "plain ones are every process's own.",
    ),
    "reproducible": Option(
        False,
        "True or False",
        is_bool,
        "the same bits for every number of processes and every sharding, given the same gradients. Gradients are the "
        "same if a batch is cut into V equal micro-batches of which process r of W computes those from rV/W to "
        "(r+1)V/W - 1 in this order, V and W powers of two, with a loss divided by V/W: in one process, under DDP with "
        'sync="owner_hook", and, where W and V/W are at most 2, under FSDP2. All devices must be of one type, with '
        "one number of threads; clipping by norms is not covered. Costs the fused kernel of the fallback, and "
        "log2(V/W) more gradients.",
    ),
    "process_group": Option(
        None,
        "None or a torch.distributed.ProcessGroup",
        lambda v: v is None or (torch.distributed.is_available() and isinstance(v, torch.distributed.ProcessGroup)),
        "the processes that share the blocks, and over which statistics are added up; None: those of the parameters' "
        "mesh or of the DDP module, else all.",
    ),
    "sync": Option(
        "ddp",
        *one_of("ddp", "owner_hook"),
        'how gradients of DDP come to the owners: averaged everywhere by DDP, or, with sharding="owners" and the DDP '
        "module as `module`, straight to the owners by its communication hook, so that a step sends no more than DDP "
        "alone. Before step() `p.grad` then holds the average only where this process owns it, else zero: clip with "
        "the optimizer's clip_grad_norm_, and use no GradScaler, whose processes would skip steps one by one.",
    ),
    "module": Option(
        None,
        "None or a torch.nn.Module",
        lambda v: v is None or isinstance(v, nn.Module),
        "the network, for the names and roles of its parameters: which are embeddings, the output head, or hidden.",
    ),
}

BLOCKS: dict[str, Option] = {
    "nesterov": Option(True, "True or False", is_bool, "look ahead by one gradient in the momentum."),
    "statistics_every": Option(1, "an int >= 1", is_count, "calls between two statistics."),
    "max_block_size": Option(
        512,
        "None or an int >= 1",
        optional(is_count),
        "sides with a factor are cut evenly to at most this; None: never.",
    ),
    "one_sided_aspect": Option(
        4.0,
        "None or a number >= 1",
        optional(lambda v: is_number(v) and v >= 1),
        "matrices with at least this ratio of sides have a factor on the smaller side only; None: never.",
    ),
    "max_precond_dim": Option(
        16384,
        "None or an int >= 1",
        optional(is_count),
        "embeddings and heads with a larger side, a vocabulary, are left to the fallback, and so is any parameter of "
        "unknown role; 1 leaves a group to the fallback altogether.",
    ),
    "fallback_betas": Option(
        None, "None or two numbers in [0, 1)", optional(is_betas), "betas of the AdamW fallback; None: `betas`."
    ),
    "fallback_lr_scale": Option(
        1.0, "a number >= 0", lambda v: is_number(v) and v >= 0, "learning rate of the fallback, relative to `lr`."
    ),
    **COMMON,
}

KRONECKER: dict[str, Option] = {
    "refresh_every": Option(10, "an int >= 1", is_count, "calls between two refreshes of a factor."),
    "refresh": Option(
        "staggered",
        *one_of("staggered", "together"),
        "spread refreshes evenly over the calls of a period, or do all of them in one call.",
    ),
    **BLOCKS,
}

INITIAL = Option(
    1.0,
    "None or a number > 0",
    optional(is_positive),
    "second moment before the first gradient; None: none, the average is debiased instead.",
)

LAYERS: dict[str, Option] = {
    **KRONECKER,
    "fallback_lr_scale": KRONECKER["fallback_lr_scale"]._replace(default=0.3),
    # Natural gradients grow as gradients vanish, and so do clips in their metric; this bounds what is left of that.
    "max_update_rms": KRONECKER["max_update_rms"]._replace(default=10.0),
    "statistic_rows": Option(
        None,
        "None or an int >= 1",
        optional(is_count),
        "of how many rows (tokens, positions, samples) of a layer in every backward pass statistics are taken, chosen "
        "evenly; they are scaled up to all. None: of all.",
    ),
    "sharing": Option(
        "expand",
        *one_of("auto", "expand", "reduce", "none"),
        "positions that share a weight (tokens, pixels) are data of their own (expand), or are summed first (reduce: "
        "cheaper, coarser); auto: reduce for convolutions, else expand; none leaves a group to the fallback.",
    ),
    "sides": Option(
        "both", *one_of("both", "inputs"), "factors on both sides of a weight, or on its inputs only (no backward)."
    ),
    "loss_reduction": Option(
        "mean", *one_of("mean", "sum"), "whether the loss is a mean or a sum over its terms (samples, tokens)."
    ),
    "momentum": Option(
        "gradient",
        *one_of("gradient", "update"),
        "what betas[0] averages: gradients, before the factors, or (heavy ball) updates, after them and after clips.",
    ),
    "norm_clip": Option(
        1.0,
        "None or a number > 0",
        optional(is_positive),
        "largest √<direction, gradient>, all blocks together: the length of a direction in the curvature's own metric. "
        "Longer ones are scaled down, so that lr bounds a step's divergence: KL <= (lr·norm_clip)²/2 to second order.",
    ),
    "kl_clip": Option(
        None,
        "None or a number > 0",
        optional(is_positive),
        "the same with lr included: largest lr²·<direction, gradient>. A schedule of lr then moves no step that is "
        "clipped; for results of others.",
    ),
    "burn_in": Option(
        0,
        "an int >= 0",
        lambda v: isinstance(v, Integral) and not isinstance(v, bool) and int(v) >= 0,
        "first calls that only gather statistics: parameters stay as they are; all factors are refreshed in the last.",
    ),
    "adapt_damping": Option(
        False,
        "True or False",
        is_bool,
        "change damping by the rule of Levenberg and Marquardt; needs step(closure).",
    ),
    "adapt_every": Option(5, "an int >= 1", is_count, "calls between two changes of damping (the first group's)."),
    "quadratic_model": Option(
        None,
        "None, 'lr' or 'lr_and_momentum'",
        optional(one_of("lr", "lr_and_momentum")[1]),
        "learning rate, or that and momentum, from the minimum of a quadratic model of the loss, in place of lr, "
        "betas[0], nesterov and clips; needs loss, and step(closure) with a closure that returns (loss, outputs).",
    ),
    "loss": Option(
        None,
        "None, 'cross_entropy', 'mse' or 'bce'",
        optional(one_of("cross_entropy", "mse", "bce")[1]),
        "what is minimized, for quadratic_model: the first group's.",
    ),
}

# Keys that others put into groups: torch's own implementation switches (some trainers set them everywhere), schedulers.
FOREIGN_KEYS = frozenset(
    "params param_names role initial_lr max_lr min_lr max_momentum base_momentum swa_lr "
    "foreach fused capturable differentiable".split()
)
ROLES = ("embedding", "head", "hidden")


def resolve(name: str, table: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of `table` overridden by what was given.

    Raises:
        TypeError: For a name that is not in the table.
    """
    for key in given:
        if key not in table:
            near = difflib.get_close_matches(key, table, 1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{name}() got an unexpected keyword argument {key!r}{hint}")
    return {**{key: option.default for key, option in table.items()}, **given}


def validate(group: Mapping[str, Any], table: Mapping[str, Option]) -> None:
    """Check a group's hyper-parameters, in torch's wording where torch has one.

    Raises:
        TypeError: For an `lr` that is not a number.
        ValueError: For a value that is not allowed; names the argument, the value and what is allowed.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if lr.device.type == "cpu" and not lr.item() >= 0:
            raise ValueError(f"Invalid learning rate: {lr.item()}")
    elif isinstance(lr, bool) or not isinstance(lr, Real):
        raise TypeError(f"lr must be a number or a 1-element Tensor, got {lr!r}")
    elif not 0.0 <= float(lr) < math.inf:
        raise ValueError(f"Invalid learning rate: {lr}")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r} (two numbers in [0, 1))")
    for i, beta in enumerate(betas):
        if not is_beta(beta):
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    if not (is_number(group["eps"]) and group["eps"] >= 0):
        raise ValueError(f"Invalid epsilon value: {group['eps']}")
    if not (is_number(group["weight_decay"]) and group["weight_decay"] >= 0):
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
    if group.get("role") is not None and group["role"] not in ROLES:
        raise ValueError(f"Invalid role: {group['role']!r} ({one_of(*ROLES)[0]})")
    for name, option in table.items():
        if name in group and not option.check(group[name]):
            raise ValueError(f"Invalid {name}: {group[name]!r} ({option.allowed})")


def expand_signature(cls: type, table: Mapping[str, Option]) -> None:
    """Show the options behind `**options` in the signature and the doc-string of a class."""
    init = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(init)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(own) == len(signature.parameters):
        return
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default)
        for name, option in table.items()
        if name not in signature.parameters
    ]
    init.__signature__ = signature.replace(parameters=own + shared)
    lines = [f"        {p.name}: {table[p.name].doc} Default: {p.default!r}." for p in shared]
    cls.__doc__ = (cls.__doc__ or "").replace("        **options: See below.", "\n".join(lines))
