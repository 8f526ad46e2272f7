"""Leaves of a pytree: their dotted names, checks of their kind, and the alignment of two pytrees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ParamsError, StackError, shown

__all__ = ["align", "check_leaves", "check_tree", "compute_dtype", "dense", "is_flat", "leading", "like", "named"]

Tree = TypeVar("Tree")


def named(tree: Any) -> list[tuple[str, Any]]:
    """``(name, leaf)`` of every leaf of ``tree``, in torch's order (dicts keep insertion order).

    A flat dict's names are its keys; in nested trees, keys, positions and field names are joined with dots.

    >>> [name for name, _ in named({"a.lora_A": torch.ones(1), "moments": ({"b": torch.ones(1)}, 3)})]
    ['a.lora_A', 'moments.0.b', 'moments.1']
    """
    if is_flat(tree):
        return [(str(key), leaf) for key, leaf in tree.items()]
    pairs, _ = pytree.tree_flatten_with_path(tree)
    return [(".".join(_token(entry) for entry in path), leaf) for path, leaf in pairs]


def is_flat(tree: Any) -> bool:
    """Whether ``tree`` is a dict of tensors, like params, for which torch's general flattening would be slow.

    >>> is_flat({"a": torch.ones(1)}), is_flat({"a": [torch.ones(1)]})
    (True, False)
    """
    return type(tree) is dict and all(isinstance(leaf, Tensor) for leaf in tree.values())


def like(tree: Tree, leaves: Iterable[Any]) -> Tree:
    """``leaves``, in the order of :func:`named`, in the structure of ``tree``.

    >>> like({"a": 1, "b": (2, 3)}, [10, 20, 30])
    {'a': 10, 'b': (20, 30)}
    """
    if is_flat(tree):
        found: Any = dict(zip(tree, leaves, strict=True))  # pyright: ignore[reportArgumentType, reportCallIssue]
        return found
    return pytree.tree_unflatten(leaves, pytree.tree_structure(tree))


def _token(entry: Any) -> str:
    """One step of a path: the key of a dict, the field of a named tuple, the position in a list."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def check_tree(tree: Any, path: str = "") -> None:
    """Raise ``ParamsError`` unless every key of every dict in ``tree`` is a string, because leaves go by names.

    It refuses numpy arrays, too, which would otherwise be passed on unchanged, like settings.

    >>> check_tree({0: torch.ones(1)})
    Traceback (most recent call last):
    ...
    funcdelta.errors.ParamsError: Names of leaves are strings; found the key 0 (int). Write {str(key): leaf ...}.
    """
    if isinstance(tree, Tensor):
        return
    parts: Iterable[tuple[Any, Any]]
    if isinstance(tree, Mapping):
        for key in tree:
            if not isinstance(key, str):
                raise ParamsError(
                    f"Names of leaves are strings; found the key {shown(key)} ({type(key).__name__}). "
                    "Write {str(key): leaf ...}."
                )
        parts = tree.items()
    elif not isinstance(tree, list | tuple):
        if hasattr(tree, "__array__") and getattr(tree, "ndim", 0):
            at = f"; {shown(path)} is" if path else "; found"
            raise ParamsError(f"Leaves are tensors{at} a {type(tree).__name__}. Write torch.as_tensor(leaf).")
        return
    else:
        parts = enumerate(tree)
    for key, part in parts:
        if not isinstance(part, Tensor):
            check_tree(part, f"{path}.{key}" if path else str(key))


def dense(name: str, leaf: Tensor) -> Tensor:
    """``leaf``, if it is a plain strided tensor; ``ParamsError`` for sparse, nested and quantised ones.

    >>> dense("w", torch.eye(2).to_sparse())
    Traceback (most recent call last):
    ...
    funcdelta.errors.ParamsError: Leaf 'w' is torch.sparse_coo, but params are dense tensors. Write leaf.to_dense().
    """
    problem = not_dense(leaf)
    if problem:
        raise ParamsError(f"Leaf {shown(name)} {problem}")
    return leaf


def not_dense(leaf: Tensor) -> str:
    """Why ``leaf`` cannot be a leaf of params, and what to write, to follow its name; empty for plain tensors.

    >>> not_dense(torch.eye(2).to_sparse())
    'is torch.sparse_coo, but params are dense tensors. Write leaf.to_dense().'
    """
    if leaf.layout is not torch.strided:
        return f"is {leaf.layout}, but params are dense tensors. Write leaf.to_dense()."
    if leaf.is_nested:
        return "is a nested tensor, but params are dense. Write leaf.to_padded_tensor(0.0)."
    if leaf.is_quantized:
        return f"is quantised, {leaf.dtype}, but params are plain numbers. Write leaf.dequantize()."
    return ""


def check_leaves(params: Any, what: str) -> None:
    """Raise ``ParamsError`` unless ``params`` is a flat dict ``{name: dense tensor with values}``.

    ``what`` begins the message.

    >>> check_leaves({"a": [1.0]}, "save")
    Traceback (most recent call last):
    ...
    funcdelta.errors.ParamsError: save: 'a' is a list; expected a tensor.
    """
    if not isinstance(params, Mapping):
        raise ParamsError(
            f"{what}: expected a dict of tensors by name, as delta.init returns; found {type(params).__name__}."
        )
    for name, leaf in params.items():
        if not isinstance(name, str):
            raise ParamsError(
                f"{what}: found the key {shown(name)} ({type(name).__name__}); expected names of leaves, as in "
                f"delta.names."
            )
        if not isinstance(leaf, Tensor):
            raise ParamsError(f"{what}: {shown(name)} is a {type(leaf).__name__}; expected a tensor.")
        if dense(name, leaf).is_meta:
            raise ParamsError(f"{what}: {shown(name)} is on the meta device; expected a tensor with values.")


def align(first: Any, other: Any, *, first_is: str, other_is: str) -> list[Any]:
    """The leaves of ``other`` in the order of ``first``; dicts are matched by key, in any order.

    ``first_is`` and ``other_is`` are what the error calls the trees.

    >>> align({"a": 1, "b": 2}, {"b": 20, "a": 10}, first_is="params", other_is="updates")
    [10, 20]
    >>> align({"a": 1, "b": 2}, {"a": 10}, first_is="params", other_is="updates")
    Traceback (most recent call last):
    ...
    funcdelta.errors.ParamsError: Leaf 'b' is in params but not in updates. Both need the same keys.
    """
    if is_flat(first) and is_flat(other) and list(first) == list(other):
        return list(other.values())
    spec = pytree.tree_structure(first)
    leaves, found = pytree.tree_flatten(other)
    if spec == found:
        return leaves
    expected_names, found_names = ([name for name, _ in named(tree)] for tree in (first, other))
    for names, others, here, there in (
        (expected_names, found_names, first_is, other_is),
        (found_names, expected_names, other_is, first_is),
    ):
        missing = set(names) - set(others)
        if missing:
            name = next(name for name in names if name in missing)
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ParamsError(f"Leaf {shown(name)}{more} is in {here} but not in {there}. Both need the same keys.")
    try:
        return spec.flatten_up_to(other)
    except ValueError as error:
        raise ParamsError(f"{first_is} and {other_is} differ in their containers: {error}") from error


def leading(tree: Any, names_of_interest: Sequence[str] | None = None) -> int:
    """The length of the member axis, which must be the same for all tensor leaves of ``tree``.

    ``names_of_interest`` limits the check to those leaves. Raises ``StackError`` naming a leaf without a member axis,
    or two leaves that disagree.

    >>> leading({"a": torch.ones(3, 2), "b": torch.ones(3)})
    3
    """
    check_tree(tree)
    pairs = [(name, dense(name, leaf)) for name, leaf in named(tree) if isinstance(leaf, Tensor)]
    if names_of_interest is not None:
        wanted = set(names_of_interest)
        pairs = [pair for pair in pairs if pair[0] in wanted]
    if not pairs:
        raise StackError(
            "A stack without tensor leaves has no number of members. Make one with leaves: delta.init(seed, n=...)."
        )
    first_name, first = pairs[0]
    # Leaves without any axis come first: "one member, not a stack" explains more than two shapes that disagree.
    for name, leaf in sorted(pairs, key=lambda pair: pair[1].ndim > 0):
        if leaf.ndim == 0:
            raise StackError(
                f"Leaf {shown(name)} has shape () and so no member axis; this is one member, not a stack. "
                "Make a stack with fd.stack([params, ...]), delta.init(seed, n=...) or, for an optimiser's state, "
                "opt.init(stack, n=...)."
            )
        if leaf.shape[0] != first.shape[0]:
            raise StackError(
                f"Leaves disagree about the number of members: {shown(first_name)} has shape "
                f"{tuple(first.shape)}, {shown(name)} has {tuple(leaf.shape)}. The first axis of every leaf of a "
                "stack is the member axis."
            )
    return first.shape[0]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 for half precision, else ``dtype`` itself.

    >>> compute_dtype(torch.bfloat16), compute_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
