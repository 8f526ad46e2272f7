"""Outputs of a model: names for their leaves, refusals of what cannot be split by member, and stacking over members."""

from __future__ import annotations

import operator
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import EngineError
from ..transforms import is_wrapped
from ..trees.opaque import PLAIN, holds_tensors
from .containers import Tree, flatten, is_cache


def names(output: Any) -> list[str]:
    """A name for every leaf of an output, in the order of :func:`flatten`.

    >>> names({"logits": 1, "hidden": (2, 3)}), names(torch.zeros(2))
    (['logits', 'hidden.0', 'hidden.1'], ['of the model'])
    """
    return _named(flatten(output)[1])


def _named(tree: Tree) -> list[str]:
    return [place or "of the model" for place in tree.places()]


LAZY = frozenset({types.GeneratorType, map, filter, zip})
"""Types that compute only when they are consumed, which is after the call."""


def refuse_lazy(output: Any, name: str = "of the model") -> None:
    """Raise :class:`~funcdelta.errors.EngineError` if an output is lazy: it would be computed after the call.

    >>> refuse_lazy((x for x in [1]))
    Traceback (most recent call last):
    ...
    funcdelta.errors.EngineError: The output of the model is a generator, which computes after the call has ended, ...
    """
    if type(output) in LAZY:
        raise EngineError(
            f"The output {name} is a {type(output).__name__}, which computes after the call has ended, without the "
            f"delta. Return a list of what it yields: [...] instead of (... for ...), list(map(...))."
        )


def check_visible(leaves: Sequence[Any], names: Sequence[str], given: Mapping[str, Any] | None = None) -> None:
    """Raise :class:`~funcdelta.errors.EngineError` if an output hides tensors, which could not be split by member.

    Args:
        given: the call's keyword inputs, for advice that fits the call.

    >>> import types
    >>> check_visible([types.SimpleNamespace(x=torch.zeros(2))], ["boxes"])
    Traceback (most recent call last):
    ...
    funcdelta.errors.EngineError: The output boxes is a SimpleNamespace, whose tensors cannot be split by member. ...
    """
    for leaf, name in zip(leaves, names, strict=True):
        if isinstance(leaf, PLAIN):
            continue
        refuse_lazy(leaf, name or "of the model")
        if is_cache(leaf):
            raise EngineError(
                f"The output {name} is a {type(leaf).__name__}, a cache, which cannot be split by member: "
                f"{_why_cache(given or {})}"
            )
        if holds_tensors(leaf):
            raise EngineError(
                f"The output {name} is a {type(leaf).__name__}, whose tensors cannot be split by member. Return a "
                f"tensor, a tuple, a dict or a dataclass instead."
            )


def _why_cache(given: Mapping[str, Any]) -> str:
    if given.get("use_cache"):
        return f"leave out use_cache={given['use_cache']!r}."
    caches = [name for name, value in given.items() if is_cache(value)]
    if caches:
        return f"the model returns the one passed as {caches[0]}=. Leave that out, and run the whole text."
    if "use_cache" in given:
        return "the model returns one despite use_cache=False. Wrap it in a module that returns the rest."
    return (
        "the model returns one without being asked. Write use_cache=False if its forward passes that on, set "
        "config.use_cache = False, or wrap it in a module that returns the rest."
    )


def apart(output: Any, storages: frozenset[int]) -> Any:
    """``output`` with copies of the tensors that lie in ``storages``, into which later calls write.

    >>> buffer = torch.zeros(2)
    >>> buffer is apart(buffer, frozenset()), buffer is apart(buffer, frozenset({buffer.untyped_storage().data_ptr()}))
    (True, False)
    """
    leaves, tree = flatten(output)
    own = [
        leaf.clone() if type(leaf) is Tensor and not is_wrapped(leaf) and _address(leaf) in storages else leaf
        for leaf in leaves
    ]
    return output if all(map(operator.is_, own, leaves)) else tree(own)


def _address(tensor: Tensor) -> int | None:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided and not tensor.is_nested else None


def stack_members(outputs: Sequence[Any]) -> Any:
    """The outputs of several members, each run alone, stacked to one: every tensor (…) becomes (n, …).

    Numbers that differ become a tensor (n,) and numpy arrays one array (n, …); values that all members share stay as
    they are. Anything else raises :class:`~funcdelta.errors.EngineError` with the name of the output.

    >>> stack_members([{"x": torch.zeros(3), "steps": 2, "kind": "a"}, {"x": torch.ones(3), "steps": 5, "kind": "a"}])
    {'x': tensor([[0., 0., 0.],
            [1., 1., 1.]]), 'steps': tensor([2, 5]), 'kind': 'a'}
    """
    rows, trees = zip(*map(flatten, outputs), strict=True)
    tree, labels = trees[0], _named(trees[0])
    for i, other in enumerate(trees):
        if other != tree:
            raise EngineError(
                f"The output of member {i} has another structure than that of member 0: {', '.join(_named(other))} "
                f"instead of {', '.join(labels)}. Return the same leaves for every member, or call delta.apply for "
                f"each member."
            )
    if not torch.compiler.is_compiling():
        check_visible(rows[0], labels)
    return tree([_joined(name, column) for name, column in zip(labels, zip(*rows, strict=True), strict=True)])


def of_each(leaf: Any, n: int) -> Any:
    """What :func:`stack_members` returns for a leaf that is not a tensor and that ``n`` members share.

    >>> of_each("a", 2), of_each(np.float32(1), 2)
    ('a', array([1., 1.], dtype=float32))
    """
    return np.stack([leaf] * n) if isinstance(leaf, (np.ndarray, np.generic)) else leaf


def join_chunks(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The outputs of several chunks of members joined to one, as :func:`stack_members` would return it for all.

    ``sizes`` says how many members each chunk has. A plain number holds for all members of its chunk.

    >>> join_chunks([{"x": torch.zeros(2), "steps": torch.tensor([5, 6])}, {"x": torch.ones(1), "steps": 7}], [2, 1])
    {'x': tensor([0., 0., 1.]), 'steps': tensor([5, 6, 7])}
    """
    rows, trees = zip(*map(flatten, outputs), strict=True)
    labels = _named(trees[0])
    for other in trees:
        if other != trees[0]:
            raise EngineError(
                f"The outputs of two chunks of members differ in structure: {', '.join(_named(other))} instead of "
                f"{', '.join(labels)}. Return the same leaves for every member, or call delta.apply for each member."
            )
    columns = zip(labels, zip(*rows, strict=True), strict=True)
    return trees[0]([_joined_chunks(name, column, sizes) for name, column in columns])


def _joined_chunks(name: str, column: tuple[Any, ...], sizes: Sequence[int]) -> Any:
    if all(isinstance(leaf, Tensor) for leaf in column):
        return _stacked(name, column, torch.cat)
    if all(isinstance(leaf, np.ndarray) for leaf in column):
        return _stacked(name, column, np.concatenate)
    if any(isinstance(leaf, Tensor) for leaf in column):
        pairs = zip(column, sizes, strict=True)
        column = tuple(_tensor_of([leaf] * n) if isinstance(leaf, NUMBERS) else leaf for leaf, n in pairs)
        if all(isinstance(leaf, Tensor) for leaf in column):
            return _stacked(name, column, torch.cat)
    entries = tuple(leaf for leaf, size in zip(column, sizes, strict=True) for _ in range(size))
    return _joined(name, entries)


NUMBERS = (bool, int, float, complex)


def _joined(name: str, column: tuple[Any, ...]) -> Any:
    first = column[0]
    if all(isinstance(leaf, Tensor) for leaf in column):
        return _stacked(name, column, torch.stack)
    if all(isinstance(leaf, (np.ndarray, np.generic)) for leaf in column):
        return _stacked(name, column, np.stack)
    if all(_same(first, leaf) for leaf in column[1:]):
        return first
    if all(isinstance(leaf, NUMBERS) for leaf in column):
        return _stacked(name, column, _tensor_of)
    kinds = " and ".join(dict.fromkeys(type(leaf).__name__ for leaf in column))
    raise EngineError(
        f"The output {name} differs by member and cannot be stacked ({kinds}). Return a tensor or a number there, or "
        f"call delta.apply for each member."
    )


def _stacked(name: str, column: tuple[Any, ...], stack: Any) -> Any:
    try:
        return stack(list(column))
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        shapes = " and ".join(dict.fromkeys(map(_shape, column)))
        raise EngineError(
            f"The output {name} cannot be stacked over members (shapes {shapes}): {str(error).splitlines()[0]}. "
            f"Return the same shape and kind for every member, or call delta.apply for each member."
        ) from error


def _shape(leaf: Any) -> str:
    return "nested" if isinstance(leaf, Tensor) and leaf.is_nested else str(tuple(np.shape(leaf)))


def _tensor_of(column: list[Any]) -> Tensor:
    """A tensor of numbers in Python's own precision; torch's default dtype could lose digits."""
    if all(isinstance(leaf, bool) for leaf in column):
        return torch.tensor(column, dtype=torch.bool)
    if all(isinstance(leaf, int) for leaf in column):
        return torch.tensor(column, dtype=torch.int64)
    wide = torch.complex128 if any(isinstance(leaf, complex) for leaf in column) else torch.float64
    return torch.tensor(column, dtype=wide)


def _same(a: Any, b: Any) -> bool:
    """Whether two leaves that are not tensors are equal; objects without ``__eq__`` are compared by attributes."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    try:
        return bool(a == b) or bool(a != a and b != b) or (bool(vars(a)) and vars(a) == vars(b))  # a != a: NaN
    except Exception:  # a class's own __eq__ may raise anything
        return False
