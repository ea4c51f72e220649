"""Compile kernels for a GPU that is not there, and read what the assembler made of them.

A stand-in for Triton's driver names the target, and a launch compiles and does no more. So the ordinary launchers can
be called with `device="meta"` tensors, and what is compiled is what a GPU would run: with strides of 1 made constants,
divisibility by 16, and addresses that are taken to be aligned. All tools come in Triton's wheel.
"""

import collections
import contextlib
import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_KIB = 1024
# What a program may have of shared memory, on the smallest device that takes the family's table: sm80's serves
# compute capabilities 8.6, 8.9 and 12.0, too.
TARGETS = {
    "sm80": (GPUTarget("cuda", 80, 32), 99 * _KIB),
    "sm90": (GPUTarget("cuda", 90, 32), 227 * _KIB),
    "sm100": (GPUTarget("cuda", 100, 32), 227 * _KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * _KIB),
}
_MATRIX_INSTRUCTIONS = ("UTCHMMA", "HGMMA", "HMMA")
# What a family's products are to use; those of float32 in full precision have none but on AMD.
WANTED = {"sm80": "HMMA", "sm90": "HGMMA", "sm100": "UTCHMMA", "gfx942": "MFMA"}


@dataclasses.dataclass(frozen=True)
class Assembled:
    """What was made of one kernel.

    Attributes:
        kernel: Its name.
        regs: Registers of a thread.
        spill: Bytes of registers that are stored to local memory and loaded again, counted in the code.
        smem: Bytes of shared memory of a program.
        product: Its matrix product, as "64x64xbf16" or "64x32xf32/tf32x3" (tile, operands, precision); "" for none.
        mma: The matrix instruction that it uses; "" for none.
        loads: Loads from global memory: how many are of 16 bytes, and how many there are.
        stores: The same of stores.
    """

    kernel: str
    regs: int
    spill: int
    smem: int
    product: str
    mma: str
    loads: tuple[int, int]
    stores: tuple[int, int]


class _StandIn:
    """The part of a driver that compiling needs."""

    def __init__(self, name):
        self._target = TARGETS[name][0]
        self._device = 1000 + list(TARGETS).index(name)  # compiled kernels are remembered by device

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return self._device

    def get_current_stream(self, device=None):
        return 0


@contextlib.contextmanager
def standing_in(name, launch):
    """Stand in for the target `name`, and call `launch(kernel, *args, grid=…, **options)` instead of launching."""

    def run(kernel, *args, grid, warmup=False, **options):
        return launch(kernel, *args, grid=grid, **options)

    # PyTorch tells of AMD's compiler by its own version.
    hip = "stand-in" if TARGETS[name][0].backend == "hip" else None
    with mock.patch.object(torch.version, "hip", hip), mock.patch.object(JITFunction, "run", run):
        driver.set_active(_StandIn(name))
        yield


@contextlib.contextmanager
def compiling(name):
    """Compile for the target `name` what is launched: yields a list, to which every compiled kernel is added."""
    kernels, run = [], JITFunction.run

    def launch(kernel, *args, **options):
        kernels.append(run(kernel, *args, warmup=True, **options))

    with standing_in(name, launch):
        yield kernels


def assembled(kernel, name):
    """Read a compiled kernel."""
    read = _of_amd if TARGETS[name][0].backend == "hip" else _of_nvidia
    return Assembled(kernel.name, smem=kernel.metadata.shared, product=_product(kernel.asm["ttir"]), **read(kernel.asm))


def _product(ttir):
    pattern = r"tt\.dot .*?(?:inputPrecision = (\w+))? : tensor<\d+x\d+x(\w+)>.* -> tensor<(\d+x\d+)x\w+>"
    found = {
        f"{tile}x{operands}{precision and '/' + precision}" for precision, operands, tile in re.findall(pattern, ttir)
    }
    return " ".join(sorted(found))


def _of_nvidia(asm):
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "cubin"
        cubin.write_bytes(asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
        code = _output(knobs.nvidia.nvdisasm.path, "-c", cubin)
    words = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)
    counts = collections.Counter(tuple(word.split(".")) for word in words)

    def number(*names):
        wide = sum(n for parts, n in counts.items() if parts[0] in names and _nvidia_bytes(parts) >= 16)
        return wide, sum(n for parts, n in counts.items() if parts[0] in names)

    # Copies of whole tiles by their descriptor count as wide.
    tiles, whole = sum(number("UTMALDG")), sum(number("UTMASTG"))
    wide, loads = number("LDG", "LDGSTS")
    wide_stores, stores = number("STG")
    return {
        "regs": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spill": sum(n * _nvidia_bytes(parts) for parts, n in counts.items() if parts[0] in ("LDL", "STL")),
        "mma": next((mma for mma in _MATRIX_INSTRUCTIONS if any(parts[0] == mma for parts in counts)), ""),
        "loads": (wide + tiles, loads + tiles),
        "stores": (wide_stores + whole, stores + whole),
    }


def _nvidia_bytes(parts):
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((sizes[part] for part in parts[1:] if part in sizes), 4)


def _of_amd(asm):
    code = asm["amdgcn"]
    counts = collections.Counter(re.findall(r"^\s+([a-z]\w+)", code, re.MULTILINE))

    def number(*names):
        of = {op: n for op, n in counts.items() if op.startswith(names)}
        return sum(n for op, n in of.items() if op.endswith("dwordx4")), sum(of.values())

    def metadata(key):
        return int(re.search(rf"\.{key}:\s+(\d+)", code).group(1))

    return {
        "regs": metadata("vgpr_count"),
        "spill": 4 * metadata("vgpr_spill_count"),
        "mma": "MFMA" if any(op.startswith(("v_mfma", "v_smfmac")) for op in counts) else "",
        "loads": number("global_load", "buffer_load"),
        "stores": number("global_store", "buffer_store"),
    }


def _output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
