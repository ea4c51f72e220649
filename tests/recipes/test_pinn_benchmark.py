"""The benchmark of optimizers on differential equations: what it counts and says."""

import math

import pytest

import benchmark_pinn as benchmark
from benchmark_pinn import CASES, Run, row, toy


def run(*errors, seconds=1.0):
    return Run([(step, 0.1 * step, error) for step, error in enumerate(errors)], seconds)


def test_a_row_has_medians_with_each_seed_and_says_which_gates_are_missed():
    case = CASES["poisson2d"]
    quick = [1.0] * 30 + [1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
    slow = [1.0] * 40 + [1e-2, 1e-3, 1e-4, 1e-5]
    cells = dict(zip(benchmark.HEAD, row("p", case, "ENGDW", [run(*quick)] * 3 + [run(*slow)], True), strict=True))
    assert cells["1e-02"] == "30 (30, 30, 30, 40)"
    assert cells["1e-04"] == "32 (32, 32, 32, 42), gate 35 met"
    assert cells["1e-06"] == "34 (34, 34, 34, -), gate 80 met"
    cells = dict(zip(benchmark.HEAD, row("p", case, "ENGDW", [run(*quick), run(*slow)], True), strict=True))
    assert cells["1e-04"] == "37 (32, 42), gate 35 MISSED"
    assert cells["1e-06"] == "- (34, -), gate 80 MISSED"
    assert row("p", case, "ENGDW", [run(1.0)], True)[6] == "-, gate 80 MISSED"


def test_a_run_has_as_many_steps_as_it_is_given_and_an_error_for_each():
    case, method = toy(CASES["poisson2d"]), benchmark.methods()["ENGDW"]
    first, again = (benchmark.solve(case, method, seed=2, steps=3, seconds=0.0) for _ in range(2))
    assert [step for step, _, _ in first.curve] == [0, 1, 2, 3]
    assert [error for _, _, error in first.curve] == [error for _, _, error in again.curve]
    assert first.rises == 0


def test_a_run_on_time_ends_with_it():
    case, method = toy(CASES["heat1d"]), benchmark.methods()["Adam"]
    found = benchmark.solve(case, method, seed=1, steps=0, seconds=0.05)
    assert 0.05 <= found.seconds < 1.0
    assert found.curve[-1][0] > 0


def test_a_diverged_run_is_over_and_reaches_nothing():
    found = run(1.0, math.nan)
    assert found.reached(1e-2) is None
    assert found.best == 1.0


def test_the_smoke_benchmark_prints_a_table_and_a_picture(tmp_path, capsys):
    picture = tmp_path / "pinn.png"
    benchmark.main(["--smoke", "--seeds", "1", "--only", "poisson2d", "poisson2d_fresh", "--out", str(picture)])
    text = capsys.readouterr().out
    assert "| poisson2d | ENGDW |" in text
    assert "| poisson2d_fresh | SPRING |" in text
    for usual in ("SOAP", "Adam", "LBFGS"):
        assert f"| poisson2d | {usual} |" in text
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("argv", [["--methods", "sopa"], ["--methods", "SOAP"]])
def test_a_method_that_is_not_there_or_has_no_end_is_refused(argv, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(argv)
    assert "--methods" in capsys.readouterr().err
