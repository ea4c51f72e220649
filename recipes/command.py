"""From the command line and the config files to one checked Config.

Later wins: the class's defaults, `configs/optim_<name>.yaml`, the task's `tuned_lr`, the config files in their order,
the command line.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

import optimizer
import tasks
from config import Config, Eval, Log, Schedule, Spec, Train
from convert import convert, spell, suggestion
from errors import RecipeError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
USAGE = """\
usage: python recipes/train.py [--config FILE]... [--section.key=value]... [--compare NAME,NAME]
       torchrun --standalone --nproc-per-node 2 recipes/train.py ...

  --config FILE         a YAML file; several are merged, the last wins (one per task, one per optimizer)
  --compare NAMES       train these too, on the same data in the same order; the first is the baseline (none: no one)
  --resume DIR          continue a run from its folder
  --folder DIR          the run's folder: made if it is not there, else continued
  --help                this text, for the task and optimizer that are chosen
"""
# Neither the data, the model nor the path of the optimizer depends on these before the run's former last step (but a
# schedule that decays is stretched by train.steps).
MAY_CHANGE_ON_RESUME = (
    *("train.steps", "train.threads", "eval.every", "out", "compare", "parallel", "replicas", "timeout"),
    *(f"log.{key}" for key in ("every", "diagnostics", "checkpoint_every", "wandb", "project")),
)


@dataclasses.dataclass
class Arguments:
    """The command line, taken apart."""

    configs: list[Path] = dataclasses.field(default_factory=list)
    overrides: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    compare: list[str] | None = None
    resume: Path | None = None
    folder: Path | None = None
    help: bool = False


def parse(argv: Sequence[str]) -> Arguments:
    """Take the command line apart: `--key value` and `--key=value` are the same.

    Raises:
        RecipeError: Something is no option, or an option has no value.
    """
    arguments, words = Arguments(), list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            arguments.help = True
            continue
        if not word.startswith("--"):
            raise RecipeError(f"expected an option, got {word!r}; options are --config FILE or --section.key=value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise RecipeError(f"--{key} needs a value")
            value = words.pop(0)
        if key == "config":
            arguments.configs.append(Path(value))
        elif key == "resume":
            arguments.resume = Path(value)
        elif key == "folder":
            arguments.folder = Path(value)
        elif key == "compare":
            arguments.compare = (arguments.compare or []) + _names(value)
        else:
            arguments.overrides.append((key, value))
    return arguments


def resolve(arguments: Arguments) -> Config:
    """Merge and check everything that the command line names.

    Raises:
        RecipeError: With one line that says which key, which value, and what is allowed.
    """
    merged = _merged(arguments)
    task = tasks.load(convert(merged.get("task", "lm"), str, "task"))
    tuned = convert(merged.pop("tuned_lr", None) or {}, dict[str, float], "tuned_lr")
    _refuse_unknown(merged, task)
    values: dict[str, Any] = {"optimizer": _spec(merged.get("optimizer") or {}, tuned, "optimizer")}
    values["compare"] = tuple(
        spec
        for spec in (_spec(entry, tuned, "compare") for entry in _entries(merged.get("compare")))
        if spec.name != values["optimizer"].name
    )
    for key, section in _sections(task).items():
        values[key] = _build(section, merged.get(key) or {}, f"{key}.")
    plain = {key: merged[key] for key in merged if key not in values}
    config: Config = _build(Config, plain, "", **values)
    if arguments.resume:
        refuse_changes(arguments.resume, config)
    return config


def refuse_changes(folder: Path, config: Config) -> bool:
    """Whether a run folder was made with just this config.

    Raises:
        RecipeError: What differs may not change when a run is continued.
    """
    old, new = _read(folder / "config.yaml"), as_dict(config)
    _refuse_changes(old, new)
    return {**old, "out": ""} == {**new, "out": ""}


def as_dict(config: Config) -> dict[str, Any]:
    """The content of a config file that resolves to `config`."""
    plain = dataclasses.asdict(config)
    plain["optimizer"] = config.optimizer.as_dict()
    plain["compare"] = [spec.as_dict() for spec in config.compare]
    return {key: _plain(value) for key, value in plain.items()}


def help_text(arguments: Arguments) -> str:
    """The usage, and every key with its default and meaning."""
    config = resolve(arguments)
    lines = [USAGE]
    for key, section in [("", config), *((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))]:
        if not dataclasses.is_dataclass(section) or isinstance(section, Spec):
            continue
        lines.append(f"{key or 'run'}:")
        for field in dataclasses.fields(section):
            if "help" in field.metadata:
                name = f"--{key}.{field.name}" if key else f"--{field.name}"
                lines.append(f"  {name:26} {getattr(section, field.name)!s:12} {field.metadata['help']}")
    lines.append(f"optimizer (one of {', '.join(sorted(optimizer.classes()))}):")
    lines.append(f"  {'--optimizer.name':34} {config.optimizer.name}")
    for key, argument in optimizer.arguments(config.optimizer.class_name).items():
        value = config.optimizer.arguments.get(key, argument.default)
        lines.append(f"  {'--optimizer.' + key:34} {value!s:16} {spell(argument.hint)}")
    return "\n".join(lines)


def _merged(arguments: Arguments) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    if arguments.resume:
        merged = _read(arguments.resume / "config.yaml")
    elif arguments.configs:
        merged["name"] = arguments.configs[0].stem
    for path in arguments.configs:
        _merge(merged, _read(path))
    if isinstance(merged.get("optimizer"), str):
        merged["optimizer"] = {"name": merged["optimizer"]}
    for key, value in arguments.overrides:
        *sections, last = ("optimizer.name" if key == "optimizer" else key).split(".", 1)
        target = merged
        for section in sections:
            if not isinstance(target.get(section), dict):
                target[section] = {}
            target = target[section]
        target[last] = value
    if arguments.compare is not None:
        merged["compare"] = arguments.compare
    return merged


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{str(path)!r} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{str(path)!r} holds no sections")
    return content


def _spec(entry: Any, tuned_lr: Mapping[str, float], where: str) -> Spec:
    """An optimizer from its section, or from its name alone."""
    entry = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict):
        raise RecipeError(f"{where}: expected the name of an optimizer or a section with one, got {entry!r}")
    given = dict(entry)
    name = convert(given.pop("name", "adamw"), str, f"{where}.name").lower()
    own_file = CONFIGS / f"optim_{name}.yaml"
    defaults = dict(_read(own_file).get("optimizer") or {}) if own_file.is_file() else {}
    defaults.pop("name", None)
    if name in tuned_lr:
        defaults["lr"] = tuned_lr[name]
    settings = {**defaults, **given}
    variant_of = convert(settings.pop("class", ""), str, f"{where}.class")
    return optimizer.check(name, settings, variant_of)


def _entries(compare: Any) -> list[Any]:
    if compare is None or isinstance(compare, str):
        return _names(compare or "")
    if not isinstance(compare, list):
        raise RecipeError(f"compare: expected a list of optimizers, got {compare!r}")
    return compare


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip() and name.strip().lower() != "none"]


def _build(cls: Any, mapping: Any, prefix: str, **ready: Any) -> Any:
    """A section from its part of the merged mapping; `ready` are fields that are no plain values."""
    if not isinstance(mapping, dict):
        raise RecipeError(f"{prefix.rstrip('.')}: expected a section with keys, got {mapping!r}")
    hints = typing.get_type_hints(cls)
    values = {key: convert(value, hints[key], prefix + key) for key, value in mapping.items()}
    try:
        return cls(**values, **ready)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _sections(task: ModuleType) -> dict[str, type]:
    """All sections but `optimizer`, whose keys are the class's arguments."""
    return {"data": task.Data, "model": task.Model, "schedule": Schedule, "train": Train, "eval": Eval, "log": Log}


def _refuse_unknown(merged: Mapping[str, Any], task: ModuleType) -> None:
    known = {field.name for field in dataclasses.fields(Config)} | {"tuned_lr", "optimizer.name", "optimizer.lr"}
    for name, section in _sections(task).items():
        known |= {f"{name}.{field.name}" for field in dataclasses.fields(section)}
    for key in flat(merged):
        if key not in known and not key.startswith(("optimizer.", "tuned_lr.")):
            raise RecipeError(f"unknown key {key!r}{suggestion(key, sorted(known))}")


def _refuse_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    before, after = flat(old), flat(new)
    for key in sorted(set(before) | set(after)):
        if before.get(key) != after.get(key) and key not in MAY_CHANGE_ON_RESUME:
            raise RecipeError(
                f"--resume: {key} was {before.get(key)!r} and would be {after.get(key)!r}; "
                f"only these may change: {', '.join(MAY_CHANGE_ON_RESUME)}"
            )
    if new["compare"][: len(old["compare"])] != old["compare"]:
        raise RecipeError("--resume: optimizers may be added to compare, those of the run must stay as they were")


def flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values by their dotted keys."""
    found = {}
    for key, value in mapping.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value})
    return found


def _plain(value: Any) -> Any:
    """Tuples as lists, so that YAML and torch.load(weights_only=True) read what was written."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
