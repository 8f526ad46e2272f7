"""A change as a product of thin matrices, ``ΔW = s B A``: how it starts, and how it acts without being made."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..functional.tokenwise import linear
from ..structures.parts import Part, place
from .layers import LINEAR, through_factors
from .leaf import Leaf
from .site import Site


class LowRank(NamedTuple):
    """``ΔW = s B A``; with several pairs each writes one of the parts of the output.

    Attributes:
        b: B (out, r), the rows of all parts one below the other.
        a: A (r, in, *kernel), or (k r, in) where each of k parts has a pair of its own.
            Of a bare parameter that holds many matrices both have its leading axes first.
        scale: s.

    >>> LowRank(torch.ones(3, 1), torch.ones(1, 2), torch.tensor(2.0)).dense(()).tolist()
    [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """

    b: Tensor
    a: Tensor
    scale: Tensor

    def dense(self, parts: tuple[Part, ...]) -> Tensor:
        """ΔW of one member."""
        if self.b.ndim > 2:  # one matrix an expert
            return self.scale * self.b @ self.a
        b, a = self.scale * self.b, self.a.flatten(1)
        if not self._in_pairs():
            return (b @ a).unflatten(1, self.a.shape[1:])
        pairs = zip(b.split([part.size for part in parts], 0), a.chunk(len(parts), 0), strict=True)
        return torch.cat([rows @ columns for rows, columns in pairs])

    def check(self, shape: tuple[int, ...], who: str) -> None:
        """Raises ``ConfigError`` unless these are factors of a matrix of that shape, of one member.

        >>> LowRank(torch.ones(1, 3), torch.ones(2, 1), torch.tensor(2.0)).check((3, 2), "MyConfig.low_rank at dense")
        Traceback (most recent call last):
        ...
        funcdelta.errors.ConfigError: MyConfig.low_rank at dense gave factors b (1, 3) and a (2, 1); expected b...
        """
        rows, columns = shape[: self.b.ndim - 1], shape[self.b.ndim - 1 :]
        rank = self.b.shape[-1]
        own = self.a.shape[self.b.ndim - 2] if self.a.ndim > self.b.ndim - 2 else 0
        many, wide = tuple(self.a.shape[: self.b.ndim - 2]), tuple(self.a.shape[self.b.ndim - 1 :])
        if tuple(self.b.shape[:-1]) != rows or many != rows[:-1] or wide != columns or not rank or own % rank:
            of_a = ", ".join(map(str, (*rows[:-1], "r", *columns)))
            raise ConfigError(
                f"{who} gave factors b {tuple(self.b.shape)} and a {tuple(self.a.shape)}; expected b "
                f"({', '.join(map(str, rows))}, r) and a ({of_a})."
            )

    def onto(self, site: Site, y: Tensor, x: Tensor, parts: tuple[Part, ...]) -> Tensor:
        """``y + s B (A x)``: two thin products; of a linear layer for one member or, tokenwise, for each of many."""
        if site.kind not in LINEAR:
            return y + through_factors(site, self.scale * self.b, self.a, x, y)
        if not parts and self.a.ndim == 2:  # scaled between the two products, where there are fewest numbers
            return y + F.linear(F.linear(x, self.a) * self.scale, self.b)
        if self._in_pairs():
            hidden = linear(x, self.a).chunk(len(parts), -1)
            rows = (self.scale * self.b).split([part.size for part in parts], -2)
            return y + place([linear(h, row) for h, row in zip(hidden, rows, strict=True)], parts, site.width)
        hidden = linear(x, self.a) * self.scale
        if parts:
            rows = linear(hidden, self.b).split([part.size for part in parts], -1)
            return y + place(rows, parts, site.width)
        if y.dtype.itemsize < 4:  # half precision rounds as it does for one member
            return y + linear(hidden, self.b)
        return torch.baddbmm(y, hidden, self.b.mT)

    def _in_pairs(self) -> bool:
        return self.a.shape[-2] != self.b.shape[-1] and self.a.ndim == self.b.ndim


def started(site: Site, shape: tuple[int, ...], rank: int, pieces: int, rng: torch.Generator) -> tuple[Leaf, Leaf]:
    """Fresh factors ``(A, B)`` of a change of that shape: one of them is zero, so that the product is.

    A is Kaiming uniform with a = √5, as the weight of ``torch.nn.Linear``; it holds ``pieces`` matrices one below the
    other. A bare parameter of many matrices has factors for each.

    >>> from funcdelta.methods.site import site_of
    >>> a, b = started(site_of("0", torch.nn.Linear(4, 6)), (6, 4), 2, 1, torch.Generator())
    >>> a.value.shape, b.axes, bool(b.value.any())
    (torch.Size([2, 4]), '. rank', False)
    """
    many = shape[:-2] if site.kind == "tensor" else ()
    rows, *fan_in = shape[len(many) :]
    bound = 1 / math.sqrt(math.prod(fan_in))
    if site.kind == "embedding":  # whose output is a row of A
        a, b = torch.zeros(rank, *fan_in), torch.randn(rows, rank, generator=rng)
    else:
        a = torch.empty(*many, pieces * rank, *fan_in).uniform_(-bound, bound, generator=rng)
        b = torch.zeros(*many, rows, rank)
    axes = [".", *["."] * len(many)]
    return Leaf(a, " ".join([*axes[1:], f"{pieces}*rank", *["."] * len(fan_in)])), Leaf(b, " ".join([*axes, "rank"]))
