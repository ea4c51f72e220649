"""A sweep: which points it has, that it goes on after a failure or a kill, and what it says in the end."""

import json
import math
import random

import pytest

import space
import sweep
from errors import RecipeError
from results import Result
from space import Axis, axis, points

TINY = {
    "task": "autoencoder",
    "model.widths": "8,2",
    "optimizer.name": "torch.sgd",
    "train.steps": 4,
    "train.batch_size": 16,
    "eval.every": 2,
    "eval.batches": 1,
}


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    monkeypatch.setattr(sweep.train.curves, "draw", lambda *_: "none")  # of each run: most of these tests' time


@pytest.fixture
def trained(monkeypatch):
    """Three lists of names of runs: those that were trained, those that shall fail, those that shall meet Ctrl-C."""
    original = sweep.train.train
    names = []
    names_fail, names_stop = set(), set()

    def train(config, *rest):
        if config.name in names_stop:
            raise KeyboardInterrupt
        if config.name in names_fail:
            raise RuntimeError("no such\nluck")
        names.append(config.name)
        original(config, *rest)

    monkeypatch.setattr(sweep.train, "train", train)
    return names, names_fail, names_stop


def arguments(out, *more):
    return [*(f"--{key}={value}" for key, value in TINY.items()), f"--out={out}", *more]


GRID = ["--sweep.optimizer.lr=1e-3,1e-2", "--sweep.optimizer.momentum=0,0.9", "--seeds=1,2"]
RUNS = [f"lr={lr},momentum={m},seed={s}" for lr in ("1e-3", "1e-2") for m in ("0", "0.9") for s in (1, 2)]


def test_a_grid_is_trained_with_every_seed_and_ranked(tmp_path, capsys, trained):
    assert sweep.main(arguments(tmp_path, *GRID)) == 0
    assert trained[0] == RUNS
    (folder,) = tmp_path.glob("autoencoder/*-run-sweep")
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "sweep.txt").read_text()
    assert text in capsys.readouterr().out
    head, *rows = text.split("\n\n")[0].splitlines()
    assert head.split()[:4] == ["lr", "momentum", "final", "loss"]
    finals = {}
    for row in rows:
        cells = row.replace("*", "").split()
        finals[cells[0], cells[1]] = [float(cell) for cell in cells[2:4]]
        for seed, loss in zip((1, 2), finals[cells[0], cells[1]], strict=True):
            read = sweep.results.read(folder / f"lr={cells[0]},momentum={cells[1]},seed={seed}", "torch.sgd")
            assert loss == pytest.approx(read.final_loss, abs=1e-4)
    medians = [sum(losses) / 2 for losses in finals.values()]
    assert len(finals) == 4
    assert medians == sorted(medians)


@pytest.mark.parametrize("how", ["killed", "failed"])
def test_a_sweep_goes_on_where_it_stopped(tmp_path, capsys, trained, how):
    names, fails, stops = trained
    (stops if how == "killed" else fails).add(RUNS[2])
    assert sweep.main(arguments(tmp_path, *GRID)) == (130 if how == "killed" else 1)
    (folder,) = tmp_path.glob("*/*")
    printed = capsys.readouterr().err
    if how == "killed":
        assert names == RUNS[:2]
        assert f"sweep.py --resume {folder} goes on" in printed
    else:
        assert names == [RUNS[0], RUNS[1], *RUNS[4:]], "the point is given up, the others have their turn"
        assert f"{RUNS[2]}: RuntimeError: no such luck\n" in printed
        assert "Traceback" in (folder / RUNS[2] / "error.txt").read_text()
        assert "RuntimeError: no such luck" in (folder / "sweep.txt").read_text().splitlines()[4]
    done = list(names)
    names.clear(), fails.clear(), stops.clear()
    assert sweep.main(["--resume", str(folder)]) == 0
    assert sorted([*done, *names]) == sorted(RUNS), "each run is trained once"
    assert not list(folder.rglob("error.txt"))
    names.clear()
    assert sweep.main([f"--resume={folder}", "--sweep.optimizer.lr=1e-2,2e-2", "--seeds=1"]) == 0
    assert names == ["lr=2e-2,momentum=0,seed=1", "lr=2e-2,momentum=0.9,seed=1"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sweep.optimizer.lrr=1,2"], "unknown key 'optimizer.lrr'"),
        (["--sweep.optimizer.lr=1e-3,abc"], "optimizer.lr: expected float"),
        (["--sweep.optimizer.lr=1e-3,-1"], "optimizer torch.sgd: Invalid learning rate: -1.0"),
        (["--sweep.trian.steps=1,2"], "did you mean 'train.steps'?"),
        (["--sweep.optimizer.lr="], "expected --sweep.KEY=VALUE,VALUE"),
        (["--sweep.optimizer.lr=1e-3..1e-1"], "--sweep.optimizer.lr: a range makes no grid"),
        (["--sweep.optimizer.lr=1..0.1", "--random=2"], "expected LOW..HIGH with 0 < LOW < HIGH, got '1..0.1'"),
        (["--sweep.optimizer.lr=0..1", "--random=2"], "expected LOW..HIGH with 0 < LOW < HIGH"),
        (["--sweep.seed=1,2"], "--sweep.seed: seeds are repetitions"),
        (["--sweep=optimizer.lr=1,2"], "--sweep: the key belongs to the option"),
        (["--sweep.train.steps=1,2", "--random=-1"], "--random must be >= 1, got -1"),
        (["--sweep.train.steps=1,2", "--train.steps=3"], "--train.steps is given, and swept as well"),
        (["--sweep.train.steps=1,2", "--compare=adamw"], "--compare is an option of train.py"),
        ([], "nothing to sweep"),
        (["--resume=absent"], "--resume: cannot read 'absent/command.json'"),
    ],
)
def test_a_mistake_is_refused_before_anything_runs(tmp_path, capsys, argv, message):
    given = arguments(tmp_path, *argv)
    if "--train.steps=3" in argv:
        given.remove("--train.steps=4")
    elif any(word.startswith("--sweep.train.steps") for word in argv):
        given.remove("--train.steps=4")
    assert sweep.main(given) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_random_points_are_repeated_by_their_seed_and_prolonged_by_more_draws():
    axes = [axis("optimizer.lr", "1e-4..1e-1"), axis("train.batch_size", "4..64"), axis("optimizer.name", "soap,adamw")]
    few, many = points(axes, 10, seed=3), points(axes, 40, seed=3)
    assert many[:10] == few
    assert points(axes, 10, seed=4) != few
    rates = [float(point["optimizer.lr"]) for point in many]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert 8 <= sum(rate < 10**-2.5 for rate in rates) <= 32, "log-uniform: half of them below the geometric mean"
    assert all(4 <= int(point["train.batch_size"]) <= 64 for point in many), "whole numbers between whole ends"
    assert {point["optimizer.name"] for point in many} == {"soap", "adamw"}


def test_random_points_of_a_small_space_are_all_of_it_once():
    found = points([axis("a", "1,2,3"), axis("b", "x,y")], 50, seed=0)
    assert sorted(map(tuple, map(dict.values, found))) == [(a, b) for a in "123" for b in "xy"]


def test_values_with_commas_are_separated_by_semicolons():
    assert axis("optimizer.betas", "0.9,0.95;0.9,0.99").values == ("0.9,0.95", "0.9,0.99")


def test_the_edge_is_where_better_values_may_lie_beyond():
    grid = axis("lr", "1e-2,1e-3,3e-2")
    assert [grid.at_edge(value) for value in grid.values] == [False, True, True]
    assert not Axis("lr", ("1e-2",)).at_edge("1e-2"), "one value has no inside"
    assert not axis("optimizer.name", "soap,adamw").at_edge("soap")
    drawn = axis("lr", "1e-4..1e-1")
    assert [drawn.at_edge(value) for value in ("1.5e-4", "1e-2", "7e-2")] == [True, False, True]


def outcome(lr, *losses, error=""):
    found = [Result("soap", [(0, 0.0, 9.0), (10, 1.0, loss)], [], 0) for loss in losses]
    return sweep.Outcome({"optimizer.lr": lr}, found, error)


def test_what_diverged_or_failed_comes_last_and_the_best_is_marked_at_the_edge():
    wanted = sweep.Sweep([axis("optimizer.lr", "1,2,3,4")], [], (1, 2, 3))
    given = [outcome("1", math.nan, math.nan, 1.0), outcome("2", error="OSError: x"), outcome("3", 5, 6, 7)]
    ranked = sorted([*given, outcome("4", math.nan, 2.0, 3.0)], key=lambda one: one.loss)
    assert [one.point["optimizer.lr"] for one in ranked][:2] == ["4", "3"]
    rows = sweep.table(wanted, ranked)
    assert [row[0] for row in rows][1:3] == ["4*", "3"]
    assert ["nan", "2.0000", "3.0000"] in rows[1]
    best, edge = sweep.advice(wanted, ranked)
    assert best == "best: --optimizer.lr=4 (median final loss 3.0000, 3 seeds)"
    assert edge == "* optimizer.lr: the best value lies at the edge of what was tried; look beyond"
    assert sweep.advice(wanted, given[:2]) == ["no point ended with a finite loss"]


def test_folders_of_different_points_differ_and_hold_no_separators():
    name = sweep.name
    point = {"data.source": "/a/b", "optimizer.lr": "1"}
    assert "/" not in name(point, 1)
    assert name(point, 1) != name({**point, "data.source": "/a_b"}, 1)
    assert name({"optimizer.lr": "1", "schedule.lr": "2"}, 1) == "optimizer.lr=1,schedule.lr=2,seed=1"
    assert len(name({f"optimizer.{'x' * 50}{n}": "1" for n in range(9)}, 1)) < 150


def test_the_words_of_a_resumed_command_come_first(tmp_path):
    (tmp_path / "command.json").write_text(json.dumps(["--seeds=1"]))
    words, folder = sweep.campaign.recall(["--a=1", "--resume", str(tmp_path), "--b=2"])
    assert (words, folder) == (["--seeds=1", "--a=1", "--b=2"], tmp_path)
    with pytest.raises(RecipeError, match="--resume needs a value"):
        sweep.campaign.recall(["--resume"])


def test_a_draw_lies_between_the_ends_of_its_range():
    generator = random.Random(0)
    drawn = [float(space.axis("x", "2.0..3.0").draw(generator)) for _ in range(50)]
    assert 2 <= min(drawn) < 2.2
    assert 2.8 < max(drawn) <= 3
