"""The folder of a run, and files in it that are whole or absent.

runs/<task>/<time>-<name>/
    config.yaml          everything that was set, resolved
    run.json             versions, git commit, device, command, the data and its SHA-256
    curves.png           all optimizers of the run
    <optimizer>/         metrics.jsonl, checkpoint.pt or step-000123/ (checkpoints.py), coverage.txt, wandb/
"""

from __future__ import annotations

import glob
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from errors import RecipeError

SCHEMA = 1  # of checkpoint.pt


def create(out: str, task: str, name: str) -> Path:
    """A new folder for a run."""
    stem = Path(out) / task / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    for attempt in range(1, 1000):
        folder = stem if attempt == 1 else stem.with_name(f"{stem.name}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise RecipeError(f"cannot make the run folder {str(folder)!r}: {error.strerror}") from error
        return folder
    raise RecipeError(f"there are 1000 run folders like {str(stem)!r}")


def of_launch(out: str, task: str, name: str, launch: str) -> Path:
    """The folder of a run whose launch has a name: the one from before a restart, or a new one.

    Args:
        out: Where run folders are made.
        task: Of the run.
        name: Of the run.
        launch: The folder's name ends with it; "": a new folder.
    """
    if not launch:
        return create(out, task, name)
    label = name + "-" + re.sub(r"[^\w.-]", "_", launch)
    found = sorted(Path(out, task).glob(f"????????-??????-{glob.escape(label)}"))
    return found[-1] if found else create(out, task, label)


@contextmanager
def replacing(path: Path, what: str) -> Iterator[Path]:
    """Give a temporary path to write to; when that succeeded, it takes the name of `path`, at once and wholly.

    Raises:
        RecipeError: It did not succeed (a full disk). What had been at `path` is still there, and nothing else.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns the OSError of a full disk into another
        temporary.unlink(missing_ok=True)
        cause: BaseException | None = error
        while cause and not isinstance(cause, OSError):
            cause = cause.__context__
        reason = (getattr(cause, "strerror", None) or str(error)).splitlines()[0]
        kept = "; the previous one is intact" if path.exists() else ""
        raise RecipeError(f"cannot write {what} {str(path)!r}: {reason}{kept}") from error


def write_text(path: Path, text: str) -> None:
    """Write a small file wholly or not at all."""
    with replacing(path, "the file") as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_description(folder: Path, config: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write config.yaml and run.json."""
    write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "numpy", "secondorder", "wandb"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    everything = {**facts, "versions": versions, "git": _git_commit(), "command": sys.argv}
    write_text(folder / "run.json", json.dumps(everything, indent=2) + "\n")


def facts(folder: Path) -> dict[str, Any]:
    """What run.json says about a run: its data, device, versions."""
    return dict(json.loads((folder / "run.json").read_text(encoding="utf-8")))


def append_metrics(path: Path, record: dict[str, Any]) -> None:
    """Add one line to metrics.jsonl."""
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        os.truncate(path, before)  # no half line
        raise RecipeError(f"cannot write {str(path)!r}: {error.strerror}") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of metrics.jsonl; a line that was cut short when its process was killed is none."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def forget_after(path: Path, step: int) -> None:
    """Drop the records of steps that will be taken again."""
    kept = [json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= step]
    write_text(path, "".join(kept))


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint; the previous one stays until the new one is whole."""
    with replacing(path, "the checkpoint") as temporary, temporary.open("wb") as file:
        torch.save({"schema": SCHEMA, **content}, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain values are accepted.

    Raises:
        RecipeError: It is damaged, or of another schema.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises six kinds for six kinds of damage
        raise RecipeError(f"cannot read the checkpoint {str(path)!r}: {str(error).splitlines()[0]}") from error
    if content.get("schema") != SCHEMA:
        raise RecipeError(f"{str(path)!r} has schema {content.get('schema')}, this recipe reads schema {SCHEMA}")
    return content


def _git_commit() -> str:
    """The commit of the recipe's repository, with a + if files differ from it."""
    here = Path(__file__).resolve().parent
    try:
        ask = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
