"""Kernels below this folder round as on a GPU, even if they are interpreted."""

import sys
from pathlib import Path

import interpreting

interpreting.install()

# For `aot_findings.py`: where Hugging Face's `kernels` is installed, it could not be imported as a part of this folder.
sys.path.append(str(Path(__file__).parent))
