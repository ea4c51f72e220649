"""Several processes started by torchrun."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parents[2]


@pytest.fixture
def torchrun(tiny_arguments, subprocess_env, script):
    def start(*argv):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [*launch, script, *tiny_arguments, *argv]
        return subprocess.run(command, env=subprocess_env, capture_output=True, text=True, timeout=120)

    return start


def test_two_processes_train_what_one_trains_and_resume(recipe, torchrun):
    settings = ["--optimizer.name=torch.sgd", "--optimizer.lr=0.5", "--compare=soap", "--train.accumulation=2"]
    settings += ["--schedule.kind=constant"]
    assert recipe(*settings, "--train.steps=20") == 0
    alone = recipe.folder
    done = torchrun(*settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("curves: ") == 1, "one process talks"
    (together,) = set(recipe.folders()) - {alone}
    done = torchrun(*settings, "--resume", str(together), "--train.steps=20")
    assert done.returncode == 0, done.stderr
    assert recipe.checkpoint("soap", together)["step"] == 20
    # The gradient is summed in another order. SGD keeps that error small; SOAP divides by the gradient's size, so that
    # only its loss is comparable.
    one, two = (recipe.checkpoint("torch.sgd", folder)["model"] for folder in (alone, together))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    for name, tolerance in (("torch.sgd", 1e-6), ("soap", 1e-3)):
        losses = [
            [record["val/loss"] for record in recipe.metrics(name, folder) if "val/loss" in record]
            for folder in (alone, together)
        ]
        assert losses[1] == pytest.approx(losses[0], rel=tolerance), name


def test_rank_0_explains_before_torchrun_reports(torchrun):
    done = torchrun("--optimizer.name=torch.adamw", "--train.batch_size=3")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "OMP_NUM_THREADS" not in line]
    first = next(line for line in lines if "rror" in line)
    assert first == "error: train.batch_size=3 is not divisible by 2 processes x 1 accumulation steps"
    assert done.stderr.count("error: train.batch_size") == 1


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["poisson2d", "transport"])
def test_two_processes_solve_what_one_solves(subprocess_env, script, tmp_path, problem):
    """By residuals, each of its own points: the same losses but for rounding, which small dampings amplify."""
    settings = ["--config", str(ROOT / "configs" / f"pinn_{problem}.yaml"), "--compare=soap", "--train.steps=4"]
    settings += ["--model.widths=8", "--train.batch_size=40", "--data.boundary=12", "--log.wandb=disabled"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = []
    for name, start in (("one", []), ("two", launch)):
        command = [sys.executable, *start, script, *settings, "--folder", str(tmp_path / name)]
        done = subprocess.run(command, env=subprocess_env, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        files = [(tmp_path / name / optimizer / "metrics.jsonl").read_text() for optimizer in ("engdw", "soap")]
        records = [json.loads(line) for text in files for line in text.splitlines()]
        found.append([record["train/loss"] for record in records if "train/loss" in record])
    assert len(found[0]) == len(found[1]) == 8
    assert found[1] == pytest.approx(found[0], rel=1e-4)
