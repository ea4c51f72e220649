"""What a run came to: read from its metrics, compared with the baseline's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runfolder import read_metrics

STATE_BYTES = ("memory/state_bytes", "optimizer/state_bytes")  # the second: its name in older run folders

Cell = str | Sequence[str]  # of a table: a text, or one for each seed


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
    def best_loss(self) -> float:
        """The lowest validation loss (NaN: there is none)."""
        return min((loss for _, _, loss in self.validation if not math.isnan(loss)), default=math.nan)

    @property
    def diverged(self) -> bool:
        """Whether it ended with a loss that is not finite."""
        return bool(self.validation) and not math.isfinite(self.final_loss)

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
    return of(name, read_metrics(folder / name / "metrics.jsonl"))


def of(name: str, records: list[dict[str, Any]]) -> Result:
    """The result of an optimizer from the records of its metrics.jsonl."""

    def series(key: str) -> list[tuple[int, float, float]]:
        return [(record["step"], record["seconds"], record[key]) for record in records if key in record]

    state = [record[key] for record in records for key in STATE_BYTES if key in record]
    accuracy = [record["val/accuracy"] for record in records if "val/accuracy" in record]
    last = accuracy[-1] if accuracy else None
    return Result(name, series("val/loss"), series("train/loss"), state[-1] if state else 0, last)


def spell(loss: float) -> str:
    """A loss as text: of those that four decimals would not tell apart, three digits."""
    return f"{loss:.4f}" if not 0 < abs(loss) < 0.01 else f"{loss:.2e}"


def table(results: list[Result]) -> str:
    """One line per optimizer. The target is the final loss of the second: the first of those compared with."""
    target = results[1].final_loss if len(results) > 1 else None
    head = ["optimizer", "final loss", "ms/step", "state MB", "seconds"]
    rows = [head if target is None else [*head, f"to {spell(target)}: steps", "seconds"]]
    for result in results:
        per_step = 1e3 * result.seconds / max(result.steps, 1)
        row = [result.name, spell(result.final_loss), f"{per_step:.1f}", f"{result.state_bytes / 1e6:.2f}"]
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


def align(rows: Sequence[Sequence[Cell]]) -> str:
    """The rows as lines of columns, aligned to the right."""
    texts = [[cell if isinstance(cell, str) else " ".join(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in texts]
    return "\n".join(lines)


def markdown(rows: Sequence[Sequence[Cell]], lower: Sequence[str] = ()) -> str:
    """The rows as a table in Markdown.

    Args:
        rows: The head comes first.
        lower: Columns of numbers in which the lowest median is set in bold.
    """
    head, *body = ([cell if isinstance(cell, str) else ", ".join(cell) for cell in row] for row in rows)
    for column in (head.index(name) for name in lower if name in head):
        medians = [_median(row[column]) for row in rows[1:]]
        for row, value in zip(body, medians, strict=True):
            if value == min(medians) < math.inf:
                row[column] = f"**{row[column]}**"
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def _median(cell: Cell) -> float:
    """Of the numbers in a cell; what is none, a miss, counts as infinite."""
    numbers = []
    for text in [cell] if isinstance(cell, str) else cell:
        try:
            numbers.append(float(text))
        except ValueError:
            numbers.append(math.inf)
    numbers = [math.inf if math.isnan(number) else number for number in numbers]
    return statistics.median(numbers)


def verdict(results: list[Result]) -> str:
    """One sentence that compares the first optimizer with the baseline."""
    first = results[0]
    if len(results) < 2:
        loss = spell(first.final_loss)
        return f"{first.name}: validation loss {loss} after {first.steps} steps, {first.seconds:.1f} s"
    baseline = results[1]
    hit = first.reached(baseline.final_loss)
    if not hit:
        return f"{first.name} did not reach {baseline.name}'s final loss of {spell(baseline.final_loss)}"
    return (
        f"{first.name} reached {baseline.name}'s final loss of {spell(baseline.final_loss)} "
        f"in {hit[0]} steps and {hit[1]:.1f} s "
        f"({hit[0] / baseline.steps:.0%} of its steps, {hit[1] / baseline.seconds:.0%} of its seconds)"
    )
