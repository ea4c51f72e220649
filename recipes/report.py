"""One page about runs: a table on top, the losses of all, and what their optimizers say about themselves.

    python recipes/report.py runs/autoencoder/20260101-120000-autoencoder-compare
    python recipes/report.py 'runs/lm/*' --metrics 'optimizer/condition*' --best 6 --out comparison

RUN is a run folder, a folder of such (of compare.py, of sweep.py), or a pattern. Written are report.html, which is
self-contained, and report.png. Runs that differ in their seed alone are one line, of the median; runs on other data or
models are another section of the page. Needs matplotlib, and neither wandb nor a network.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import functools
import html
import io
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import palette
import panels
import results
import runfolder
import series
from errors import RecipeError
from palette import Style
from results import Cell
from series import Section, Series

BASELINE = "adamw"
WIDTH = 15.0  # of the page, in inches
LOSSES = 4.6  # height
ROW = 2.1  # height of a row of diagnostics
HEAD = ("optimizer", "lr", "seeds", "final loss", "best loss", "ms/step", "state MB", "steps to", "seconds to")
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto; max-width: 1240px;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .2rem; }
p { margin: .2rem 0 .8rem; color: #555; } figure { margin: 1.2rem 0; } figcaption { color: #555; font-size: .9rem; }
img { width: 100%; min-width: 760px; height: auto; } figure, .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .8rem; white-space: nowrap; }
th, td { padding: .22rem .5rem; text-align: right; border-bottom: 1px solid #e4e4e4; }
th { border-bottom: 1.5px solid #888; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
td svg { vertical-align: middle; margin-right: .5rem; } code { font-size: .85rem; overflow-wrap: anywhere; }
details { color: #555; margin-top: 1.5rem; }
"""


@dataclasses.dataclass(frozen=True)
class Part:
    """A section as it is shown."""

    section: Section
    drawn: Section  # its best series
    styles: dict[str, Style]
    title: str
    target: float
    rows: list[list[Cell]]
    metrics: list[str]
    subtitle: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if the page was written, 2 if it was given bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders or patterns")
    parser.add_argument("--metrics", metavar="GLOB", action="append", default=[], help="diagnostics; repeatable")
    parser.add_argument("--target", type=float, help="loss to reach; default: AdamW's worst final one, else the median")
    parser.add_argument("--best", type=int, default=20, help="draw so many lines; the table has all (default 20)")
    parser.add_argument("--out", help="path without suffix; default: report, in the folder that holds all runs")
    arguments = parser.parse_args(argv)
    try:
        if arguments.best < 1:
            raise RecipeError(f"--best must be >= 1, got {arguments.best}")
        runs = series.find(arguments.runs)
        sections = series.sections(runs)
        parts = [part(section, arguments.metrics, arguments.target, arguments.best) for section in sections]
        common = os.path.commonpath([run.folder.resolve() for run in runs])
        stem = Path(arguments.out or Path(common) / "report")
        pictures = write_png(parts, stem.with_name(stem.name + ".png"))
        write_html(parts, arguments.runs, stem.with_name(stem.name + ".html"))
    except (RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for one in parts:
        print(f"{one.section.title}\n{results.align(one.rows)}\n")
    print(f"page: {stem}.html, {pictures}")
    return 0


def part(section: Section, patterns: Sequence[str], target: float | None, most: int) -> Part:
    """All that is shown of a section."""
    drawn = Section(section.title, section.series[:most])
    styles = palette.styles({one.label: one.name for one in drawn.series})
    reference = default_target(section) if target is None else target
    runs = section.runs
    machines = sorted({str(run.facts.get("device", "unknown device")) for run in runs})
    versions = sorted({f"torch {run.facts.get('versions', {}).get('torch', '?')}" for run in runs})
    data = str(runs[0].facts.get("data", ""))
    number = f"{_count(len(runs), 'run')} of {_count(len({run.name for run in runs}), 'optimizer')}"
    shown = f"; the {most} best of {len(section.series)} lines are drawn" if len(section.series) > most else ""
    subtitle = f"{data}\n{number}; {', '.join(machines)}, {', '.join(versions)}{shown}"
    origins = {Path(run.origin).resolve().name for run in runs}
    title = f"{section.title}: {origins.pop()}" if len(origins) == 1 else section.title
    metrics = panels.choose(drawn, patterns)
    return Part(section, drawn, styles, title, reference, rows(section, reference), metrics, subtitle)


def default_target(section: Section) -> float:
    """The worst final loss of AdamW's best setting; without AdamW, the median of all."""
    baseline = [one for one in section.series if one.name == BASELINE][:1]
    finals = [run.result.final_loss for one in baseline or section.series for run in one.runs]
    finite = [loss for loss in finals if math.isfinite(loss)] or [math.nan]
    return max(finite) if baseline else statistics.median(finite)


def rows(section: Section, target: float) -> list[list[Cell]]:
    """A head and a row per series, with a number per seed where seeds differ."""
    accurate = any(run.result.accuracy is not None for run in section.runs)
    steps_to, seconds_to = (f"{word} {target:.4g}" for word in HEAD[-2:])
    table: list[list[Cell]] = [[*HEAD[:-2], steps_to, seconds_to, *(["accuracy"] if accurate else [])]]
    for one in section.series:
        found = [run.result for run in one.runs]
        hits = [result.reached(target) for result in found]
        row: list[Cell] = [one.label, _lr(one), ",".join(str(run.seed) for run in one.runs)]
        row.append(_per_seed([result.final_loss for result in found], _loss))
        row.append(_per_seed([result.best_loss for result in found], _loss))
        row.append(f"{statistics.median(1e3 * result.seconds / max(result.steps, 1) for result in found):.1f}")
        row.append(f"{found[0].state_bytes / 1e6:.2f}")
        row.append(_per_seed([hit[0] if hit else math.nan for hit in hits], lambda steps: f"{steps:.0f}"))
        row.append(_per_seed([hit[1] if hit else math.nan for hit in hits], lambda seconds: f"{seconds:.1f}"))
        if accurate:
            row.append(_per_seed([math.nan if r.accuracy is None else r.accuracy for r in found], lambda a: f"{a:.1%}"))
        table.append(row)
    return table


def write_png(parts: list[Part], path: Path) -> str:
    """The page as a picture."""
    pyplot = _pyplot()
    heights = [height for one in parts for height in _heights(one)]
    figure = pyplot.figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    strips = iter(_strips(figure, heights))
    for one in parts:
        title = f"{one.title}\n{one.subtitle}"
        styles = [one.styles.get(each.label, Style("#ffffff")) for each in one.section.series]
        panels.table(next(strips), WIDTH, one.rows, styles, title)
        panels.losses(next(strips), one.drawn, one.styles, one.target)
        if one.metrics:
            panels.diagnostics(next(strips), one.drawn, one.styles, one.metrics)
    with runfolder.replacing(path, "the picture") as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)
    return str(path)


def write_html(parts: list[Part], asked: Sequence[str], path: Path) -> None:
    """The page as one file that needs no other."""
    body = []
    for one in parts:
        lines = "<br>".join(map(html.escape, one.subtitle.split("\n")))
        body.append(f"<h1>{html.escape(one.title)}</h1>\n<p>{lines}</p>\n{_html_table(one)}")
        body.append(
            _image(
                "Loss. Bold: validation, the median over seeds with their range; faint: training.",
                LOSSES,
                functools.partial(panels.losses, section=one.drawn, styles=one.styles, target=one.target),
            )
        )
        if one.metrics:
            body.append(
                _image(
                    "Diagnostics over the steps, the median over seeds.",
                    ROW * panels.rows_of(one.metrics),
                    functools.partial(panels.diagnostics, section=one.drawn, styles=one.styles, keys=one.metrics),
                )
            )
        folders = "<br>".join(f"<code>{html.escape(str(run.folder))}: {run.name}</code>" for run in one.section.runs)
        body.append(f"<details><summary>{_count(len(one.section.runs), 'run')}</summary>{folders}</details>")
    title = html.escape(", ".join(one.title for one in parts))
    command = html.escape(" ".join(["python recipes/report.py", *asked]))
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{CSS}</style>\n</head>\n<body>\n'
        + "\n".join(body)
        + f"\n<p>Made by <code>{command}</code></p>\n</body>\n</html>\n"
    )
    runfolder.write_text(path, page)


def _html_table(one: Part) -> str:
    head, *rest = one.rows
    lines = ["<tr>" + "".join(f"<th>{html.escape(str(cell))}</th>" for cell in head) + "</tr>"]
    for each, row in zip(one.section.series, rest, strict=True):
        texts = [html.escape(cell if isinstance(cell, str) else "  ".join(cell)) for cell in row]
        texts[0] = _key(one, each) + texts[0]
        lines.append("<tr>" + "".join(f"<td>{text}</td>" for text in texts) + "</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _key(one: Part, each: Series) -> str:
    style = one.styles.get(each.label)
    if style is None:
        return ""
    dash = f' stroke-dasharray="{" ".join(f"{2 * part:g}" for part in style.dash)}"' if style.dash else ""
    line = f'<line x1="0" y1="5" x2="30" y2="5" stroke="{style.color}" stroke-width="3"{dash}/>'
    return f'<svg width="30" height="10" aria-hidden="true">{line}</svg>'


def _image(caption: str, height: float, draw: Callable[[Any], None]) -> str:
    """A picture inside of the page."""
    pyplot = _pyplot()
    figure = pyplot.figure(figsize=(WIDTH, height), layout="constrained")
    draw(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    pyplot.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _heights(one: Part) -> list[float]:
    below = [ROW * panels.rows_of(one.metrics)] if one.metrics else []
    return [panels.table_height(one.rows, f"\n{one.subtitle}"), LOSSES, *below]


def _strips(figure: Any, heights: list[float]) -> list[Any]:
    return list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise RecipeError("matplotlib is not installed: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _lr(one: Series) -> str:
    lr = one.runs[0].settings.get("optimizer.lr")
    return "default" if lr is None else f"{lr:g}"


def _per_seed(values: list[float], spell: Callable[[float], str]) -> Cell:
    """Each seed's number; for more than three seeds the median and the range."""
    texts = ["-" if math.isnan(value) else spell(value) for value in values]
    finite = [value for value in values if not math.isnan(value)]
    if len(values) <= 3 or not finite:
        return texts
    missed = f", {len(values) - len(finite)} missed" if len(finite) < len(values) else ""
    return f"{spell(statistics.median(finite))} ({spell(min(finite))}–{spell(max(finite))}{missed})"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _loss(value: float) -> str:
    return results.spell(value) if abs(value) < 1 else f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
