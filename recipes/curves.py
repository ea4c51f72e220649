"""The picture of a run: loss against steps and against seconds, all optimizers together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import palette
from results import Result
from runfolder import replacing

INSIDE = 7  # so many names fit into a panel without hiding its lines


def draw(
    results: list[Result], title: str, path: Path, target: tuple[float, str] | None = None, what: str = "loss"
) -> str:
    """Draw curves.png: validation loss as lines; where no optimizer has several runs, training loss faint behind them.

    Args:
        results: The runs; those of one optimizer share a color, which is the same in every picture.
        title: Of the picture.
        path: Where it goes.
        target: A loss, drawn as a dotted line, and what it is.
        what: Validation measures.

    Returns:
        Where it is, or why it is not there.
    """
    try:
        import matplotlib
    except ImportError:
        return "none: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(result.name for result in results))
    alone = len(names) == len(results)
    styles = palette.styles({name: name for name in names})
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, column, label in zip(axes, (0, 1), ("step", "seconds of training"), strict=True):
        for name in names:
            line = styles[name].line()
            runs = [result for result in results if result.name == name]
            for repetition, result in enumerate(runs):
                if alone:
                    axis.plot(*_columns(result.training, column), **line, alpha=0.25, linewidth=0.8)
                style: dict[str, Any] = {"marker": ".", "markersize": 4} if alone else {"linewidth": 1.0}
                shown = None if repetition else name
                axis.plot(*_columns(result.validation, column), **line | style, label=shown)
        if target:
            axis.axhline(target[0], color="gray", linestyle=":", label=target[1])
        axis.set_xlabel(label)
        axis.grid(alpha=0.2)
    scale, bottom, top = _range(results)
    axes[0].set_yscale(scale)
    axes[0].set_ylim(bottom, top)
    axes[0].set_ylabel(f"{what} (line with dots: validation,\nfaint: training loss)" if alone else f"validation {what}")
    if len(names) <= INSIDE:
        axes[1].legend(loc="upper right")
    else:
        figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(title)
    with replacing(path, "the picture") as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    pyplot.close(figure)
    return str(path)


def _columns(points: list[tuple[int, float, float]], column: int) -> tuple[list[float], list[float]]:
    return [point[column] for point in points], [point[2] for point in points]


def _range(results: list[Result]) -> tuple[str, float | None, float | None]:
    """Scale and ends of the axis of losses.

    From those after a twentieth of the run: neither the first fall nor a run that diverges sets the scale.
    """
    losses = [
        loss
        for result in results
        for step, _, loss in result.validation
        if step >= result.steps / 20 and math.isfinite(loss) and loss <= 2 * result.validation[0][2]
    ]
    if not losses or max(losses) == min(losses):
        return "linear", None, None
    if 0 < 100 * min(losses) < max(losses):
        return "log", min(losses) / 1.5, max(losses) * 1.5
    margin = 0.05 * (max(losses) - min(losses))
    return "linear", min(losses) - margin, max(losses) + margin
