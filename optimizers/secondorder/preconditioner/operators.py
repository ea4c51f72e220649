"""Curvatures and preconditioners as linear operators that one can look at and compute with.

    op = Σ_b  P_bᵀ V_b diag(s_b) V_bᵀ P_b,      V_b = Q_1 ⊗ Q_2 ⊗ …

The parameter, viewed as a tensor of a few modes, is cut into blocks b; P_b picks the entries of a block, Q_i is the
orthogonal basis of its mode i (absent: the identity) and s_b the spectrum: one eigenvalue per entry of the block, in
the coordinates of the bases. As blocks do not overlap, every function of the operator is that function of s_b.

Vectors are flattened parameters (row-major, as by `p.reshape(-1)`), N entries long.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator  # type: ignore[import-untyped,import-not-found,unused-ignore]


@dataclasses.dataclass(frozen=True, eq=False)
class EigenBlock:
    """The operator on one block: V diag(spectrum) Vᵀ.

    Attributes:
        slices: Where the block lies in the viewed parameter, one slice per mode.
        bases: Orthogonal eigenvectors, as columns, of the modes that have them: mode → `(d_mode, d_mode)`.
        spectrum: Eigenvalues, of the block's shape.
    """

    slices: tuple[slice, ...]
    bases: Mapping[int, Tensor]
    spectrum: Tensor


class KroneckerOperator:
    """Symmetric positive semidefinite linear operator on the space of one parameter.

    It owns copies of everything it was made from, so it stays what it is when training goes on. It computes in its own
    dtype, to which it converts what it is applied to.

    Args:
        shape: Shape of the parameter.
        view: Shape as which the parameter is viewed (`p.reshape(view)`) before it is cut into blocks.
        blocks: Blocks that cover the view without overlap; all tensors of one floating dtype, on one device.

    Raises:
        ValueError: If shapes do not fit together, or if blocks overlap or leave a gap.
    """

    def __init__(self, shape: Sequence[int], view: Sequence[int], blocks: Sequence[EigenBlock]) -> None:
        self._parameter_shape, self._view = tuple(shape), tuple(view)
        size = math.prod(self._parameter_shape)
        if math.prod(self._view) != size:
            raise ValueError(f"a parameter of shape {self._parameter_shape} cannot be viewed as {self._view}")
        for block in blocks:
            _check(block, self._view)
        _check_cover(blocks, self._view)
        tensors = [tensor for block in blocks for tensor in (block.spectrum, *block.bases.values())]
        kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
        if len(kinds) != 1 or not tensors[0].is_floating_point():
            raise ValueError(f"blocks must be of one floating dtype and on one device, got {kinds}")
        self._blocks = tuple(
            EigenBlock(
                slices=tuple(block.slices),
                bases={mode: _copy(basis) for mode, basis in block.bases.items()},
                spectrum=_copy(block.spectrum),
            )
            for block in blocks
        )
        self.shape = (size, size)
        self.dtype = tensors[0].dtype
        self.device = tensors[0].device

    def __repr__(self) -> str:
        blocks = f"{len(self._blocks)} block{'s' if len(self._blocks) > 1 else ''}"
        return f"{type(self).__name__}(shape={self.shape}, parameter={self._parameter_shape}, {blocks}, {self.dtype})"

    def __matmul__(self, x: Tensor) -> Tensor:
        """Apply the operator.

        Args:
            x: A tensor of the parameter's shape, a vector `(N,)`, or the columns of a matrix `(N, k)`.

        Returns:
            The product, of the shape of `x` and the operator's dtype.

        Raises:
            ValueError: If `x` has another shape.
        """
        return self._map(x, lambda block: block.spectrum)

    def solve(self, x: Tensor) -> Tensor:
        """Apply the inverse.

        Args:
            x: A tensor of the parameter's shape, a vector `(N,)`, or the columns of a matrix `(N, k)`.

        Returns:
            The solution, of the shape of `x` and the operator's dtype.

        Raises:
            ValueError: If `x` has another shape.
            LinAlgError: If an eigenvalue is not positive.
        """
        self._require_positive("solve")
        return self._map(x, lambda block: 1 / block.spectrum)

    def power(self, exponent: float) -> KroneckerOperator:
        """Raise the operator to a power: -1 is the inverse, 0.5 the symmetric square root.

        Args:
            exponent: Any real number.

        Returns:
            A new operator.

        Raises:
            LinAlgError: If the power does not exist: for a negative exponent all eigenvalues must be positive, for a
                fractional one they must not be negative.
        """
        if exponent < 0:
            self._require_positive(f"power({exponent})")
        elif exponent != int(exponent):
            self._require(lambda s: s >= 0, "not negative", f"power({exponent})")
        result = copy.copy(self)
        result._blocks = tuple(
            dataclasses.replace(block, spectrum=block.spectrum.pow(exponent)) for block in self._blocks
        )
        return result

    def inv(self, damping: float = 0.0) -> KroneckerOperator:
        """Invert the operator `C`, or `C + damping I`.

        Args:
            damping: What is added to every eigenvalue.

        Returns:
            A new operator, `(C + damping I)⁻¹`.

        Raises:
            ValueError: If `damping` is negative or not finite.
            LinAlgError: If an eigenvalue of `C + damping I` is not positive.
        """
        if not 0 <= damping < math.inf:
            raise ValueError(f"damping must be a finite number >= 0, got {damping}")
        damped = copy.copy(self)
        damped._blocks = tuple(dataclasses.replace(block, spectrum=block.spectrum + damping) for block in self._blocks)
        damped._require_positive(f"inv(damping={damping})")
        return damped.power(-1)

    def logdet(self) -> Tensor:
        """Return the logarithm of the determinant, a scalar tensor.

        Raises:
            LinAlgError: If an eigenvalue is not positive.
        """
        self._require_positive("logdet")
        return torch.stack([block.spectrum.log().sum() for block in self._blocks]).sum()

    def trace(self) -> Tensor:
        """Return the trace, a scalar tensor."""
        return torch.stack([block.spectrum.sum() for block in self._blocks]).sum()

    def diag(self) -> Tensor:
        """Return the diagonal, in the parameter's shape."""
        result = torch.empty(self._view, dtype=self.dtype, device=self.device)
        for block in self._blocks:
            # (V diag(s) Vᵀ)_jj = Σ_l V_jl² s_l, and squares of a Kronecker product are the product of the squares.
            diagonal = block.spectrum
            for mode, basis in block.bases.items():
                diagonal = _multiply(basis.square(), diagonal, mode)
            result[block.slices] = diagonal
        return result.reshape(self._parameter_shape)

    def eigenvalues(self) -> Tensor:
        """Return all N eigenvalues, in descending order."""
        return torch.cat([block.spectrum.reshape(-1) for block in self._blocks]).sort(descending=True).values

    def eigvalsh(self) -> Tensor:
        """Return all N eigenvalues, in ascending order as `torch.linalg.eigvalsh` of the matrix does."""
        return self.eigenvalues().flip(0)

    def frobenius(self) -> Tensor:
        """Return the Frobenius norm, a scalar tensor."""
        norms = torch.stack([torch.linalg.vector_norm(block.spectrum) for block in self._blocks])
        return torch.linalg.vector_norm(norms)

    def condition(self) -> Tensor:
        """Return the largest over the smallest eigenvalue, a scalar tensor; infinite where that is not positive."""
        eigenvalues = self.eigenvalues()
        largest, smallest = eigenvalues[0], eigenvalues[-1]
        return torch.where(smallest > 0, largest / smallest, torch.inf)

    def to_dense(self) -> Tensor:
        """Return the matrix `(N, N)`."""
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def to_scipy(self) -> LinearOperator:
        """Return the operator for SciPy's iterative solvers, as a `scipy.sparse.linalg.LinearOperator`.

        Raises:
            ImportError: If SciPy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise ImportError("to_scipy() needs SciPy, which is not installed: pip install scipy") from error

        def multiply(x):  # type: ignore[no-untyped-def]
            return (self @ torch.as_tensor(x, dtype=self.dtype, device=self.device)).cpu().numpy()

        dtype = torch.empty((), dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=multiply, rmatvec=multiply, matmat=multiply, dtype=dtype)

    def _map(self, x: Tensor, spectrum: Callable[[EigenBlock], Tensor]) -> Tensor:
        """Apply the operator that has another spectrum on each block."""
        size = self.shape[0]
        if x.shape != self._parameter_shape and x.shape != (size,) and not (x.ndim == 2 and x.shape[0] == size):
            raise ValueError(
                f"an operator of shape {self.shape} on a parameter of shape {self._parameter_shape} cannot be applied "
                f"to a tensor of shape {tuple(x.shape)}; it takes {self._parameter_shape}, ({size},) or ({size}, k)"
            )
        # k vectors are k entries of one more mode; every block leaves it alone.
        columns = x.shape[1] if x.ndim == 2 and x.shape != self._parameter_shape else 1
        X = x.to(self.dtype).reshape(*self._view, columns)
        result = torch.empty_like(X)
        for block in self._blocks:
            part = X[block.slices]
            for mode, basis in block.bases.items():
                part = _multiply(basis.mT, part, mode)
            part = part * spectrum(block)[..., None]
            for mode, basis in block.bases.items():
                part = _multiply(basis, part, mode)
            result[block.slices] = part
        return result.reshape(x.shape)

    def _require_positive(self, operation: str) -> None:
        self._require(lambda s: s > 0, "positive", operation)

    def _require(self, holds: Callable[[Tensor], Tensor], what: str, operation: str) -> None:
        failing = sum(int((~holds(block.spectrum)).sum()) for block in self._blocks)
        if failing:
            raise torch.linalg.LinAlgError(
                f"{operation} needs eigenvalues that are {what}; {failing} of {self.shape[0]} are not"
            )


def _check(block: EigenBlock, view: tuple[int, ...]) -> None:
    if len(block.slices) != len(view):
        raise ValueError(f"a block of the view {view} needs {len(view)} slices, got {block.slices}")
    shape = tuple(len(range(*cut.indices(size))) for cut, size in zip(block.slices, view, strict=True))
    if block.spectrum.shape != shape:
        raise ValueError(
            f"the spectrum of the block {block.slices} of the view {view} must have shape {shape}, "
            f"got {tuple(block.spectrum.shape)}"
        )
    for mode, basis in block.bases.items():
        if not 0 <= mode < len(shape):
            raise ValueError(f"a block of shape {shape} has no mode {mode}")
        if basis.shape != (shape[mode], shape[mode]):
            raise ValueError(
                f"the basis of mode {mode} of a block of shape {shape} must have shape {(shape[mode],) * 2}, "
                f"got {tuple(basis.shape)}"
            )


def _check_cover(blocks: Sequence[EigenBlock], view: tuple[int, ...]) -> None:
    times = torch.zeros(view, dtype=torch.uint8)
    for block in blocks:
        times[block.slices] += 1
    if not (times == 1).all():
        raise ValueError(f"blocks must cover every entry of the view {view} once, got {[b.slices for b in blocks]}")


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _multiply(A: Tensor, X: Tensor, mode: int) -> Tensor:
    """Multiply every vector of X along `mode` by the matrix A."""
    return torch.tensordot(A, X, dims=([1], [mode])).movedim(0, mode)
