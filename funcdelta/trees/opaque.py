"""Finds tensors in objects that torch's pytree does not know, and so cannot split by member."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

Value = TypeVar("Value")

PLAIN = (Tensor, str, int, float, bool, complex, bytes, type(None))
"""Types of leaves that are tensors, or have none inside."""
DEPTH = 4
"""How deep to look for tensors: a cache has layers, which have keys."""


def tensors_in(leaf: Any, depth: int = DEPTH) -> Iterator[Tensor]:
    """The tensors among the attributes of ``leaf``; none if it is itself a tensor.

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
    """Whether ``leaf`` is an object with tensors among its attributes, and not itself a tensor.

    >>> import types, torch
    >>> holds_tensors(types.SimpleNamespace(x=torch.ones(2))), holds_tensors(torch.ones(2))
    (True, False)
    """
    return next(tensors_in(leaf), None) is not None


def spare(inputs: Value) -> Value:
    """A copy of the inputs for an extra run, which must not change objects among them (a cache).

    >>> cache = [object()]
    >>> spare((cache, 1))[0] is cache
    False
    """
    return pytree.tree_map(_copied, inputs)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, PLAIN):
        return leaf
    # deepcopy refuses tensors with a grad_fn (a cache filled outside no_grad), so clone those.
    return copy.deepcopy(leaf, {id(t): t.clone() for t in tensors_in(leaf) if not t.is_leaf})
