"""Attention on the meta device as fused kernels do it: ``softmax(q kᵀ s + bias) v`` without keeping the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ...functional.attention import AttentionBy


class FusedAttention(AttentionBy):
    """Inside it, ``scaled_dot_product_attention`` on meta tensors keeps queries, keys, values, output and row sums.

    Otherwise the meta device runs the plain composition, which keeps two matrices of scores for each head. Real devices
    do so only where a model asks for it (``attn_implementation="eager"``), and that is left as it is here.

    >>> q = torch.empty(1, 2, 5, 8, device="meta", requires_grad=True)
    >>> with FusedAttention():
    ...     type(F.scaled_dot_product_attention(q, q, q).grad_fn).__name__
    'ScaledDotProductEfficientAttentionBackward0'
    """

    def __init__(self) -> None:
        super().__init__(_attention)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    if attn_mask is not None:
        # Boolean masks become the numbers that the kernels add.
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
