"""Separates the leaves that have derivatives from integers, booleans and other objects in params."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ParamsError
from ..trees.leaves import align, check_tree, dense, named

__all__ = ["Parted"]


class Parted:
    """``params`` split into the differentiable leaves, in a fixed order (``reals``), and the rest, which stays as is.

    >>> parted = Parted({"w": torch.ones(2), "steps": torch.tensor(3)})
    >>> parted.whole([torch.zeros(2)])
    {'w': tensor([0., 0.]), 'steps': tensor(3)}
    >>> parted.filled([torch.ones(2)], torch.zeros_like)
    {'w': tensor([1., 1.]), 'steps': tensor(0)}
    """

    def __init__(self, params: Any) -> None:
        check_tree(params)
        self.params = params
        self.leaves, self.spec = pytree.tree_flatten(params)
        self.names = [name for name, _ in named(params)]
        self.places = [
            place
            for place, (name, leaf) in enumerate(zip(self.names, self.leaves, strict=True))
            if isinstance(leaf, Tensor) and (dense(name, leaf).is_floating_point() or leaf.is_complex())
        ]
        if not self.places:
            raise ParamsError("params have nothing to differentiate: no leaf is a floating-point or complex tensor.")

    @property
    def reals(self) -> list[Tensor]:
        """The differentiable leaves: floating-point and complex tensors."""
        return [self.leaves[place] for place in self.places]

    def whole(self, reals: Sequence[Tensor]) -> Any:
        """``params`` with ``reals`` in place of the differentiable leaves."""
        leaves = list(self.leaves)
        for place, real in zip(self.places, reals, strict=True):
            leaves[place] = real
        return pytree.tree_unflatten(leaves, self.spec)

    def filled(self, reals: Sequence[Tensor], rest: Callable[[Tensor], Tensor]) -> Any:
        """A tree like ``params`` of ``reals``, and ``rest(leaf)`` for every other tensor."""
        leaves = [rest(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        for place, real in zip(self.places, reals, strict=True):
            leaves[place] = real
        return pytree.tree_unflatten(leaves, self.spec)

    def along(self, direction: Any, what: str) -> list[Tensor]:
        """The leaves of ``direction`` that correspond to ``reals``, matched by name.

        Raises ``ParamsError`` if its structure differs from that of ``params``.
        """
        leaves = align(self.params, direction, first_is="params", other_is=what)
        for place in self.places:
            mine, other = self.leaves[place], leaves[place]
            if not isinstance(other, Tensor) or (other.shape, other.dtype) != (mine.shape, mine.dtype):
                found = f"{tuple(other.shape)}, {other.dtype}" if isinstance(other, Tensor) else repr(other)
                raise ParamsError(
                    f"Leaf {self.names[place]!r} of {what} is {found}; expected {tuple(mine.shape)}, {mine.dtype}, as "
                    f"in params."
                )
        return [leaves[place] for place in self.places]
