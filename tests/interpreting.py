"""Triton's interpreter, made to round as a GPU does.

Seen in triton 3.6.0 and 3.7.1: the interpreter holds bfloat16 as the bits of it and multiplies, adds and compares these
bits as integers; its cast to bfloat16 truncates, and its casts lose subnormal numbers; a dot product's
`input_precision` is ignored; minima and maxima propagate NaN, which a GPU's do not. What tests would then show is not
what a GPU computes. Here casts and dot products are replaced by right ones, "tf32" drops the 13 last bits of operands
as the tensor cores do, and every other arithmetic on bfloat16 is an error: kernels are to widen what they load.

What the interpreter cannot show at all: races between programs, which run one after another; resources; false claims
of alignment; reads out of bounds, unless what lies there is poisoned. "tf32x3" is computed in full float32.
"""

import functools

import numpy as np

from secondorder_kernels.policy import interpreting


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Round float32 numbers to the nearest bfloat16, ties to even; NaN is the canonical one."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    nearest = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), np.uint16(0x7FFF), nearest.astype(np.uint16).reshape(x.shape))


def from_bfloat16_bits(bits: np.ndarray) -> np.ndarray:
    """Float32 numbers from the bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def cut_to_tf32(x: np.ndarray) -> np.ndarray:
    """Keep 10 bits of the mantissa, as tensor cores read float32: Triton does not round operands of "tf32"."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).reshape(x.shape)


@functools.cache
def install() -> None:
    """Replace the interpreter's arithmetic for the rest of the process; nothing happens where it does not run."""
    if not interpreting():
        return
    try:
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder as Builder
        from triton.runtime.interpreter import TensorHandle
    except ImportError:
        return
    cast, dot = Builder.cast_impl, Builder.create_dot

    def is_bfloat16(handle):
        return handle.dtype.scalar == tl.bfloat16

    def cast_impl(self, src, dst_type):
        if is_bfloat16(src):
            src = TensorHandle(from_bfloat16_bits(src.data), tl.float32)
            return src if dst_type.scalar == tl.float32 else cast(self, src, dst_type)
        if dst_type.scalar == tl.bfloat16:
            return TensorHandle(bfloat16_bits(src.data.astype(np.float32)), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if is_bfloat16(a):
            a, b = (TensorHandle(from_bfloat16_bits(x.data), tl.float32) for x in (a, b))
        elif a.dtype.scalar == tl.float32 and input_precision.name == "TF32":
            a, b = (TensorHandle(cut_to_tf32(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def refusing_bfloat16(method):
        original = getattr(Builder, method)

        @functools.wraps(original)
        def replacement(self, *args):
            if any(isinstance(arg, TensorHandle) and is_bfloat16(arg) for arg in args):
                raise TypeError(f"the interpreter would do {method} on the bits of bfloat16: widen it to float32 first")
            return original(self, *args)

        return replacement

    for method in ("binary_op", "unary_op", "create_fabs", "create_fma", "create_clampf", "create_rsqrt"):
        setattr(Builder, method, refusing_bfloat16(method))
    Builder.cast_impl, Builder.create_dot = cast_impl, create_dot
    Builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    Builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
