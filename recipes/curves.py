"""The picture of a run: loss against steps and against seconds, all optimizers together."""

from __future__ import annotations

import math
from pathlib import Path

from results import Result
from runfolder import replacing


def draw(results: list[Result], title: str, path: Path) -> str:
    """Draw curves.png: validation loss as lines with dots, training loss faint behind them.

    Args:
        results: The optimizers; the second one's final loss is drawn as the target.
        title: Of the picture.
        path: Where it goes.

    Returns:
        Where it is, or why it is not there.
    """
    try:
        import matplotlib
    except ImportError:
        return "none: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, column, label in zip(axes, (0, 1), ("step", "seconds of training"), strict=True):
        for number, result in enumerate(results):
            color = f"C{number}"
            axis.plot(*_columns(result.training, column), color=color, alpha=0.25, linewidth=0.8)
            axis.plot(*_columns(result.validation, column), color=color, marker=".", markersize=4, label=result.name)
        if len(results) > 1:
            axis.axhline(results[1].final_loss, color="gray", linestyle=":", label=f"{results[1].name}'s final loss")
        axis.set_xlabel(label)
        axis.grid(alpha=0.2)
    bottom, top = _range(results)
    axes[0].set_ylim(bottom, top)
    axes[0].set_ylabel("loss (line with dots: validation, faint: training)")
    axes[1].legend(loc="upper right")
    figure.suptitle(title)
    with replacing(path, "the picture") as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    pyplot.close(figure)
    return str(path)


def _columns(points: list[tuple[int, float, float]], column: int) -> tuple[list[float], list[float]]:
    return [point[column] for point in points], [point[2] for point in points]


def _range(results: list[Result]) -> tuple[float | None, float | None]:
    """The losses after a twentieth of the run: neither the first fall nor a run that diverges sets the scale."""
    losses = [
        loss
        for result in results
        for step, _, loss in result.validation
        if step >= result.steps / 20 and math.isfinite(loss) and loss <= 2 * result.validation[0][2]
    ]
    if not losses or max(losses) == min(losses):
        return None, None
    margin = 0.05 * (max(losses) - min(losses))
    return min(losses) - margin, max(losses) + margin
