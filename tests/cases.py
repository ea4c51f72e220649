"""The public optimizers under test: a new class adds one line to `OPTIMIZERS`.

The parameters here are loose: they belong to no module. A layer method trains them by its fallback, and says so in a
warning; the same contract on layers is in `test_layer_contract.py`. A method that steps by residuals trains on
gradients by AdamW; its steps by residuals are in `test_residual_optimizers.py`.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import secondorder
from secondorder._options import COMMON


@dataclass(frozen=True)
class Case:
    """A class and the arguments with which the contract is tested: small refresh periods, so that refreshes happen."""

    cls: type[torch.optim.Optimizer]
    kwargs: dict[str, Any] = field(default_factory=dict)
    average: str = "exp_avg"  # an entry of a preconditioned block's state that every step moves, in the block's shape
    measures: bool = False  # the first usable gradient leaves the parameter where it is
    moves: bool = False  # factors move in every step; a refresh only tidies up
    layers: bool = False  # statistics come from layers: loose parameters are left to the fallback
    residuals: bool = False  # steps by residuals: gradients alone train by AdamW, which reads no option of its own

    def make(self, params: Any, **more: Any) -> Any:
        return self.build(params, **{**self.kwargs, **more})

    def build(self, *args: Any, **options: Any) -> Any:
        """The class with these arguments alone, without a layer method's warning that it was given no module."""
        with warnings.catch_warnings():
            if self.layers:
                warnings.filterwarnings("ignore", ".*no module= was given")
            return self.cls(*args, **options)

    def takes(self, option: str) -> bool:
        """Whether the option acts on loose parameters."""
        if self.layers:
            return option in COMMON or option.startswith("fallback_")
        if self.residuals:
            return option in self.cls.shared_options
        return option in self.cls.shared_options or option in self.cls.own_options


OPTIMIZERS = [
    Case(secondorder.SOAP, dict(lr=0.01, refresh_every=3)),
    Case(secondorder.Shampoo, dict(lr=0.01, refresh_every=3), average="momentum"),
    Case(secondorder.EigenvalueCorrectedShampoo, dict(lr=0.01, refresh_every=3), average="momentum"),
    Case(secondorder.AdamW, dict(lr=0.01)),
    Case(secondorder.KFAC, dict(lr=0.01, fallback_lr_scale=1.0), layers=True),
    Case(secondorder.EKFAC, dict(lr=0.01, fallback_lr_scale=1.0), layers=True),
    Case(secondorder.SINGD, dict(lr=0.01, fallback_lr_scale=1.0), layers=True),
    Case(secondorder.IKFAC, dict(lr=0.01, fallback_lr_scale=1.0), layers=True),
    Case(secondorder.KLShampoo, dict(lr=0.01, refresh_every=3)),
    Case(secondorder.KLSOAP, dict(lr=0.01, refresh_every=3)),
    Case(secondorder.SIRFShampoo, dict(lr=0.01), average="momentum"),
    Case(secondorder.IFShampoo, dict(lr=0.01, statistics_every=3), average="momentum"),
    Case(secondorder.RFAdamW, dict(lr=0.01), average="momentum"),
    Case(secondorder.RFRMSProp, dict(lr=0.01), average="momentum"),
    Case(secondorder.SpectralFactorized, dict(lr=0.01, refresh_every=3), average="momentum", moves=True),
    Case(secondorder.InverseFreeKLShampoo, dict(lr=0.01), average="momentum", measures=True),
    Case(secondorder.ENGDW, dict(lr=0.01, fallback_lr_scale=1.0), residuals=True),
    Case(secondorder.SPRING, dict(lr=0.01, fallback_lr_scale=1.0), residuals=True),
    Case(secondorder.ResidualKFAC, dict(lr=0.01, fallback_lr_scale=1.0), residuals=True),
]


def variants(**named: dict[str, Any]) -> pytest.MarkDecorator:
    """Parametrise a test by `case` and `options`: every class with those of the named options that act on it."""
    pairs = [
        pytest.param(case, options, id=f"{case.cls.__name__}-{name}")
        for case in OPTIMIZERS
        for name, options in named.items()
        if all(case.takes(key) for key in options)
    ]
    return pytest.mark.parametrize(("case", "options"), pairs)


def classes_with(option: str) -> pytest.MarkDecorator:
    """Parametrise a test by `case`: every class on which the option acts."""
    chosen = [case for case in OPTIMIZERS if case.takes(option)]
    return pytest.mark.parametrize("case", chosen, ids=[case.cls.__name__ for case in chosen])


# A matrix, a bias, a wide matrix (one-sided), a convolution, a scalar, a size-1 axis, the first matrix's shape again.
SHAPES = [(6, 5), (6,), (3, 14), (4, 3, 2, 2), (), (1, 5), (6, 5)]


def parameters(shapes: Iterable[tuple[int, ...]] = SHAPES, *, seed: int = 0, dtype=torch.float32) -> list[nn.Parameter]:
    """Fresh parameters with values that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradient(shape: tuple[int, ...], step: int, index: int = 0, dtype=torch.float32) -> Tensor:
    """The gradient of parameter `index` at a step: a fixed mean and noise, independent of everything else."""

    def normal(seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return (0.3 * normal(7919 * (index + 1)) + normal(104729 * (index + 1) + step)).to(dtype)


def feed(params: Iterable[Tensor], step: int) -> None:
    """Give every parameter its gradient of a step."""
    for index, p in enumerate(params):
        p.grad = gradient(tuple(p.shape), step, index, p.dtype).to(p.device)


def train(
    optimizer: torch.optim.Optimizer,
    params: list[nn.Parameter],
    steps: Iterable[int],
    before: Callable[[int], None] | None = None,
) -> None:
    """Steps on the fixed sequence of gradients; `before` is called between the gradients and each step."""
    for step in steps:
        feed(params, step)
        if before is not None:
            before(step)
        optimizer.step()


def largest_update(cls: Any, shape: tuple[int, int], **options: Any) -> float:
    """Largest root mean square of an update, in units of lr, over 300 anisotropic gradients (Adam: 1)."""
    generator = torch.Generator().manual_seed(1)
    turns = [torch.linalg.qr(torch.randn(d, d, generator=generator)).Q * torch.logspace(0, -1.5, d) for d in shape]
    (p,) = parameters([shape])
    whole = dict(max_block_size=None, one_sided_aspect=None)
    optimizer = cls([p], lr=1e-3, weight_decay=0.0, **whole, **options)
    worst = 0.0
    for _ in range(300):
        before = p.detach().clone()
        p.grad = turns[0] @ torch.randn(shape, generator=generator) @ turns[1].T
        optimizer.step()
        worst = max(worst, float((p.detach() - before).square().mean().sqrt()) / 1e-3)
    return worst


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64 that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape: int, seed: int = 0, classes: int = 3) -> Tensor:
    """Class indices that depend on the seed alone."""
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


class Launches(TorchDispatchMode):
    """Counts operations by name; a view launches nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not operation.is_view:
            self.found[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def values(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def flat_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all state tensors by `position/key/...`."""
    out: dict[str, Tensor] = {}

    def visit(prefix: str, entry: dict[str, Any]) -> None:
        for key, value in entry.items():
            if isinstance(value, dict):
                visit(f"{prefix}/{key}", value)
            else:
                out[f"{prefix}/{key}"] = torch.as_tensor(value).detach().clone()

    for index, entry in optimizer.state_dict()["state"].items():
        visit(str(index), entry)
    return out


def assert_same_bits(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, f"item {i}: {a.dtype} {a.shape}, {b.dtype} {b.shape}"
        assert torch.equal(a, b), f"item {i}: differs by up to {(a - b).abs().max()}"


def assert_same_state(ours: dict[str, Tensor], theirs: dict[str, Tensor], but: str = "") -> None:
    """All entries equal bitwise, those whose key is `but` left out."""
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if key.rpartition("/")[2] != but:
            assert torch.equal(value, theirs[key]), key
