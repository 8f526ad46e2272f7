"""Parts of a fused output: the features that are queries, keys or values.

A layer may compute several projections at once. Its d features form g equal groups (heads, or 1), and a part is the
features ``start`` to ``stop`` of every group. This covers q, k and v side by side, of different sizes, and interleaved
by head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MatchError


@dataclass(frozen=True)
class Part:
    """Features ``start`` to ``stop`` of each of ``groups`` equal groups of an output.

    Attributes:
        name: the part's name (``q``).
        start, stop: the range within a group.
        groups: the number of groups in the whole output.

    >>> q = Part("q", 0, 2, groups=2)
    >>> q.size, q.indices(12).tolist()
    (4, [0, 1, 6, 7])
    """

    name: str
    start: int
    stop: int
    groups: int = 1

    @property
    def size(self) -> int:
        """The total number of features of the part."""
        return self.groups * (self.stop - self.start)

    def indices(self, width: int) -> Tensor:
        """The indices of the part's features among all ``width`` features of the output, in order.

        >>> Part("v", 4, 6).indices(6)
        tensor([4, 5])
        """
        return torch.arange(width).view(self.groups, -1)[:, self.start : self.stop].flatten()


def equal_parts(names: Sequence[str], width: int) -> tuple[Part, ...]:
    """``width`` features split into equal, adjacent parts.

    >>> equal_parts(("q", "k", "v"), 12)[1]
    Part(name='k', start=4, stop=8, groups=1)
    """
    size = width // len(names)
    return tuple(Part(name, i * size, (i + 1) * size) for i, name in enumerate(names))


def place(pieces: Sequence[Tensor], parts: Sequence[Part], width: int, axis: int = -1) -> Tensor:
    """A tensor, ``width`` long along ``axis``, with each piece at the place of its part and zeros elsewhere.

    Piece i has ``parts[i].size`` features along ``axis``, in the order of :meth:`Part.indices`; all parts must have the
    same number of groups. It works under transforms, because nothing is written in place.

    >>> place([torch.tensor([1, 2, 3, 4])], [Part("k", 1, 3, groups=2)], 6)
    tensor([0, 1, 2, 0, 3, 4])
    """
    axis %= pieces[0].ndim
    groups = parts[0].groups
    if any(part.groups != groups for part in parts):
        raise MatchError(f"Parts of one output must agree in groups; found {[part.groups for part in parts]}.")
    given = sorted(zip(parts, pieces, strict=True), key=lambda pair: pair[0].start)
    columns: list[Tensor] = []
    end = 0
    for part, piece in given:
        grouped = piece.unflatten(axis, (groups, part.stop - part.start))
        if part.start > end:
            columns.append(_zeros(grouped, axis + 1, part.start - end))
        columns.append(grouped)
        end = part.stop
    if width // groups > end:
        columns.append(_zeros(columns[-1], axis + 1, width // groups - end))
    return torch.cat(columns, axis + 1).flatten(axis, axis + 1)


def _zeros(like: Tensor, axis: int, size: int) -> Tensor:
    return like.new_zeros((*like.shape[:axis], size, *like.shape[axis + 1 :]))
