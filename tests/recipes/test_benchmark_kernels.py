"""The benchmarks of kernels, whole steps and launches: their tables say what they promise. Never a time."""

import functools
import json
import re

import pytest
import torch

import benchmark_kernels as benchmark
import benchmark_launches as launching
import benchmark_whole_steps as whole
import secondorder_kernels
from secondorder_kernels import policy, tables
from secondorder_kernels.dispatch import operations
from secondorder_kernels.tuning.cases import cases

HERE = pytest.mark.skipif(not policy.interpreting(), reason="needs Triton's interpreter")


@functools.cache
def configs():
    return {case.operation: case.candidates[0] for case in cases("tiny") if case.candidates}


@pytest.fixture(autouse=True)
def _first_candidates(monkeypatch):
    """Configurations that do not depend on what the package ships."""
    monkeypatch.setattr(tables, "family_config", lambda operation, *key: configs()[operation])


def rows_of(text):
    """Cells of every row of a table."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [line for line in lines if not line[0].startswith("---")]


# ---------------------------------------------------------------------- kernels


@HERE
def test_smoke_has_a_row_for_every_case_and_no_time(tmp_path, capsys):
    out = tmp_path / "rows.json"
    assert benchmark.main(["--smoke", "--only", "adam_direction_", "adamw_", "orthogonalize", "--out", str(out)]) == 0
    header, *rows = rows_of(capsys.readouterr().out)
    assert header == benchmark.HEADER and all(len(row) == len(header) for row in rows)
    assert [row[0] for row in rows] == ["adam_direction_", "adamw_", "orthogonalize"]
    for row in rows:
        assert row[2] == "right" and row[3] == row[6] == row[7] == benchmark.NOT_TIMED
    assert "torch fused" in rows[1][5] and "cholesky" in rows[2][5]
    assert rows[0][8] == "reference"  # what "auto" takes on a CPU
    written = json.loads(out.read_text())
    assert written["torch"] == torch.__version__ and len(written["rows"]) == 3
    assert not any("us" in row for row in written["rows"])


@HERE
def test_a_wrong_kernel_is_named_and_not_timed(monkeypatch, capsys):
    path = benchmark.triton_path("adam_direction_")

    def run(m, *args, **options):
        path.run(m, *args, **options)
        m[0, 1, 2] += 1

    wrong = type(path)("triton", run, path.refuses, path.declines, shape=path.shape, launch=path.launch)
    monkeypatch.setattr(benchmark, "triton_path", lambda name: wrong)
    assert benchmark.main(["--smoke", "--only", "adam_direction_"]) == 1
    printed = capsys.readouterr().out
    assert rows_of(printed)[1][2] == "wrong" and "ours of adam_direction_, result 0 deviates by" in printed


def test_ratios_and_shares_are_of_our_time():
    row = {"operation": "o", "case": "c", "error": {}, "us": {"ours": 50.0, "baddbmm": 75.0, "reference": 200.0}}
    row |= {"floor_us": 40.0, "bound": "bytes", "graph_us": 45.0, "host_us": 7.0, "auto": "triton"}
    assert benchmark.cells(row) == [
        "o",
        "c",
        "50.0",
        "80 %",
        "bytes",
        "1.50 baddbmm, 4.00 reference",
        "45.0",
        "7",
        "triton",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "no_such"], "invalid choice: 'no_such'"),
        (["--budget", "-1"], "--budget must be above 0, got -1"),
        (["--smoke", "--out", "no/such/folder.json"], "there is no folder no/such"),
        pytest.param([], "there is no GPU", marks=HERE),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, says, capsys):
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(arguments)
    assert exit_.value.code == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1


@HERE
def test_once_runs_every_kernel_twice(capsys):
    chosen = [case for case in cases("tiny") if case.operation in ("graft_", "orthogonalize")]
    assert benchmark.once(chosen, torch.device("cpu")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("graft_") and line.endswith(": ok") for line in lines)


# ---------------------------------------------------------------------- whole steps


def meta(name, **options):
    params = [
        torch.nn.Parameter(torch.empty(64, 32, device="meta")),
        torch.nn.Parameter(torch.empty(10, device="meta")),
    ]
    return getattr(whole.secondorder, name)(params, **options)


def test_work_of_soaps_step_by_hand():
    optimizer = meta("SOAP", refresh_every=10)
    flops, moved = whole.work("SOAP", optimizer)
    N, sides = 64 * 32, (64, 32)
    # There, back (2 N d each) and a statistic (N d) on both sides; refreshes of 12 d³ every 10 steps.
    assert flops == sum(5 * N * d + 1.2 * d**3 for d in sides)
    # Two moments, a basis read, half a covariance read and all of it written; a gradient read, a parameter read and
    # written; the fallback's two moments.
    assert moved == 16 * N + sum(10 * d * d for d in sides) + 12 * (N + 10) + 16 * 10


def test_rare_statistics_cost_their_share():
    dense, rare = (whole.work("InverseFreeKLShampoo", meta("InverseFreeKLShampoo", statistics_every=n)) for n in (1, 4))
    N, sides = 64 * 32, (64, 32)
    assert dense[0] == sum(5 * N * d + 7 * d**3 for d in sides)
    assert rare[0] == sum(4.25 * N * d + 1.75 * d**3 for d in sides)


@HERE
def test_steps_smoke_steps_with_kernels_and_prints_no_time(monkeypatch, capsys):
    monkeypatch.setattr(whole, "METHODS", {"SOAP": whole.METHODS["SOAP"]})
    calls = []
    use_kernels = secondorder_kernels.use_kernels
    monkeypatch.setattr(
        secondorder_kernels, "use_kernels", lambda *how, **options: calls.append(how) or use_kernels(*how, **options)
    )
    rows = whole.run(torch.device("cpu"), smoke=True, budget=60.0)
    assert [row["optimizer"] for row in rows] == ["SOAP", "torch AdamW, fused", "SOAP"]
    assert calls and set(calls) == {("triton",)}
    assert not any(key.endswith("_ms") for row in rows for key in row)
    printed = capsys.readouterr().out
    assert not re.search(r"\d\.\d+ \| (products|bytes)", printed)
    assert [line[0] for line in rows_of(printed)] == ["training step", "toy", "toy", "parameters", "toy"]


@HERE
@pytest.mark.slow
def test_steps_smoke_of_all_methods(capsys):
    assert benchmark.main(["--steps", "--smoke"]) == 0
    printed = capsys.readouterr().out
    assert all(printed.count(f"| {name} |") == 2 for name in whole.METHODS)


# ---------------------------------------------------------------------- launches


def test_what_counts_as_a_launch():
    x, y = (torch.ones(4, 4, device="meta") for _ in range(2))
    with launching.Launches() as counted:
        x.mul_(2)  # 1
        x.view(16), x.mT, x[1:], torch.empty_like(x), x.detach()
        torch._foreach_add_([x, y], 1.0)  # 2
        torch.ones(3) + 1  # on the host
        torch.mul(x, y, out=torch.empty_like(x))  # 3
    assert counted.operations.total() == counted.total == 3


def test_launches_of_kernels_are_counted_and_nothing_is_run():
    tensors = [torch.empty(2, 8, 8, device="meta") for _ in range(4)]
    rate = torch.empty(2, 1, 1, device="meta")
    options = {"beta1_rate": rate, "beta2_rate": rate, "beta1": 0.9, "eps": 1e-8, "nesterov": False}
    counted = launching.Launches()
    with secondorder_kernels.use_kernels("triton"), launching._launching(counted), counted:
        operations()["adam_direction_"](*tensors, **options)
    assert counted.kernels.total() == 1 and counted.operations.total() == 0


def test_launches_grow_with_buckets_and_not_with_layers():
    few, many = (launching.count("SOAP", layers, "triton", width=24) for layers in (1, 3))
    assert few.buckets == many.buckets
    assert few.kernels == many.kernels > 0
    assert few.plain == many.plain < few.most == many.most
    assert launching.count("SOAP", 1, "reference", width=24).kernels == 0


def test_the_report_has_a_row_per_method():
    header, *rows = rows_of(launching.report((1, 2), ["AdamW"], width=24))
    assert [row[0] for row in rows] == ["AdamW"] and len(rows[0]) == len(header)
    assert "InverseFreeKLShampoo" in launching.methods()
