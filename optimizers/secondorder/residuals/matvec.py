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

CHUNK = 64  # rows at a time: as many graphs' worth of memory


class Products:
    """J of a residual vector whose graph is kept: to be used before a parameter changes in place.

    Attributes:
        backend: "matvec".
        reason: Why not "expand"; empty if it was asked for.
        residual: r `(N,)`, without its graph.
    """

    backend = "matvec"

    def __init__(self, vector: Tensor, params: Sequence[Tensor], reason: str = "", chunk: int | None = None) -> None:
        self.residual, self.reason = vector.detach(), reason
        self._vector, self._params = vector, list(params)
        self._live = [i for i, p in enumerate(self._params) if p.requires_grad]
        self._chunk = chunk or CHUNK
        self._transposed: tuple[Tensor, list[Tensor | None]] | None = None
        self._gradient: list[Tensor] | None = None

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

    def kernel(self, dtype: torch.dtype | None = None) -> Tensor:
        """K = J Jᵀ `(N, N)` as J (Jᵀ e_i), in the network's dtype, with `chunk` rows of J in memory; 2 N passes."""
        K = self.residual.new_empty(len(self.residual), len(self.residual))
        for at, rows in self._row_chunks():
            K[at : at + len(rows[0])] = self._forward(rows, batched=True)
        return K.to(dtype or K.dtype)

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
        chunks = [torch.cat([part.reshape(len(part), -1) for part in rows], 1) for _, rows in self._row_chunks()]
        return torch.cat(chunks).to(dtype or self.residual.dtype)

    def _row_chunks(self) -> Iterator[tuple[int, list[Tensor]]]:
        """First row, and some rows of J by parameter `(c, *p.shape)`."""
        N = len(self.residual)
        for at in range(0, N, self._chunk):
            units = torch.eye(N, dtype=self.residual.dtype, device=self.residual.device)[at : at + self._chunk]
            yield at, self._backward(units, batched=True)

    def _backward(self, u: Tensor, batched: bool = False) -> list[Tensor]:
        """Jᵀ u, or `(c, *p.shape)` of u `(c, N)`."""
        shape = u.shape[:-1] if batched else ()
        products = [u.new_zeros((*shape, *p.shape), dtype=p.dtype) for p in self._params]
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
                found = torch.autograd.grad(self._vector, live, u, create_graph=True, allow_unused=True)
            self._transposed = u, list(found)
        u, products = self._transposed
        used = [(g, v[i]) for i, g in zip(self._live, products, strict=True) if g is not None]
        if not used:
            return self.residual.new_zeros((*(v[0].shape[:1] if batched else ()), len(u)))
        return torch.autograd.grad(
            [g for g, _ in used], [u], [part for _, part in used], retain_graph=True, is_grads_batched=batched
        )[0]
