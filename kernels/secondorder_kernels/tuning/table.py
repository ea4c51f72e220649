"""Writing the tables that `tables.py` reads."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from secondorder_kernels import tables

Entry = dict[str, Any]


def merge(folder: Path, device: torch.device, entries: Sequence[Entry]) -> Path:
    """Put entries into a device's table, in the place of those for the same operation, kind and sizes.

    A table that was measured with other versions of torch, Triton or the driver is replaced: its ratios are not those
    of what is installed now.

    Args:
        folder: Where the table is, or is to be; made if need be.
        device: Whose table.
        entries: As the table has them.

    Returns:
        The table's path.

    Raises:
        OSError: If it cannot be written.
        ValueError: If what is there is no table.
    """
    path = folder / tables.file_name(device)
    header = provenance(device)
    kept: list[Entry] = []
    if path.is_file():
        old = json.loads(path.read_text())
        if not isinstance(old, dict) or not isinstance(old.get("entries"), list):
            raise ValueError(f"{path} is no table")
        if all(old.get(name) == value for name, value in header.items() if name != "date"):
            kept = old["entries"]
    found = {key(entry): entry for entry in [*kept, *entries]}
    ordered = [found[place] for place in sorted(found)]
    folder.mkdir(parents=True, exist_ok=True)
    # A reader sees the old table or the new one, never half of it.
    fresh = path.with_suffix(f".{os.getpid()}")
    lines = ",\n".join("  " + json.dumps(entry) for entry in ordered)
    fresh.write_text(json.dumps(header, indent=1)[:-2] + f',\n "entries": [\n{lines}\n ]\n}}\n')
    os.replace(fresh, path)
    tables.forget()
    return path


def provenance(device: torch.device) -> dict[str, str]:
    """What was measured, when, and with what."""
    import triton

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver": _driver() if device.type == "cuda" else "none",
    }


def _driver() -> str:
    """Version of the GPU's driver; "unknown" where nothing tells."""
    rocm = Path("/sys/module/amdgpu/version")
    if torch.version.hip:
        return rocm.read_text().strip() if rocm.is_file() else "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def key(entry: Entry) -> tuple[str, str, tuple[int, ...]]:
    """By what an entry is looked up."""
    return entry["op"], entry["kind"], tuple(entry["sizes"])
