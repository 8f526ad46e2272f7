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

from ..errors import ConfigError


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


def all_tokens(
    function: Callable[..., Tensor], p: Mapping[str, Tensor], values: tuple[Tensor, ...], n: int, site: str
) -> Tensor | None:
    """``function`` on the tokens of all members, rows of values (n·b, …, d) to rows; ``None``: it has to be mapped.

    It has to be where values do not have one row, and one token, for each other's, or a leaf has three axes or more.
    Raises ``ConfigError`` where the function gives no value a token.

    >>> p = {"gain": torch.tensor([1.0, 10.0])}
    >>> all_tokens(lambda p, y: y * p["gain"], p, (torch.ones(4, 3),), 2, "layer")[:, 0]
    tensor([ 1.,  1., 10., 10.])
    """
    y = values[0]
    tokens: list[Tensor] = []  # plain ones, for tracing knows no others
    leaves: dict[str, Tensor] = {}
    if y.ndim < 2:
        return None
    for value in values:
        if value.shape[:-1] != y.shape[:-1]:
            return None
        tokens.append(value.reshape(n, -1, value.shape[-1]))
    for name, leaf in p.items():
        axes = leaf.ndim
        if axes == 3:
            leaves[name] = leaf
        elif axes == 1:
            leaves[name] = leaf.view(n, 1, 1)
        elif axes == 2:
            leaves[name] = leaf.unsqueeze(1)
        else:
            return None
    out = function(leaves, *tokens)
    if out.ndim != 3 or out.shape[:2] != tokens[0].shape[:2]:
        raise ConfigError(
            f"The method at {site} says that it is tokenwise, but of {n} members' tokens "
            f"{tuple(tokens[0].shape)} it made {tuple(out.shape)}: write it with matrix products over the last axis "
            f"and elementwise operations (fd.linear(x, weight, bias), leaf.mT, axes counted from the last), or leave "
            f"tokenwise out."
        )
    return out.reshape(*y.shape[:-1], out.shape[-1])
