"""Values of inputs without rows, as a part of the inputs' key, if they may decide which layout holds.

Python may branch on a flag that all members share. A layout that was learned with one value of it may not hold for
another, so the probe notes which inputs Python reads, and from then on their values belong to the key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..transforms import concrete
from ..trees.opaque import PLAIN, holds_tensors, tensors_in
from .containers import is_cache

SHORT = 32
"""Values of up to this many bytes enter the key in full, longer ones by a digest."""

MANY = 16
"""After this many values it is assumed that every call has another one, and no more layouts are learned."""


@dataclass(frozen=True)
class Deciding:
    """Stored in place of a layout if the values of some inputs decide which layout holds.

    Attributes:
        places: the positions of these inputs.
        learned: how many layouts were learned, one for each combination of values.
    """

    places: tuple[int, ...]
    learned: int = 1

    def with_more(self, places: Iterable[int]) -> Deciding:
        """This with the inputs that one more call was seen to read.

        >>> Deciding((1,)).with_more({3, 1})
        Deciding(places=(1, 3), learned=2)
        """
        return Deciding(tuple(sorted({*self.places, *places})), self.learned + 1)

    def values(self, leaves: list[Any]) -> tuple[str, ...]:
        """The values of the deciding inputs, as words for a key."""
        return tuple(written(leaves[place]) for place in self.places)


def can_decide(leaf: Any) -> bool:
    """Whether a leaf without rows is or holds tensors whose values Python may read; not caches, which always change.

    >>> can_decide(torch.zeros(())), can_decide(True)
    (True, False)
    """
    if isinstance(leaf, Tensor):
        return True
    return not isinstance(leaf, (np.ndarray, list, *PLAIN)) and not is_cache(leaf) and holds_tensors(leaf)


def held(leaf: Any) -> Iterator[Tensor]:
    """The tensor that a leaf is, or those that it holds."""
    if isinstance(leaf, Tensor):
        yield leaf
    else:
        yield from tensors_in(leaf)


def written(leaf: Any) -> str:
    """The values of a leaf as a word, equal for tensors that are equal to the bit.

    >>> written(torch.tensor([1])) == written(torch.tensor([1])), written(torch.tensor([1])) == written(torch.tensor(1))
    (True, False)
    """
    if isinstance(leaf, np.ndarray):
        return _word(leaf.tobytes() if leaf.dtype != object else repr(leaf.tolist()).encode())
    return "|".join(_word(_bytes(tensor)) for tensor in held(leaf))


def _word(content: bytes) -> str:
    return content.hex() if len(content) <= SHORT else hashlib.blake2b(content, digest_size=16).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    plain = concrete(tensor).detach()
    if plain.is_nested:
        return b"".join(_bytes(part) for part in plain.unbind())
    if plain.layout != torch.strided:
        plain = plain.to_dense()
    if plain.is_meta:
        return b""
    flat = plain.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return f"{tuple(plain.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()
