"""Triangular Toeplitz matrices: `L_ij = c_(i-j)` for `i >= j`, or `L^T`; storage the coefficients `c (d,)`.

They are polynomials in the shift, `L = Σ_j c_j Z^j`: they commute, `L x` is the convolution of c and x cut off after d
terms, `L^T x` their correlation, and `c_j` of `Π(M)` is `2 - δ_j0` times the mean of the j-th diagonal of M. The sums
of these diagonals are correlations too:

    M = X X^T              Σ_i x_i x_(i+j), summed over columns
    M = L^T L or L L^T     Σ_u c_u (d - (u + j)) c_(u+j)

All by FFT, with zeros up to 2d - 1 terms or more, so that nothing wraps around: O(d log d) per column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from secondorder.preconditioner.structures.protocol import Structure, accumulator


@dataclass(frozen=True)
class Toeplitz(Structure):
    """Triangular Toeplitz matrices. Half precision is computed in float32, for want of an FFT.

    Attributes:
        upper: Upper triangular, instead of lower.
    """

    upper: bool = False

    def shape(self, d: int) -> tuple[int, ...]:
        """See `Structure`."""
        return (d,)

    def eye(self, d: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """See `Structure`."""
        one = torch.zeros(d, dtype=dtype, device=device)
        one[:1] = 1
        return one

    def apply(self, K: Tensor, X: Tensor) -> Tensor:
        """See `Structure`."""
        return self._multiply(K, X, self.upper)

    def apply_t(self, K: Tensor, X: Tensor) -> Tensor:
        """See `Structure`."""
        return self._multiply(K, X, not self.upper)

    def project(self, M: Tensor) -> Tensor:
        """See `Structure`."""
        n, d = M.shape[:2]
        # Read with d + 1 entries a line, the upper triangle has its j-th diagonal in column j.
        diagonals = F.pad(M.triu().flatten(1), (0, d)).view(n, d, d + 1)[:, :, :d]
        return _coefficients(diagonals.sum(1, dtype=accumulator(M))).to(M.dtype)

    def project_gram(self, X: Tensor) -> Tensor:
        """See `Structure`."""
        spectrum = _spectrum(X.mT)
        power = (spectrum.real.square() + spectrum.imag.square()).sum(1)
        return _coefficients(_sequence(power, X.shape[1])).to(X.dtype)

    def self_gram(self, K: Tensor) -> Tensor:
        """See `Structure`."""
        d = K.shape[1]
        counts = torch.arange(d, 0, -1, dtype=accumulator(K), device=K.device)
        correlation = _spectrum(K).conj() * _spectrum(counts * K)
        return _coefficients(_sequence(correlation, d)).to(K.dtype)

    def product(self, K: Tensor, m: Tensor) -> Tensor:
        """See `Structure`."""
        return _sequence(_spectrum(K) * _spectrum(m), K.shape[1]).to(K.dtype)

    def average_trace(self, K: Tensor) -> Tensor:
        """The first coefficient."""
        return K[:, 0].to(accumulator(K))

    def to_dense(self, K: Tensor) -> Tensor:
        """See `Structure`."""
        steps = torch.arange(K.shape[1], device=K.device)
        lag = steps[:, None] - steps
        lower = K[:, lag.clamp_min(0)].tril()
        return lower.mT if self.upper else lower

    def frobenius(self, K: Tensor) -> Tensor:
        """Every coefficient as often as it occurs, d - j times."""
        counts = torch.arange(K.shape[1], 0, -1, dtype=accumulator(K), device=K.device)
        return torch.linalg.vector_norm(counts.sqrt() * K, dim=1)

    def spectral_bound(self, K: Tensor) -> Tensor:
        """The sum of the absolute coefficients, of which a row or a column has at most one each."""
        return K.abs().sum(1, dtype=accumulator(K))

    def _multiply(self, K: Tensor, X: Tensor, correlate: bool) -> Tensor:
        filters = _spectrum(K)
        columns = _spectrum(X.mT).mul_((filters.conj() if correlate else filters).unsqueeze(1))
        return _sequence(columns, X.shape[1]).mT.to(X.dtype)


def _length(d: int) -> int:
    """A quick FFT length of at least `2d - 1`: a power of two, or one times a small odd number."""
    return min(odd << (-(-(2 * d - 1) // odd) - 1).bit_length() for odd in (1, 3, 5, 9, 15))


def _spectrum(x: Tensor) -> Tensor:
    x, length = x.to(accumulator(x)), _length(x.shape[-1])
    if not x.numel():  # refused by some FFT libraries
        return x.new_zeros(*x.shape[:-1], length // 2 + 1, dtype=x.dtype.to_complex())
    return torch.fft.rfft(x, length)


def _sequence(spectrum: Tensor, d: int) -> Tensor:
    """The first `d` terms."""
    if not spectrum.numel():
        return spectrum.new_zeros(*spectrum.shape[:-1], d, dtype=spectrum.dtype.to_real())
    return torch.fft.irfft(spectrum, _length(d))[..., :d]


def _coefficients(sums: Tensor) -> Tensor:
    """From the sums of the diagonals `(n, d)`: means, those off the main diagonal twice."""
    d = sums.shape[1]
    weights = 2 / torch.arange(d, 0, -1, dtype=sums.dtype, device=sums.device)
    weights[:1] /= 2
    return weights * sums
