"""What a model or one of its modules writes into the tensors that it is given.

A state that is updated in place has in the end what each row's own run wrote into it. So whatever runs twice, with a
delta and without it, or by another engine after the first one could not, has to begin from the same tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..transforms import is_wrapped


def marks(tensors: Sequence[Tensor]) -> list[Any]:
    """What tells later whether each was written: a count, or a copy where nobody counts, in inference mode.

    >>> marks([torch.zeros(2)])
    [0]
    """
    return [_mark(tensor) for tensor in tensors]


def _mark(tensor: Tensor) -> Any:
    if is_wrapped(tensor):
        return None  # what transforms have made they write into anew
    return tensor.clone() if tensor.is_inference() else tensor._version


def changed(tensors: Sequence[Tensor], before: Sequence[Any]) -> tuple[int, ...]:
    """The positions of the tensors that were written since they had these :func:`marks`.

    >>> x, y = torch.zeros(2), torch.zeros(2)
    >>> before = marks([x, y])
    >>> _ = y.add_(1)
    >>> changed([x, y], before)
    (1,)
    """
    pairs = enumerate(zip(tensors, before, strict=True))
    return tuple(
        i
        for i, (now, was) in pairs
        if (not torch.equal(now, was) if isinstance(was, Tensor) else was is not None and now._version != was)
    )


class Copies:
    """Copies of ``values`` for the run that comes first; ``known`` are those that are written, by position.

    Attributes:
        made: the copies.

    >>> state, x = torch.zeros(2), torch.ones(2)
    >>> copies = Copies([state, x], ())
    >>> _ = copies.made[0].add_(1)
    >>> own = copies.apart()
    >>> _ = own[0].add_(2)
    >>> [(value is state, theirs, first) for value, theirs, first, _ in copies.written(own, [0, 0])]
    [(True, tensor([2., 2.]), tensor([1., 1.]))]
    """

    def __init__(self, values: Sequence[Tensor], known: Collection[int]) -> None:
        self.values, self.known = list(values), frozenset(known)
        self.made = [value.clone() for value in values]
        # Compiled code counts nothing, and has what was learned.
        self._traced = torch.compiler.is_compiling()
        self._before = ([], []) if self._traced else (marks(self.made), marks(self.values))
        self._first: frozenset[int] = frozenset()

    def apart(self) -> list[Tensor]:
        """The tensors for the second run: further copies of what the first one has written."""
        self._first = self._changed()
        return [value.clone() if i in self._first else value for i, value in enumerate(self.values)]

    def written(self, own: Sequence[Tensor], dims: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor, Tensor, Any]]:
        """``(value, what the second run made of it, what the first did, dim)`` of all that either has written."""
        for i in sorted(self._first | self._changed()):
            yield self.values[i], own[i], self.made[i], dims[i]

    def _changed(self) -> frozenset[int]:
        if self._traced:
            return self.known
        made, given = self._before
        return self.known.union(changed(self.made, made), changed(self.values, given))
