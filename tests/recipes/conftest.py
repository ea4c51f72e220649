"""A tiny run of the recipe, in this process: a few hundred bytes of text, a one-block GPT, a dozen steps."""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "recipes"))  # recipes import each other as siblings, as when run as a script

import runfolder  # noqa: E402 -- the path comes first
import train  # noqa: E402


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(300)))
    return path


@pytest.fixture
def tiny_arguments(text_file, tmp_path):
    settings = {
        "data.source": text_file,
        "model.layers": 1,
        "model.heads": 2,
        "model.width": 16,
        "model.context": 16,
        "train.steps": 12,
        "train.batch_size": 4,
        "eval.every": 4,
        "eval.batches": 2,
        "log.every": 2,
        "log.wandb": "disabled",
        "out": tmp_path / "runs",
    }
    return [f"--{key}={value}" for key, value in settings.items()]


class Recipe:
    """The recipe's command line with a tiny model; keeps the folders that it made."""

    def __init__(self, arguments, out):
        self.arguments, self.out = arguments, out

    def __call__(self, *more):
        before = set(self.folders())
        code = train.main([*self.arguments, *more])
        new = [folder for folder in self.folders() if folder not in before]
        self.folder = new[-1] if new else None
        return code

    def folders(self):
        return sorted(self.out.glob("*/*"))

    def metrics(self, name="torch.adamw", folder=None):
        return runfolder.read_metrics((folder or self.folder) / name / "metrics.jsonl")

    def checkpoint(self, name="torch.adamw", folder=None):
        """The content of the last one, whether one process wrote it or several."""
        own = (folder or self.folder) / name
        if (own / "checkpoint.pt").exists():
            return runfolder.load_checkpoint(own / "checkpoint.pt")
        dcp_to_torch_save(sorted(own.glob("step-*"))[-1], own / "whole.pt")
        content = torch.load(own / "whole.pt", weights_only=False)
        return {**content, **content["trainer"]}


@pytest.fixture
def recipe(tiny_arguments, tmp_path):
    return Recipe([*tiny_arguments, "--optimizer.name=torch.adamw"], tmp_path / "runs")


@pytest.fixture
def subprocess_env():
    """The environment in which a new Python finds what this one imports."""
    roots = [str(ROOT / "optimizers"), str(ROOT / "kernels")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def script():
    """The recipe's file, for a new Python."""
    return str(ROOT / "recipes" / "train.py")
