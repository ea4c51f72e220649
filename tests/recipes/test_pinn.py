"""Differential equations for networks: their residuals, points and solutions, and the recipe that solves them."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import closures
import command
import optimizer
import pinn
import residual_cases
import runfolder
import schedule
import tasks
import train
from config import Schedule
from pinn import burgers, inverse, nested
from pinn.points import Sampling, evaluation
from pinn.poisson import Poisson
from secondorder import least_squares, taylor

SMALL = {"data.boundary": 6, "model.widths": "5,4", "train.batch_size": 12, "train.clip": 0, "eval.batches": 2}


class Exact:
    """A problem's solution in the place of the network."""

    velocity, diffusivity = inverse.VELOCITY, inverse.DIFFUSIVITY

    def __init__(self, problem):
        self.problem = problem

    def __call__(self, x):
        return self.problem.solution(x)


def exact_points(problem):
    """Points of the problem, with what is known there free of float32 and of noise."""
    points = problem.draw(20, 10, torch.Generator().manual_seed(3))
    if isinstance(problem, Poisson):
        points["f"] = problem.f(points["x"])
    if "g" in points:
        where = points["edge"] if "edge" in points and "start" not in points else points["start"]
        points["g"] = problem.solution(where)
    if "u" in points:
        points["u"] = problem.solution(points["where"])
    return points


@pytest.mark.parametrize("name", pinn.PROBLEMS)
def test_every_residual_vanishes_for_the_solution_and_for_nothing_else(name):
    problem = pinn.load(name)
    points = exact_points(problem)
    for key, r in problem.residuals(Exact(problem), points, nested).items():
        assert r.shape == (len(r), 1)
        assert r.abs().max() < 1e-9, key
    other = problem.residuals(problem.network((5,)), points, nested)
    assert all(r.abs().max() > 1e-4 for r in other.values())


@pytest.mark.parametrize("name", pinn.PROBLEMS)
def test_what_is_known_at_points_is_rounded_to_float32_at_most(name):
    problem = pinn.load(name)
    drawn, exact = problem.draw(20, 10, torch.Generator().manual_seed(3)), exact_points(problem)
    assert drawn.keys() == exact.keys()
    for key, value in drawn.items():
        assert value.dtype == torch.float64
        noise = 0.05 if name == "transport" and key == "u" else 2e-7 * max(1.0, float(exact[key].abs().max()))
        assert (value - exact[key]).abs().max() <= noise, key


@pytest.mark.parametrize("name", pinn.PROBLEMS)
def test_taylor_mode_and_nested_autograd_agree(name):
    problem = pinn.load(name)
    model, points = problem.network((6, 5)), problem.draw(7, 6, torch.Generator().manual_seed(3))
    one, other = (problem.residuals(model, points, operators) for operators in (taylor, nested))
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("operators", [taylor, nested], ids=["taylor", "nested"])
def test_the_first_loss_is_that_of_the_papers_code(operators):
    # Dangel et al. (2024): logged by their training script, model seed 1.
    problem = pinn.load("poisson2d")
    points = Sampling(problem, (64,), 900, 120, seed=1, fresh=False).at(0)
    torch.manual_seed(1)
    loss = least_squares(**problem.residuals(problem.network((64,)), points, operators))
    assert loss.item() == pytest.approx(48.92347435353573, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "golden", "widths", "counts"),
    [
        ("poisson2d", "tiny_problem_engdw", (16, 16), (64, 16)),
        ("heat1d", "tiny_heat_problem_engdw", (12, 12), (40, 12)),
    ],
)
def test_points_weights_and_residuals_are_those_of_the_golden_data(name, golden, widths, counts):
    problem, recorded = pinn.load(name), residual_cases.recorded(golden)
    points = Sampling(problem, widths, *counts, seed=1, fresh=False).at(0)
    torch.manual_seed(1)
    model = problem.network(widths)
    torch.testing.assert_close(residual_cases.flat(model.parameters()), recorded["theta0"], rtol=0, atol=0)
    assert torch.equal(points["x"], recorded["X_int"])
    assert torch.equal(points["edge"], recorded["X_bnd"])
    inside, edge = problem.residuals(model, points, taylor).values()
    torch.testing.assert_close(inside.flatten(), recorded["r_int"].flatten(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(edge.flatten(), recorded["r_bnd"].flatten(), rtol=1e-12, atol=1e-12)


def test_the_reference_of_burgers_does_not_depend_on_the_number_of_nodes(monkeypatch):
    problem = pinn.load("burgers")
    x, u = evaluation(problem, 300, seed=5)
    monkeypatch.setattr(burgers, "NODES", 120)
    torch.testing.assert_close(problem.solution(x), u, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", pinn.PROBLEMS)
def test_points_are_in_the_box_and_conditions_on_its_faces(name):
    problem = pinn.load(name)
    low, high = torch.tensor(problem.box, dtype=torch.float64).T
    points = problem.draw(40, 10, torch.Generator().manual_seed(3))
    for key in ("x", "edge", "start", "where"):
        if key in points:
            assert (points[key] >= low).all(), key
            assert (points[key] <= high).all(), key
        if key in ("edge", "start") and key in points:
            assert ((points[key] == low) | (points[key] == high)).any(1).all(), key
    slice_ = problem.slice(5)
    assert slice_.shape == (25, len(problem.axes))
    assert slice_.unique(dim=0).shape[0] == 25


def test_points_are_a_function_of_seed_and_step():
    problem = pinn.load("heat1d")

    def sampling(seed=1, fresh=True):
        return Sampling(problem, (4,), 9, 4, seed, fresh)

    one = sampling()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    for step in (0, 1, 7):
        assert torch.equal(one.at(step)["x"], sampling().at(step)["x"])
        assert torch.equal(sampling(fresh=False).at(step)["x"], one.at(0)["x"])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one.at(1)["x"], one.at(2)["x"])
    assert not torch.equal(one.at(1)["x"], sampling(seed=2).at(1)["x"])
    assert torch.equal(pinn.load("transport").draw(3, 5, torch.Generator())["u"], sampling_of_measurements())


def sampling_of_measurements():
    """Whatever the seed: there was one experiment."""
    return pinn.load("transport").draw(30, 5, torch.Generator().manual_seed(8))["u"]


def test_an_unknown_problem_is_named():
    with pytest.raises(pinn.RecipeError, match=r"data.problem: expected one of .*, got 'poison2d', did you mean 'pois"):
        pinn.load("poison2d")


# ---------------------------------------------------------------------------------------------------- steps


def problem_at_a_point():
    problem = pinn.load("poisson2d")
    torch.manual_seed(4)
    model = problem.network((6,))
    points = problem.draw(20, 8, torch.Generator().manual_seed(3))
    return model, lambda: problem.residuals(model, points, taylor)


@pytest.mark.parametrize("name", ["engdw", "soap", "adamw", "torch.adam", "torch.lbfgs", "torch.muon"])
def test_every_optimizer_takes_the_residuals_and_reports_the_parts_of_the_loss_before_the_step(name):
    model, residuals = problem_at_a_point()
    opt = optimizer.build(optimizer.check(name, {"lr": 1e-3}), model)
    expected = {key: 0.5 * r.square().mean().item() for key, r in residuals().items()}
    loss, parts = closures.step(opt, residuals)
    assert {key: part.item() for key, part in parts.items()} == pytest.approx(expected, rel=1e-12)
    assert loss.item() == pytest.approx(sum(expected.values()), rel=1e-12)
    assert not loss.requires_grad
    assert least_squares(**residuals()).item() < loss.item()


def test_optimizers_with_a_line_search_keep_their_lr():
    model, _ = problem_at_a_point()
    cosine = Schedule(kind="cosine", warmup=3)
    for name, kind in (("engdw", "constant"), ("spring", "cosine"), ("soap", "cosine")):
        assert schedule.of(optimizer.build(optimizer.check(name, {}), model), cosine).kind == kind
    wolfe = optimizer.check("torch.lbfgs", {"line_search_fn": "strong_wolfe"})
    assert schedule.of(optimizer.build(wolfe, model), cosine) == dataclasses.replace(cosine, kind="constant", warmup=0)


# ---------------------------------------------------------------------------------------------------- the recipe


@pytest.fixture
def undrawn(monkeypatch):
    """Runs without their picture, which takes longer than the rest."""
    monkeypatch.setattr(tasks.load("pinn").Task, "draw", lambda *_: "none")
    monkeypatch.setattr(train.curves, "draw", lambda *_: "none")


@pytest.fixture
def solve(tmp_path):
    """The recipe's command line with a tiny problem; returns the run's folder, or the exit code if that is not 0."""

    def run(*more, **settings):
        given = {**SMALL, "train.steps": 3, "eval.every": 1, "log.every": 1, "log.wandb": "disabled", **settings}
        given = {**given, "task": "pinn", "out": tmp_path / "runs"}
        code = train.main([*(f"--{key}={value}" for key, value in given.items()), *more])
        return code or sorted((tmp_path / "runs").glob("*/*"))[-1]

    return run


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", pinn.PROBLEMS)
def test_every_problem_is_trained_by_energy_natural_gradients_and_by_soap(solve, name):
    folder = solve("--optimizer.name=engdw", "--compare=soap", **{"data.problem": name})
    for own in ("engdw", "soap"):
        records = runfolder.read_metrics(folder / own / "metrics.jsonl")
        assert [record["step"] for record in records] == [0, 1, 2, 3]
        parts = [sum(value for key, value in r.items() if key.startswith("loss/")) for r in records[1:]]
        assert parts == pytest.approx([record["train/loss"] for record in records[1:]], rel=1e-12)
        assert math.isfinite(records[-1]["val/loss"])
    losses = [r["train/loss"] for r in runfolder.read_metrics(folder / "engdw" / "metrics.jsonl")[1:]]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("name", ["heat1d", "poisson5d"])
def test_the_solution_and_the_errors_are_drawn(solve, name):
    folder = solve("--optimizer.name=engdw", **{"data.problem": name, "train.steps": 1})
    for picture in ("curves.png", "engdw/solution.png"):
        assert (folder / picture).stat().st_size > 10_000
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("undrawn")
def test_errors_are_root_mean_squares_over_all_parts_of_the_validation(solve):
    folder = solve("--optimizer.name=engdw", **{"eval.batches": 3, "train.steps": 1})
    record = runfolder.read_metrics(folder / "engdw" / "metrics.jsonl")[0]
    problem = pinn.load("poisson2d")
    torch.manual_seed(1)
    model = problem.network((5, 4))
    x, u = evaluation(problem, 36, seed=1)
    difference = (model(x) - u).detach()
    assert record["val/l2_abs"] == pytest.approx((difference.norm() / 6).item(), rel=1e-12)
    assert record["val/loss"] == pytest.approx((difference.norm() / u.norm()).item(), rel=1e-12)


@pytest.mark.usefixtures("undrawn")
def test_what_is_asked_of_the_optimizer_is_logged(solve):
    folder = solve("--optimizer.name=engdw", **{"data.problem": "transport"})
    record = runfolder.read_metrics(folder / "engdw" / "metrics.jsonl")[-1]
    wanted = ["optimizer/step_size", "optimizer/damping", "loss/pde", "loss/measurements", "time/cpu_ms"]
    wanted += ["val/l2_abs", "val/velocity_error", "val/diffusivity_error", "train/grad_norm"]
    assert not [key for key in wanted if not math.isfinite(record[key])]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["engdw", "spring", "soap", "torch.lbfgs"])
def test_interrupted_and_resumed_is_bitwise_the_uninterrupted_run(solve, monkeypatch, name):
    settings = {"optimizer.name": name, "data.fresh": True, "train.steps": 7, "log.checkpoint_every": 3}
    settings |= {"log.diagnostics": "brief"}  # a checkpoint does not hold what was measured before it
    whole = solve(**settings)
    original = tasks.load("pinn").Task.batch

    def batch(self, step, first, count):
        if step == 5:
            raise KeyboardInterrupt
        return original(self, step, first, count)

    monkeypatch.setattr(tasks.load("pinn").Task, "batch", batch)
    assert solve(**settings) == 130
    broken = next(path for path in whole.parent.iterdir() if path != whole)
    monkeypatch.setattr(tasks.load("pinn").Task, "batch", original)
    assert runfolder.load_checkpoint(broken / name / "checkpoint.pt")["step"] == 3
    assert train.main(["--resume", str(broken)]) == 0
    one, other = (runfolder.load_checkpoint(path / name / "checkpoint.pt") for path in (whole, broken))
    torch.testing.assert_close(other["model"], one["model"], rtol=0, atol=0)

    def steps(folder):
        records = runfolder.read_metrics(folder / name / "metrics.jsonl")
        return [{k: v for k, v in r.items() if k != "seconds" and not k.startswith("time/")} for r in records]

    assert steps(broken) == steps(whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.clip": 1.0}, "train.clip must be 0.0 for task=pinn, which has residuals, got 1.0"),
        ({"train.accumulation": 2}, "train.accumulation must be 1 for task=pinn"),
        ({"train.dtype": "bfloat16"}, "train.dtype must be float32 for task=pinn"),
        ({"data.boundary": 1}, "data.boundary must be >= 2, got 1"),
        ({"model.widths": "none"}, "model.widths"),
    ],
)
def test_what_residuals_do_not_allow_is_refused(solve, capsys, settings, message):
    assert solve(**settings) == 2
    assert message in capsys.readouterr().err


def test_an_optimizer_that_needs_a_closure_is_refused_for_tasks_without_residuals(recipe, capsys):
    assert recipe("--optimizer.name=torch.lbfgs") == 2
    assert "torch.lbfgs evaluates a loss several times, which task=lm lacks" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(command.CONFIGS.glob("pinn_*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_config_has_points_and_networks_that_fit_its_problem(path):
    config = command.resolve(command.parse([f"--config={path}"]))
    task = tasks.load(config.task).Task(config.data, config.model, config.seed)
    torch.manual_seed(config.seed)
    model = task.build_model()
    residuals = task.residuals(model, task.batch(0, 0, config.train.batch_size))
    assert {len(r) for r in residuals.values()} >= {config.train.batch_size}
    assert all(isinstance(p, nn.Parameter) and p.dtype == torch.float64 for p in model.parameters())
