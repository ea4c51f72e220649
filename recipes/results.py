"""What a run came to: read from its metrics, compared with the baseline's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from runfolder import read_metrics


@dataclass(frozen=True)
class Result:
    """One optimizer's run."""

    name: str
    validation: list[tuple[int, float, float]]  # (step, seconds of training, loss)
    training: list[tuple[int, float, float]]
    state_bytes: int
    accuracy: float | None = None  # the last on the validation set, where the task has one

    @property
    def final_loss(self) -> float:
        """The last validation loss (NaN: it diverged before the first)."""
        return self.validation[-1][2] if self.validation else math.nan

    @property
    def steps(self) -> int:
        """Steps taken."""
        return self.validation[-1][0] if self.validation else 0

    @property
    def seconds(self) -> float:
        """Seconds of training, evaluation and writing excluded."""
        return self.validation[-1][1] if self.validation else 0.0

    def reached(self, target: float) -> tuple[int, float] | None:
        """Step and seconds of the first evaluation at or below `target`."""
        return next(((step, seconds) for step, seconds, loss in self.validation if loss <= target), None)


def read(folder: Path, name: str) -> Result:
    """The result of optimizer `name` in a run folder."""
    records = read_metrics(folder / name / "metrics.jsonl")

    def series(key: str) -> list[tuple[int, float, float]]:
        return [(record["step"], record["seconds"], record[key]) for record in records if key in record]

    state = [record["optimizer/state_bytes"] for record in records if "optimizer/state_bytes" in record]
    accuracy = [record["val/accuracy"] for record in records if "val/accuracy" in record]
    last = accuracy[-1] if accuracy else None
    return Result(name, series("val/loss"), series("train/loss"), state[-1] if state else 0, last)


def table(results: list[Result]) -> str:
    """One line per optimizer. The target is the final loss of the second: the first of those compared with."""
    target = results[1].final_loss if len(results) > 1 else None
    head = ["optimizer", "final loss", "ms/step", "state MB", "seconds"]
    rows = [head if target is None else [*head, f"to {target:.4f}: steps", "seconds"]]
    for result in results:
        per_step = 1e3 * result.seconds / max(result.steps, 1)
        row = [result.name, f"{result.final_loss:.4f}", f"{per_step:.1f}", f"{result.state_bytes / 1e6:.2f}"]
        row.append(f"{result.seconds:.1f}")
        if target is not None:
            hit = result.reached(target)
            row += [str(hit[0]), f"{hit[1]:.1f}"] if hit else ["not reached", "-"]
        rows.append(row)
    if any(result.accuracy is not None for result in results):
        rows[0].append("accuracy")
        for row, result in zip(rows[1:], results, strict=True):
            row.append("-" if result.accuracy is None else f"{result.accuracy:.1%}")
    return align(rows)


def align(rows: list[list[str]]) -> str:
    """The rows as lines of columns, aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def verdict(results: list[Result]) -> str:
    """One sentence that compares the first optimizer with the baseline."""
    first = results[0]
    if len(results) < 2:
        return f"{first.name}: validation loss {first.final_loss:.4f} after {first.steps} steps, {first.seconds:.1f} s"
    baseline = results[1]
    hit = first.reached(baseline.final_loss)
    if not hit:
        return f"{first.name} did not reach {baseline.name}'s final loss of {baseline.final_loss:.4f}"
    return (
        f"{first.name} reached {baseline.name}'s final loss of {baseline.final_loss:.4f} "
        f"in {hit[0]} steps and {hit[1]:.1f} s "
        f"({hit[0] / baseline.steps:.0%} of its steps, {hit[1] / baseline.seconds:.0%} of its seconds)"
    )
