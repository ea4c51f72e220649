"""The whole recipe on a tiny model: what it trains, writes, resumes and says."""

import json
import math

import pytest
import torch
import yaml

import command
import optimizer
import tasks.lm
from results import Result, read, table, verdict

OURS = [name for name in optimizer.classes() if not name.startswith("torch.")]


def assert_bitwise_equal(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_bitwise_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, pair in enumerate(zip(a, b, strict=True)):
            assert_bitwise_equal(*pair, f"{where}[{number}]")
    else:
        assert a == b, where


def without_times(records):
    return [{k: v for k, v in record.items() if k != "seconds" and not k.startswith("time/")} for record in records]


@pytest.fixture
def interrupt(monkeypatch):
    """Ctrl-C while the data of a step is read."""

    def at(step, times=1):
        original = tasks.lm.Task.batch
        left = [times]

        def batch(self, current, first, count):
            if current == step and left[0]:
                left[0] -= 1
                raise KeyboardInterrupt
            return original(self, current, first, count)

        monkeypatch.setattr(tasks.lm.Task, "batch", batch)

    return at


@pytest.mark.parametrize("name", [*OURS, "torch.adamw", "torch.muon"])
def test_interrupted_and_resumed_is_bitwise_the_uninterrupted_run(recipe, interrupt, name):
    # Dropout draws from torch's generator; steps 6 and 7 are taken twice; 5 divides none of the other periods.
    settings = [f"--optimizer.name={name}", "--model.dropout=0.2", "--log.checkpoint_every=5", "--train.steps=17"]
    settings.append("--log.diagnostics=brief")  # a checkpoint does not hold what was measured before it
    assert recipe(*settings) == 0
    whole = recipe.folder
    interrupt(step=7)
    assert recipe(*settings) == 130
    broken = recipe.folder
    assert recipe.checkpoint(name, broken)["step"] == 5
    assert recipe("--resume", str(broken), *settings) == 0
    assert recipe.folder is None, "a resumed run makes no second folder"
    for part in ("step", "model", "optimizer", "scheduler"):
        assert_bitwise_equal(recipe.checkpoint(name, broken)[part], recipe.checkpoint(name, whole)[part], part)
    assert without_times(recipe.metrics(name, broken)) == without_times(recipe.metrics(name, whole))


def test_a_comparison_is_resumed_where_it_stopped(recipe, interrupt):
    settings = ["--compare=torch.sgd", "--log.checkpoint_every=5"]
    assert recipe(*settings) == 0
    whole = recipe.folder
    interrupt(step=7)
    assert recipe(*settings) == 130
    broken = recipe.folder
    interrupt(step=6)  # of torch.sgd: torch.adamw continues with step 5 …
    assert recipe("--resume", str(broken)) == 130
    assert recipe("--resume", str(broken)) == 0
    for name in ("torch.adamw", "torch.sgd"):
        assert_bitwise_equal(recipe.checkpoint(name, broken)["model"], recipe.checkpoint(name, whole)["model"], name)
        assert without_times(recipe.metrics(name, broken)) == without_times(recipe.metrics(name, whole))


def test_a_finished_run_can_be_made_longer_but_not_otherwise(recipe, capsys):
    assert recipe("--schedule.kind=constant") == 0
    folder = recipe.folder
    assert recipe("--schedule.kind=constant", "--resume", str(folder), "--train.steps=20") == 0
    longer = recipe.metrics(folder=folder)
    assert recipe("--schedule.kind=constant", "--train.steps=20") == 0
    assert [r["val/loss"] for r in longer if "val/loss" in r] == [
        r["val/loss"] for r in recipe.metrics() if "val/loss" in r
    ]
    capsys.readouterr()
    assert recipe("--schedule.kind=constant", "--resume", str(folder), "--model.width=32") == 2
    assert "--resume: model.width was 16 and would be 32; only these may change: train.steps" in capsys.readouterr().err


def test_other_data_under_the_same_name_is_not_resumed_on(recipe, text_file, capsys):
    assert recipe() == 0
    folder = recipe.folder
    text_file.write_text(text_file.read_text().upper())
    assert recipe("--resume", str(folder), "--train.steps=20") == 2
    assert "the data is not" in capsys.readouterr().err


def test_all_optimizers_start_alike_and_see_the_same_batches(recipe, monkeypatch):
    seen = []
    original = tasks.lm.Task.batch

    def batch(self, *place):
        seen.append((place, original(self, *place)[0]))
        return original(self, *place)

    monkeypatch.setattr(tasks.lm.Task, "batch", batch)
    assert recipe("--compare=torch.sgd") == 0
    first, second = seen[:12], seen[12:]
    assert_bitwise_equal(first, second)
    assert recipe.metrics("torch.adamw")[0]["val/loss"] == recipe.metrics("torch.sgd")[0]["val/loss"]


def test_the_gradient_is_the_same_however_it_is_accumulated(recipe):
    losses = []
    for accumulation in (1, 2, 4):
        assert recipe(f"--train.accumulation={accumulation}", "--optimizer.name=torch.sgd", "--optimizer.lr=0.5") == 0
        losses.append(recipe.checkpoint("torch.sgd")["model"])
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-5, atol=1e-6)


def test_clipping_bounds_what_the_optimizer_sees(recipe):
    assert recipe("--train.clip=1e-3", "--optimizer=torch.sgd", "--optimizer.lr=1", "--train.steps=1") == 0
    after = recipe.checkpoint("torch.sgd")["model"]
    assert recipe("--train.clip=0", "--optimizer=torch.sgd", "--optimizer.lr=0", "--train.steps=1") == 0
    before = recipe.checkpoint("torch.sgd")["model"]
    step = math.sqrt(sum(float((after[name] - before[name]).double().square().sum()) for name in after))
    assert step == pytest.approx(1e-3, rel=1e-3)
    assert recipe.metrics("torch.sgd")[-1]["train/grad_norm"] > 0.1


def test_autocast_changes_the_products_and_leaves_the_weights_in_float32(recipe):
    assert recipe() == 0
    exact = recipe.metrics()[-1]["val/loss"]
    assert recipe("--train.dtype=bfloat16") == 0
    rounded = recipe.metrics()[-1]["val/loss"]
    assert 0 < abs(rounded - exact) < 0.1
    assert all(value.dtype == torch.float32 for value in recipe.checkpoint()["model"].values())


def test_a_run_folder_holds_all_that_is_needed_to_repeat_it(recipe):
    assert recipe("--compare=torch.sgd") == 0
    names = {str(path.relative_to(recipe.folder)) for path in recipe.folder.rglob("*") if path.is_file()}
    each = ["metrics.jsonl", "checkpoint.pt"]
    expected = {f"{name}/{file}" for name in ("torch.adamw", "torch.sgd") for file in each}
    assert names == expected | {"config.yaml", "run.json", "results.txt", "curves.png"}
    facts = json.loads((recipe.folder / "run.json").read_text())
    assert len(facts["data_sha256"]) == 64
    assert facts["versions"]["torch"] == torch.__version__
    assert (recipe.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    again = command.resolve(command.parse([f"--config={recipe.folder / 'config.yaml'}"]))
    assert command.as_dict(again) == yaml.safe_load((recipe.folder / "config.yaml").read_text())


def test_our_optimizers_write_down_their_coverage_and_diagnostics(recipe):
    assert recipe("--optimizer.name=soap") == 0
    assert "token_embedding" in (recipe.folder / "soap" / "coverage.txt").read_text()
    last = recipe.metrics("soap")[-1]
    assert last["optimizer/refused_steps"] == 0
    assert last["optimizer/update_ratio"] > 0
    assert not any(key.startswith("optimizer/bucket/") for key in last)
    assert last["memory/state_bytes"] > 0


def test_full_diagnostics_tell_of_eigenvalues_and_buckets_and_brief_ones_measure_nothing(recipe):
    assert recipe("--optimizer.name=soap", "--log.diagnostics=full", "--train.steps=2") == 0
    last = recipe.metrics("soap")[-1]
    assert last["optimizer/condition_max"] >= 1
    assert any(key.startswith("optimizer/bucket/") for key in last)
    assert recipe("--optimizer.name=soap", "--log.diagnostics=brief", "--train.steps=2") == 0
    assert "optimizer/update_ratio" not in recipe.metrics("soap")[-1]


def test_records_say_where_the_time_goes(recipe):
    assert recipe() == 0
    last = recipe.metrics()[-1]
    for key in ("train/loss", "train/lr", "train/grad_norm", "val/loss", "seconds"):
        assert last[key] > 0
    assert last["train/tokens"] == 12 * 4 * 16
    spent = sum(last[f"time/{phase}_ms"] for phase in ("data", "forward_backward", "optimizer"))
    assert 0 < spent < 1e3


def test_progress_ends_with_the_last_step_on_a_plain_line(recipe, capsys):
    assert recipe() == 0
    printed = capsys.readouterr()
    assert "step 12/12" in printed.err
    assert "ETA 0:00" in printed.err
    assert "\r" not in printed.err, "no rewriting where nobody sees a terminal"


def test_progress_rewrites_one_line_on_a_terminal(recipe, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("progress.Progress.TERMINAL_SECONDS", 0.0)
    assert recipe() == 0
    printed = capsys.readouterr().err
    assert printed.count("\r\x1b[2K") == 6
    assert printed.count("\n") == 1


def test_the_summary_names_losses_steps_and_the_picture(recipe, capsys):
    assert recipe("--compare=torch.sgd") == 0
    head, ours, baseline, sentence, curves = capsys.readouterr().out.strip().splitlines()[-5:]
    assert head.split()[:3] == ["optimizer", "final", "loss"]
    assert ours.split()[0] == "torch.adamw"
    assert baseline.split()[0] == "torch.sgd"
    assert sentence.startswith("torch.adamw reached torch.sgd's final loss")
    assert curves == f"curves: {recipe.folder / 'curves.png'}"


def test_steps_to_target_are_counted_to_the_first_evaluation_at_the_baselines_final_loss():
    ours = Result("ours", [(0, 0.0, 5.0), (10, 2.0, 3.0), (20, 4.0, 2.5), (30, 6.0, 2.0)], [], 4_000_000)
    baseline = Result("base", [(0, 0.0, 5.0), (10, 1.0, 4.0), (20, 2.0, 3.5), (30, 3.0, 2.5)], [], 2_000_000)
    assert ours.reached(2.5) == (20, 4.0)
    assert baseline.reached(2.4) is None
    assert table([ours, baseline]).splitlines()[1].split() == "ours 2.0000 200.0 4.00 6.0 20 4.0".split()
    assert verdict([ours, baseline]).endswith("in 20 steps and 4.0 s (67% of its steps, 133% of its seconds)")
    assert verdict([baseline, ours]) == "base did not reach ours's final loss of 2.0000"


def test_a_run_that_diverges_stops_and_leaves_the_others_their_turn(recipe, capsys):
    assert recipe("--optimizer=torch.sgd", "--optimizer.lr=1e9", "--train.clip=0", "--compare=torch.adamw") == 0
    assert "torch.sgd: the loss is not finite after step" in capsys.readouterr().err
    assert math.isnan(read(recipe.folder, "torch.sgd").final_loss)
    assert read(recipe.folder, "torch.adamw").final_loss < 6


def test_a_run_that_diverged_is_over_and_not_repeated(recipe, capsys):
    settings = ["--optimizer=torch.sgd", "--optimizer.lr=1e9", "--train.clip=0"]
    assert recipe(*settings) == 0
    before = recipe.metrics("torch.sgd")
    folder = recipe.folder
    capsys.readouterr()
    assert recipe(*settings, "--resume", str(folder)) == 0
    assert repr(recipe.metrics("torch.sgd", folder)) == repr(before), "nan is not equal to itself"
    assert "not finite" not in capsys.readouterr().err
