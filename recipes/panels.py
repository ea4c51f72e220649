"""The pictures of a report: losses, diagnostics, and a table with the key to the lines.

Each function draws one section into a figure or a part of one, so that the page's PNG and the HTML show the same.
"""

from __future__ import annotations

import fnmatch
import math
import statistics
from collections.abc import Sequence
from typing import Any

from palette import Style
from results import Cell
from series import Curve, Section

MOST = 8  # panels of diagnostics that are chosen by default
ALWAYS = ("step", "seconds", "train/loss", "train/lr", "val/loss")  # shown elsewhere, or not worth a panel
DEFAULT = ("val/*", "optimizer/*", "loss/*", "train/grad_norm")
# What tells most about a preconditioner, by the words in a metric's name, most telling first.
TELLING = "accuracy held_out cosine ratio condition rank clip damping noise snr since_refresh stale norm".split()
GRID: dict[str, Any] = {"alpha": 0.25, "linewidth": 0.6}
CHARACTER = 0.602  # width of a letter of DejaVu Sans Mono, in its size
POINT = 1 / 72  # inch


def losses(figure: Any, section: Section, styles: dict[str, Style], target: float | None) -> None:
    """Loss against steps, seconds, and tokens or samples: validation bold with the seeds' range, training faint."""
    from matplotlib import ticker

    units = section.units()
    labels = ["steps", "seconds of training", *([units[0]] if units else [])]
    axes = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    drawn: dict[str, list[Curve]] = {"train/loss": [], "val/loss": []}
    for key, curves in drawn.items():
        bold = key == "val/loss"
        for one in section.series:
            curve, style = one.curve(key), styles[one.label]
            curves.append(curve)
            places = [curve.steps, curve.seconds, [step * units[1] for step in curve.steps] if units else []]
            for axis, place in zip(axes, places, strict=False):
                if bold and len(one.runs) > 1:
                    axis.fill_between(place, curve.low, curve.high, color=style.color, alpha=0.1, linewidth=0)
                look = {"linewidth": 1.7} if bold else {"linewidth": 0.7, "alpha": 0.35, "zorder": 1}
                axis.plot(place, curve.middle, **style.line() | look, label=one.label if bold else None)
    for axis, label in zip(axes, labels, strict=True):
        if target is not None and math.isfinite(target):
            axis.axhline(target, color="#888888", linestyle=":", linewidth=1.2, label=f"target {target:.4g}")
        axis.set_xlabel(label)
        axis.locator_params(axis="x", nbins=6)
        axis.grid(**GRID)
        axis.margins(x=0.02)
    if units:
        axes[-1].xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    _loss_range(axes[0], drawn["val/loss"])
    axes[0].set_ylabel("loss (bold: validation, faint: training)")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8, handlelength=2.6, frameon=False)


def diagnostics(figure: Any, section: Section, styles: dict[str, Style], keys: Sequence[str]) -> None:
    """One panel for each metric, over the steps."""
    columns = columns_of(keys)
    axes = figure.subplots(rows_of(keys), columns, squeeze=False)
    for axis, key in zip(axes.flat, keys, strict=False):
        values: list[float] = []
        for one in section.series:
            curve = one.curve(key)
            values += curve.middle
            if curve.steps:
                axis.plot(curve.steps, curve.middle, **styles[one.label].line(), linewidth=1.1)
        if _is_wide(values) and _is_skewed(values):
            _make_logarithmic(axis, min(values), max(values))
        axis.locator_params(axis="x", nbins=6, integer=True)
        group, _, name = key.rpartition("/")
        axis.set_title(name.replace("_", " "), fontsize=9, loc="left", pad=4)
        axis.set_title(group, fontsize=7, loc="right", color="#777777", pad=4)
        axis.tick_params(labelsize=7)
        axis.grid(**GRID)
        axis.margins(x=0.02)
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    for column in range(min(columns, len(keys))):
        axes[(len(keys) - 1 - column) // columns][column].set_xlabel("steps", fontsize=8)


def columns_of(keys: Sequence[str]) -> int:
    """Panels in a row."""
    return 5 if len(keys) == 5 else 4


def rows_of(keys: Sequence[str]) -> int:
    """Rows of panels."""
    return math.ceil(len(keys) / columns_of(keys))


def choose(section: Section, patterns: Sequence[str]) -> list[str]:
    """The metrics to draw: those that match a pattern; without patterns, the most telling ones.

    Args:
        section: Whose runs are looked through.
        patterns: Such as `optimizer/condition*`; "optimizer/" may be left out.
    """
    last: dict[str, set[float]] = {}
    spread: dict[str, int] = {}
    for one in section.series:
        seen: dict[str, set[float]] = {}
        for record in (record for run in one.runs for record in run.records):
            for key, value in record.items():
                if key not in ALWAYS and isinstance(value, (int, float)) and math.isfinite(value):
                    seen.setdefault(key, set()).add(float(value))
        for key, values in seen.items():
            last.setdefault(key, set()).update(values)
            spread[key] = spread.get(key, 0) + (len(values) > 1)
    if patterns:
        wanted = [(pattern, f"optimizer/{pattern}") for pattern in patterns]
        return sorted(key for key in last if any(fnmatch.fnmatchcase(key, p) for pair in wanted for p in pair))
    keys = [key for key in last if any(fnmatch.fnmatchcase(key, p) for p in DEFAULT) and spread[key]]
    keys.sort(key=lambda key: (key.startswith("train/"), key.count("/"), _telling(key), -spread[key], key))
    return sorted(keys[:MOST], key=lambda key: (not key.startswith("val/"), key.rpartition("/")[0], _telling(key), key))


def table(figure: Any, width: float, rows: Sequence[Sequence[Cell]], styles: Sequence[Style], title: str) -> None:
    """The table, in inches, with a piece of line before each row.

    Args:
        figure: Where it goes; it is filled.
        width: Of the figure.
        rows: The head comes first.
        styles: Of the rows below the head.
        title: Above it; lines after the first are small.
    """
    height = table_height(rows, title)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.axis("off")
    first, *more = title.split("\n")
    axis.text(0.2, 0.28, first, fontsize=14, fontweight="bold", va="center")
    for number, line in enumerate(more):
        axis.text(0.2, 0.55 + 0.17 * number, line, fontsize=8, color="#555555", va="center")
    texts = [[cell if isinstance(cell, str) else " ".join(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    room = width - 0.9
    size = min(8.5, room / ((sum(widths) + 2.5 * len(widths)) * CHARACTER * POINT))
    letter = size * CHARACTER * POINT
    top = height - 0.21 * len(rows) - 0.1
    for number, row in enumerate(texts):
        y = top + 0.21 * (number + 0.5)
        x = 0.7
        look = {"fontsize": size, "va": "center", "family": "monospace"}
        for column, (cell, letters) in enumerate(zip(row, widths, strict=True)):
            right = x + letters * letter
            place = {"x": right, "ha": "right"} if column else {"x": x, "ha": "left"}
            axis.text(y=y, s=cell, weight="normal" if number else "bold", **place, **look)
            x = right + 2.5 * letter
        if number:
            axis.plot([0.22, 0.6], [y, y], **styles[number - 1].line(), linewidth=2)
        else:
            axis.plot([0.2, x], [y + 0.11, y + 0.11], color="#999999", linewidth=0.6)


def table_height(rows: Sequence[Sequence[Cell]], title: str) -> float:
    """In inches."""
    return 0.21 * len(rows) + 0.17 * title.count("\n") + 0.65


def _loss_range(axis: Any, curves: list[Curve]) -> None:
    """The scale of the losses: neither the first fall nor a run that diverges may set it."""
    start = max((curve.middle[0] for curve in curves if curve.middle), default=1.0)
    high_enough = [value for curve in curves for value in curve.high if value <= 2 * start]
    low_enough = [value for curve in curves for value in curve.low]
    if not high_enough or not low_enough:
        return
    if _is_wide([min(low_enough), max(high_enough)]):
        _make_logarithmic(axis, min(low_enough), max(high_enough))
        return
    settled = []
    for curve in curves:
        pairs = zip(curve.steps, curve.high, strict=True)
        settled += [value for step, value in pairs if 10 * step >= curve.steps[-1] and value <= 2 * start]
    low, high = min(low_enough), max(settled or high_enough)
    margin = 0.05 * (high - low) or 1.0
    axis.set_ylim(low - margin, high + margin)


def _make_logarithmic(axis: Any, low: float, high: float) -> None:
    """A logarithmic axis for values between two, with labels enough."""
    from matplotlib import ticker

    axis.set_yscale("log")
    axis.set_ylim(low / 1.3, high * 1.2)
    if high < 500 * low:  # decades alone would be one or two labels
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def _is_wide(values: Sequence[float]) -> bool:
    """Whether the values call for a logarithmic axis: all positive, and a decade apart."""
    return bool(values) and min(values) > 0 and max(values) >= 10 * min(values)


def _is_skewed(values: Sequence[float]) -> bool:
    """Whether the middle of the values is nearer to the geometric mean of their ends than to the arithmetic one."""
    low, high, middle = min(values), max(values), statistics.median(values)
    return math.sqrt(low * high) > middle or middle - math.sqrt(low * high) < (low + high) / 2 - middle


def _telling(key: str) -> int:
    return next((rank for rank, word in enumerate(TELLING) if word in key.lower()), len(TELLING))
