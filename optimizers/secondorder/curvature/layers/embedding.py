"""Embedding: a linear layer on one-hot rows, whose input factor is a vector of counts.

    z_{ns} = W a_{ns},   a_{ns} = e_{id(n,s)},   W = `weight`ᵀ (d x V), so that the block is `weight.grad`ᵀ

    expand:  A = Σ_{n,s} a aᵀ = diag(how often each token occurs)                        exactly diagonal
    reduce:  A = Σ_n ā āᵀ,  ā_n = mean over the positions = histogram of sample n        its diagonal: Σ_n ā_n²

Off the diagonal the reduce form counts which tokens meet in a sample; that V x V matrix is left out. Tokens equal to
`padding_idx` get no gradient: their rows are left out of every sum and average.
Source: Martens and Grosse 2015 (arXiv:1503.05671) on one-hot inputs; reduce: Eschenhagen et al. 2023
(arXiv:2311.00636).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secondorder.curvature.layers.protocol import Unbound


@dataclass(frozen=True)
class EmbeddingRule(Unbound):
    """The normal form of one embedding, with counts in place of inputs; made by `embedding_rule`. See `LayerRule`.

    Index tensors have shape `(n, *s)`: axis 0 is the sample axis; a single index is one sample.

    Attributes:
        d_in: V, the number of tokens.
        d_out: d, the size of an embedding.
        padding_idx: The token without gradient, or None.
    """

    d_in: int
    d_out: int
    padding_idx: int | None
    groups: int = 1
    masks: bool = True
    tokens: bool = True
    pooled: bool = False

    @property
    def fold(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The weight has tokens first."""
        return (self.d_in, self.d_out), (1, 0)

    def save(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """The indices."""
        return (x,)

    def inputs(self, ids: Tensor) -> Tensor:  # (1, n, s, V)
        """One-hot rows: what the counts below are the diagonals of. For small vocabularies only."""
        kept = self._kept(ids, None).unsqueeze(-1)
        return (kept == torch.arange(self.d_in, device=ids.device)).to(torch.get_default_dtype()).unsqueeze(0)

    def mean_inputs(self, ids: Tensor) -> Tensor:  # (1, n, V)
        """Histograms, averaged over the positions that take part. For small vocabularies only."""
        rows = self.inputs(ids)
        return rows.sum(dim=2) / rows.sum(dim=(2, 3)).clamp(min=1).unsqueeze(-1)

    def token_counts(
        self, ids: Tensor, mask: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:  # (V,)
        """Diagonal of the input factor in the expand form: how often each token occurs.

        The sum of the result is the number of rows that take part.

        Args:
            ids: Token indices `(n, *s)`.
            mask: Which rows take part, in the shape of `ids`, 0 or 1. Default: all.
            dtype: Of the result.
        """
        kept = self._kept(ids, mask)
        return self._sum_by_token(kept, torch.ones_like(kept, dtype=dtype))

    def reduced_counts(
        self, ids: Tensor, mask: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:  # (V,)
        """Diagonal of the input factor in the reduce form: `Σ_n ā_n²`.

        `ā_n` averages over those positions of sample n that take part. With c occurrences of a token among its S
        positions, each occurrence contributes `c / S²`: no sample's histogram over the vocabulary is written down.

        Args:
            ids: Token indices `(n, *s)`.
            mask: Which rows take part, in the shape of `ids`, 0 or 1. Default: all.
            dtype: Of the result.
        """
        kept = self._kept(ids, mask)
        ordered = kept.sort(dim=1).values
        occurrences = torch.searchsorted(ordered, kept, right=True) - torch.searchsorted(ordered, kept)
        positions = (kept < self.d_in).sum(dim=1, keepdim=True).clamp(min=1)
        return self._sum_by_token(kept, occurrences.to(dtype) / positions.square())

    def token_sums(self, mask: Tensor, reduce: bool, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:  # (V,)
        """`reduced_counts` or `token_counts`."""
        return self.reduced_counts(ids, mask, dtype) if reduce else self.token_counts(ids, mask, dtype)

    def token_moment(self, squares: Tensor, ids: Tensor) -> Tensor:  # (V, d)
        """Squares of output gradients, summed over the rows of each token: rows count as samples.

        Args:
            squares: `(1, n, s, d)`, zero in rows that do not take part.
            ids: Token indices `(n, *s)`.
        """
        return squares.new_zeros(self.d_in, squares.shape[-1]).index_add(0, ids.flatten(), squares.flatten(0, 2))

    def outputs(self, g: Tensor, ids: Tensor) -> Tensor:  # (1, n, s, d)
        """Output gradients, zero in the rows of `padding_idx`.

        Args:
            g: Gradient of the layer's output `(n, *s, d)`.
            ids: Token indices `(n, *s)`.
        """
        if self.padding_idx is not None:
            g = g.masked_fill((ids == self.padding_idx).unsqueeze(-1), 0)
        return g.reshape(1, *_two_axes(ids), g.shape[-1])

    def _kept(self, ids: Tensor, mask: Tensor | None) -> Tensor:  # (n, s)
        """Token indices, those that do not take part replaced by V."""
        kept = ids.reshape(_two_axes(ids))
        if self.padding_idx is not None:
            kept = kept.masked_fill(kept == self.padding_idx, self.d_in)
        if mask is not None:
            kept = kept.masked_fill(mask.reshape(kept.shape) == 0, self.d_in)
        return kept

    def _sum_by_token(self, kept: Tensor, values: Tensor) -> Tensor:  # (V,)
        sums = values.new_zeros(self.d_in + 1)
        return sums.index_add(0, kept.flatten(), values.flatten())[:-1]


def embedding_rule(module: nn.Embedding) -> EmbeddingRule:
    """The rule of an embedding.

    Args:
        module: The layer.

    Raises:
        TypeError: Another kind of layer.
        ValueError: `scale_grad_by_freq` is on: gradients are then not sums over rows.
    """
    if not isinstance(module, nn.Embedding):
        raise TypeError(f"module must be an Embedding, but got {type(module).__name__}")
    if module.scale_grad_by_freq:
        raise ValueError("module must have scale_grad_by_freq=False, but got True")
    return EmbeddingRule(module.num_embeddings, module.embedding_dim, module.padding_idx)


def _two_axes(ids: Tensor) -> tuple[int, int]:
    """Samples n and positions s of an index tensor."""
    return (ids.shape[0], ids.shape[1:].numel()) if ids.dim() else (1, 1)
