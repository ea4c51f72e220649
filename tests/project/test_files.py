"""The shape of the repository: short files, a fixed root, pinned dependencies."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("optimizers", "kernels", "tests", "recipes")
MAX_LINES = 500
ROOT_ENTRIES = {
    "pyproject.toml",
    "optimizers",
    "kernels",
    "tests",
    "recipes",
    "configs",
    "README.md",
    "CHANGELOG.md",
    "ARCHITECTURE.md",
    "LICENSE",
    "constraints.txt",
}


def test_no_python_file_is_long() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_import_roots_are_not_packages() -> None:
    # With an __init__.py the folder `kernels` would hide Hugging Face's package of that name.
    assert not [folder for folder in ("optimizers", "kernels") if (ROOT / folder / "__init__.py").exists()]


def test_packages_are_typed() -> None:
    assert (ROOT / "optimizers/secondorder/py.typed").exists()
    assert (ROOT / "kernels/secondorder_kernels/py.typed").exists()


@pytest.mark.skipif(shutil.which("git") is None, reason="git lists what belongs to the repository")
def test_root_holds_the_agreed_entries_only() -> None:
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip(f"an unpacked archive has no list of its files: {listing.stderr.strip()}")
    present = {line.split("/")[0] for line in listing.stdout.splitlines()}
    assert {name for name in present if not name.startswith(".")} == ROOT_ENTRIES


def test_every_direct_dependency_is_pinned() -> None:
    # Read as text: tomllib is in the standard library from Python 3.11 on only.
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:dependencies|recipes|integrations|dev) = \[(.*?)\]$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(lists) == 4
    wanted = {name.lower() for part in lists for name in re.findall(r'"([A-Za-z][\w-]*)', part)}
    pins = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert wanted == {name.lower() for name in pins}
