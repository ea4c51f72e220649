"""Back-end "matvec": products with the Jacobian of any residual, by reverse-mode autograd over its graph.

    Jᵀ u                     one backward pass
    J v = d/du <Jᵀ u, v>     two: Jᵀ u is linear in u, so its graph serves all v

Rows and kernels are vector-Jacobian products with unit vectors, `chunk` of them at a time. A row costs a gradient of
the whole batch, so all N of them are quadratic in N.

J v by two backward passes: Townsend, *A new trick for calculating Jacobian vector products* (2017).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from secondorder import linalg

CHUNK = 64  # rows at a time: as many graphs' worth of memory
PROBES = 16  # of an estimated trace, whose relative error is at most √(2 / 16)


class Products:
    """J of a residual vector whose graph is kept: to be used before a parameter changes in place.

    An empty vector, of samples that are all on other processes, needs no graph.

    Attributes:
        backend: "matvec".
        reason: Why not "expand"; empty if it was asked for.
        residual: r `(N,)`, without its graph.
        groups: Numbers of parameters that are one layer: unknown here, so every parameter for itself.
    """

    backend = "matvec"

    def __init__(self, vector: Tensor, params: Sequence[Tensor], reason: str = "", chunk: int | None = None) -> None:
        self.residual, self.reason = vector.detach(), reason
        self._vector, self._params = vector, list(params)
        self.groups = [[i] for i in range(len(self._params))]
        self._live = [i for i, p in enumerate(self._params) if p.requires_grad and len(vector)]
        self._chunk = chunk or CHUNK
        self._transposed: tuple[Tensor, list[Tensor | None]] | None = None
        self._gradient: list[Tensor] | None = None

    @property
    def recorded(self) -> Products:
        """Itself."""
        return self

    @property
    def loss(self) -> Tensor:
        """½ |r|², 0-dim."""
        return self.residual.square().sum() / 2

    @property
    def gradient(self) -> list[Tensor]:
        """Jᵀ r, shaped like the parameters; computed once."""
        if self._gradient is None:
            self._gradient = self.vjp(self.residual)
        return self._gradient

    def vjp(self, u: Tensor) -> list[Tensor]:
        """Jᵀ u of u `(N,)`, shaped like the parameters."""
        return self._backward(u.to(self.residual.dtype))

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        """J v `(N,)` of v shaped like the parameters."""
        return self._forward([part.to(p.dtype) for part, p in zip(v, self._params, strict=True)])

    def vjps(self, u: Tensor) -> list[Tensor]:
        """Jᵀ u of several u `(c, N)`, by parameter `(c, *p.shape)`; their graphs' worth of memory at once."""
        return self._backward(u.to(self.residual.dtype), batched=True)

    def jvps(self, v: Sequence[Tensor]) -> Tensor:
        """J v `(c, N)` of several v, by parameter `(c, *p.shape)`; their graphs' worth of memory at once."""
        return self._forward([part.to(p.dtype) for part, p in zip(v, self._params, strict=True)], batched=True)

    def kernel(self, dtype: torch.dtype | None = None) -> Tensor:
        """K = J Jᵀ `(N, N)` as J (Jᵀ e_i), in the network's dtype, with `chunk` rows of J in memory; 2 N passes."""
        K = self.residual.new_empty(len(self.residual), len(self.residual))
        for at, rows in self._row_chunks():
            K[at : at + len(rows[0])] = self.jvps(rows)
        return K.to(dtype or K.dtype)

    def trace(self) -> Tensor:
        """The trace of K, estimated by |Jᵀ u|² of the same `PROBES` vectors of random signs; in float64."""
        generator = torch.Generator().manual_seed(0)
        u = torch.randint(0, 2, (PROBES, len(self.residual)), generator=generator).mul(2).sub(1).to(self.residual)
        parts = self.vjps(u)
        return sum((linalg.wide(part).square().sum() for part in parts), linalg.wide(u.new_zeros(()))) / PROBES

    def apply_kernel(self, X: Tensor) -> Tensor:
        """K X `(N, k)` of X `(N, k)`, in the dtype of X, by 2 k passes in the network's."""
        return torch.cat([self.jvps(self.vjps(columns)) for columns in X.mT.split(self._chunk)]).mT.to(X.dtype)

    def restricted(self, params: Sequence[int]) -> Products:
        """J of some parameters, by their numbers."""
        return Products(self._vector, [self._params[i] for i in params], self.reason, self._chunk)

    def normal(self, dtype: torch.dtype | None = None) -> Tensor:
        """G = Jᵀ J `(D, D)`, with `chunk` rows of J in memory; N backward passes."""
        D = sum(p.numel() for p in self._params)
        G = self.residual.new_zeros(D, D, dtype=dtype)
        for _, rows in self._row_chunks():
            J = torch.cat([part.reshape(len(part), -1) for part in rows], 1).to(G.dtype)
            G.addmm_(J.mT, J)
        return G

    def rows(self, dtype: torch.dtype | None = None) -> Tensor:
        """J `(N, D)`, parameters in their order, each flattened; N backward passes."""
        J = self.residual.new_zeros(len(self.residual), sum(p.numel() for p in self._params), dtype=dtype)
        for at, rows in self._row_chunks():
            J[at : at + len(rows[0])] = torch.cat([part.reshape(len(part), -1) for part in rows], 1)
        return J

    def _row_chunks(self) -> Iterator[tuple[int, list[Tensor]]]:
        """First row, and some rows of J by parameter `(c, *p.shape)`."""
        N = len(self.residual)
        for at in range(0, N, self._chunk):
            units = torch.eye(N, dtype=self.residual.dtype, device=self.residual.device)[at : at + self._chunk]
            yield at, self.vjps(units)

    def _backward(self, u: Tensor, batched: bool = False) -> list[Tensor]:
        """Jᵀ u, or `(c, *p.shape)` of u `(c, N)`."""
        shape = u.shape[:-1] if batched else ()
        products = [u.new_zeros((*shape, *p.shape), dtype=p.dtype) for p in self._params]
        if not self._live:
            return products
        found = torch.autograd.grad(
            self._vector,
            [self._params[i] for i in self._live],
            u,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
        for i, product in zip(self._live, found, strict=True):
            if product is not None:
                products[i] = product
        return products

    def _forward(self, v: Sequence[Tensor], batched: bool = False) -> Tensor:
        """J v, or `(c, N)` of v `(c, *p.shape)`."""
        if self._transposed is None:
            u = torch.zeros_like(self.residual, requires_grad=True)
            with torch.enable_grad():
                live = [self._params[i] for i in self._live]
                found = torch.autograd.grad(self._vector, live, u, create_graph=True, allow_unused=True) if live else ()
            self._transposed = u, list(found)
        u, products = self._transposed
        used = [(g, v[i]) for i, g in zip(self._live, products, strict=True) if g is not None]
        if not used:
            return self.residual.new_zeros((*(v[0].shape[:1] if batched else ()), len(u)))
        return torch.autograd.grad(
            [g for g, _ in used], [u], [part for _, part in used], retain_graph=True, is_grads_batched=batched
        )[0]
