"""The inputs and outputs of a call, flattened into leaves and rebuilt from them.

torch's pytree knows some containers; this opens also what a tokenizer returns, plain dataclasses, and subclasses of
dict and tuple. Keys are read off the values, so that classes which were registered with pytree without keys have names
for their leaves as well.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import EngineError
from ..trees.opaque import PLAIN, holds_tensors


@dataclass(frozen=True)
class Tree:
    """The structure of a value that :func:`flatten` opened; called with leaves, it rebuilds the value.

    Attributes:
        kind: the container's class; ``None`` for a leaf.
        keys, parts: the name and the structure of each child.
        close: makes the container from its children.
    """

    kind: type | None = None
    keys: tuple[str, ...] = ()
    parts: tuple[Tree, ...] = ()
    close: Callable[[list[Any]], Any] | None = field(default=None, compare=False, repr=False)

    def __call__(self, leaves: Iterable[Any]) -> Any:
        """The value with these leaves."""
        return self._take(iter(leaves))

    def _take(self, leaves: Iterator[Any]) -> Any:
        if self.close is None:
            return next(leaves)
        return self.close([next(leaves) if part is LEAF else part._take(leaves) for part in self.parts])

    def places(self, root: str = "") -> list[str]:
        """A name for every leaf: the keys that lead to it, joined by dots."""
        if self.close is None:
            return [root]
        found: list[str] = []
        for key, part in zip(self.keys, self.parts, strict=True):
            place = f"{root}.{key}" if root else key
            found += [place] if part is LEAF else part.places(place)
        return found


LEAF = Tree()
CARRIERS = (Tensor, np.ndarray)
"""Leaves that may have rows."""


def flatten(value: Any, whole: Callable[[Any], bool] | None = None) -> tuple[list[Any], Tree]:
    """The leaves of ``value``, and the structure that rebuilds it; parts for which ``whole`` is true stay one leaf.

    >>> leaves, tree = flatten({"x": [1, torch.zeros(2)], "y": None})
    >>> leaves, tree.places(), tree([5, 6, 7])
    ([1, tensor([0., 0.]), None], ['x.0', 'x.1', 'y'], {'x': [5, 6], 'y': 7})
    """
    opened = None if isinstance(value, PLAIN) or (whole is not None and whole(value)) else _open(value)
    if opened is None:
        return [value], LEAF
    keys, children, close = opened
    leaves: list[Any] = []
    parts: list[Tree] = []
    for child in children:
        found, part = ([child], LEAF) if isinstance(child, PLAIN) else flatten(child, whole)
        leaves += found
        parts.append(part)
    return leaves, Tree(type(value), keys, tuple(parts), close)


def is_cache(leaf: Any) -> bool:
    """Whether ``leaf`` is a cache whose rows can be picked, as Transformers' can.

    >>> from transformers import DynamicCache
    >>> is_cache(DynamicCache()), is_cache(torch.zeros(2))
    (True, False)
    """
    return hasattr(leaf, "reorder_cache") and not isinstance(leaf, nn.Module)


Opened = tuple[tuple[str, ...], list[Any], Callable[[list[Any]], Any]]


def _open(value: Any) -> Opened | None:
    """The keys and children of a container and the function that rebuilds it; ``None`` if ``value`` is a leaf."""
    if isinstance(value, (np.ndarray, nn.Module, torch.Size)) or is_cache(value):
        return None
    children, spec = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
    if not (len(children) == 1 and children[0] is value):
        return _keys(value, len(children)), children, lambda parts: pytree.tree_unflatten(parts, spec)
    if isinstance(value, Mapping):
        return tuple(map(str, value)), list(value.values()), functools.partial(_mapping_like, value)
    if isinstance(value, (tuple, list)):
        return _keys(value, len(value)), list(value), functools.partial(_sequence_like, value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = tuple(f.name for f in dataclasses.fields(value) if hasattr(value, f.name))
        parts = [getattr(value, name) for name in names]
        # A dataclass without tensors, such as a config, is one value.
        if any(isinstance(leaf, CARRIERS) or holds_tensors(leaf) for leaf in pytree.tree_leaves(parts)):
            return names, parts, functools.partial(_dataclass_like, value, names)
    return None


def _keys(value: Any, count: int) -> tuple[str, ...]:
    names = value if isinstance(value, Mapping) else getattr(value, "_fields", None)
    if names is None and dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value)]
    if names is None or len(names) != count:
        return tuple(map(str, range(count)))
    return tuple(map(str, names))


def _mapping_like(value: Any, parts: list[Any]) -> Any:
    items = dict(zip(value, parts, strict=True))
    if isinstance(value, UserDict):
        twin = copy.copy(value)
        twin.data = items
        return twin
    return _made(value, items)


def _sequence_like(value: Any, parts: list[Any]) -> Any:
    return type(value)(*parts) if hasattr(value, "_fields") else _made(value, parts)


def _made(value: Any, content: Any) -> Any:
    kind = type(value)
    try:
        return kind(content)
    except Exception as error:  # the constructor of a subclass may take other arguments, and raise anything
        raise EngineError(
            f"A {kind.__name__} among the inputs or outputs could not be rebuilt: "
            f"{kind.__name__}({type(content).__name__}) raised {error}. Use a plain {type(content).__name__} instead."
        ) from error


def _dataclass_like(value: Any, names: tuple[str, ...], parts: list[Any]) -> Any:
    twin = copy.copy(value)
    for name, part in zip(names, parts, strict=True):
        object.__setattr__(twin, name, part)  # it may be frozen
    return twin
