"""Two runs of the recipe, merged."""

import math

import pytest
import torch

import merge
import runfolder
import train


@pytest.fixture
def autoencoder(tmp_path):
    """Train an autoencoder for a few steps; returns the run folder."""

    def run(name="soap", *more, seed=1, steps=6):
        before = set((tmp_path / "runs").glob("*/*"))
        settings = {
            "task": "autoencoder",
            "seed": seed,
            "optimizer.name": name,
            "optimizer.lr": 0.01,
            "model.widths": "16,8",
            "train.steps": steps,
            "train.batch_size": 16,
            "eval.batches": 2,
            "log.wandb": "disabled",
            "out": tmp_path / "runs",
        }
        assert train.main([*(f"--{key}={value}" for key, value in settings.items()), "--compare=none", *more]) == 0
        (new,) = set((tmp_path / "runs").glob("*/*")) - before
        return new

    return run


def weights(folder, name="soap"):
    return runfolder.load_checkpoint(folder / name / "checkpoint.pt")["model"]


def losses(out):
    rows = [line.rsplit(None, 1) for line in out.splitlines() if line[:1] not in ("", " ")]
    return {name.strip(): float(value) for name, value in rows[:4]}


@pytest.mark.parametrize("name", ["soap", "kfac", "adamw"])
def test_weights_are_averaged_by_the_fisher_information_of_the_runs(autoencoder, tmp_path, capsys, name):
    first, second = autoencoder(name), autoencoder(name, "--optimizer.lr=0.02", steps=9)
    capsys.readouterr()
    out = tmp_path / "merged.pt"
    assert merge.main([str(first), str(second), "--out", str(out), "--floor", "0.1"]) == 0
    told = losses(capsys.readouterr().out)
    runs = [merge.load(folder, None, "diag") for folder in (first, second)]
    merged = runfolder.load_checkpoint(out)["model"]
    for key, value in merged.items():
        F = torch.stack([run.fisher[key].double() for run in runs])
        W = torch.stack([weights(folder, name)[key].double() for folder in (first, second)])
        F = F + 0.1 * F.mean()
        torch.testing.assert_close(value.double(), (F * W).sum(0) / F.sum(0), rtol=1e-6, atol=1e-7)
        assert not torch.allclose(value, W.mean(0).float())
    for run in runs:
        record = runfolder.read_metrics(run.folder / "metrics.jsonl")[-1]
        assert told[str(run.folder)] == pytest.approx(record["val/loss"], abs=2e-6)
    assert math.isfinite(told["plain average"]) and math.isfinite(told["Fisher average"])


def test_fisher_information_decides_where_one_run_has_none():
    values = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([3.0, 3.0, 3.0])]
    fishers = [torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])]
    torch.testing.assert_close(merge.average(values, fishers, 1e-9), torch.tensor([1.0, 3.0, 2.0]))
    torch.testing.assert_close(merge.average(values, fishers, 1e9), torch.full((3,), 2.0))
    torch.testing.assert_close(merge.average(values, [None, fishers[0]], 1e-9), torch.full((3,), 2.0))


def test_a_model_merged_with_itself_is_itself(autoencoder, tmp_path):
    run = autoencoder()
    assert merge.main([str(run), str(run), "--out", str(tmp_path / "same.pt")]) == 0
    merged = runfolder.load_checkpoint(tmp_path / "same.pt")["model"]
    for key, value in weights(run).items():
        torch.testing.assert_close(merged[key], value, rtol=1e-6, atol=0)


def test_what_cannot_be_merged_is_refused_in_one_line(autoencoder, tmp_path, capsys):
    first, other = autoencoder(steps=2), autoencoder("soap", "--model.widths=8", steps=2)
    foreign, adam = autoencoder("torch.adamw", steps=2), autoencoder("adamw", steps=2)
    capsys.readouterr()
    for runs, words, more in (
        ((first, tmp_path), "is no run folder", []),
        ((first, other), "different models", []),
        ((first, adam), "one optimizer", []),
        ((foreign, foreign), "keeps no Fisher information", []),
        ((first, first), "has soap, got 'kfac'", ["--optimizer", "kfac"]),
        ((first, first), "--floor", ["--floor", "0"]),
    ):
        assert merge.main([*map(str, runs), "--out", str(tmp_path / "no.pt"), *more]) == 2
        told = capsys.readouterr().err
        assert words in told and told.count("\n") == 1, told
    assert not (tmp_path / "no.pt").exists()
