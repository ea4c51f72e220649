"""Small kernels, most of them with one fault: what the checker has to find. Prints their numbers, by target and name.

python tests/kernels/aot_toys.py sm90 gfx942
"""

import dataclasses
import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from aot_compile import assembled, compiling  # noqa: E402


@triton.jit
def product(A, B, C, k, stride, SIDE: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    i, p = tl.arange(0, SIDE), tl.arange(0, K)
    sums = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(0, k, K):
        a = tl.load(A + i[:, None] * stride + start + p[None, :])
        b = tl.load(B + i[:, None] * stride + start + p[None, :])
        sums = tl.dot(a, b.T, sums, input_precision=PRECISION)
    tl.store(C + i[:, None] * SIDE + i[None, :], sums)


TOYS = {
    "plain": (torch.bfloat16, "ieee", 1024, 64),
    "full precision": (torch.float32, "ieee", 1024, 64),
    "split in three": (torch.float32, "tf32x3", 1024, 64),
    "narrow": (torch.bfloat16, "ieee", 1023, 64),
    "too large": (torch.bfloat16, "ieee", 1024, 256),
}


def multiply(dtype, precision, stride, side):
    A, B = (torch.empty(side * stride, dtype=dtype, device="meta") for _ in range(2))
    C = torch.empty(side, side, device="meta")
    product[(1,)](A, B, C, 1024, stride, SIDE=side, K=64, PRECISION=precision, num_warps=4, num_stages=3)


if __name__ == "__main__":
    found = {}
    for target in sys.argv[1:]:
        for name, toy in TOYS.items():
            if target == "gfx942" and toy[1] == "tf32x3":
                continue  # not known there
            with compiling(target) as kernels:
                multiply(*toy)
            found.setdefault(target, {})[name] = dataclasses.asdict(assembled(kernels[0], target))
    print(json.dumps(found))
