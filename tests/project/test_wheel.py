"""The built wheel holds the two packages, works from another folder, and nothing else comes with it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# slow: pip builds in an environment of its own and fetches the build backend
pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT), cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_two_typed_packages_and_the_licence_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"secondorder", "secondorder_kernels"}
    assert {"secondorder/py.typed", "secondorder_kernels/py.typed"} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    sources = {
        str(path.relative_to(root)) for root in (ROOT / "optimizers", ROOT / "kernels") for path in root.rglob("*.py")
    }
    assert sources <= set(names)


def test_wheel_is_imported_and_checks_itself_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site))
    run(*pip, str(wheel), cwd=tmp_path)
    # The target comes first on the path, before an editable install of the clone.
    where = "import secondorder, secondorder_kernels; print(secondorder.__file__, secondorder_kernels.__file__)"
    files = run(sys.executable, "-c", where, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert [Path(file).is_relative_to(site) for file in files] == [True, True]
    report = run(sys.executable, "-m", "secondorder", cwd=tmp_path, PYTHONPATH=str(site))
    assert "self-check" in report
