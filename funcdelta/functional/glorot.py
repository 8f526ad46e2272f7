"""Glorot initialisation with gain √2, which keeps the variance of activations and gradients from layer to layer.

Source: Glorot and Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks"; the gain
is that of rectifiers, as in OpenDelta.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GLOROT = ("glorot-uniform", "glorot-normal")
"""The two distributions, by the names of OpenDelta's configs."""


def glorot(kind: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Matrices (..., in, out) with variance 4 / (in + out) from one of the distributions :data:`GLOROT`.

    >>> w = glorot("glorot-uniform", (4, 30, 20), torch.Generator().manual_seed(0))
    >>> w.shape, bool(w.abs().max() <= (12 / 50) ** 0.5)
    (torch.Size([4, 30, 20]), True)
    """
    deviation = 2 / math.sqrt(shape[-2] + shape[-1])
    if kind == "glorot-normal":
        return torch.randn(shape, generator=rng) * deviation
    bound = math.sqrt(3) * deviation
    return torch.empty(shape).uniform_(-bound, bound, generator=rng)
