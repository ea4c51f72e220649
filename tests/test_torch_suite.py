"""torch's own optimizer tests on all our classes, where a copy of upstream's files is given by `--torch-tests PATH`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cases

HERE = Path(__file__).parent


def test_upstream_tests_pass_on_all_our_classes(request):
    folder = request.config.getoption("--torch-tests")
    if folder is None:
        pytest.skip("needs torch's test_optim.py, which is not in its wheel: --torch-tests PATH")
    folder = Path(folder).resolve()
    assert (folder / "test_optim.py").is_file(), f"{folder} has no test_optim.py"
    command = [sys.executable, "-m", "pytest", "-q", "-ra"]
    command += ["-p", "torch_suite", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={folder}"]
    command += ["-k", "TestOptimRenewed", str(folder / "test_optim.py")]
    paths = [str(HERE), *sys.path, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    report = run.stdout[-8000:] + run.stderr[-2000:]
    assert run.returncode == 0, report
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 15 * len(cases.OPTIMIZERS), report
