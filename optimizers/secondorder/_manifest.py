"""What a complete checkpoint is: a folder with a manifest of its files, their sizes and SHA-256 digests.

The manifest is the last file that is written, so a folder without one was never finished. It is what tells a file that
is whole from one that only looks so: torch loads a shard with flipped bits, or from another step, without an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch.distributed.checkpoint as dcp

FORMAT = 1
MANIFEST = "manifest.json"
METADATA = ".metadata"  # torch's table of contents: which key lies where

_SHOWN = 5
_CHUNK = 1 << 20  # bytes that are hashed at a time

Files: TypeAlias = dict[str, dict[str, Any]]  # by name: {"size": bytes, "sha256": hexadecimal digits}


class CheckpointError(ValueError):
    """A checkpoint could not be saved or loaded: what failed, on which rank, in which file, for which keys."""


def shown(keys: Iterable[str]) -> str:
    """The first of the keys, and how many more there are."""
    keys = list(keys)
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(map(repr, keys[:_SHOWN])) + more


def described(folder: Path, names: Iterable[str]) -> Files:
    """Sizes and digests of files as they are now."""
    return {name: {"size": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in names}


def write(folder: Path, world_size: int, files: Files) -> None:
    """Write the manifest; it, and the folder's entries, are on the disk when this returns."""
    content = {"format": FORMAT, "world_size": world_size, "files": dict(sorted(files.items()))}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(folder: Path) -> Files:
    """The files of a checkpoint, as its manifest has them.

    Raises:
        CheckpointError: There is no manifest, or none that this version reads.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = content["format"]
        entries = content["files"].items()
        files = {str(name): {"size": int(entry["size"]), "sha256": str(entry["sha256"])} for name, entry in entries}
    except OSError as error:
        raise CheckpointError(
            f"{MANIFEST}: cannot be read ({error.strerror}); {str(folder)!r} was not saved by secondorder.checkpoint, "
            "or not to the end"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST}: damaged ({type(error).__name__}: {error})") from error
    if version != FORMAT:
        raise CheckpointError(f"{MANIFEST}: format {version!r}, this version reads {FORMAT}")
    if METADATA not in files:
        raise CheckpointError(f"{MANIFEST}: damaged (it has no entry for {METADATA})")
    return files


def faults(folder: Path, files: Files, names: Iterable[str]) -> list[str]:
    """What is wrong with some of a checkpoint's files, one line a file, with the first keys that it should hold."""
    out = []
    for name in names:
        fault = _fault(folder / name, files[name])
        if fault:
            out.append(f"{name}: {fault}{_contents(folder, files, name)}")
    return out


def check(folder: Path, files: Files, names: Iterable[str]) -> None:
    """Raise `CheckpointError` if anything is wrong with these files."""
    found = faults(folder, files, names)
    if found:
        raise CheckpointError("; ".join(found))


def verify(path: str | os.PathLike[str]) -> list[str]:
    """Compare a checkpoint with its manifest; every byte is read. Needs no process group.

    Args:
        path: The checkpoint's folder.

    Returns:
        One line for every problem; none if the checkpoint is as it was saved.
    """
    folder = Path(path)
    try:
        files = read(folder)
    except CheckpointError as error:
        return [str(error)]
    return faults(folder, files, files)


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint in a folder.

    Complete: it has a manifest, and every file of it at its full size. Contents are not read (`verify` does).

    Args:
        folder: Where checkpoints lie whose names end in `step-` and a number, such as `step-000123`.

    Returns:
        The one of the highest step; None if there is none, or no such folder.
    """
    found = []
    for path in Path(folder).iterdir() if Path(folder).is_dir() else ():
        step = re.search(r"step-(\d+)$", path.name)
        if step and _is_complete(path):
            found.append((int(step[1]), path))
    return max(found)[1] if found else None


def _is_complete(folder: Path) -> bool:
    try:
        return not any(_fault(folder / name, entry, contents=False) for name, entry in read(folder).items())
    except CheckpointError:
        return False


def _fault(path: Path, entry: Mapping[str, Any], contents: bool = True) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return f"{size} bytes, {entry['size']} were saved"
        if contents and _digest(path) != entry["sha256"]:
            return "other content than was saved (SHA-256 differs)"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _contents(folder: Path, files: Files, name: str) -> str:
    """Which keys a file should hold, from the table of contents, if that is sound."""
    if name == METADATA or _fault(folder / METADATA, files[METADATA]):
        return ""
    stored = dcp.FileSystemReader(folder).read_metadata().storage_data
    keys = {index.fqn for index, place in stored.items() if place.relative_path == name}
    return f"; it held {shown(sorted(keys))}" if keys else ""
