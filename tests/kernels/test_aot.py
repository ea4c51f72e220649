"""The checker of compiled kernels finds what it is to find: in kernels with a known fault, and against a report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import aot_findings
import pytest

FOLDER = Path(__file__).parent
LIMIT = 227 * 1024


@pytest.fixture(scope="module")
def toys():
    """Numbers of the kernels in `aot_toys.py`; in a process of its own, since this one may interpret."""
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(FOLDER / "aot_toys.py"), "sm90", "gfx942"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_good_kernel_has_no_fault(toys):
    for target, mma in (("sm90", "HGMMA"), ("gfx942", "MFMA")):
        plain = toys[target]["plain"]
        assert plain["kernel"] == "product" and plain["loads"][0] == plain["loads"][1] > 0
        assert 32 <= plain["regs"] <= 255 and 16 * 1024 <= plain["smem"] <= 64 * 1024
        assert plain["product"] == "64x64xbf16"
        assert aot_findings.judged(plain, LIMIT, mma, wide=1.0) == []


def test_spilled_registers_and_too_much_shared_memory_are_found(toys):
    large = toys["sm90"]["too large"]
    spills, memory = aot_findings.judged(large, 99 * 1024, "HGMMA", wide=1.0)
    assert spills == f"spills {large['spill']} bytes of registers, 32 are allowed" and large["spill"] > 1000
    assert memory == f"takes {large['smem']} bytes of shared memory, the device has 101376"
    assert aot_findings.judged(large, LIMIT, "HGMMA", spill=large["spill"]) == []
    assert "65536" in aot_findings.judged(toys["gfx942"]["too large"], 64 * 1024, "MFMA", spill=10**6)[0]


def test_a_product_without_the_matrix_instruction_is_found(toys):
    plain, scalar = toys["sm90"]["plain"], toys["sm90"]["full precision"]
    for found, mma in (("HMMA", "HGMMA"), ("", "HGMMA"), ("HMMA", "UTCHMMA")):
        (finding,) = aot_findings.judged({**plain, "mma": found}, LIMIT, mma)
        assert finding == f"its product of 64x64xbf16 uses {found or 'no matrix instruction'}, not {mma}"
    assert aot_findings.judged({**plain, "product": "32x32xbf16", "mma": "HMMA"}, LIMIT, "HGMMA") == []
    assert aot_findings.judged({**plain, "product": "32x32xbf16", "mma": ""}, LIMIT, "HGMMA")
    # Of float32 in full precision only AMD has them.
    assert (
        scalar["product"] == "64x64xf32" and scalar["mma"] == "" and toys["gfx942"]["full precision"]["mma"] == "MFMA"
    )
    assert aot_findings.judged(scalar, LIMIT, "HGMMA") == [] and aot_findings.judged(scalar, LIMIT, "MFMA")
    split = toys["sm90"]["split in three"]
    assert split["product"] == "64x64xf32/tf32x3" and aot_findings.judged(split, LIMIT, "HGMMA") == []
    assert aot_findings.judged({**split, "mma": ""}, LIMIT, "HGMMA")


@pytest.mark.parametrize("target", ["sm90", "gfx942"])
def test_narrow_loads_are_found(toys, target):
    narrow = toys[target]["narrow"]
    mma = "HGMMA" if target == "sm90" else "MFMA"
    (finding,) = aot_findings.judged(narrow, LIMIT, mma, wide=0.5)
    assert finding == f"only 0 of {narrow['loads'][1]} loads are of 16 bytes"
    assert aot_findings.judged(narrow, LIMIT, mma) == []


GOOD = {"kernel": "k", "regs": 100, "spill": 0, "smem": 1000, "mma": "HGMMA", "loads": [24, 24], "stores": [8, 8]}


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"regs": 132}, None),
        ({"regs": 133}, "k: registers from 100 to 133"),
        ({"regs": 50, "smem": 2000}, None),
        ({"spill": 32}, None),
        ({"spill": 36}, "k: spilled bytes from 0 to 36"),
        ({"mma": "HMMA"}, "k: matrix instruction from HGMMA to HMMA"),
        ({"mma": ""}, "k: matrix instruction from HGMMA to none"),
        ({"loads": [46, 48]}, None),
        ({"loads": [24, 48]}, "k: loads of 16 bytes from 24/24 to 24/48"),
        ({"stores": [0, 0]}, None),
        ({"stores": [0, 32]}, "k: stores of 16 bytes from 8/8 to 0/32"),
        ({"kernel": "j"}, "launches j, and k in the report"),
    ],
)
def test_what_got_worse_since_the_report_is_found(change, finding):
    assert aot_findings.compared([{**GOOD, **change}], [GOOD]) == ([] if finding is None else [finding])


def test_another_number_of_kernels_is_found_and_gains_are_not():
    assert aot_findings.compared([GOOD, GOOD], [GOOD]) == ["launches k, k, and k in the report"]
    assert aot_findings.compared([GOOD], [{**GOOD, "mma": "", "spill": 8, "loads": [0, 24], "regs": 255}]) == []


def test_a_run_is_held_against_the_report_by_case_and_versions_are_named():
    earlier = {"sm90": {"triton": "3.7.1", "cases": {"a": [GOOD], "b": [GOOD]}}}
    same = {"sm90": {"triton": "3.8.0", "cases": {"a": [GOOD], "b": [GOOD]}}}
    assert aot_findings.against(same, earlier, complete=True) == []
    other = {"sm90": {"triton": "3.8.0", "cases": {"a": [{**GOOD, "mma": ""}], "c": [GOOD]}}}
    versions = "(triton 3.8.0, in the report 3.7.1)"
    found = [
        f"sm90 a: k: matrix instruction from HGMMA to none {versions}",
        f"sm90 c: is not in the report {versions}",
        f"sm90 b: is in the report alone {versions}",
    ]
    assert aot_findings.against(other, earlier, complete=True) == found
    assert aot_findings.against(other, earlier, complete=False) == found[:2]
    assert aot_findings.against({"sm80": same["sm90"]}, earlier, complete=False)


def test_reports_are_written_in_one_order_and_read_again(tmp_path):
    cases = {"b": [GOOD], "a": [GOOD, {**GOOD, "kernel": "sum"}]}
    report = {"sm90": {"triton": "3.7.1", "cases": cases}, "gfx942": {"triton": "3.7.1", "cases": {}}}
    path, again = tmp_path / "report.json", tmp_path / "again.json"
    aot_findings.write(path, report)
    assert aot_findings.read(path) == report
    reordered = {"gfx942": report["gfx942"], "sm90": {"triton": "3.7.1", "cases": dict(reversed(cases.items()))}}
    aot_findings.write(again, reordered)
    assert again.read_text() == path.read_text()
