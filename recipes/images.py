"""Labelled images as arrays, and the samples that are drawn from them.

What `load` recognises:
    digits    the 1797 handwritten digits of 8 x 8 pixels beside this file; every sixth validates
    a folder  of MNIST-like idx files (train-images-idx3-ubyte, train-labels-idx1-ubyte, and t10k-...; .gz as well)
    a folder  of CIFAR-10's binary version (data_batch_1.bin … data_batch_5.bin, test_batch.bin)

`digits.npz` is the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, UCI
Machine Learning Repository, doi 10.24432/C50P49, licence CC BY 4.0) as scikit-learn distributes it (`load_digits`),
stored as uint8: `images` (1797, 64) with values 0 … 16, `labels` (1797,).
"""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import fingerprint
from errors import RecipeError

DIGITS = Path(__file__).with_name("digits.npz")
IDX_UINT8 = 0x08  # third byte of an idx file's magic number; the fourth is the number of dimensions
CIFAR_SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class Labelled:
    """Images (N, C, H, W) and their labels (N,), both uint8."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """Training and validation images. `white` is the largest value that a pixel can have."""

    train: Labelled
    val: Labelled
    white: int
    sha256: str
    summary: str

    @property
    def classes(self) -> int:
        """The number of labels."""
        return int(max(self.train.labels.max(), self.val.labels.max())) + 1

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self.train.images.shape[1:]

    def draw(self, seed: int, step: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels in [0, 1] and labels of samples `first` … `first + count - 1` of a step, drawn with replacement."""
        # One generator per step, drawn in order of the index: sample i is the same whoever asks for it.
        draws = np.random.default_rng((seed, step)).integers(len(self.train.labels), size=first + count)
        return self._take(self.train, draws[first:])

    def spread(self, part: Labelled, first: int, count: int, total: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples `first` … `first + count - 1` of `total` that are spread evenly over `part`."""
        index = np.arange(first, first + count, dtype=np.int64)
        return self._take(part, index * len(part.labels) // total)

    def _take(self, part: Labelled, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels = part.images[index].astype(np.float32) / np.float32(self.white)  # (count, C, H, W)
        return pixels, part.labels[index].astype(np.int64)


def load(source: str) -> Dataset:
    """Read `source`, whatever it is (see the module's first lines).

    Args:
        source: "digits", or the path of a folder.

    Raises:
        RecipeError: Nothing there, or not in the format that its name or header says.
    """
    if source == "digits":
        return _digits()
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise RecipeError(f"data.source: expected digits or a folder, got {source!r}")
    if any(folder.glob("train-images*")):
        return _mnist(folder)
    if any(folder.glob("data_batch_*.bin")):
        return _cifar(folder)
    raise RecipeError(f"data.source: {source!r} has neither MNIST's train-images... nor CIFAR-10's data_batch_*.bin")


def _digits() -> Dataset:
    with np.load(DIGITS) as file:
        images, labels = file["images"].reshape(-1, 1, 8, 8), file["labels"]
    held_out = np.arange(len(labels)) % 6 == 0
    train, val = (Labelled(images[part], labels[part]) for part in (~held_out, held_out))
    return _dataset(train, val, 16, [DIGITS], "UCI digits")


def _mnist(folder: Path) -> Dataset:
    parts, files = [], []
    for prefix in ("train", "t10k"):
        images_file, labels_file = _idx_file(folder, f"{prefix}-images", 3), _idx_file(folder, f"{prefix}-labels", 1)
        images, labels = _idx(images_file, 3), _idx(labels_file, 1)
        if len(images) != len(labels) or not len(labels):
            raise RecipeError(f"data.source: {len(images)} images in {images_file}, {len(labels)} labels beside them")
        parts.append(Labelled(images[:, None], labels))
        files += [images_file, labels_file]
    if parts[0].images.shape[1:] != parts[1].images.shape[1:]:
        raise RecipeError(f"data.source: the training images of {str(folder)!r} have another size than the t10k ones")
    return _dataset(*parts, 255, files, str(folder))


def _idx_file(folder: Path, stem: str, dimensions: int) -> Path:
    """The file as it is called by its authors, compressed, or as some copies spell it."""
    for dash in "-.":
        for ending in ("", ".gz"):
            path = folder / f"{stem}{dash}idx{dimensions}-ubyte{ending}"
            if path.is_file():
                return path
    raise RecipeError(f"data.source: {str(folder)!r} has no file {stem}-idx{dimensions}-ubyte (or .gz)")


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """An array of bytes with so many dimensions: magic number, big-endian int32 sizes, values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError) as error:
        raise RecipeError(f"data.source: {str(path)!r} is damaged: {error}") from error
    start = 4 * (1 + dimensions)
    magic, *shape = (int.from_bytes(content[place : place + 4], "big") for place in range(0, start, 4))
    expected = IDX_UINT8 << 8 | dimensions
    if magic != expected:
        raise RecipeError(f"data.source: {str(path)!r} has the magic number {magic:#010x}, expected {expected:#010x}")
    if len(content) != start + math.prod(shape):
        sizes = " x ".join(map(str, shape))
        raise RecipeError(
            f"data.source: {str(path)!r} is damaged: its header says {sizes} values "
            f"({start + math.prod(shape)} bytes), it has {len(content)} bytes"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _cifar(folder: Path) -> Dataset:
    files = sorted(folder.glob("data_batch_*.bin"))
    test = folder / "test_batch.bin"
    if not test.is_file():
        raise RecipeError(f"data.source: {str(folder)!r} has no file test_batch.bin")
    parts = [_cifar_file(path) for path in files]
    train = Labelled(np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts]))
    return _dataset(train, _cifar_file(test), 255, [*files, test], str(folder))


def _cifar_file(path: Path) -> Labelled:
    """Records of one label and 3072 values: the red, the green and the blue plane, row by row."""
    record = 1 + math.prod(CIFAR_SHAPE)
    content = np.fromfile(path, dtype=np.uint8)
    if not content.size or content.size % record:
        raise RecipeError(f"data.source: {str(path)!r} has {content.size} bytes, expected a multiple of {record}")
    records = content.reshape(-1, record)
    if records[:, 0].max() > 9:
        raise RecipeError(f"data.source: {str(path)!r} holds the label {records[:, 0].max()}, CIFAR-10 has 0 to 9")
    return Labelled(records[:, 1:].reshape(-1, *CIFAR_SHAPE), records[:, 0])


def _dataset(train: Labelled, val: Labelled, white: int, files: list[Path], what: str) -> Dataset:
    sha256 = fingerprint(files)
    size = " x ".join(map(str, train.images.shape[1:]))
    counts = f"{len(train.labels):,} images of {size} for training, {len(val.labels):,} for validation"
    return Dataset(train, val, white, sha256, f"{what}: {counts}, sha256 {sha256[:12]}")
