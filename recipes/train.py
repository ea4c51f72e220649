"""Train a model with one of the suite's optimizers, and others beside it for comparison.

    python recipes/train.py --config configs/lm_tiny.yaml
    torchrun --standalone --nproc-per-node 2 recipes/train.py --config configs/lm_tiny.yaml --compare adamw,torch.muon

Every optimizer starts from the same weights and sees the same batches in the same order, one after the other. The run
folder then holds the config, the metrics, a checkpoint for each, and curves.png (see runfolder.py). `--help` lists
everything that can be set.

A run that is asked to stop (preemption.py) or killed goes on from its last checkpoint: with `--resume FOLDER`, with the
same command where that gives it a `--folder`, and by itself when torchrun restarts it.
"""

from __future__ import annotations

import contextlib
import math
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import checkpoints
import closures
import command
import curves
import optimizer
import preemption
import rendezvous
import results
import runfolder
import schedule
import tasks
import world as processes
from config import Config, Spec, Train
from errors import RecipeError
from progress import Progress, Stopwatch
from tracking import Tracker
from world import World

MEMORY = ("state_bytes", "workspace_bytes")  # of the optimizer's diagnostics


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if it trained or was asked to stop, 2 if it was given bad input, 130 if interrupted."""
    try:
        arguments = command.parse(sys.argv[1:] if argv is None else argv)
        if arguments.help:
            say(command.help_text(arguments))
            return 0
        config = command.resolve(arguments)
        with processes.join(config.device, config.timeout) as world:
            run(config, world, arguments.resume or arguments.folder)
    except preemption.Preempted as stopped:
        return int(stopped.code or 0)
    except (RecipeError, OSError) as error:
        return refuse(f"error: {error}")
    except KeyboardInterrupt:
        say("interrupted; --resume with the run folder continues from its last checkpoint", file=sys.stderr)
        return 130
    return 0


def say(text: str, file: Any = None) -> None:
    """Print on the main process."""
    if processes.rank() == 0:
        print(text, file=file, flush=True)


def refuse(line: str) -> int:
    """Say on the main process what is wrong."""
    say(line, file=sys.stderr)
    if processes.rank() > 0:
        time.sleep(5)  # torchrun ends all processes when the first one fails: let that be the one that explains
    return 2


def run_once(config: Config, world: World, folder: Path) -> list[results.Result]:
    """The run of a config in this very folder: trained, continued where it was interrupted, or just read."""
    if (folder / "config.yaml").exists():
        same = command.refuse_changes(folder, config)
        if same and (folder / "results.txt").exists():
            return [results.read(folder, spec.name) for spec in config.optimizers]
    return run(config, world, folder)


def run(config: Config, world: World, folder: Path | None = None) -> list[results.Result]:
    """Train all optimizers of a config in one run folder, then draw and summarise them.

    Args:
        config: Of the run.
        world: The processes.
        folder: Of the run; what is there is continued. None: a new one, or that of this launch before a restart.
    """
    check_division(config.train, world)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    task = tasks.load(config.task).Task(config.data, config.model, config.seed)
    check_closures(config, task, world)
    if world.is_main:
        folder = folder or runfolder.of_launch(config.out, config.task, config.name, rendezvous.launch())
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "config.yaml").exists():
            command.refuse_changes(folder, config)
        (folder / "results.txt").unlink(missing_ok=True)  # its presence says that the run is finished
        facts = {"data": task.summary, "data_sha256": task.fingerprint, "device": device_name(world)}
        if (folder / "run.json").exists() and runfolder.facts(folder)["data_sha256"] != task.fingerprint:
            raise RecipeError(f"--resume: the data is not what {str(folder)!r} was trained on; was: see its run.json")
        runfolder.write_description(folder, command.as_dict(config), facts)
        say(f"{task.summary}\n{device_name(world)}, {world.size} processes; run folder {folder}")
    folder = world.gather(folder)[0]
    for number, spec in enumerate(config.optimizers, 1):
        train(config, spec, task, world, folder / spec.name, f"[{number}/{len(config.optimizers)}] {spec.name}")
    trained = [results.read(folder, spec.name) for spec in config.optimizers]
    if world.is_main:
        rates = [f"{spec.name} (lr {spec.arguments.get('lr', 'default')})" for spec in config.optimizers]
        title = f"{config.name}: {', '.join(rates)}"
        what = tasks.measured(config.task)
        target = (trained[1].final_loss, f"{trained[1].name}'s final {what}") if len(trained) > 1 else None
        picture = curves.draw(trained, title, folder / "curves.png", target, what)
        runfolder.write_text(folder / "results.txt", f"{results.table(trained)}\n{results.verdict(trained)}\n")
        say(f"\n{results.table(trained)}\n{results.verdict(trained)}\ncurves: {picture}")
    world.barrier()
    return trained


def check_division(loop: Train, world: World) -> None:
    """Refuse what cannot be divided evenly.

    Raises:
        RecipeError: The processes do not share the micro-batches, or those the batch.
    """
    parts, by = loop.microbatches, f"{loop.microbatches} micro-batches"
    if parts % world.size:
        raise RecipeError(f"train.microbatches={parts} is not divisible by {world.size} processes")
    if not parts:
        parts, by = world.size * loop.accumulation, f"{world.size} processes x {loop.accumulation} accumulation steps"
    if loop.batch_size % parts:
        raise RecipeError(f"train.batch_size={loop.batch_size} is not divisible by {by}")


def check_closures(config: Config, task: Any, world: World) -> None:
    """Refuse what a step with a closure does not do.

    Raises:
        RecipeError: The task has residuals and the loop is to do something with their gradient, or it has none and an
            optimizer needs a closure.
    """
    if not hasattr(task, "residuals"):
        for spec in config.optimizers:
            if spec.class_name in optimizer.NEED_CLOSURE:
                raise RecipeError(
                    f"optimizer {spec.name} evaluates a loss several times, which task={config.task} lacks"
                )
        return
    if world.size > 1:
        if config.parallel != "ddp":
            raise RecipeError(f"parallel must be ddp for task={config.task}, by residuals, got {config.parallel}")
        for spec in config.optimizers:
            if spec.class_name in optimizer.NEED_CLOSURE:
                raise RecipeError(f"optimizer {spec.name} sees one process's loss alone, got {world.size} processes")
    for name, value, wanted in (
        ("accumulation", config.train.accumulation, 1),
        ("microbatches", max(config.train.microbatches, 1), 1),
        ("clip", config.train.clip, 0.0),
        ("dtype", config.train.dtype, "float32"),
    ):
        if value != wanted:
            raise RecipeError(f"train.{name} must be {wanted} for task={config.task}, which has residuals, got {value}")


def train(config: Config, spec: Spec, task: Any, world: World, folder: Path, label: str) -> None:
    """Train one optimizer from its last checkpoint, or from the start, to the last step.

    Raises:
        Preempted: It was asked to stop before, and has written a checkpoint.
    """
    steps = config.train.steps
    torch.manual_seed(config.seed)  # the same weights for every optimizer
    model = task.build_model().to(world.device)
    wrapped = world.wrap(model, config.parallel, config.replicas)
    closure = hasattr(task, "residuals")  # steps by residuals need every parameter in every process
    opt = optimizer.build(spec, model, shared=world.size > 1 and config.parallel == "ddp" and not closure)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, schedule.factor(schedule.of(opt, config.schedule), steps))
    watch = Stopwatch(world.device)
    start = restore(folder, model, opt, scheduler, watch, world)
    if start >= steps or results.read(folder.parent, spec.name).diverged:
        return
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    tracker = None
    if world.is_main:
        folder.mkdir(exist_ok=True)
        runfolder.forget_after(folder / "metrics.jsonl", start or -1)
        describe(opt, folder)
        tracker = Tracker(config.log, folder, f"{config.name}-{spec.name}", command.as_dict(config))
    if hasattr(opt, "track") and config.log.diagnostics != "brief":
        opt.track(config.log.every)
    units = task.units_per_sample * config.train.batch_size
    progress = Progress(label, steps, start, task.samples_unit, units, silent=not world.is_main)
    logged = start

    def record(step: int, values: dict[str, Any]) -> None:
        if tracker and values:
            line = {"step": step, "seconds": watch.seconds(), **values}
            runfolder.append_metrics(folder / "metrics.jsonl", line)
            tracker.log(line)

    if start == 0:
        record(0, evaluate(model, task, config, world))
    for step in range(start, steps):
        vote = world.vote()
        watch.mark("")
        batches = [points(task, step, config, world)] if closure else microbatches(task, step, config, world)
        watch.mark("data")
        lr = float(opt.param_groups[0]["lr"])
        parts: dict[str, Tensor] = {}
        if closure:
            loss, parts = closures.step(opt, residuals(wrapped, task, step, batches[0], config))
            norm = clip_gradient(model, 0.0)
        else:
            loss = forward_backward(wrapped, task, step, batches, config, world)
            watch.mark("forward_backward")
            norm = clip_gradient(model, config.train.clip)
            opt.step()
        opt.zero_grad()
        scheduler.step()
        watch.mark("optimizer")

        done, last = step + 1, step + 1 == steps
        values: dict[str, Any] = {}
        if done % config.log.every == 0 or last:
            milliseconds = {f"time/{k}_ms": 1e3 * v / (done - logged) for k, v in watch.split().items()}
            logged = done
            values = {"train/loss": world.mean(loss), "train/lr": lr, "train/grad_norm": float(norm), **milliseconds}
            values |= {f"loss/{name}": float(part) for name, part in parts.items()}
            values |= {f"train/{task.samples_unit}": units * done, **diagnostics(opt, config.log.diagnostics)}
            values["memory/state_bytes"] = optimizer.state_bytes(opt)
            if world.device.type == "cuda":
                values["memory/peak_bytes"] = torch.cuda.max_memory_allocated(world.device)
            progress.show(done, f"loss {results.spell(values['train/loss'])}  lr {lr:.2e}")
        diverged = not math.isfinite(values.get("train/loss", 0.0))
        if done % config.eval.every == 0 or last or diverged:
            values |= {"val/loss": math.nan} if diverged else evaluate(model, task, config, world)
        record(done, values)
        verdict = vote()
        if diverged:
            say(f"{label}: the loss is not finite after step {done}; stopped", file=sys.stderr)
            break
        if verdict or last or done % config.log.checkpoint_every == 0:
            save(folder, done, model, opt, scheduler, watch, world)
        if verdict:
            break
    if tracker:
        tracker.finish()
        if hasattr(task, "draw") and done == steps and not diverged:
            say(f"{label}: {task.draw(model, f'{config.name}: {spec.name} after {steps} steps', folder)}")
    if verdict:
        say(f"{label}: asked to stop after step {done}; --resume {folder.parent} goes on", file=sys.stderr)
        raise preemption.stop(verdict, world.parent)


def share(loop: Train, world: World) -> tuple[int, int]:
    """How many micro-batches of a step each process takes, and how many samples each has."""
    parts = loop.microbatches // world.size or loop.accumulation
    return parts, loop.batch_size // (world.size * parts)


def microbatches(task: Any, step: int, config: Config, world: World) -> list[tuple[Tensor, ...]]:
    """This process's part of the step's global batch, one batch per backward pass."""
    parts, count = share(config.train, world)
    first = world.rank * parts * count
    return [move(task.batch(step, first + part * count, count), world.device) for part in range(parts)]


def points(task: Any, step: int, config: Config, world: World) -> tuple[Tensor, ...]:
    """This process's points of a step: every W-th of each residual."""
    batch = task.batch(step, 0, config.train.batch_size)
    return move(tuple(tensor[world.rank :: world.size] for tensor in batch), world.device)


def move(batch: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """A batch on the device."""
    return tuple(tensor.to(device, non_blocking=True) for tensor in batch)


def autocast(config: Config, world: World) -> torch.autocast:
    """bfloat16 products in the forward pass, if the config wants them."""
    return torch.autocast(world.device.type, torch.bfloat16, enabled=config.train.dtype == "bfloat16")


def forward_backward(
    model: nn.Module, task: Any, step: int, batches: list[tuple[Tensor, ...]], config: Config, world: World
) -> Tensor:
    """Add the gradient of the mean loss over all batches; returns that loss, of this process.

    Dropout depends on the step and on the micro-batch's number among those of all processes, on nothing else.
    """
    total = torch.zeros((), device=world.device)
    for number, batch in enumerate(batches, 1):
        seed_everything(config.seed, step, world.rank * len(batches) + number)
        with contextlib.nullcontext() if number == len(batches) else world.gradients_stay(model):
            with autocast(config, world):
                loss = task.loss(model, batch) / len(batches)
            loss.backward()
        total += loss.detach()
    return total


def residuals(
    model: nn.Module, task: Any, step: int, batch: tuple[Tensor, ...], config: Config
) -> Callable[[], dict[str, Tensor]]:
    """The residuals of a step; what is random in them is the same at every evaluation."""

    def evaluate() -> dict[str, Tensor]:
        seed_everything(config.seed, step, 1)
        return task.residuals(model, batch)

    return evaluate


def clip_gradient(model: nn.Module, largest: float) -> Tensor:
    """Scale the gradient down to the norm `largest` (0: leave it); returns the norm it had."""
    if largest:
        norm = nn.utils.clip_grad_norm_(model.parameters(), largest)
    else:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def evaluate(model: nn.Module, task: Any, config: Config, world: World) -> dict[str, float]:
    """What the task measures, on the same samples at every call and for every number of processes."""
    parts, count = share(config.train, world)
    parts *= config.eval.batches
    total = config.eval.batches * config.train.batch_size
    model.eval()
    sums: dict[str, Tensor] = {}
    for part in range(parts):
        batch = move(task.validation((world.rank * parts + part) * count, count, total), world.device)
        with autocast(config, world):
            for name, value in task.measure(model, batch).items():
                sums[name] = sums.get(name, 0) + value / parts
    model.train()
    means = {name: world.mean(value) for name, value in sums.items()}
    if hasattr(task, "summarise"):
        means = task.summarise(means)
    return {f"val/{name}": value for name, value in means.items()}


def save(folder: Path, step: int, model: nn.Module, opt: Any, scheduler: Any, watch: Stopwatch, world: World) -> None:
    """Write everything that the next step depends on. The data's position is the step."""
    trainer = {"scheduler": scheduler.state_dict(), "seconds": watch.seconds()}
    checkpoints.save(folder, step, model, opt, trainer, world)


def restore(folder: Path, model: nn.Module, opt: Any, scheduler: Any, watch: Stopwatch, world: World) -> int:
    """Bring back what `save` wrote; returns the number of steps taken, 0 where there is no checkpoint."""
    trainer = {"scheduler": scheduler.state_dict(), "seconds": 0.0}
    trainer = checkpoints.restore(folder, model, opt, trainer, world)
    scheduler.load_state_dict(trainer["scheduler"])
    watch.total = trainer["seconds"]
    return int(trainer["step"])


def diagnostics(opt: Any, detail: str) -> dict[str, float]:
    """What the optimizer says about itself, by the name of a metric; nothing where it cannot tell."""
    if not hasattr(opt, "diagnostics"):
        return {}
    found = opt.diagnostics(full=detail == "full")
    shown = {key: value for key, value in found.items() if detail == "full" or not key.startswith("bucket/")}
    return {f"{'memory' if key in MEMORY else 'optimizer'}/{key}": value for key, value in shown.items()}


def seed_everything(*key: int) -> None:
    """Seed torch, numpy and Python, for each key independently of all others."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def device_name(world: World) -> str:
    """What the run runs on."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The CPU's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or "CPU"


def describe(opt: Any, folder: Path) -> None:
    """Write down which parameter is treated how, where the optimizer can tell."""
    if hasattr(opt, "coverage"):
        runfolder.write_text(folder / "coverage.txt", f"{opt.coverage()}\n\n{opt.memory_report()}\n")


if __name__ == "__main__":
    sys.exit(main())
