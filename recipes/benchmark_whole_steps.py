"""Whole steps on a GPU, beside what the machine could do at best, and training steps beside torch's fused AdamW.

Run by `python recipes/benchmark_kernels.py --steps`. Products of float32 are at `torch.set_float32_matmul_precision`
"high". Every optimizer steps twice over: with the kernels that the tables allow ("auto"), and with torch alone
("reference"), in turn. Times are those of a user: of the host and the device together, from call to idle device.

    median, worst  of the steps of a refresh period, each the least of the rounds
    mean           of them; by which
    of the roof    is measured: the larger of products at their peak and bytes at the copy's rate, refreshes amortised
    graph          of the step replayed as a CUDA graph, of methods without a refresh schedule

Parameters and gradients are bfloat16; gradients are drawn, but for methods that look at layers, which see forward and
backward passes outside the clock. A training step is a GPT's, under bfloat16 autocast: forward pass, backward pass and
step, in turns with torch's AdamW.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import secondorder
import secondorder_kernels
from benchmark_step import table
from gpt import GPT
from secondorder_kernels.tuning import measure
from secondorder_kernels.tuning.products import rules

Row = dict[str, Any]
PRECISION = "high"
NOT_TIMED = "–"


@dataclass(frozen=True)
class Size:
    """A GPT and its batch.

    Attributes:
        title: In the tables.
        shape: Arguments of `GPT`.
        batch: Samples.
        length: Tokens of a sample.
        period: Calls between two refreshes, and how many are timed in a round.
        rounds: That are timed.
    """

    title: str
    shape: dict[str, Any]
    batch: int
    length: int
    period: int = 10
    rounds: int = 3

    def model(self, device: torch.device) -> nn.Module:
        """A new one."""
        torch.manual_seed(0)
        with device:
            return GPT(**self.shape, tied=True)


def _shape(vocabulary: int, context: int, layers: int, heads: int, width: int) -> dict[str, Any]:
    return dict(vocab_size=vocabulary, context=context, layers=layers, heads=heads, width=width)


SMALL = Size("GPT-2 small", _shape(50257, 1024, 12, 12, 768), 8, 1024)
MEDIUM = Size("GPT, 350 M", _shape(50257, 1024, 24, 16, 1024), 4, 1024)
TOY = Size("toy", _shape(40, 8, 1, 2, 16), 2, 8, period=2, rounds=1)


@dataclass(frozen=True)
class Work:
    """What a method does in a step to a block of N entries, for each mode of size d that has a dense factor.

    Attributes:
        products: Multiples of N d operations; a product of two matrices is 2, one known to be symmetric 1.
        moving: Those of a step in which the factors move.
        cubes: Multiples of d³ operations of such a step.
        entry: Bytes of state moved for each entry of the block.
        factor: Bytes moved for each entry of a d x d factor.
    """

    products: float
    moving: float
    cubes: float
    entry: float
    factor: float


METHODS = {
    # There and back; the statistic. Two moments, a basis that is read, a covariance of which half is read.
    "SOAP": Work(4, 1, 0, 16, 4 + 6),
    # Gradient and momentum whitened; the statistic; KᵀK, and three products with what moves K.
    "InverseFreeKLShampoo": Work(4, 1, 7, 8, 8),
    # There and back. Its statistics come from the backward pass: one more half to be read.
    "KFAC": Work(4, 0, 0, 8, 4 + 6 + 2),
}


def work(name: str, optimizer: Any) -> tuple[float, float]:
    """Operations of products, and bytes, that a step needs on average at least."""
    do, flops, seen = METHODS[name], 0.0, 0
    params = [p for group in optimizer.param_groups for p in group["params"]]
    size = params[0].element_size()
    moved = 3.0 * size * sum(p.numel() for p in params)  # gradient, parameter read and written
    for candidate in optimizer.plan.candidates:
        b, numel = candidate.bucket, torch.Size(candidate.bucket.shape).numel()
        refresh_every = max(1, int(candidate.hp.get("refresh_every", 1)))
        moves = 1 / max(1, int(candidate.hp.get("statistics_every", 1)))
        seen += candidate.rows * numel
        moved += candidate.rows * numel * do.entry
        for mode in b.modes:
            d = b.shape[mode]
            refresh = b.method.refresh_cost(b.shape, mode) / refresh_every
            flops += candidate.rows * (
                (do.products + moves * do.moving) * numel * d + moves * do.cubes * d**3 + refresh
            )
            moved += candidate.rows * do.factor * d * d
    rest = sum(p.numel() for p in params) - seen
    return flops, moved + 4.0 * size * max(0, rest)  # the fallback's moments, in the parameters' dtype


def make(name: str, model: nn.Module) -> Optimizer:
    """A method with its defaults, after its first phase."""
    options = {"dense_steps": 0} if name == "InverseFreeKLShampoo" else {}
    optimizer: Optimizer = getattr(secondorder, name)(model.parameters(), module=model, **options)
    return optimizer


def _scheduled(optimizer: Any) -> bool:
    """Whether the host decides in each call what is refreshed."""
    return any(
        c.bucket.method.refresh_cost(c.bucket.shape, m) for c in optimizer.plan.candidates for m in c.bucket.modes
    )


class Runner:
    """A method at work on a GPT's parameters in bfloat16.

    Args:
        name: Of the method.
        size: The GPT.
        device: Where.
        mode: Of the kernels.
    """

    def __init__(self, name: str, size: Size, device: torch.device, mode: str) -> None:
        self.size, self.device, self.mode = size, device, mode
        self.model = size.model(device).bfloat16()
        self.optimizer = make(name, self.model)
        self.looks = name == "KFAC"
        params = list(self.model.parameters())
        self.grads = [[0.01 * torch.randn_like(p) for p in params] for _ in range(0 if self.looks else 2)]
        self.tokens = torch.randint(0, size.shape["vocab_size"], (size.batch, size.length), device=device)
        self.calls = 0

    def gradients(self) -> None:
        """What comes before the step."""
        if self.looks:
            self.optimizer.zero_grad()
            loss(self.model, self.tokens).backward()
            return
        for p, g in zip(self.model.parameters(), self.grads[self.calls % 2], strict=True):
            p.grad = g

    def step(self) -> None:
        """The step."""
        self.calls += 1
        with secondorder_kernels.use_kernels(self.mode, strict=False):
            self.optimizer.step()

    def period(self) -> list[float]:
        """Milliseconds of the steps of a period."""
        found = []
        for _ in range(self.size.period):
            self.gradients()
            found.append(elapsed_ms(self.step, self.device))
        return found


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of predicting the token before: what is learned does not matter."""
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())


def elapsed_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Wall time until the device is idle."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return 1e3 * (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def steps(
    name: str, size: Size, device: torch.device, ceilings: dict[str, float] | None, modes: tuple[str, ...]
) -> list[Row]:
    """Rows of one method: with kernels and without."""
    runners = [Runner(name, size, device, mode) for mode in modes]
    rounds: list[list[list[float]]] = [[] for _ in runners]
    for number in range(2 + size.rounds):  # in the first two periods what is refreshed is made anew
        for runner, kept in zip(runners, rounds, strict=True):
            found = runner.period()
            if number >= 2:
                kept.append(found)
    rows = []
    for runner, kept in zip(runners, rounds, strict=True):
        calls = [min(call) for call in zip(*kept, strict=True)]
        row: Row = {"list": size.title, "optimizer": name, "kernels": runner.mode}
        flops, moved = work(name, runner.optimizer)
        row.update(flops=flops, bytes=moved)
        if ceilings is not None:
            at = 1e3 * flops / ceilings[rules(torch.float32, PRECISION)["unit"]], 1e3 * moved / ceilings["bytes"]
            row.update(median_ms=statistics.median(calls), worst_ms=max(calls), mean_ms=statistics.fmean(calls))
            row.update(roof_ms=max(at), bound="products" if at[0] > at[1] else "bytes")
            if not _scheduled(runner.optimizer):
                row["graph_ms"] = _captured(runner)
        rows.append(row)
    return rows


def _captured(runner: Runner) -> float | str:
    """Milliseconds of a replayed step, or why there is none."""
    runner.gradients()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            runner.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            runner.step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return statistics.median(elapsed_ms(graph.replay, runner.device) for _ in range(10))


def training(size: Size, device: torch.device, timed: bool) -> list[Row]:
    """Rows of training steps, the first of them torch's AdamW."""
    makers: dict[str, Callable[[nn.Module], Optimizer]] = {
        "torch AdamW, fused": lambda model: torch.optim.AdamW(model.parameters(), fused=True)
    }
    makers.update({name: lambda model, name=name: make(name, model) for name in METHODS})
    models = {name: size.model(device) for name in makers}
    optimizers = {name: maker(models[name]) for name, maker in makers.items()}
    tokens = torch.randint(0, size.shape["vocab_size"], (size.batch, size.length), device=device)
    found: dict[str, list[float]] = {name: [] for name in makers}
    for number in range(2 + size.rounds):
        for name, optimizer in optimizers.items():

            def step(model: nn.Module = models[name], optimizer: Optimizer = optimizer) -> None:
                optimizer.zero_grad()
                with torch.autocast(device.type, torch.bfloat16):
                    out = loss(model, tokens)
                out.backward()
                optimizer.step()

            times = [elapsed_ms(step, device) for _ in range(size.period)]
            if timed:
                print(f"training, round {number + 1}, {name}: {statistics.fmean(times):.1f} ms", flush=True)
            if number >= 2:
                found[name].append(statistics.fmean(times))
    rows = []
    for name, means in found.items():
        row: Row = {"training": size.title, "optimizer": name, "tokens": size.batch * size.length}
        if timed:
            row.update(mean_ms=min(means), to_adamw=min(means) / min(found["torch AdamW, fused"]))
        rows.append(row)
    return rows


@contextlib.contextmanager
def _precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(PRECISION)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def run(device: torch.device, smoke: bool, budget: float) -> list[Row]:
    """Measure and print training steps, then whole steps.

    Args:
        device: Where.
        smoke: At toy size, with every kernel that takes it, and nothing timed.
        budget: Seconds, after which nothing is begun.
    """
    start, rows = time.monotonic(), []
    ceilings = None if smoke else measure.ceilings()
    modes = ("triton",) if smoke else ("auto", "reference")
    with _precision():
        trained = training(TOY if smoke else SMALL, device, not smoke)
        print("\n" + table(TRAINING_HEADER, [_train_cells(row) for row in trained]), flush=True)
        for size in (TOY,) if smoke else (SMALL, MEDIUM):
            for name in METHODS:
                if time.monotonic() - start < budget:
                    rows += steps(name, size, device, ceilings, modes)
                    print(f"measured: {size.title}, {name}", flush=True)
                else:
                    print(f"the budget was spent: {size.title}, {name} is missing", flush=True)
    print("\n" + table(STEP_HEADER, [_step_cells(row) for row in rows]))
    return rows + trained


TRAINING_HEADER = ["training step", "tokens", "optimizer", "mean, ms", "to AdamW"]
STEP_HEADER = ["parameters", "optimizer", "kernels", "median, ms", "worst, ms", "mean, ms", "TFLOP", "GB"]
STEP_HEADER += ["roof, ms", "bound by", "of the roof", "graph, ms"]


def _step_cells(row: Row) -> list[str]:
    first = [row["list"], row["optimizer"], row["kernels"]]
    needs = [f"{row['flops'] / 1e12:.3f}", f"{row['bytes'] / 1e9:.2f}"]
    if "mean_ms" not in row:
        return [*first, *[NOT_TIMED] * 3, *needs, *[NOT_TIMED] * 4]
    times = [f"{row[name]:.2f}" for name in ("median_ms", "worst_ms", "mean_ms")]
    roof = [f"{row['roof_ms']:.2f}", row["bound"], f"{100 * row['roof_ms'] / row['mean_ms']:.0f} %"]
    graph = row.get("graph_ms", NOT_TIMED)
    return [*first, *times, *needs, *roof, graph if isinstance(graph, str) else f"{graph:.2f}"]


def _train_cells(row: Row) -> list[str]:
    times = [f"{row['mean_ms']:.1f}", f"{row['to_adamw']:.2f}"] if "mean_ms" in row else [NOT_TIMED] * 2
    return [row["training"], str(row["tokens"]), row["optimizer"], *times]
