"""What the readers make of files, and which windows a step sees."""

import numpy as np
import pytest
import torch

import data
from data import Windows, load
from errors import RecipeError
from tasks.lm import Data, Model, Task


def shard(path, tokens, magic=data.MAGIC, version=1, count=None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def test_a_text_file_is_its_bytes_and_its_end_validates(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(100)))
    corpus = load(str(tmp_path / "a.txt"), 0.1)
    assert corpus.is_bytes
    assert bytes(corpus.train[0]) == bytes(range(90))
    assert bytes(corpus.val[0]) == bytes(range(90, 100))


def test_a_folder_is_split_by_file_and_skips_what_is_hidden_or_binary(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02}.txt").write_text(chr(ord("a") + number) * 5)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    corpus = load(str(tmp_path), 0.1)
    assert bytes(corpus.val[0]) == b"aaaaakkkkk"
    assert bytes(corpus.train[0]) == b"".join(bytes([ord("a") + n]) * 5 for n in range(12) if n not in (0, 10))


def test_nanogpt_files_are_raw_uint16(tmp_path):
    np.arange(300, 340, dtype="<u2").tofile(tmp_path / "train.bin")
    np.arange(50, dtype="<u2").tofile(tmp_path / "val.bin")
    corpus = load(str(tmp_path), 0.1)
    assert not corpus.is_bytes
    np.testing.assert_array_equal(corpus.train[0], np.arange(300, 340))
    np.testing.assert_array_equal(corpus.val[0], np.arange(50))


def test_token_shards_are_known_by_their_magic_number(tmp_path):
    shard(tmp_path / "fineweb_train_000001.bin", range(1000, 1040))
    shard(tmp_path / "fineweb_train_000002.bin", range(2000, 2030))
    shard(tmp_path / "fineweb_val_000000.bin", [7, 8, 9])
    corpus = load(str(tmp_path), 0.1)
    assert [list(part) for part in corpus.train] == [list(range(1000, 1040)), list(range(2000, 2030))]
    assert list(corpus.val[0]) == [7, 8, 9]
    shard(tmp_path / "any.bin", range(20))  # one file by itself, whatever its name
    assert list(load(str(tmp_path / "any.bin"), 0.25).val[0]) == [15, 16, 17, 18, 19]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x_train_000001.bin", {"magic": 1}, "has the magic number 1, a token shard has 20240520"),
        ("x_val_000001.bin", {"version": 2}, "is damaged: its header says version 2"),
        ("x.bin", {"count": 99}, r"is damaged: .* 99 tokens \(1222 bytes\), the file has 1030 bytes"),
        ("odd.bin", b"123", "3 bytes, which are no uint16 tokens"),
        ("empty.bin", b"", "is empty"),
        ("empty.txt", b"", "is empty"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, name, content, message):
    if isinstance(content, dict):
        shard(tmp_path / name, [1, 2, 3], **content)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=message) as error:
        load(str(tmp_path / name), 0.1)
    assert name in str(error.value)


def test_folders_without_enough_in_them_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="0 text files, at least 2"):
        load(str(tmp_path), 0.1)
    (tmp_path / "train.bin").write_bytes(b"1234")
    with pytest.raises(RecipeError, match=r"no validation \.bin file"):
        load(str(tmp_path), 0.1)
    with pytest.raises(RecipeError, match="no file or folder 'absent'"):
        load("absent", 0.1)


def test_the_standard_library_is_split_without_a_file_in_both_parts():
    corpus = load("stdlib", 0.1)
    assert b"import os" in bytes(corpus.train[0])
    assert 0.02 < len(corpus.val[0]) / len(corpus.train[0]) < 0.5
    assert corpus.sha256 == load("stdlib", 0.1).sha256


def test_the_fingerprint_follows_the_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some text that is long enough")
    before = load(str(path), 0.1).sha256
    path.write_text("some text that is lonh enough")
    assert load(str(path), 0.1).sha256 != before


def test_windows_are_all_slices_of_the_arrays_and_cross_none():
    arrays = [np.arange(10, 17), np.arange(2), np.arange(20, 25)]  # the second is too short for any
    windows = Windows(arrays, 4, "training")
    expected = [array[i : i + 4].tolist() for array in arrays for i in range(len(array) - 3)]
    assert windows.take(np.arange(len(windows))).tolist() == expected


def test_text_that_is_too_short_is_refused():
    with pytest.raises(RecipeError, match="the training data holds 7 tokens in one piece, one sample needs 9"):
        Windows([np.arange(7)], 9, "training")


@pytest.fixture
def task(text_file):
    return Task(Data(source=str(text_file)), Model(context=16), seed=3)


def test_a_batch_depends_on_seed_step_and_index_alone(task, text_file):
    whole = task.batch(5, 0, 8)
    parts = [task.batch(5, first, 2) for first in (0, 2, 4, 6)]
    for side in (0, 1):
        assert torch.equal(whole[side], torch.cat([part[side] for part in parts]))
    assert torch.equal(whole[0], task.batch(5, 0, 8)[0])
    assert not torch.equal(whole[0], task.batch(6, 0, 8)[0])
    assert not torch.equal(whole[0], Task(Data(source=str(text_file)), Model(context=16), seed=4).batch(5, 0, 8)[0])


def test_targets_are_the_inputs_one_token_later(task):
    inputs, targets = task.batch(0, 0, 4)
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_validation_windows_are_fixed_and_span_the_validation_text(task):
    whole = task.validation(0, 6, 6)[0]
    assert torch.equal(whole, torch.cat([task.validation(0, 3, 6)[0], task.validation(3, 3, 6)[0]]))
    text = torch.from_numpy(task.val.arrays[0].astype(np.int64))
    assert torch.equal(whole[0], text[:16])
    assert torch.equal(whole[-1], text[-17:-1])


def test_a_token_beyond_the_vocabulary_is_refused(text_file):
    task = Task(Data(source=str(text_file)), Model(context=16, vocab_size=60), seed=0)
    with pytest.raises(RecipeError, match=r"the data holds token \d+, but model.vocab_size is 60"):
        task.batch(0, 0, 4)
