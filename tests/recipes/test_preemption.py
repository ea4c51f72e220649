"""A run that is asked to stop leaves a checkpoint and goes on as if nothing had been."""

import os
import signal

import pytest
import torch

import preemption
import tasks.lm


@pytest.fixture
def ask(monkeypatch):
    """Send this process a signal while the data of a step is read for the first time."""

    def at(step, number):
        original = tasks.lm.Task.batch
        left = [number]

        def batch(self, current, first, count):
            if current == step and left:
                os.kill(os.getpid(), left.pop())
            return original(self, current, first, count)

        monkeypatch.setattr(tasks.lm.Task, "batch", batch)

    return at


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_with_a_checkpoint_and_the_same_command_goes_on(recipe, ask, capsys, tmp_path, number):
    handler = signal.getsignal(number)
    settings = ["--model.dropout=0.2", "--compare=torch.sgd"]
    assert recipe(*settings) == 0
    whole = recipe.folder
    folder = tmp_path / "runs" / "lm" / "stopped"
    ask(step=6, number=number)
    assert recipe(*settings, f"--folder={folder}") == 0
    assert f"asked to stop after step 8; --resume {folder} goes on" in capsys.readouterr().err
    assert recipe.checkpoint(folder=folder)["step"] == 8, "asked in the seventh step, seen at the start of the eighth"
    assert not (folder / "results.txt").exists()
    assert signal.getsignal(number) is handler
    assert recipe(*settings, f"--folder={folder}") == 0
    assert (folder / "results.txt").exists()
    for name in ("torch.adamw", "torch.sgd"):
        expected, got = (recipe.checkpoint(name, run)["model"] for run in (whole, folder))
        assert all(torch.equal(got[key], expected[key]) for key in expected), name


def test_the_wandb_run_keeps_its_id(recipe, ask):
    pytest.importorskip("wandb", reason="wandb is an extra")
    ask(step=6, number=signal.SIGTERM)
    assert recipe("--log.wandb=offline") == 0
    folder = recipe.folder
    assert recipe("--log.wandb=offline", "--resume", str(folder)) == 0
    names = sorted(path.name for path in folder.rglob("run-*.wandb"))
    assert len(names) == 2
    assert len(set(names)) == 1, "two files of one run"


@pytest.mark.parametrize(
    "restarts, own, verdict, code",
    [
        (0, preemption.NOTHING, preemption.THIS_PROCESS, 0),
        (3, preemption.THIS_PROCESS, preemption.THIS_PROCESS, 0),
        (3, preemption.NOTHING, preemption.THIS_PROCESS, 1),
        (3, preemption.NOTHING, preemption.ALL, 0),
    ],
)
def test_who_may_be_started_again_without_the_one_that_goes_leaves_with_an_error(
    monkeypatch, restarts, own, verdict, code
):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(restarts))
    monkeypatch.setattr(preemption, "_received", own)
    assert preemption.stop(verdict, os.getppid()).code == code


def test_a_process_whose_parent_is_gone_asks_by_itself(monkeypatch):
    monkeypatch.setattr(preemption, "_received", preemption.NOTHING)
    assert preemption.asked(os.getppid()) == preemption.NOTHING
    assert preemption.asked(os.getppid() + 1) == preemption.THIS_PROCESS
