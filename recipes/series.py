"""Run folders as series for a report: the runs of one optimizer at one setting, one per seed, under one label.

Runs on the same task, data and model are a section: their losses may be compared. Within a section two runs belong to
one series if they differ in the seed alone. A label is the optimizer's name, and what sets the series apart.
"""

from __future__ import annotations

import glob
import json
import math
import os
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import results
import runfolder
import space
from command import flat
from errors import RecipeError
from results import Result

NO_SETTING = ("seed", "out", "name", "device", "train.threads")  # neither changes what is learned
NO_SECTION = ("log", "compare", "optimizer", "tuned_lr")
TUNING = "tune-"  # how compare.py names the runs of --tune


@dataclass(frozen=True)
class Run:
    """One optimizer's run."""

    name: str
    folder: Path  # of the run, beside its other optimizers
    origin: str  # what was asked for, and led here
    settings: dict[str, Any]  # by dotted keys
    seed: int
    records: list[dict[str, Any]]
    facts: dict[str, Any]

    @property
    def result(self) -> Result:
        """What it came to."""
        return results.of(self.name, self.records)


@dataclass(frozen=True)
class Curve:
    """A metric over the steps: the median of the seeds, and their least and largest."""

    steps: list[int]
    seconds: list[float]
    middle: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Series:
    """The runs of one optimizer at one setting."""

    label: str
    runs: list[Run]

    @property
    def name(self) -> str:
        """Of the optimizer."""
        return self.runs[0].name

    @property
    def final_loss(self) -> float:
        """The median of the runs' last losses; infinite if it diverged, or never was evaluated."""
        return statistics.median(_or_infinite(run.result.final_loss) for run in self.runs)

    def curve(self, key: str) -> Curve:
        """A metric, at the steps at which most of the runs have a finite value of it."""
        found: dict[int, list[tuple[float, float]]] = {}
        for run in self.runs:
            for record in run.records:
                if isinstance(record.get(key), (int, float)) and math.isfinite(record[key]):
                    found.setdefault(record["step"], []).append((record["seconds"], float(record[key])))
        steps = sorted(step for step, values in found.items() if 2 * len(values) > len(self.runs))
        columns = [list(zip(*found[step], strict=True)) for step in steps]
        return Curve(
            steps,
            [statistics.median(seconds) for seconds, _ in columns],
            [statistics.median(values) for _, values in columns],
            [min(values) for _, values in columns],
            [max(values) for _, values in columns],
        )


@dataclass(frozen=True)
class Section:
    """What may be compared, the best series first."""

    title: str
    series: list[Series]

    @property
    def runs(self) -> list[Run]:
        """All runs."""
        return [run for one in self.series for run in one.runs]

    def units(self) -> tuple[str, float] | None:
        """What throughput is counted in, and how many one step takes; None where the runs differ."""
        found = set()
        for run in self.runs:
            last: dict[str, Any] = next((record for record in reversed(run.records) if "train/lr" in record), {})
            others = set(last) - {"train/loss", "train/lr", "train/grad_norm"}
            found |= {(key[6:], last[key] / last["step"]) for key in others if key.startswith("train/")}
        return found.pop() if len(found) == 1 else None


def find(patterns: Iterable[str]) -> list[Run]:
    """All runs in the folders, or folders of folders, that the patterns name.

    Raises:
        RecipeError: A pattern names nothing, or there is no run.
    """
    runs: dict[Path, Run] = {}
    for pattern in patterns:
        origins = sorted(glob.glob(os.path.expanduser(pattern)))
        if not origins:
            raise RecipeError(f"no file or folder {pattern!r}")
        for origin in map(Path, origins):
            for path in sorted(origin.rglob("metrics.jsonl")) if origin.is_dir() else [origin]:
                if (path.parent.parent / "config.yaml").exists() and path.resolve() not in runs:
                    run = _read(path, str(origin))
                    if run is not None:
                        runs[path.resolve()] = run
    if not runs:
        raise RecipeError(f"no run with metrics in {', '.join(patterns)}")
    return list(runs.values())


def sections(runs: list[Run]) -> list[Section]:
    """The runs by what may be compared, then by series."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_workload(run), sort_keys=True, default=str), []).append(run)
    places = [_workload(group[0]) for group in groups.values()]
    found = []
    for place, group in zip(places, groups.values(), strict=True):
        task = place.get("task")
        differing = _differing([other for other in places if other.get("task") == task])
        words = [f"{key}={_spell(place[key])}" for key in differing if key in place]
        found.append(Section(" ".join([str(task), *words]), _series(group)))
    return found


def _series(runs: list[Run]) -> list[Series]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([run.name, _setting(run)], sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    parts: list[tuple[list[Run], str]] = []
    for group in groups.values():
        parts += _repeats(group)
    everywhere = _differing([_shared(group[0]) for group, _ in parts])
    found = []
    for group, repeat in parts:
        alike = [_setting(other[0]) for other, _ in parts if other[0].name == group[0].name]
        keys = list(dict.fromkeys([*_differing(alike), *everywhere]))
        words = space.short(keys)
        setting = _setting(group[0])
        label = [group[0].name, *(f"{words[key]}={_spell(setting[key])}" for key in keys if key in setting)]
        found.append(Series(" ".join([*label, repeat] if repeat else label), sorted(group, key=lambda run: run.seed)))
    return sorted(found, key=lambda series: series.final_loss)


def _repeats(group: list[Run]) -> list[tuple[list[Run], str]]:
    """The group in parts that hold each seed once, and a word for each part: another folder, another code."""
    if len({run.seed for run in group}) == len(group):
        return [(group, "")]
    for place in (lambda run: Path(run.origin), lambda run: run.folder.parent, lambda run: run.folder):
        parts: dict[Path, list[Run]] = {}
        for run in group:
            parts.setdefault(place(run), []).append(run)
        if all(len({run.seed for run in part}) == len(part) for part in parts.values()):
            break
    common = os.path.commonpath([str(path.parent) for path in parts])
    return [(part, f"({os.path.relpath(path, common)})") for path, part in parts.items()]


def _read(path: Path, origin: str) -> Run | None:
    """The run of a metrics.jsonl; None for those of --tune, unless they are what was asked for."""
    folder, name = path.parent.parent, path.parent.name
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    if str(config.get("name")).startswith(TUNING) and Path(origin) not in (folder, path.parent, path):
        return None
    try:
        records = runfolder.read_metrics(path)
    except ValueError:
        print(f"{path}: a line is incomplete; left out", file=sys.stderr)
        return None
    specs = [config["optimizer"], *config.get("compare", [])]
    spec: dict[str, Any] = next((spec for spec in specs if spec["name"] == name), {})
    settings = flat({key: value for key, value in config.items() if key not in NO_SECTION})
    settings |= {f"optimizer.{key}": value for key, value in spec.items() if key != "name"}
    facts = runfolder.facts(folder) if (folder / "run.json").exists() else {}
    return Run(name, folder, origin, settings, int(config.get("seed", 0)), records, facts) if records else None


def _workload(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.settings.items() if key.split(".")[0] in ("task", "data", "model")}


def _setting(run: Run) -> dict[str, Any]:
    return {key: run.settings[key] for key in run.settings if key not in NO_SETTING and key not in _workload(run)}


def _shared(run: Run) -> dict[str, Any]:
    return {key: value for key, value in _setting(run).items() if not key.startswith("optimizer.")}


def _differing(settings: list[dict[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for setting in settings for key in setting)
    return [key for key in keys if len({json.dumps(setting.get(key, "?"), default=str) for setting in settings}) > 1]


def _spell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_spell, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value
