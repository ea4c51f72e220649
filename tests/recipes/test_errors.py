"""Bad input ends with one line and exit code 2, and never with half a file."""

import errno
import hashlib
import resource
import subprocess
import sys

import pytest
import torch

import runfolder
from errors import RecipeError


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--data.source=absent.txt"], "error: data.source: no file or folder 'absent.txt'"),
        (["--data.source=empty.txt"], "error: data.source: 'empty.txt' is empty"),
        (
            ["--data.source=x_train_000001.bin"],
            "error: data.source: 'x_train_000001.bin' has the magic number 16843009",
        ),
        (["--model.context=100000"], "error: the training data holds"),
        (["--optim.lr=1"], "error: unknown key 'optim.lr', did you mean 'optimizer.lr'?"),
        (["--optimizer.lr=-1"], "error: optimizer torch.adamw: Invalid learning rate: -1.0"),
        (["--optimizer.name=soap", "--optimizer.lr=-1"], "error: optimizer soap: "),
        (
            ["--train.accumulation=3"],
            "error: train.batch_size=4 is not divisible by 1 processes x 3 accumulation steps",
        ),
        (["--config=absent.yaml"], "error: cannot read 'absent.yaml': No such file or directory"),
        (["--resume=absent"], "error: cannot read 'absent/config.yaml': No such file or directory"),
        (["--compare=nothing"], "error: optimizer.name: expected one of "),
        (["--out=text.txt"], "error: cannot make the run folder 'text.txt/lm/"),
    ],
)
def test_bad_input_is_one_line_and_code_2_and_makes_no_folder(recipe, capsys, tmp_path, argv, line):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "x_train_000001.bin").write_bytes(b"\1" * 4000)
    assert recipe(*argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(line)
    assert printed.err.count("\n") == 1
    assert recipe.folder is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the claim is about machines without CUDA")
def test_cuda_is_refused_where_there_is_none(recipe, capsys):
    assert recipe("--device=cuda") == 2
    assert capsys.readouterr().err == "error: device=cuda, but torch sees no CUDA device\n"


def test_plain_python_exits_with_2_and_no_traceback(subprocess_env, script):
    argv = [sys.executable, script, "--optimizer.lr=-1", "--optimizer.name=torch.adamw"]
    done = subprocess.run(argv, env=subprocess_env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: optimizer torch.adamw: Invalid learning rate: -1.0\n"


@pytest.fixture
def small_files():
    """Lets this process write no file beyond so many bytes: a write fails midway, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["soap", "torch.adamw"])
def test_a_disk_too_full_for_a_checkpoint_leaves_the_previous_one(recipe, small_files, capsys, name):
    assert recipe(f"--optimizer={name}", "--schedule.kind=constant") == 0
    path = recipe.folder / name / "checkpoint.pt"
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    files = {file.name for file in path.parent.iterdir()}
    capsys.readouterr()
    small_files(path.stat().st_size // 2)
    more = ["--schedule.kind=constant", "--train.steps=24", "--resume", str(recipe.folder)]
    code = recipe(f"--optimizer={name}", *more)
    small_files(resource.RLIM_INFINITY)
    assert code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: cannot write the checkpoint {str(path)!r}: File too large; the previous one is intact"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    assert {file.name for file in path.parent.iterdir()} == files


def test_a_line_that_does_not_fit_is_taken_back(tmp_path, small_files):
    path = tmp_path / "metrics.jsonl"
    runfolder.append_metrics(path, {"step": 1})
    whole = path.read_bytes()
    small_files(len(whole) + 8)
    with pytest.raises(RecipeError, match="cannot write"):
        runfolder.append_metrics(path, {"step": 2, "loss": 0.123456789})
    small_files(resource.RLIM_INFINITY)
    assert path.read_bytes() == whole


def test_no_space_left_is_said_as_such(tmp_path):
    with pytest.raises(RecipeError, match="cannot write the file .*: No space left on device") as error:  # noqa: SIM117
        with runfolder.replacing(tmp_path / "new", "the file") as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert "intact" not in str(error.value), "there was no previous file"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "other schema", "other objects"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    runfolder.save_checkpoint(path, {"step": 1, "model": {"w": torch.zeros(1000)}})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "other schema":
        torch.save({"schema": 0}, path)
    else:
        torch.save({"schema": 1, "model": Exception("arbitrary code")}, path)
    with pytest.raises(RecipeError, match=r"checkpoint.pt'") as error:
        runfolder.load_checkpoint(path)
    assert "\n" not in str(error.value)
