"""What layer statistics cost: relative to the backward pass, per training step, and in memory.

    python recipes/benchmark_layers.py [--threads 1] [--rounds 20] [--device cpu] [--only NAME]

Three tables. All contestants of a table run in one process, in turn, round by round, so that whatever else the machine
does meets them alike; medians are compared. `singd` takes part where it is installed (`pip install singd`).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, asked for memory alone, need not report itself

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import secondorder

WARM_UP = 3  # rounds that are not counted: first factors, first allocations


@dataclass
class Task:
    """A network and a batch."""

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    classes: int


def _mlp(width: int, depth: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Linear(width, width), nn.GELU()]
        return nn.Sequential(*layers)

    return build


def _conv(channels: Sequence[int], classes: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for i, o in zip(channels, channels[1:], strict=False):
            layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))

    return build


TASKS = {
    "linear": Task("4 linear layers 512 x 512, 4096 rows", _mlp(512, 4), (8, 512, 512), 512),
    "conv": Task("4 convolutions 64 x 64 x 3 x 3, 32 images of 16 x 16", _conv([64] * 5, 10), (32, 64, 16, 16), 10),
}


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _batch(task: Task, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.randn(task.inputs, device=device)
    rows = task.inputs[:-1] if len(task.inputs) == 3 else task.inputs[:1]
    return x, torch.randint(0, task.classes, rows, device=device)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    out = model(batch[0])
    return cross_entropy(out.flatten(0, -2), batch[1].flatten())


def statistic_cost(task: Task, sharing: str, rounds: int, device: torch.device) -> list[str]:
    """Seconds of the backward pass with and without statistics, and of the forward pass while taps are off."""
    batch = _batch(task, device)
    models = {"plain": task.build().to(device), "tapped": task.build().to(device)}
    optimizer = secondorder.KFAC(models["tapped"].parameters(), lr=0.0, module=models["tapped"], sharing=sharing)
    sites = optimizer._capture.sites  # type: ignore[union-attr]  # the taps alone are measured here, not a step
    times: dict[str, list[float]] = {"plain": [], "on": [], "off": [], "forward plain": [], "forward off": []}
    for i in range(rounds + WARM_UP):
        for name in ("plain", "on", "off"):
            model = models["plain" if name == "plain" else "tapped"]
            for site in sites:
                site.active = name == "on"
            found: list[Tensor] = []
            forward = _seconds(lambda m=model, f=found: f.append(_loss(m, batch)), device)
            backward = _seconds(found[0].backward, device)
            optimizer.zero_grad()
            models["plain"].zero_grad()
            if i >= WARM_UP:
                times[name].append(backward)
                if name != "on":
                    times[f"forward {name}"].append(forward)
    plain, on = statistics.median(times["plain"]), statistics.median(times["on"])
    off = statistics.median(times["forward off"]) / statistics.median(times["forward plain"]) - 1
    added = on / plain - 1
    shares = [f"{100 * share:.1f} %" for share in (added, added / 10, off)]
    return [task.name, sharing, f"{1e3 * plain:.2f}", *shares]


def contestants(model: nn.Module) -> dict[str, Callable[[], torch.optim.Optimizer]]:
    """Makers of optimizers for a network; those that are not installed are left out."""
    params = list(model.parameters())
    made: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "torch AdamW": lambda: torch.optim.AdamW(params, lr=1e-4),
        "KFAC": lambda: secondorder.KFAC(params, lr=1e-4, module=model),
        "KFAC, statistics_every=10": lambda: secondorder.KFAC(params, lr=1e-4, module=model, statistics_every=10),
        "EKFAC": lambda: secondorder.EKFAC(params, lr=1e-4, module=model),
    }
    if importlib.util.find_spec("singd") is not None:
        from singd.optim.optimizer import SINGD  # type: ignore[import-not-found,import-untyped,unused-ignore]

        conv = any(isinstance(m, nn.Conv2d) for m in model.modules())
        kind = "reduce" if conv else "expand"
        average = "batch" if conv else "batch+sequence"
        made["singd, T=1"] = lambda: SINGD(model, lr=1e-4, T=1, kfac_approx=kind, loss_average=average)
        made["singd, T=10"] = lambda: SINGD(model, lr=1e-4, T=10, kfac_approx=kind, loss_average=average)
    return made


def step_cost(task: Task, rounds: int, device: torch.device) -> list[list[str]]:
    """Seconds and memory of whole training steps."""
    batch = _batch(task, device)
    names = list(contestants(task.build().to(device)))
    models = {name: task.build().to(device) for name in names}
    optimizers = {name: contestants(models[name])[name]() for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}

    def step(name: str) -> None:
        optimizers[name].zero_grad()
        _loss(models[name], batch).backward()
        optimizers[name].step()

    for i in range(rounds + 2 * 10):  # two refresh periods are warm-up
        for name in names:
            seconds = _seconds(lambda n=name: step(n), device)
            if i >= 2 * 10:
                times[name].append(seconds)
    base = statistics.fmean(times["torch AdamW"])
    rows = []
    for name in names:
        mean, median, worst = statistics.fmean(times[name]), statistics.median(times[name]), max(times[name])
        peak = _peak_bytes(lambda n=name: step(n), device)
        ratios = [f"{mean / base:.2f}x", f"{worst / median:.2f}x"]
        sizes = [f"{size / 2**20:.1f}" for size in (_state_bytes(optimizers[name]), peak)]
        rows.append([task.name, name, f"{1e3 * mean:.2f}", *ratios, *sizes])
    return rows


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the state, however nested; storages that are shared count once."""
    found: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for entry in value.values():
                visit(entry)
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module):
            visit(vars(value))

    visit(dict(optimizer.state))
    for name in ("Ks", "Cs", "m_Ks", "m_Cs"):  # singd keeps its factors beside the state
        visit(getattr(optimizer, name, {}))
    return sum(found.values())


def _peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes allocated at once while `run` runs, above what there was before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--rounds", type=int, default=20, help="counted rounds")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", choices=TASKS, help="one task alone")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    device = torch.device(given.device)
    tasks = [TASKS[given.only]] if given.only else list(TASKS.values())
    where = f"{platform.machine()}, {given.threads} thread(s)"
    where = torch.cuda.get_device_name() if device.type == "cuda" else where
    print(f"torch {torch.__version__}, {where}; medians of {given.rounds} rounds\n")
    costs = []
    for task in tasks:
        kinds = ("reduce", "expand") if "conv" in task.name else ("expand", "reduce")
        costs += [statistic_cost(task, sharing, given.rounds, device) for sharing in kinds]
    header = ["network", "sharing", "backward, ms", "statistics added", "at statistics_every=10", "forward, taps off"]
    print(_table(header, costs) + "\n")
    header = ["network", "optimizer", "step, ms (mean)", "to AdamW", "worst / median", "state, MiB", "peak, MiB"]
    print(_table(header, [row for task in tasks for row in step_cost(task, given.rounds, device)]))


if __name__ == "__main__":
    main()
