"""Routing: chooses the delta for each row, one per domain, by the row's embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def centroids(embeddings: Tensor, domains: Tensor, n: int) -> Tensor:
    """The mean embeddings (n, d) of n domains, normalised to unit length.

    >>> centroids(torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 1]), n=2)
    tensor([[1., 0.],
            [0., 1.]])
    """
    sums = embeddings.new_zeros(n, embeddings.shape[-1]).index_add(0, domains, embeddings)
    return sums / sums.norm(dim=-1, keepdim=True)


def nearest(embeddings: Tensor, centres: Tensor) -> Tensor:
    """The domain of each row, (b,), by the largest cosine similarity: an index for ``delta.apply_rows``.

    >>> nearest(torch.tensor([[0.1, 2.0], [1.0, 0.0]]), torch.eye(2))
    tensor([1, 0])
    """
    return (embeddings @ centres.mT).argmax(-1)


def mixture(outputs: Tensor, weights: Tensor) -> Tensor:
    """Σₖ πᵢₖ yₖᵢ, (b, …): outputs (n, b, …) of ``delta.apply_many``, weighted by a gate (b, n).

    >>> mixture(torch.tensor([[[1.0], [2.0]], [[10.0], [20.0]]]), torch.tensor([[0.5, 0.5], [0.0, 1.0]]))
    tensor([[ 5.5000],
            [20.0000]])
    """
    return torch.einsum("nb...,bn->b...", outputs, weights)
