"""What the readers make of image files, and which samples a step sees."""

import gzip

import numpy as np
import pytest

import images
from errors import RecipeError


def idx(array, magic=None):
    magic = 0x0800 + array.ndim if magic is None else magic
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return magic.to_bytes(4, "big") + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": generator.integers(256, size=(7, 5, 4)),
        "train-labels-idx1-ubyte": np.arange(7),
        "t10k-images-idx3-ubyte": generator.integers(256, size=(3, 5, 4)),
        "t10k-labels-idx1-ubyte": np.array([8, 1, 0]),
    }
    for name, array in arrays.items():
        (tmp_path / name).write_bytes(idx(array))
    return tmp_path, arrays


@pytest.fixture
def cifar(tmp_path):
    records = np.random.default_rng(0).integers(256, size=(6, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    for number in (1, 2):
        (tmp_path / f"data_batch_{number}.bin").write_bytes(records[2 * number - 2 : 2 * number].tobytes())
    (tmp_path / "test_batch.bin").write_bytes(records[4:].tobytes())
    return tmp_path, records


def test_the_shipped_digits_are_small_and_what_uci_describes():
    assert images.DIGITS.stat().st_size < 100_000
    digits = images.load("digits")
    everything = np.concatenate([digits.train.images, digits.val.images])
    assert everything.shape == (1797, 1, 8, 8)
    assert (everything.min(), everything.max(), digits.white) == (0, 16, 16)
    counts = np.bincount(np.concatenate([digits.train.labels, digits.val.labels]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # of each digit
    assert len(digits.val.labels) == 300
    assert digits.classes == 10


def test_no_digit_is_both_trained_and_validated_on():
    digits = images.load("digits")
    with np.load(images.DIGITS) as file:
        np.testing.assert_array_equal(digits.val.images.reshape(300, 64), file["images"][::6])
    seen = np.concatenate([digits.draw(1, step, 0, 256)[0] for step in range(60)]).reshape(-1, 64) * 16
    held_out = {row.tobytes() for row in digits.val.images.reshape(-1, 64)}
    assert not held_out & {row.tobytes() for row in seen.astype(np.uint8)}


@pytest.mark.parametrize("spelling", ["plain", "gz", "dot"])
def test_idx_files_are_read_however_they_are_spelled(mnist, spelling):
    folder, arrays = mnist
    for path in list(folder.iterdir()):
        if spelling == "gz":
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        elif spelling == "dot":
            path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    dataset = images.load(str(folder))
    np.testing.assert_array_equal(dataset.train.images[:, 0], arrays["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(dataset.val.images[:, 0], arrays["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(dataset.val.labels, [8, 1, 0])
    assert (dataset.shape, dataset.classes, dataset.white) == ((1, 5, 4), 9, 255)


def test_cifar_records_are_a_label_and_three_planes(cifar):
    folder, records = cifar
    dataset = images.load(str(folder))
    np.testing.assert_array_equal(dataset.train.labels, records[:4, 0])
    assert dataset.shape == (3, 32, 32)
    assert dataset.train.images[3, 1, 2, 5] == records[3, 1 + 1024 + 2 * 32 + 5]  # green, third row, sixth column
    np.testing.assert_array_equal(dataset.val.images.reshape(2, -1), records[4:, 1:])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train-images-idx3-ubyte",
            idx(np.zeros((7, 5, 4)), magic=0x0D03),
            "magic number 0x00000d03, expected 0x0000080",
        ),
        ("train-labels-idx1-ubyte", idx(np.zeros((7, 5, 4))), "magic number 0x00000803, expected 0x00000801"),
        ("train-images-idx3-ubyte", idx(np.zeros((7, 5, 4)))[:-1], r"7 x 5 x 4 values \(156 bytes\), it has 155 bytes"),
        ("train-images-idx3-ubyte", b"", "magic number 0x00000000"),
        ("train-labels-idx1-ubyte", idx(np.zeros(6)), "7 images in .*, 6 labels"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((3, 4, 4))), "have another size"),
        ("t10k-labels-idx1-ubyte", None, "has no file t10k-labels-idx1-ubyte"),
    ],
)
def test_a_wrong_idx_file_is_refused(mnist, name, content, message):
    folder, _ = mnist
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(RecipeError, match=message) as error:
        images.load(str(folder))
    assert "\n" not in str(error.value)


def test_a_damaged_gz_file_is_refused(mnist):
    folder, _ = mnist
    path = folder / "t10k-labels-idx1-ubyte"
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes())[:-9])
    path.unlink()
    with pytest.raises(RecipeError, match="is damaged"):
        images.load(str(folder))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_2.bin", bytes(3072), "has 3072 bytes, expected a multiple of 3073"),
        ("test_batch.bin", b"", "has 0 bytes"),
        ("data_batch_1.bin", bytes([10]) + bytes(3072), "holds the label 10"),
        ("test_batch.bin", None, "has no file test_batch.bin"),
    ],
)
def test_a_wrong_cifar_file_is_refused(cifar, name, content, message):
    folder, _ = cifar
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        images.load(str(folder))


def test_what_is_no_image_source_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="expected digits or a folder, got 'absent'"):
        images.load("absent")
    with pytest.raises(RecipeError, match="has neither MNIST's"):
        images.load(str(tmp_path))


def test_a_sample_depends_on_seed_step_and_index_alone():
    digits = images.load("digits")
    whole = digits.draw(3, 5, 0, 8)
    for first in (0, 4):
        for part, expected in zip(digits.draw(3, 5, first, 4), whole, strict=True):
            np.testing.assert_array_equal(part, expected[first : first + 4])
    for other in (digits.draw(4, 5, 0, 8), digits.draw(3, 6, 0, 8)):
        assert not np.array_equal(other[0], whole[0])


def test_a_spread_of_all_is_each_image_once():
    digits = images.load("digits")
    pixels, labels = digits.spread(digits.val, 0, 300, 300)
    np.testing.assert_array_equal(pixels * 16, digits.val.images)
    np.testing.assert_array_equal(labels, digits.val.labels)
    np.testing.assert_array_equal(digits.spread(digits.val, 50, 10, 100)[1], digits.val.labels[150:180:3])
