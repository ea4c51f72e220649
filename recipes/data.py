"""Text and token files as arrays of integers, and the windows that are cut from them.

What `load` recognises:
    stdlib            the `*.py` files of this interpreter's standard library, as bytes; every tenth file validates
    a text file       its bytes; the end validates
    a folder of text  the bytes of its files; every tenth file validates
    a .bin file       with the magic number 20240520: a FineWeb shard (256 int32 header, then uint16 tokens);
                      without: nanoGPT's raw uint16 tokens
    a folder of .bin  train.bin and val.bin (nanoGPT), or *_train_*.bin and *_val_*.bin (FineWeb shards)
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import RecipeError

MAGIC = 20240520
HEADER_BYTES = 1024
SHARD_NAME = re.compile(r"_(train|val)_\d+\.bin$")  # a file of this name is a shard, or broken


@dataclass(frozen=True)
class Corpus:
    """Training and validation text, each in one or more arrays (uint8 bytes or uint16 tokens)."""

    train: list[np.ndarray]
    val: list[np.ndarray]
    is_bytes: bool
    sha256: str
    summary: str


class Windows:
    """All windows of `length` consecutive tokens, numbered through the arrays; none crosses from one to the next."""

    def __init__(self, arrays: Sequence[np.ndarray], length: int, part: str) -> None:
        self.length = length
        self.arrays = [array for array in arrays if len(array) >= length]
        if not self.arrays:
            held = max((len(array) for array in arrays), default=0)
            raise RecipeError(f"the {part} data holds {held} tokens in one piece, one sample needs {length}")
        self.ends = np.cumsum([len(array) - length + 1 for array in self.arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Windows by number, as int64 of shape (len(indices), length)."""
        rows = np.empty((len(indices), self.length), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            which = int(np.searchsorted(self.ends, index, side="right"))
            start = int(index) - (int(self.ends[which - 1]) if which else 0)
            row[:] = self.arrays[which][start : start + self.length]
        return rows


def load(source: str, val_fraction: float) -> Corpus:
    """Read `source`, whatever it is (see the module's first lines).

    Args:
        source: "stdlib", or the path of a file or folder.
        val_fraction: Part of a single file that is kept for validation, from its end.

    Raises:
        RecipeError: Nothing there, empty, or not in the format that its name or header says.
    """
    if source == "stdlib":
        stdlib = Path(sysconfig.get_path("stdlib"))
        return _from_files(sorted(stdlib.glob("*.py")), "standard library of this Python")
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise RecipeError(f"data.source: no file or folder {source!r}")
    if path.suffix == ".bin":
        return _corpus(*_split(_tokens(path), val_fraction), [path], str(path))
    return _corpus(*_split(_bytes([path]), val_fraction), [path], str(path))


def _from_folder(folder: Path) -> Corpus:
    train = sorted(folder.glob("train.bin")) or sorted(folder.glob("*_train_*.bin"))
    val = sorted(folder.glob("val.bin")) or sorted(folder.glob("*_val_*.bin"))
    if train and val:
        return _corpus([_tokens(path) for path in train], [_tokens(path) for path in val], train + val, str(folder))
    if train or val:
        raise RecipeError(f"data.source: {str(folder)!r} has {'no validation' if train else 'no training'} .bin file")
    inside = sorted(path for path in folder.rglob("*") if path.is_file())
    visible = [path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return _from_files([path for path in visible if _is_text(path)], str(folder))


def _from_files(files: list[Path], what: str) -> Corpus:
    """Every tenth file validates, so that no file is in both parts."""
    if len(files) < 2:
        raise RecipeError(f"data.source: {what} holds {len(files)} text files, at least 2 are needed to split by file")
    val = files[::10]
    train = [path for path in files if path not in set(val)]
    return _corpus([_bytes(train)], [_bytes(val)], train + val, f"{what} ({len(files)} files)")


def _corpus(train: list[np.ndarray], val: list[np.ndarray], files: Iterable[Path], what: str) -> Corpus:
    is_bytes = train[0].dtype == np.uint8
    unit = "bytes" if is_bytes else "tokens"
    counts = [sum(len(array) for array in part) for part in (train, val)]
    sha256 = fingerprint(files)
    summary = f"{what}: {counts[0]:,} {unit} for training, {counts[1]:,} for validation, sha256 {sha256[:12]}"
    return Corpus(train, val, is_bytes, sha256, summary)


def _split(array: np.ndarray, val_fraction: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    cut = len(array) - int(len(array) * val_fraction)
    return [array[:cut]], [array[cut:]]


def _bytes(files: Iterable[Path]) -> np.ndarray:
    files = list(files)
    text = b"".join(path.read_bytes() for path in files)
    if not text:
        raise RecipeError(f"data.source: {str(files[0])!r} is empty")
    return np.frombuffer(text, dtype=np.uint8)


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)


def _tokens(path: Path) -> np.ndarray:
    """The uint16 tokens of one .bin file, mapped from disk."""
    size = path.stat().st_size
    if not size:
        raise RecipeError(f"data.source: {str(path)!r} is empty")
    with path.open("rb") as file:
        header = np.frombuffer(file.read(12).ljust(12, b"\0"), dtype="<i4")
    magic, version, count = (int(number) for number in header)
    if magic == MAGIC:
        if version != 1 or size != HEADER_BYTES + 2 * count:
            raise RecipeError(
                f"data.source: {str(path)!r} is damaged: its header says version {version} and {count} tokens "
                f"({HEADER_BYTES + 2 * count} bytes), the file has {size} bytes"
            )
        return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)
    if SHARD_NAME.search(path.name):
        raise RecipeError(f"data.source: {str(path)!r} has the magic number {magic}, a token shard has {MAGIC}")
    if size % 2:
        raise RecipeError(f"data.source: {str(path)!r} has {size} bytes, which are no uint16 tokens")
    return np.memmap(path, dtype="<u2", mode="r")


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over each file's name, size and content; of .bin files (gigabytes) the first and last MiB only."""
    digest, end = hashlib.sha256(), 1 << 20
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if path.suffix != ".bin" or size <= 2 * end:
                digest.update(file.read())
            else:
                digest.update(file.read(end))
                file.seek(-end, 2)
                digest.update(file.read())
    return digest.hexdigest()
