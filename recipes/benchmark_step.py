"""What a step of an optimizer costs beside its peers: time, evenness, operations launched, state.

    python recipes/benchmark_step.py [--lists gpt conv small tiny] [--only NAME ...] [--rounds 3] [--threads 1]
    python recipes/benchmark_step.py --profile SOAP [--lists gpt]

One table per list of parameters. Everybody preconditions the hidden matrices of the list and leaves the rest (a
vocabulary, vectors) to AdamW: its own where it has one, else torch's; refreshes come every 10 calls. All optimizers
take their turns in one process, a refresh period each, round by round, so that whatever else the machine does meets
them alike. Gradients are drawn and written outside the clock. The first two periods are not counted.

    amortised       mean over a period, median of the rounds
    worst / median  of the calls of a period, each the median of the rounds
    launched        operations a step dispatches; views and allocations are left out; not known of compiled ones
    state           bytes per parameter of the list; what only lives during a step is not in it
    to its peer     amortised time relative to the best peer of the same method: the first word of the optimizer's row

Peers are what a user would install: `pip install heavyball pytorch-optimizer singd sirfshampoo emerging-optimizers`.
Those that are absent, or do not take a list, are named. The reference implementation of SOAP is no package;
`pytorch_optimizer.SOAP` is a port of it, with 8 products a step instead of its 10, and stands for it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import secondorder

PERIOD = 10  # calls between two refreshes
WARM_UP = 2  # periods that are not counted: first bases are decompositions, first calls allocate and compile
ROWS = 16  # data rows of the layers that layer methods look at

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shapes:
    """A network as an optimizer sees it: matrices and convolutions to be preconditioned, and all other parameters."""

    title: str
    hidden: tuple[Shape, ...]
    rest: tuple[Shape, ...]


def _gpt(layers: int, d: int, vocabulary: int) -> Shapes:
    outputs = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)]
    vectors = [(d,)] * 4 + [(out,) for out, _ in outputs]
    rest = [(vocabulary, d), (256, d), (d,), (d,)]
    title = f"GPT-like: {layers} layers of width {d}, vocabulary {vocabulary}"
    return Shapes(title, tuple(outputs * layers), tuple(vectors * layers + rest))


def _resnet(widths: Sequence[int], blocks: int) -> Shapes:
    hidden, before = [(widths[0], 3, 3, 3)], widths[0]
    for width in widths:
        hidden += [(width, before, 3, 3), *[(width, width, 3, 3)] * (2 * blocks - 1)]
        hidden += [(width, before, 1, 1)] if width != before else []
        before = width
    norms = [(shape[0],) for shape in hidden for _ in range(2)]
    title = f"Residual conv net: widths {', '.join(map(str, widths))}, {blocks} blocks each"
    return Shapes(title, (*hidden, (100, before)), (*norms, (100,)))


LISTS = {
    "gpt": _gpt(4, 256, 4096),
    "conv": _resnet((32, 64, 128), 3),
    "small": Shapes("144 matrices of 32 x 32, 144 vectors", ((32, 32),) * 144, ((32,),) * 144),
    "tiny": Shapes("144 matrices of 4 x 4, 144 vectors: the host alone", ((4, 4),) * 144, ((4,),) * 144),
}


class Layers(nn.Module):
    """The hidden matrices as layers beside each other, for methods that look at layers."""

    def __init__(self, hidden: Sequence[Shape]) -> None:
        super().__init__()
        kinds = {2: lambda o, i: nn.Linear(i, o, bias=False), 4: lambda o, i, *k: nn.Conv2d(i, o, k, bias=False)}
        self.layers = nn.ModuleList(kinds[len(shape)](*shape) for shape in hidden)

    def forward(self) -> Tensor:
        weights = [layer.weight for layer in self.layers]
        data = [torch.randn(ROWS, *w.shape[1:], device=w.device) for w in weights]
        outs = [layer(x) for layer, x in zip(self.layers, data, strict=True)]
        return torch.stack([out.square().sum() for out in outs]).sum() / ROWS


@dataclass
class Problem:
    """A contestant's own copy of the parameters."""

    model: Layers
    rest: list[nn.Parameter]
    hidden: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.hidden = list(self.model.parameters())

    @property
    def params(self) -> list[nn.Parameter]:
        return [*self.hidden, *self.rest]

    @classmethod
    def of(cls, shapes: Shapes, device: torch.device) -> Problem:
        model = Layers(shapes.hidden).to(device)
        return cls(model, [nn.Parameter(0.1 * torch.randn(shape, device=device)) for shape in shapes.rest])


@dataclass(frozen=True)
class Contestant:
    """An optimizer by the name of its row.

    Attributes:
        name: Of the row.
        method: Rows of one method compete.
        make: One optimizer, or two that share the parameters.
        package: What must be installed; empty for our own.
        layers: It looks at layers: a forward and a backward pass, outside the clock, come before each step.
        compiled: Whether heavyball compiles.
    """

    name: str
    method: str
    make: Callable[[Problem], list[Optimizer]]
    package: str = ""
    layers: bool = False
    compiled: bool = False


def _ours(name: str, **options: Any) -> Callable[[Problem], list[Optimizer]]:
    """All of the list, the rest left to the fallback."""
    cls = getattr(secondorder, name)
    return lambda p: [cls([{"params": p.hidden}, {"params": p.rest, "max_precond_dim": 1}], **options)]


def _hidden(make: Callable[..., Optimizer], adamw: Callable[..., Optimizer] = torch.optim.AdamW) -> Any:
    """The hidden matrices to one optimizer, the rest to an AdamW."""
    return lambda p: [make(p.hidden), adamw(p.rest)]


def _peer(path: str, **options: Any) -> Callable[[Problem], list[Optimizer]]:
    """`package.Class` on the hidden matrices; imported when it is made."""
    package, name = path.rsplit(".", 1)
    return lambda p: _hidden(lambda params: getattr(importlib.import_module(package), name)(params, **options))(p)


def _with_model(path: str, **options: Any) -> Callable[[Problem], list[Optimizer]]:
    """The same for a peer that wants the network."""
    package, name = path.rsplit(".", 1)
    return lambda p: _hidden(lambda _: getattr(importlib.import_module(package), name)(p.model, **options))(p)


def _layer_method(name: str) -> Callable[[Problem], list[Optimizer]]:
    cls = getattr(secondorder, name)
    return lambda p: [cls([{"params": p.hidden}, {"params": p.rest, "max_precond_dim": 1}], module=p.model)]


def _contestants() -> list[Contestant]:
    own_adamw = secondorder.AdamW
    emerging = dict(package="emerging_optimizers")
    singd = dict(T=1, loss_average="batch", kfac_approx="expand", warn_unsupported=False)
    found = [
        Contestant("AdamW", "AdamW", lambda p: [own_adamw(p.params)]),
        Contestant("torch.AdamW foreach", "AdamW", lambda p: [torch.optim.AdamW(p.params, foreach=True)], "torch"),
        Contestant("torch.AdamW fused", "AdamW", lambda p: [torch.optim.AdamW(p.params, fused=True)], "torch"),
        Contestant("torch.Muon", "Muon", _peer("torch.optim.Muon"), "torch"),
        Contestant("SOAP", "SOAP", _ours("SOAP")),
        Contestant("SOAP, whole matrices", "SOAP", _ours("SOAP", max_block_size=None, one_sided_aspect=None)),
        Contestant("EigenvalueCorrectedShampoo", "Shampoo", _ours("EigenvalueCorrectedShampoo")),
        Contestant("Shampoo", "Shampoo", _ours("Shampoo")),
        Contestant("KLShampoo", "KLShampoo", _ours("KLShampoo")),
        Contestant("KLSOAP", "KLSOAP", _ours("KLSOAP")),
        Contestant(
            "InverseFreeKLShampoo", "KLShampoo", _hidden(lambda p: secondorder.InverseFreeKLShampoo(p), own_adamw)
        ),
        Contestant("SIRFShampoo", "SIRFShampoo", _hidden(lambda p: secondorder.SIRFShampoo(p), own_adamw)),
        Contestant("SINGD", "SINGD", _layer_method("SINGD"), layers=True),
        Contestant(
            "pytorch_optimizer.SOAP",
            "SOAP",
            _peer("pytorch_optimizer.SOAP", precondition_frequency=PERIOD),
            "pytorch_optimizer",
        ),
        Contestant(
            "pytorch_optimizer.Shampoo",
            "Shampoo",
            _peer("pytorch_optimizer.Shampoo", preconditioning_compute_steps=PERIOD, momentum=0.9),
            "pytorch_optimizer",
        ),
        Contestant(
            "pytorch_optimizer.ScalableShampoo",
            "Shampoo",
            _peer(
                "pytorch_optimizer.ScalableShampoo",
                start_preconditioning_step=1,
                preconditioning_compute_steps=PERIOD,
            ),
            "pytorch_optimizer",
        ),
    ]
    for name in ("SOAP", "KLShampoo", "KLSOAP"):
        make = _peer(f"heavyball.{name}", precondition_frequency=PERIOD)
        found.append(Contestant(f"heavyball.{name}", name, make, "heavyball"))
        found.append(Contestant(f"heavyball.{name} compiled", name, make, "heavyball", compiled=True))
    for name, kl in (("SOAP", False), ("KLSOAP", True)):
        make = _peer("emerging_optimizers.soap.SOAP", lr=1e-3, use_kl_shampoo=kl)
        found.append(Contestant(f"emerging_optimizers.{name}", name, make, **emerging))
    found.append(Contestant("singd.SINGD", "SINGD", _with_model("singd.optim.optimizer.SINGD", **singd), "singd", True))
    sirf = _with_model("sirfshampoo.SIRFShampoo", batch_size=ROWS)
    found.append(Contestant("sirfshampoo.SIRFShampoo", "SIRFShampoo", sirf, "sirfshampoo"))
    return found


CONTESTANTS = {c.name: c for c in _contestants()}


class Runner:
    """A contestant at work on its copy of a list."""

    def __init__(self, contestant: Contestant, shapes: Shapes, gradients: Sequence[Sequence[Tensor]]) -> None:
        self.contestant, self.gradients = contestant, gradients
        self.device = gradients[0][0].device
        self.problem = Problem.of(shapes, self.device)
        with self._compiling():
            self.optimizers = contestant.make(self.problem)
        self.calls = 0
        self.seconds: list[list[float]] = []  # by round, of each call of a period

    def step(self, watch: contextlib.AbstractContextManager[Any] | None = None) -> float:
        """One step, its gradients written before; seconds of the step alone, which `watch` sees."""
        if self.contestant.layers:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self.problem.model().backward()
        with torch.no_grad():
            for p, g in zip(self.problem.params, self.gradients[self.calls % len(self.gradients)], strict=True):
                if p.grad is None:
                    p.grad = g.clone()
                elif not self.contestant.layers:
                    p.grad.copy_(g)
        self.calls += 1
        with self._compiling(), watch or contextlib.nullcontext():
            self._wait()
            start = time.perf_counter()
            for optimizer in self.optimizers:
                optimizer.step()
            self._wait()
            return time.perf_counter() - start

    def period(self, watch: contextlib.AbstractContextManager[Any] | None = None) -> list[float]:
        """Seconds of the calls of a refresh period."""
        return [self.step(watch) for _ in range(PERIOD)]

    def launched(self) -> float | None:
        """Operations per step."""
        if self.contestant.compiled:
            return None
        count = _Count()
        self.period(count)
        return count.launched / PERIOD

    def state_bytes(self) -> int:
        """Bytes of the tensors that the optimizers keep; parameters and gradients are not theirs."""
        found: dict[int, int] = {}
        seen: set[int] = set()
        not_theirs = {t.untyped_storage().data_ptr() for p in self.problem.params for t in (p, p.grad) if t is not None}

        def visit(value: Any) -> None:
            if id(value) in seen or isinstance(value, (nn.Module, str, type)):
                return
            seen.add(id(value))
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            elif isinstance(value, Mapping):
                for entry in value.values():
                    visit(entry)
            elif isinstance(value, (list, tuple)):
                for entry in value:
                    visit(entry)
            elif hasattr(value, "__dict__"):
                visit(vars(value))

        for optimizer in self.optimizers:
            visit(dict(optimizer.state))
            for name in ("Ks", "Cs", "m_Ks", "m_Cs", "preconditioner", "preconditioner_momenta"):
                visit(getattr(optimizer, name, {}))  # singd and sirfshampoo keep their factors beside the state
        return sum(size for at, size in found.items() if at not in not_theirs)

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        """heavyball's switch is a global of its module."""
        if self.contestant.package != "heavyball" or self.contestant.compiled:
            yield
            return
        utils = importlib.import_module("heavyball").utils
        before, utils.compile_mode = utils.compile_mode, None
        try:
            yield
        finally:
            utils.compile_mode = before

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class _Count(TorchDispatchMode):
    """Counts operations that do work."""

    launched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        allocates = any(word in name for word in ("::empty", "::new_empty", "::detach", "profiler"))
        self.launched += not (func.is_view or allocates)
        return func(*args, **(kwargs or {}))


def run(
    shapes: Shapes, chosen: Sequence[Contestant], rounds: int, device: torch.device
) -> tuple[list[Runner], list[str]]:
    """All that can take part, measured in turn; and who cannot, or not to the end, with the reason."""
    gradients = [[0.01 * torch.randn(s, device=device) for s in (*shapes.hidden, *shapes.rest)] for _ in range(3)]
    runners: list[Runner] = []
    absent: list[str] = []

    @contextlib.contextmanager
    def naming(contestant: Contestant) -> Iterator[None]:
        try:
            yield
        except ModuleNotFoundError as error:
            absent.append(f"{contestant.name} (no module {error.name})")
        except (ValueError, RuntimeError) as error:
            if not contestant.package:
                raise
            absent.append(f"{contestant.name} ({str(error).splitlines()[0].rstrip('.')})")

    for contestant in chosen:
        with naming(contestant):
            runners.append(Runner(contestant, shapes, gradients))
    for turn in range(WARM_UP + rounds):
        for runner in list(runners):
            seconds = None
            with naming(runner.contestant):
                seconds = runner.period()
            if seconds is None:
                runners.remove(runner)
            elif turn >= WARM_UP:
                runner.seconds.append(seconds)
    return runners, absent


def amortised(runner: Runner) -> float:
    """Seconds per step."""
    return statistics.median(statistics.fmean(period) for period in runner.seconds)


def rows(runners: Sequence[Runner]) -> list[list[str]]:
    """The table's rows."""
    costs = {r.contestant.name: amortised(r) for r in runners}
    best: dict[str, float] = defaultdict(lambda: float("inf"))
    for r in runners:
        if r.contestant.package:
            best[r.contestant.method] = min(best[r.contestant.method], costs[r.contestant.name])
    adamw = costs.get("torch.AdamW foreach")
    table = []
    for r in runners:
        name, cost = r.contestant.name, costs[r.contestant.name]
        calls = [statistics.median(call) for call in zip(*r.seconds, strict=True)]
        launched = r.launched()
        state = r.state_bytes() / sum(p.numel() for p in r.problem.params)
        cells = [f"{1e3 * cost:.2f}", f"{max(calls) / statistics.median(calls):.2f}"]
        cells += ["" if launched is None else f"{launched:.0f}", f"{state:.1f}"]
        cells.append("" if adamw is None else f"{cost / adamw:.2f}")
        cells.append(f"{cost / best[r.contestant.method]:.2f}" if r.contestant.method in best else "")
        table.append([name, *cells])
    return table


KINDS = {
    "products": "mm bmm addmm baddbmm addbmm dot mv addmv",
    "decompositions": "geqrf linalg_householder_product linalg_qr _linalg_eigh linalg_cholesky_ex _linalg_svd",
    "copies, gather, scatter": "copy_ _foreach_copy_ index index_select index_copy_ gather scatter cat stack sort",
    "host": "view select slice transpose t permute expand as_strided unsqueeze squeeze reshape flatten unbind split "
    "diagonal matmul to _to_copy empty empty_like empty_strided resize_ detach linalg_eigh alias _unsafe_view",
}


def profile(runner: Runner) -> dict[str, float]:
    """Seconds per step by kind of operation; host is Python, dispatch and views."""
    for _ in range(WARM_UP + 1):
        runner.period()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(PERIOD):
            runner.step(torch.profiler.record_function("measured"))
    found: dict[str, float] = defaultdict(float)
    kinds = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names.split()}
    left = [event for event in profiler.events() if event.name == "measured"]
    while left:
        event = left.pop()
        left.extend(event.cpu_children)
        kind = kinds.get(event.name, "element-wise" if event.name.startswith("aten::") else "host")
        found[kind] += 1e-6 * event.self_cpu_time_total / PERIOD
    return found


def _profile_lines(runner: Runner, title: str) -> list[str]:
    found = profile(runner)
    total = sum(found.values())
    lines = [f"{runner.contestant.name}, {title}: {1e3 * total:.2f} ms a step with the profiler"]
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return lines + [f"{100 * seconds / total:5.1f} %  {kind}" for kind, seconds in ordered]


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _versions() -> str:
    names = sorted({c.package for c in CONTESTANTS.values() if c.package})
    found = []
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, or a profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=list(LISTS), help="of parameters")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, metavar="NAME", help="these optimizers alone")
    parser.add_argument("--rounds", type=int, default=3, help="counted periods of every optimizer")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--profile", choices=CONTESTANTS, metavar="NAME", help="where the time of one optimizer goes")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    device = torch.device(given.device)
    where = f"{platform.machine()}, {given.threads} thread(s)"
    where = torch.cuda.get_device_name() if device.type == "cuda" else where
    print(f"{_versions()}; {where}; {given.rounds} rounds")
    names = [given.profile] if given.profile else given.only or list(CONTESTANTS)
    header = ["optimizer", "amortised, ms", "worst / median", "launched", "state, B", "to AdamW", "to its peer"]
    for shapes in (LISTS[name] for name in given.lists):
        chosen = [CONTESTANTS[name] for name in names]
        rounds = 0 if given.profile else given.rounds
        runners, absent = run(shapes, chosen, rounds, device)
        size = sum(p.numel() for p in runners[0].problem.params) if runners else 0
        title = f"{shapes.title} ({size / 1e6:.2f} M parameters in {len(shapes.hidden) + len(shapes.rest)} tensors)"
        if given.profile:
            print("\n" + "\n".join(line for runner in runners for line in _profile_lines(runner, title)))
        else:
            print(f"\n{title}\n\n{table(header, rows(runners))}")
        if absent:
            print(f"\nskipped: {', '.join(absent)}")


if __name__ == "__main__":
    main()
