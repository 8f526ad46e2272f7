"""Objects that torch's pytree does not know, with tensors in them: nothing can split those by member."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

Value = TypeVar("Value")

PLAIN = (Tensor, str, int, float, bool, complex, bytes, type(None))
"""Leaves without tensors inside, or that are tensors themselves."""
DEPTH = 4
"""How deep tensors are looked for: a cache has layers, which have keys."""


def tensors_in(leaf: Any, depth: int = DEPTH) -> Iterator[Tensor]:
    """The tensors among the attributes of ``leaf``, which is no tensor itself.

    >>> import types, torch
    >>> list(tensors_in(types.SimpleNamespace(hidden=[torch.ones(2)]))), list(tensors_in(torch.ones(2)))
    ([tensor([1., 1.])], [])
    """
    if isinstance(leaf, PLAIN) or not depth:
        return
    for value in pytree.tree_leaves(getattr(leaf, "__dict__", {})):
        if isinstance(value, Tensor):
            yield value
        else:
            yield from tensors_in(value, depth - 1)


def holds_tensors(leaf: Any) -> bool:
    """Whether ``leaf``, no tensor itself, has tensors among its attributes.

    >>> holds_tensors("text")
    False
    """
    return next(tensors_in(leaf), None) is not None


def spare(inputs: Value) -> Value:
    """The inputs for a run besides the call itself: objects that a run may change (a cache) are copied.

    >>> cache = [object()]
    >>> spare((cache, 1))[0] is cache
    False
    """
    return pytree.tree_map(_copied, inputs)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, PLAIN):
        return leaf
    # Tensors with a history (a cache filled outside no_grad) have to be cloned by torch.
    return copy.deepcopy(leaf, {id(t): t.clone() for t in tensors_in(leaf) if not t.is_leaf})


def why_opaque(leaf: Any) -> str:
    """Why the tensors in ``leaf`` cannot be reached, and what to write.

    >>> import types
    >>> why_opaque(types.SimpleNamespace())
    "is a SimpleNamespace, whose tensors torch's pytree cannot see. Use a tuple or a dict instead."
    """
    name = type(leaf).__name__
    register = f"Write torch.utils._pytree.register_dataclass({name}) once, or use"
    instead = register if dataclasses.is_dataclass(leaf) else "Use"
    if name.endswith("Cache"):
        return f"is a {name}, which nothing can split by member: leave out use_cache=True, and caches among the inputs."
    return f"is a {name}, whose tensors torch's pytree cannot see. {instead} a tuple or a dict instead."
