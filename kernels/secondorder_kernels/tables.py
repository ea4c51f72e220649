"""Tables of configurations: for every operation which tiles, or that another path is as fast; one JSON file per device.

    {"device": "NVIDIA H100 80GB HBM3", "date": "…", "torch": "…", "triton": "…", "driver": "…", "entries": [
      {"op": "ema_syrk_", "kind": "float32/bf16/k", "sizes": [24, 1024, 1024],
       "config": {"block": 64, …} or null, "us": 61.2, "best_us": 84.0, "best": "baddbmm", "ratio": 1.37}]}

`kind` must agree exactly; of these entries that with the nearest sizes is taken, by the sum of |log2| of their ratios.
A config of null: another path was as fast. Tables of a device are written by `python -m secondorder_kernels.tune`; the
files named by a family (`sm90.json`, …) hold configurations that compile well there and were never measured: no ratio.

Of a device these are read, in this order: the folder SECONDORDER_KERNELS_CONFIG_DIR or, where that is not named, the
user's cache; the package.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_FARTHEST = 4.0  # octaves, summed over sizes: beyond, a measurement says nothing
_SHIPPED = Path(__file__).parent / "configs"

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """One line of a table.

    Attributes:
        sizes: At which it was measured.
        config: Keyword arguments of the kernel's launcher; None: another path was as fast.
        ratio: Time of the best other path over that of the kernel; None: never measured.
    """

    sizes: tuple[int, ...]
    config: Config | None
    ratio: float | None = None


Table = Mapping[tuple[str, str], list[Entry]]


def user_folder() -> Path:
    """Where the tuner writes, and what is read before the package's own tables."""
    named = os.environ.get("SECONDORDER_KERNELS_CONFIG_DIR")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "secondorder_kernels"


@functools.cache
def file_name(device: torch.device) -> str:
    """File name of a device's table: its name, with what file systems may not like replaced."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return "".join(c if c.isalnum() else "_" for c in name) + ".json"


def family(device: torch.device) -> str:
    """Whose configurations compile well on a device: sm80, sm90, sm100, gfx942; of a CPU: the interpreter's."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    # From 12.0 on, consumer GPUs: instructions and shared memory are those of 8.9 rather than those of 10.0.
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm80")


def nearest(operation: str, kind: str, sizes: tuple[int, ...], device: torch.device) -> Entry | None:
    """The measured entry for sizes like these; None if there is none."""
    return _nearest_measured(operation, kind, sizes, file_name(device), torch.are_deterministic_algorithms_enabled())


@functools.lru_cache(maxsize=4096)
def _nearest_measured(
    operation: str, kind: str, sizes: tuple[int, ...], name: str, deterministic: bool
) -> Entry | None:
    for table in _measured(name, deterministic):
        found = _nearest(table.get((operation, kind), []), sizes)
        if found is not None and _distance(found.sizes, sizes) <= _FARTHEST:
            return found
    return None


def config(operation: str, kind: str, sizes: tuple[int, ...], device: torch.device) -> Config:
    """Keyword arguments for the kernel's launcher: as measured on this device, or else its family's.

    Raises:
        LookupError: If the family's table has no such entry; a mistake of this package.
    """
    found = nearest(operation, kind, sizes, device)
    if found is not None and found.config is not None:
        return found.config
    return family_config(operation, kind, sizes, family(device))


@functools.lru_cache(maxsize=4096)
def family_config(operation: str, kind: str, sizes: tuple[int, ...], name: str) -> Config:
    """Keyword arguments for the kernel's launcher from a family's table; the kind "*" stands for all others."""
    table = _read(_SHIPPED / f"{name}.json")
    for wanted in (kind, "*"):
        found = _nearest(table.get((operation, wanted), []), sizes)
        if found is not None and found.config is not None:
            return found.config
    raise LookupError(f"{name}.json has no configuration of {operation} for {kind}")


def fingerprint() -> str:
    """A digest of all tables that this process may read: ranks whose tables differ would round differently."""
    digest = hashlib.sha256()
    for folder in _folders(torch.are_deterministic_algorithms_enabled()):
        for path in sorted(folder.glob("*.json")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def forget() -> None:
    """Read the tables again at the next look-up: after the tuner wrote one."""
    _measured.cache_clear()
    _nearest_measured.cache_clear()
    family_config.cache_clear()


def _folders(deterministic: bool) -> list[Path]:
    # What a user tuned belongs to one machine; who asks for determinism asks for the same bits on the next one.
    return [_SHIPPED] if deterministic else [user_folder(), _SHIPPED]


@functools.cache
def _measured(name: str, deterministic: bool) -> list[Table]:
    return [_read(folder / name) for folder in _folders(deterministic) if (folder / name).is_file()]


def _read(path: Path) -> Table:
    table: dict[tuple[str, str], list[Entry]] = {}
    for entry in json.loads(path.read_text())["entries"]:
        row = Entry(tuple(entry["sizes"]), entry["config"], entry.get("ratio"))
        table.setdefault((entry["op"], entry["kind"]), []).append(row)
    return table


def _nearest(entries: list[Entry], sizes: tuple[int, ...]) -> Entry | None:
    return min(entries, key=lambda entry: _distance(entry.sizes, sizes), default=None)


def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return sum(abs(math.log2(max(x, 1) / max(y, 1))) for x, y in zip(a, b, strict=True))
