"""Which of its input tensors a model or a module writes.

A state that is updated in place has to hold, for each row, what the row's own run wrote into it. So anything that runs
twice (with a delta and without, or by a second engine after the first one failed) has to begin with the same tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..transforms import is_wrapped


def marks(tensors: Sequence[Tensor]) -> list[Any]:
    """Marks from which :func:`changed` can tell whether a tensor was written: its version, or a copy if it has none."""
    return [_mark(tensor) for tensor in tensors]


def _mark(tensor: Tensor) -> Any:
    if is_wrapped(tensor):
        return None  # a write into a transform's tensor does not reach the caller's
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
    """Tensors for two runs on the same ``values``, and what each run wrote into them.

    Args:
        known: the positions of the values that are known to be written.

    Attributes:
        made: copies of ``values`` for the first run.

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
        # There are no versions while compiling, but what is written is known from the layout.
        self._traced = torch.compiler.is_compiling()
        self._before = ([], []) if self._traced else (marks(self.made), marks(self.values))
        self._first: frozenset[int] = frozenset()

    def apart(self) -> list[Tensor]:
        """The tensors for the second run: ``values``, or a copy of each that the first run has written."""
        self._first = self._changed()
        return [value.clone() if i in self._first else value for i, value in enumerate(self.values)]

    def written(self, own: Sequence[Tensor], dims: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor, Tensor, Any]]:
        """``(value, its copy after the second run, after the first, dim)`` for each value that either run wrote."""
        for i in sorted(self._first | self._changed()):
            yield self.values[i], own[i], self.made[i], dims[i]

    def _changed(self) -> frozenset[int]:
        if self._traced:
            return self.known
        made, given = self._before
        return self.known.union(changed(self.made, made), changed(self.values, given))
