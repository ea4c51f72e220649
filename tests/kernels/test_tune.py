"""The tuner: what is wrong is never enabled, what is slower neither, and the dispatch reads what it writes."""

import dataclasses
import json

import pytest
import torch

import secondorder_kernels
from secondorder_kernels import dispatch, policy, tables, tune
from secondorder_kernels.tuning import case as cases_module
from secondorder_kernels.tuning import measure, table
from secondorder_kernels.tuning.case import Verifier, triton_path
from secondorder_kernels.tuning.cases import cases

CPU = torch.device("cpu")
HERE = pytest.mark.skipif(not policy.interpreting(), reason="needs Triton's interpreter")


def first(operation, words="", sizes="tiny"):
    return next(case for case in cases(sizes) if case.operation == operation and words in case.label)


def clock(fastest, us=10.0, others=100.0):
    """Times by name: the fastest takes `us`, all else `others`."""

    def times(calls):
        for call in calls.values():
            call()
        return {name: measure.Timing(us if name == fastest else others, 0.0) for name in calls}

    return times


@pytest.fixture
def own_tables(tmp_path, monkeypatch):
    """A folder that the dispatch reads, and the tuner writes to."""
    monkeypatch.setenv("SECONDORDER_KERNELS_CONFIG_DIR", str(tmp_path))
    tables.forget()
    yield tmp_path
    tables.forget()


@pytest.fixture
def faulty(monkeypatch):
    """Replaces what an operation's kernel does with certain configurations."""

    def install(operation, fault, when=lambda config: True):
        path = triton_path(operation)

        def launch(*args, config, **kwargs):
            result = path.launch(*args, config=config, **kwargs)
            if when(config):
                fault(*args)
            return result

        wrong = dataclasses.replace(path, launch=launch)
        monkeypatch.setattr(tune, "triton_path", lambda name: wrong if name == operation else triton_path(name))

    return install


def test_every_operation_with_a_kernel_has_cases_of_all_sizes():
    operations = {name: dispatch.operations().get(name) for name in secondorder_kernels.__all__}
    with_kernel = {name for name, operation in operations.items() if operation and operation.triton}
    known = {case.operation for case in cases("all")}
    assert with_kernel and with_kernel <= known
    assert {case.operation for case in cases("quick")} == known
    missing = known - {case.operation for case in cases("tiny")}
    assert missing <= ({"stochastic_round"} if policy.interpreting() else set())


# ---------------------------------------------------------------------- work, counted by hand


def test_work_of_a_symmetric_average_by_hand():
    # Two matrices of 40 x 33 in float16. On and below the diagonal 40 * 41 / 2 = 820 entries, 33 multiplications and 33
    # additions each; of C one triangle is read and both are written, 1600 * 4 / 2 + 1600 * 4 = 9600 bytes.
    case = first("ema_syrk_", "(2, 40, 33)")
    itemsize = case.call(CPU).args[1].element_size()
    assert itemsize == 2
    assert case.flops == 2 * 820 * 66
    assert case.bytes == 2 * (40 * 33 * 2 + 9600)
    # The least time by operations is 108 240 / 1e9 s, by bytes 24 480 / 1e8 s.
    assert case.floor_us({"bf16": 1e9, "bytes": 1e8}) == pytest.approx(244.8)
    assert case.floor_us({"bf16": 1e8, "bytes": 1e9}) == pytest.approx(1082.4)


def test_work_of_adams_direction_by_hand():
    # 24 matrices of 768 x 768: gradient read, direction written, two averages read and written, in float32.
    case = first("adam_direction_", "(24, 768, 768) float32", sizes="all")
    assert case.bytes == 24 * 768 * 768 * 4 * 6
    assert case.flops == 24 * 768 * 768 * 12


def test_work_of_a_triangular_update_by_hand():
    # sum over i >= j of (i - j + 1) multiplications and additions is about d³ / 3.
    d = 1024
    case = first("multiply_update", "(24, 1024, 1024) float32 high lower", sizes="all")
    exact = 24 * sum(2 * (i - j + 1) for i in range(d) for j in range(i + 1))
    assert case.flops == pytest.approx(exact, rel=0.01)


# ---------------------------------------------------------------------- what is written is what dispatch reads


@HERE
def test_the_fastest_right_candidate_is_what_the_dispatch_finds(own_tables):
    case = first("adam_direction_")
    wanted = case.candidates[2]
    found = tune.tune(case, CPU, clock(tune.words(wanted)))
    assert not found.wrong and found.entry["ratio"] == 10.0 and found.entry["best_us"] == 100.0
    path = table.merge(own_tables, CPU, [found.entry])
    kind, sizes = case.call(CPU).of(triton_path("adam_direction_").shape)
    entry = tables.nearest("adam_direction_", kind, sizes, CPU)
    assert entry == tables.Entry(sizes, wanted, 10.0)
    assert tables.config("adam_direction_", kind, sizes, CPU) == wanted
    written = json.loads(path.read_text())
    assert set(written) == {"device", "date", "torch", "triton", "driver", "entries"}
    assert written["torch"] == torch.__version__
    assert set(written["entries"][0]) == {"op", "kind", "sizes", "config", "us", "best_us", "best", "ratio"}


@HERE
@pytest.mark.parametrize(("us", "pays"), [(96.0, False), (95.0, True)])
def test_a_kernel_must_save_a_twentieth(us, pays):
    case = first("adam_direction_")
    found = tune.tune(case, CPU, clock(tune.words(case.candidates[0]), us))
    assert found.entry["config"] == (case.candidates[0] if pays else None)
    assert found.entry["ratio"] == pytest.approx(100 / us, abs=1e-3)  # null as it is, it was measured


def off_by_a_little(m, *rest):
    m[1, 3, 5] += 0.02


def not_written(m, v, g, out, **options):
    out[0, -1, -1] = torch.nan


def neighbour(m, v, *rest):
    v[-1, -1] = v[0, -1]


@HERE
@pytest.mark.parametrize("fault", [off_by_a_little, not_written, neighbour])
def test_a_wrong_kernel_is_never_timed_nor_enabled(faulty, own_tables, fault):
    case = first("adam_direction_")
    wrong, right = case.candidates[:2]
    faulty("adam_direction_", fault, lambda config: config == wrong)
    found = tune.tune(case, CPU, clock(tune.words(wrong), others=50.0))
    assert set(found.wrong) == {tune.words(wrong)}
    assert tune.words(wrong) not in found.times
    assert found.entry["config"] != wrong and found.entry["ratio"] == 1.0

    faulty("adam_direction_", fault)
    found = tune.tune(case, CPU, clock("none"))
    assert len(found.wrong) == len(case.candidates) and found.entry["config"] is None and found.entry["ratio"] == 0
    table.merge(own_tables, CPU, [found.entry])
    entry = tables.nearest("adam_direction_", found.entry["kind"], tuple(found.entry["sizes"]), CPU)
    assert entry.config is None and entry.ratio is not None  # and so it is declined, as measured and not worth it


@HERE
def test_a_kernel_that_goes_wrong_in_a_later_call_is_not_enabled(faulty):
    case, calls = first("adam_direction_"), []
    late = case.candidates[0]

    def fault(m, *rest):
        calls.append(0)
        if len(calls) > 1:
            m[0, 0, 0] += 1

    faulty("adam_direction_", fault, lambda config: config == late)
    found = tune.tune(case, CPU, clock(tune.words(late)))
    assert set(found.wrong) == {tune.words(late)} and found.entry["config"] is None


@HERE
def test_a_candidate_that_does_not_run_is_left_out(faulty):
    case = first("adam_direction_")

    def fault(*args):
        raise RuntimeError("out of resource: shared memory")

    faulty("adam_direction_", fault, lambda config: config == case.candidates[0])
    found = tune.tune(case, CPU, clock(tune.words(case.candidates[1])))
    assert found.absent[tune.words(case.candidates[0])].startswith("RuntimeError: out of resource")
    assert not found.wrong and found.entry["config"] == case.candidates[1]


def test_poison_shows_what_is_not_written():
    with cases_module._Poisoned():
        empties = [
            torch.empty(3),
            torch.zeros(2).new_empty(4),
            torch.empty_like(torch.ones(2)),
            torch.empty((), dtype=int),
        ]
    assert all(t.isnan().all() for t in empties[:3])


@HERE
def test_other_paths_are_checked_too(monkeypatch):
    monkeypatch.setattr(tune, "other_paths", lambda case, call: {"does nothing": lambda *args, **options: None})
    found = tune.tune(first("adam_direction_"), CPU, clock("does nothing"))
    assert "does nothing" in found.absent and "does nothing" not in found.times and found.entry["ratio"] == 0


@HERE
def test_what_no_call_would_take_does_not_count():
    quick = dataclasses.replace(first("adam_direction_"), baselines={"others'": lambda *args, **options: None})
    found = tune.tune(quick, CPU, clock("others'"))
    assert found.entry["best"] == "reference" and "others'" not in found.times


@HERE
def test_lists_of_tensors_are_checked_by_their_first_and_last(monkeypatch):
    case = first("adamw_")
    verifier = Verifier(case, CPU)
    reference = dispatch.operations()["adamw_"].reference
    assert verifier.error(reference) is None

    def last_is_off(params, *args, **options):
        reference(params, *args, **options)
        params[-1][0] += 1

    assert "deviates" in verifier.error(last_is_off)


# ---------------------------------------------------------------------- tables


def entry(op="a", sizes=(1, 2), ratio=2.0, **config):
    return {"op": op, "kind": "k", "sizes": list(sizes), "config": config or None, "ratio": ratio}


def test_entries_replace_those_of_the_same_key_and_leave_the_others(tmp_path):
    table.merge(tmp_path, CPU, [entry("b", block=1), entry("a", block=2)])
    path = table.merge(tmp_path, CPU, [entry("a", block=3), entry("a", (1, 4), block=4)])
    found = [(e["op"], tuple(e["sizes"]), e["config"]) for e in json.loads(path.read_text())["entries"]]
    assert found == [("a", (1, 2), {"block": 3}), ("a", (1, 4), {"block": 4}), ("b", (1, 2), {"block": 1})]
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_of_other_versions_is_replaced(tmp_path, monkeypatch):
    path = table.merge(tmp_path, CPU, [entry("b", block=1)])
    monkeypatch.setattr(torch, "__version__", "9.9")
    table.merge(tmp_path, CPU, [entry("a", block=1)])
    assert [e["op"] for e in json.loads(path.read_text())["entries"]] == ["a"]


def test_cases_that_a_table_does_not_tell_apart_leave_the_least_gain():
    written = {}
    assert tune._least(entry(ratio=2.0, block=1), written)["ratio"] == 2.0
    assert tune._least(entry(ratio=0.5), written)["config"] is None
    assert tune._least(entry(ratio=3.0, block=1), written)["config"] is None


# ---------------------------------------------------------------------- the command


@HERE
def test_smoke_checks_everything_and_writes_what_nobody_trusts(own_tables, capsys):
    out = own_tables / "new"
    assert tune.main(["--smoke", "--operations", "adam_direction_", "multiply_update", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "5 of 5 candidates are right" in printed and f"written: {out}" in printed and " us" not in printed
    entries = json.loads((out / "interpreter.json").read_text())["entries"]
    assert {e["op"] for e in entries} == {"adam_direction_", "multiply_update"}
    assert all(e["ratio"] is None and e["config"] for e in entries)
    assert not list(own_tables.glob("*.json"))


@HERE
def test_smoke_tells_wrong_kernels_by_its_exit_code(faulty, capsys):
    faulty("adam_direction_", off_by_a_little)
    assert tune.main(["--smoke", "--operations", "adam_direction_"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("WRONG") == 5 and "written" not in printed


@HERE
def test_the_budget_ends_between_cases(capsys):
    assert tune.main(["--smoke", "--operations", "multiply_update", "--budget", "1e-9"]) == 0
    assert "the budget is spent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--operations", "no_such"], "invalid choice: 'no_such'"),
        (["--sizes", "some"], "invalid choice: 'some'"),
        (["--budget", "0"], "--budget must be above 0, got 0"),
        pytest.param(["--smoke", "--out", __file__], "no table can be written to", marks=HERE),
        pytest.param([], "there is no GPU", marks=HERE),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, says, capsys):
    with pytest.raises(SystemExit) as exit_:
        tune.main(arguments)
    assert exit_.value.code == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1


@HERE
def test_a_table_that_cannot_be_read_is_told_before_anything_runs(tmp_path, capsys):
    (tmp_path / "interpreter.json").write_text("[]")
    with pytest.raises(SystemExit) as exit_:
        tune.main(["--smoke", "--out", str(tmp_path)])
    assert exit_.value.code == 2 and "is no table" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_clocks_see_that_twice_the_work_takes_longer():
    small, large = (torch.randn(n, 4096, 4096, device="cuda") for n in (1, 4))
    times = measure.in_turn({"small": lambda: small.mul_(1.0), "large": lambda: large.mul_(1.0)})
    assert 2 < times["large"].us / times["small"].us < 8
    assert measure.graph_us(lambda: small.mul_(1.0)) > 0 and measure.host_us(lambda: small.mul_(1.0)) > 0
