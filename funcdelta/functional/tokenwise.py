"""Runs a function that acts on each token alone for all n members at once, by batched products instead of vmap.

Hidden values are (n, T, d), with a member's rows and tokens in one axis; matrices are (n, a, b), vectors (n, 1, d) and
numbers (n, 1, 1). With these shapes, matrix products and elementwise operations that are written for one member
compute each member's result, so the method's function is called once, without ``torch.vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


class Tokenwise:
    """A member's function at a site that acts on each token alone.

    >>> Tokenwise(lambda p, y: y + p["shift"])({"shift": 1}, 2)
    3
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def __call__(self, p: Mapping[str, Tensor], *values: Tensor) -> Tensor:
        return self.function(p, *values)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b`` over the last axis, for one member or, with leaves as above, for n members.

    >>> x, weight, bias = torch.randn(3, 5, 4), torch.randn(3, 2, 4), torch.randn(3, 2)
    >>> many = linear(x, weight, bias.unsqueeze(1))
    >>> torch.allclose(many[1], linear(x[1], weight[1], bias[1]), atol=1e-6)
    True
    """
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias, x, weight.mT)
