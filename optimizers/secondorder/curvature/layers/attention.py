"""`nn.MultiheadAttention` taken apart, so that its projections can be seen.

    q = q_in W_qᵀ + b_q,   k = k_in W_kᵀ + b_k,   v = v_in W_vᵀ + b_v        W_q (E, E), W_k (E, kdim), W_v (E, vdim)
    out_h = softmax(q_h k_hᵀ / √(E / H) + mask) v_h,   z = [out_1 … out_H] W_oᵀ + b_o

torch computes this in one functional call in which no projection is a module and `out_proj` is never called: module
hooks cannot see it. Here q, k, v go through a function on the module, `tap`, and `out_proj` is called.

The three projections are three groups of the normal form, one Kronecker pair each, of `in_proj_weight` viewed as
(3, E, E). Queries may be more or fewer than keys: groups are a tuple of three tensors (n, s_j, E), not one tensor with
a leading axis. Where kdim or vdim differ from E the weights are three parameters, hence three linear layers.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secondorder.curvature.layers.protocol import Unbound

Triple = tuple[Tensor, Tensor, Tensor]


class Tap(Protocol):
    """What may be put on a module as `tap`. An attribute `active`, where there is one, can switch it off."""

    def __call__(self, module: nn.Module, inputs: Triple, projections: Triple, /) -> Triple:
        """Projections to go on with, of the same values.

        Args:
            module: The attention layer.
            inputs: Queries, keys and values `(n, s_j, d_j)`, batch first whatever the layer's `batch_first`. What was
                one object in the call of the layer is one object here.
            projections: What they were projected to, `(n, s_j, E)`; no views, they may be changed in place.
        """


@dataclass(frozen=True)
class AttentionRule(Unbound):
    """The normal form of `in_proj_weight`, viewed as (3, E, E); made by `attention_rule`. See `LayerRule`."""

    d_in: int
    d_out: int
    groups: int = 3
    masks: bool = True
    tokens: bool = False
    pooled: bool = False
    fold: None = None

    def save(self, module: nn.Module, x: Triple) -> tuple[Tensor, ...]:
        """The three inputs of `Tap`."""
        return x

    def inputs(self, *saved: Tensor) -> tuple[Tensor, ...]:
        """Three `(n, s_j, E)`."""
        return saved

    def mean_inputs(self, *saved: Tensor) -> Tensor:
        """`(3, n, E)`."""
        return torch.stack([x.mean(dim=1) for x in saved])

    def outputs(self, g: Triple, *saved: Tensor) -> tuple[Tensor, ...]:
        """Three `(n, s_j, E)`: the gradients of the projections as they are."""
        return g


def attention_rule(module: nn.MultiheadAttention) -> AttentionRule:
    """The rule of an attention layer's projections.

    Args:
        module: The layer.

    Raises:
        ValueError: The layer has three weights (kdim or vdim differ from E): each is a linear layer of its own.
    """
    if not module._qkv_same_embed_dim:
        raise ValueError(
            f"module must have kdim and vdim equal to embed_dim, but got {module.kdim}, {module.vdim} and "
            f"{module.embed_dim}: use a linear rule for each projection"
        )
    return AttentionRule(module.embed_dim, module.embed_dim)


class DecomposedMultiheadAttention(nn.MultiheadAttention):
    """The class that `swap` gives to an attention layer.

    While `tap` is None or inactive, or gradients are off, torch's own forward runs. Else the layer is computed piece
    by piece: `out_proj` is called as a module, with input `(n, s, E)`, so that its hooks fire. What the pieces do not
    cover (`bias_k`, `add_zero_attn`, nested tensors, shapes that do not fit) is left to torch's forward too, which
    computes it or says what is wrong.

    A copy or a pickle is of the class that the layer had before, without the tap.

    Attributes:
        tap: Sees inputs and projections, and may replace the projections. Default: None.
    """

    tap: Tap | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `torch.nn.MultiheadAttention`."""
        tap = self.tap
        if (
            tap is None
            or not getattr(tap, "active", True)
            or not torch.is_grad_enabled()
            or not self._covers(query, key, value, key_padding_mask, attn_mask, is_causal)
        ):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        batched = query.dim() == 3
        inputs = _batch_first(query, key, value, self.batch_first)
        q, k, v = (self._heads(x) for x in tap(self, inputs, self._project(inputs)))  # (n, H, s_j, E / H)
        # The hint stands for the mask only where nothing needs the mask itself.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout)
            heads = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        out = self.out_proj(heads.transpose(1, 2).flatten(2))  # (n, s, E)
        if not batched:
            return out.squeeze(0), weights
        return out if self.batch_first else out.transpose(0, 1), weights

    def __reduce_ex__(self, protocol: Any) -> Any:
        del protocol
        mro = type(self).__mro__
        original = mro[mro.index(DecomposedMultiheadAttention) + 1]
        twin: nn.Module = object.__new__(original)
        twin.__dict__.update((name, held) for name, held in self.__dict__.items() if name != "tap")
        return twin.__reduce_ex__(1)  # later protocols insist on the class of the object that they were called for

    def _covers(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        if self.bias_k is not None or self.bias_v is not None or self.add_zero_attn:
            return False
        if any(x.is_nested or x.dim() != query.dim() for x in (query, key, value)) or query.dim() not in (2, 3):
            return False
        if is_causal and attn_mask is None:
            return False
        time = 1 if self.batch_first and query.dim() == 3 else 0
        L, S = query.shape[time], key.shape[time]
        batch = () if query.dim() == 2 else (query.shape[1 - time],)
        if key.shape[:-1] != value.shape[:-1] or (batch and key.shape[1 - time] != batch[0]):
            return False
        if query.shape[-1] != self.embed_dim or key.shape[-1] != self.kdim or value.shape[-1] != self.vdim:
            return False
        masks = [mask for mask in (key_padding_mask, attn_mask) if mask is not None]
        if any(mask.dtype != torch.bool and not mask.is_floating_point() for mask in masks):
            return False
        if key_padding_mask is not None and key_padding_mask.shape != (*batch, S):
            return False
        return attn_mask is None or attn_mask.shape in ((L, S), (math.prod(batch) * self.num_heads, L, S))

    def _project(self, inputs: Triple) -> Triple:
        weights = (
            self.in_proj_weight.chunk(3)
            if self._qkv_same_embed_dim
            else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        q, k, v = map(F.linear, inputs, weights)
        if self.in_proj_bias is not None:
            # Added by F.linear, it would make the results views, which a tap could not change in place.
            q, k, v = (z.add_(b) for z, b in zip((q, k, v), self.in_proj_bias.chunk(3), strict=True))
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:  # (n, s, E) -> (n, H, s, E / H)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Both masks as one summand of the scores, broadcastable to `(n, H, L, S)`."""
        total = None
        if attn_mask is not None:
            total = _additive(attn_mask, dtype)
            total = total if total.dim() == 2 else total.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, dtype).unflatten(-1, (1, 1, -1))  # (n, 1, 1, S), unbatched (1, 1, S)
            total = padding if total is None else total + padding
        return total


def swap(module: nn.MultiheadAttention) -> str | None:
    """Give an attention layer the class that can be tapped.

    The object, its parameters and their names stay as they are.

    Args:
        module: The layer; a swapped one is left as it is.

    Returns:
        None, or why the layer was left as it is.
    """
    cls: type[Any] = type(module)
    if issubclass(cls, DecomposedMultiheadAttention):
        return None
    if cls.forward is not nn.MultiheadAttention.forward or "forward" in module.__dict__:
        return "it has its own forward"
    if module.bias_k is not None or module.bias_v is not None:
        return "it adds a bias to keys and values (add_bias_kv)"
    if module.add_zero_attn:
        return "it attends to a zero (add_zero_attn)"
    weights = ["in_proj_weight"] if module._qkv_same_embed_dim else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    for name in (*weights, "in_proj_bias"):
        if name not in module._parameters:  # parametrised or pruned
            return f"its {name} is computed, not a parameter"
    if type(module.out_proj).forward is not nn.Linear.forward or "weight" not in module.out_proj._parameters:
        return "its out_proj is not a plain linear layer"
    module.__class__ = _decomposed(cls)  # type: ignore[arg-type]  # mypy doubts that a class is hashable
    return None


@functools.cache
def _decomposed(cls: type[Any]) -> type[Any]:
    if cls is nn.MultiheadAttention:
        return DecomposedMultiheadAttention
    return type(f"Decomposed{cls.__name__}", (DecomposedMultiheadAttention, cls), {})


def _batch_first(query: Tensor, key: Tensor, value: Tensor, is_batch_first: bool) -> Triple:  # three (n, s_j, d_j)
    """Views with the sample axis first; what is one object stays one."""

    def view(x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.dim() == 2 else x if is_batch_first else x.transpose(0, 1)

    q = view(query)
    k = q if key is query else view(key)
    v = k if value is key else q if value is query else view(value)
    return q, k, v


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask, True where attention is forbidden, as 0 and -inf; a float mask as it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
