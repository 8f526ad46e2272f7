"""Members without a map: a function of each token alone takes the tokens of all n members in batched products.

Hidden values are given as (n, T, d), with a member's rows and tokens in one axis, matrices as (n, a, b), vectors as
(n, 1, d) and numbers as (n, 1, 1). What matrix products and elementwise operations compute of a member's own tensors
they then compute of each member's, so the method's function is called once, with no ``torch.vmap`` around it.
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
    """``x Wᵀ + b`` over the last axis, for one member or, with leaves as above, for each of n.

    >>> x, weight, bias = torch.randn(3, 5, 4), torch.randn(3, 2, 4), torch.randn(3, 2)
    >>> many = linear(x, weight, bias.unsqueeze(1))
    >>> torch.allclose(many[1], linear(x[1], weight[1], bias[1]), atol=1e-6)
    True
    """
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias, x, weight.mT)
