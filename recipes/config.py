"""What can be set: the sections of a run, each field with its default and one line of help.

A task brings its own `data` and `model` sections (`tasks/`), an optimizer brings its own arguments (`optimizer.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def knob(default: Any, help: str) -> Any:  # noqa: A002 -- the word that argparse uses
    """A field of a section: its default value and the line that `--help` prints for it."""
    return field(default=default, metadata={"help": help})


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the run, as a multiple of the optimizer's lr."""

    kind: Literal["cosine", "linear", "constant"] = knob(
        "cosine", "decay after the warm-up; optimizers with a line search keep lr"
    )
    warmup: int = knob(0, "steps of linear warm-up")
    final: float = knob(0.1, "multiple of lr at the last step (cosine, linear)")

    def __post_init__(self) -> None:
        require(self.warmup >= 0, f"schedule.warmup must be >= 0, got {self.warmup}")
        require(0.0 <= self.final <= 1.0, f"schedule.final must be in [0, 1], got {self.final}")


@dataclass(frozen=True)
class Train:
    """The loop."""

    steps: int = knob(600, "optimizer steps")
    batch_size: int = knob(16, "samples per optimizer step, over all processes and accumulation steps")
    accumulation: int = knob(1, "backward passes per optimizer step and process")
    microbatches: int = knob(
        0,
        "backward passes per optimizer step over all processes (0: accumulation on each): with it the run does not "
        "depend on how many processes there are",
    )
    clip: float = knob(1.0, "largest gradient norm (0: no clipping)")
    dtype: Literal["float32", "bfloat16"] = knob("float32", "bfloat16: autocast of the forward pass, float32 weights")
    threads: int = knob(0, "CPU threads per process (0: torch's choice)")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation"):
            require(getattr(self, name) >= 1, f"train.{name} must be >= 1, got {getattr(self, name)}")
        # A power of two: dividing by it is exact, in whatever order processes and passes do it.
        exact = self.microbatches >= 0 and self.microbatches.bit_count() <= 1
        require(exact, f"train.microbatches must be 0 or a power of two, got {self.microbatches}")
        either = self.microbatches == 0 or self.accumulation == 1
        require(either, f"train.accumulation={self.accumulation} and train.microbatches={self.microbatches}: give one")
        require(self.clip >= 0.0, f"train.clip must be >= 0, got {self.clip}")
        require(self.threads >= 0, f"train.threads must be >= 0, got {self.threads}")


@dataclass(frozen=True)
class Eval:
    """The validation loss, on the same samples each time."""

    every: int = knob(25, "steps between evaluations; the resolution of `steps to target`")
    batches: int = knob(8, "batches (of train.batch_size) per evaluation")

    def __post_init__(self) -> None:
        require(self.every >= 1, f"eval.every must be >= 1, got {self.every}")
        require(self.batches >= 1, f"eval.batches must be >= 1, got {self.batches}")


@dataclass(frozen=True)
class Log:
    """What is written, and how often."""

    every: int = knob(10, "steps between records of metrics.jsonl and wandb")
    diagnostics: Literal["brief", "measured", "full"] = knob(
        "measured",
        "what the optimizer tells: brief: counters; measured: also what a step does (its cost: a copy of the weights "
        "every log.every steps); full: also eigenvalues, and all of it for every bucket (dear)",
    )
    checkpoint_every: int = knob(200, "steps between checkpoints; the last step always writes one")
    wandb: Literal["auto", "online", "offline", "disabled"] = knob(
        "auto", "auto: online if credentials are configured, else offline; the environment's WANDB_MODE wins"
    )
    project: str = knob("secondorder", "wandb project")

    def __post_init__(self) -> None:
        require(self.every >= 1, f"log.every must be >= 1, got {self.every}")
        require(self.checkpoint_every >= 1, f"log.checkpoint_every must be >= 1, got {self.checkpoint_every}")


@dataclass(frozen=True)
class Spec:
    """An optimizer by name, with the keyword arguments that it is built with.

    The name is the class's, or that of a variant: a class with other arguments than its defaults.
    """

    name: str
    arguments: dict[str, Any]
    variant_of: str = ""

    @property
    def class_name(self) -> str:
        """Which class is built."""
        return self.variant_of or self.name

    def as_dict(self) -> dict[str, Any]:
        """The `optimizer` section of a config file that builds this optimizer again."""
        variant = {"class": self.variant_of} if self.variant_of else {}
        return {"name": self.name, **variant, **self.arguments}


@dataclass(frozen=True)
class Config:
    """One run: a task, the optimizer that is asked for, and those it is compared with."""

    task: str = knob("lm", "file in recipes/tasks")
    name: str = knob("run", "part of the run folder's name; a config file gives its own")
    out: str = knob("runs", "where run folders are made")
    seed: int = knob(1, "of the model's start, the order of the data and dropout")
    device: Literal["auto", "cpu", "cuda"] = knob("auto", "auto: cuda if there is one")
    parallel: Literal["ddp", "fsdp2", "hsdp"] = knob(
        "ddp", "several processes hold copies of the model (ddp), shards of it (fsdp2), or copies of shards (hsdp)"
    )
    replicas: int = knob(2, "hsdp: copies of the model; those who share one exchange most")
    timeout: float = knob(120.0, "seconds that a process waits for another before it gives up")
    data: Any = None
    model: Any = None
    optimizer: Spec = Spec("adamw", {})
    compare: tuple[Spec, ...] = ()
    schedule: Schedule = Schedule()
    train: Train = Train()
    eval: Eval = Eval()
    log: Log = Log()

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed must be >= 0, got {self.seed}")
        require(self.replicas >= 1, f"replicas must be >= 1, got {self.replicas}")
        require(self.timeout > 0, f"timeout must be > 0, got {self.timeout}")

    @property
    def optimizers(self) -> tuple[Spec, ...]:
        """All that is trained, in this order."""
        return (self.optimizer, *self.compare)
