"""Several optimizers over several seeds: the target, the table, the choice of the lr."""

import math
from pathlib import Path

import pytest

import compare
import runfolder
from compare import Comparison, table, worst
from errors import RecipeError
from results import Result, align, markdown

TINY = {
    "task": "autoencoder",
    "model.widths": "8,2",
    "train.steps": 8,
    "train.batch_size": 16,
    "eval.every": 2,
    "eval.batches": 1,
}


def arguments(out, *more):
    return [*(f"--{key}={value}" for key, value in TINY.items()), f"--out={out}", *more]


def test_one_command_trains_all_and_tells_in_one_folder(tmp_path, capsys):
    argv = arguments(tmp_path, "--optimizers=soap_reference", "--seeds=1,2", "--tune", "--lrs=1e-4,1e-2")
    assert compare.main(argv) == 0
    (folder,) = tmp_path.glob("autoencoder/*")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "comparison.txt").read_text()
    assert text in capsys.readouterr().out
    optimizers = ("soap_reference", "adamw")
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        *("seed-1", "seed-2"),
        *(f"tune-{name}-{lr}" for name in optimizers for lr in ("0.0001", "0.01")),
    }

    def losses(run, name):
        path = folder / run / name / "metrics.jsonl"
        return [record["val/loss"] for record in runfolder.read_metrics(path) if "val/loss" in record]

    rows = {line.split()[0]: line.split() for line in text.splitlines()[1:3]}
    for name in optimizers:
        best = min(("0.0001", "0.01"), key=lambda lr: losses(f"tune-{name}-{lr}", name)[-1])
        assert rows[name][1] == best
        assert losses("seed-1", name) == losses(f"tune-{name}-{best}", name), "tuned on the first seed"
        assert len({losses(f"seed-{seed}", other)[0] for seed in (1, 2) for other in (name, "adamw")}) == 2
    target = max(losses(f"seed-{seed}", "adamw")[-1] for seed in (1, 2))
    assert f"target: {target:.4f}" in text
    page = (folder / "table.md").read_text()
    assert page.startswith("`python recipes/compare.py ")
    assert "| optimizer | lr | steps to target |" in page
    assert f"| adamw | {rows['adamw'][1]} |" in page


@pytest.fixture
def interrupt(monkeypatch):
    """Ctrl-C when the given optimizer is trained on the given seed; counts all that is trained."""
    original = compare.train.train
    trained: list = []

    def at(name=None, seed=None):
        trained.clear()

        def train(config, spec, *rest):
            if (spec.name, config.seed) == (name, seed):
                raise KeyboardInterrupt
            trained.append((spec.name, config.seed, config.name))
            original(config, spec, *rest)

        monkeypatch.setattr(compare.train, "train", train)
        monkeypatch.setattr(compare.curves, "draw", lambda *_: "none")  # most of these tests' time
        return trained

    return at


def test_a_comparison_that_was_killed_goes_on_where_it_stopped(tmp_path, capsys, interrupt):
    argv = ["--optimizers=soap", "--seeds=1,2", "--tune", "--lrs=1e-4,1e-2"]
    trained = interrupt()
    assert compare.main(arguments(tmp_path / "whole", *argv)) == 0
    everything = list(trained)
    trained = interrupt("adamw", 2)
    assert compare.main(arguments(tmp_path / "broken", *argv)) == 130
    (folder,) = (tmp_path / "broken").glob("*/*")
    assert f"compare.py --resume {folder} goes on" in capsys.readouterr().err
    before = list(trained)
    trained = interrupt()
    assert compare.main(["--resume", str(folder)]) == 0
    assert before + [run for run in trained if run[0] == "adamw"] == everything
    assert {run[2] for run in trained} == {"seed-2"}, "finished folders are not even opened"
    (whole,) = (tmp_path / "whole").glob("*/*")
    for run in ("seed-1", "seed-2"):
        for name in ("soap", "adamw"):
            resumed, straight = (compare.results.read(place / run, name) for place in (folder, whole))
            assert [loss for *_, loss in resumed.validation] == [loss for *_, loss in straight.validation]
    trained = interrupt()
    assert compare.main(["--resume", str(folder)]) == 0
    assert not trained


def test_a_comparison_can_be_added_to_but_not_changed(tmp_path, capsys, interrupt):
    assert compare.main(arguments(tmp_path, "--optimizers=soap", "--seeds=1")) == 0
    (folder,) = tmp_path.glob("*/*")
    trained = interrupt()
    assert compare.main(["--resume", str(folder), "--optimizers=soap,torch.sgd", "--seeds=1,2"]) == 0
    added = [run for run in trained if run[1] == 2 or run[0] == "torch.sgd"]
    assert added == [("torch.sgd", 1, "seed-1"), *((name, 2, "seed-2") for name in ("soap", "adamw", "torch.sgd"))]
    assert "torch.sgd" in (folder / "table.md").read_text()
    capsys.readouterr()
    assert compare.main(["--resume", str(folder), "--train.batch_size=32"]) == 2
    assert "train.batch_size was 16 and would be 32" in capsys.readouterr().err


def test_all_is_every_class_of_the_suite_and_muon():
    import secondorder

    names = Comparison(optimizers=("all", "soap_reference")).optimizers
    classes = {name.lower() for name in secondorder.__all__ if isinstance(getattr(secondorder, name), type)}
    assert set(names) == {*classes, "torch.muon", "soap_reference"}
    assert names[1] == "adamw"
    assert len(names) == len(set(names))


def result(name, losses, accuracy=None):
    return Result(name, [(10 * n, float(n), loss) for n, loss in enumerate(losses)], [], 2_500_000, accuracy)


def test_the_table_counts_to_the_target_and_says_where_it_is_not_reached():
    trained = [
        result("fast", [9.0, 3.0, 2.0, 1.0], 0.9),
        result("fast", [9.0, 4.0, 3.0, 2.0], 1.0),
        result("slow", [9.0, 8.0, 7.0, 3.0], 0.5),
        result("slow", [9.0, 8.0, 7.0, 6.0], 0.4),
    ]
    cells = table(trained, {"slow": None, "fast": 0.01}, target=3.0, steps=30)
    head, first, second = align(cells).splitlines()
    assert first.split() == "fast 0.01 10 20 50% 1.0 2.0 1.000 2.000 100.0 2.50 90.0% 100.0%".split()
    assert second.split() == "slow default 30 - - 3.0 - 3.000 6.000 100.0 2.50 50.0% 40.0%".split()
    assert head.split()[-1] == "accuracy"
    assert len({len(line) for line in (head, first, second)}) == 1
    assert markdown(cells, compare.LOWER_IS_BETTER).splitlines() == [
        f"| {' | '.join(map(str, cells[0]))} |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| fast | 0.01 | **10, 20** | 50% | **1.0, 2.0** | **1.000, 2.000** | 100.0 | 2.50 | 90.0%, 100.0% |",
        "| slow | default | 30, - | - | 3.0, - | 3.000, 6.000 | 100.0 | 2.50 | 50.0%, 40.0% |",
    ]


def test_the_picture_has_a_line_per_run_and_a_name_per_optimizer(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    runs = [result("fast", [9.0, 3.0]), result("fast", [9.0, 4.0]), result("slow", [9.0, 8.0])]
    compare.curves.draw(runs, "title", tmp_path / "curves.png", (3.5, "target"))
    axes = figures[0].axes
    assert [axis.get_xlabel() for axis in axes] == ["step", "seconds of training"]
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == ["fast", "slow", "target"]
    for axis in axes:
        assert [line.get_ydata()[-1] for line in axis.lines] == [3.0, 4.0, 8.0, 3.5]
    assert [line.get_xdata()[-1] for line in axes[0].lines[:3]] == [10, 10, 10]


def test_the_target_is_the_worst_of_the_baselines_seeds():
    assert worst([2.0, 3.0, 1.0]) == 3.0
    assert worst([2.0, math.nan]) == math.inf


@pytest.mark.parametrize(
    ("given", "expected"),
    [(("soap",), ("soap", "adamw")), (("AdamW", "x", "y"), ("x", "adamw", "y")), (("adamw",), ("adamw",))],
)
def test_the_baseline_is_always_trained_and_once(given, expected):
    assert Comparison(optimizers=given).optimizers == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds=a"], "--seeds: expected"),
        (["--seeds="], "--seeds: expected at least one value"),
        (["--optimizer.lr=1"], "--optimizer.lr: expected --seeds and --optimizers"),
        (["--seed=1"], "--seed: expected --seeds and --optimizers"),
        (["--compare=soap"], "--compare is an option of train.py"),
        (["--resume=absent"], "--resume: cannot read 'absent/command.json'"),
        (["--optimizers=sopa"], "did you mean 'soap'?"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(argv, message, tmp_path, capsys):
    assert compare.main(arguments(tmp_path, *argv)) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert not list(Path(tmp_path).iterdir())


def test_a_baseline_that_diverges_at_every_lr_ends_the_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare.train, "run", lambda *_: [result("adamw", [math.nan])])
    assert compare.main(arguments(tmp_path, "--optimizers=adamw", "--tune", "--lrs=1,2")) == 2
    assert "adamw diverged with every lr of 1, 2" in capsys.readouterr().err


def test_another_that_diverges_at_every_lr_is_named_and_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(compare.curves, "draw", lambda *_: "none")
    original = compare.train.run

    def run(config, *rest):
        spec = config.optimizer
        return [result("torch.sgd", [math.nan])] if spec.name == "torch.sgd" else original(config, *rest)

    monkeypatch.setattr(compare.train, "run", run)
    argv = arguments(tmp_path, "--optimizers=torch.sgd", "--seeds=1", "--tune", "--lrs=1e-3,1e-2")
    assert compare.main(argv) == 0
    text = next(tmp_path.glob("*/*/comparison.txt")).read_text()
    assert "torch.sgd diverged with every lr of 0.001, 0.01" in text
    assert len(text.split("\n\n")[0].splitlines()) == 2


def test_bad_values_are_refused_by_name():
    with pytest.raises(RecipeError, match="--lrs"):
        Comparison(lrs=())
