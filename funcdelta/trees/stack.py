"""Stacks members, takes some of a stack, and joins stacks; the member axis is the first axis of every leaf.

Every function takes any pytree of tensors (params, gradients, an optimiser's state). A leaf that is not a tensor (a
Python number, ``None``) is shared by all members and passes unchanged.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ParamsError, shown
from ..kinds import count
from ..transforms import is_wrapped
from .constants import marked
from .leaves import align, check_tree, dense, leading, named, not_dense
from .seeding import derive, seeds
from .selecting import Selector, combine, partition, select

__all__ = [
    "Selector",
    "broadcast",
    "cat",
    "combine",
    "derive",
    "members",
    "partition",
    "seeds",
    "select",
    "stack",
    "take",
    "unstack",
]

Tree = TypeVar("Tree")


def stack(trees: Iterable[Tree]) -> Tree:
    """Stack members: every leaf of the result is ``torch.stack`` of the members' leaves, with a leading axis n.

    All trees must have the same structure (dict order does not matter), and leaves the same shape, dtype and device;
    ``ParamsError`` names the leaf that differs.

    >>> stack([{"a": torch.zeros(2)}, {"a": torch.ones(2)}])
    {'a': tensor([[0., 0.],
            [1., 1.]])}
    """
    return _join(trees, "stack", "member", torch.stack, skip=0)


def unstack(stack: Tree) -> list[Tree]:
    """The members of a stack, in order: the inverse of :func:`stack`. The leaves are views.

    >>> unstack({"a": torch.tensor([1.0, 2.0])})
    [{'a': tensor(1.)}, {'a': tensor(2.)}]
    """
    n = members(stack)
    leaves, spec = pytree.tree_flatten(stack)
    columns = [
        [marked(row, leaf) for row in leaf.unbind(0)] if isinstance(leaf, Tensor) else [leaf] * n for leaf in leaves
    ]
    return [pytree.tree_unflatten(list(row), spec) for row in zip(*columns, strict=True)]


def take(stack: Tree, index: int | slice | Sequence[int] | Tensor) -> Tree:
    """Some members of a stack: one member for an int, a smaller stack for a list, 1-D tensor or slice.

    A 0-d integer tensor selects one member, too. A boolean mask selects the members where it is true. An int or a slice
    returns views, other indices copies. Raises ``ParamsError`` if a member does not exist.

    >>> s = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])}
    >>> take(s, -1)
    {'a': tensor([5., 6.])}
    >>> take(s, [2, 0])
    {'a': tensor([[5., 6.],
            [1., 2.]])}
    >>> take(s, slice(1, 2))
    {'a': tensor([[3., 4.]])}
    """
    where = _where(index, members(stack))

    def pick(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not isinstance(where, Tensor):
            return marked(leaf[where], leaf)
        chosen = where.to(leaf.device)
        # A 0-d index becomes a list of one, because leaf[tensor] would read it as a number, which fails under vmap.
        return marked(leaf[chosen] if chosen.ndim else leaf[chosen.reshape(1)].squeeze(0), leaf)

    try:
        return pytree.tree_map(pick, stack)
    except IndexError as error:  # an index whose values a transform hides
        raise ParamsError(f"There is no such member: {error}. The stack has {members(stack)} members.") from error


def _where(index: Any, n: int) -> int | slice | Tensor:
    """``index`` in a form that torch reads correctly, after checking that its members are among ``n``."""
    if isinstance(index, Tensor):
        return _rows(index, n)
    if isinstance(index, slice):
        try:
            chosen = range(n)[index]
        except (TypeError, ValueError) as error:
            raise ParamsError(f"{index} cannot select members: {error}.") from None
        return index if chosen.step > 0 else torch.tensor(list(chosen), dtype=torch.long, device="cpu")
    if hasattr(index, "tolist"):  # numpy arrays and numbers
        index = index.tolist()
    if not isinstance(index, Iterable):
        return _row(index, n)
    rows = list(index)
    if rows and all(isinstance(row, bool) for row in rows):
        return _rows(torch.tensor(rows, device="cpu"), n)
    return torch.tensor([_row(row, n) for row in rows], dtype=torch.long, device="cpu")


def _rows(index: Tensor, n: int) -> Tensor:
    """An index tensor or mask, after checking that its members are among ``n``."""
    if index.layout is not torch.strided or index.is_nested or index.is_quantized:
        kind = "nested" if index.is_nested else f"{index.dtype}, {index.layout}"
        raise ParamsError(f"An index tensor must be dense; found one that is {kind}. Write a list of integers.")
    if index.ndim > 1 or index.is_floating_point() or index.is_complex():
        raise ParamsError(
            f"An index tensor must have shape () or (k,) and integers or booleans; found shape {tuple(index.shape)}, "
            f"{index.dtype}."
        )
    if index.device.type == "meta":
        raise ParamsError("An index tensor on the meta device has no values, so it selects no members.")
    if index.dtype == torch.bool:
        if tuple(index.shape) != (n,):
            raise ParamsError(f"A mask over {n} members must have shape ({n},); found {tuple(index.shape)}.")
        return index
    index = index.long()  # torch reads uint8 as a mask
    if not torch.compiler.is_compiling() and not is_wrapped(index):
        flat = index.reshape(-1)
        beyond = flat[(flat < -n) | (flat >= n)]
        if beyond.numel():
            raise ParamsError(_no_member(int(beyond[0]), n))
    return index


def cat(stacks: Iterable[Tree]) -> Tree:
    """Concatenate stacks; the numbers of members add up, n = n_0 + n_1 + ….

    >>> cat([{"a": torch.ones(2, 3)}, {"a": torch.zeros(1, 3)}])["a"].shape
    torch.Size([3, 3])
    """
    stacks = list(stacks)
    for one in stacks:
        members(one)
    return _join(stacks, "cat", "stack", torch.cat, skip=1)


def broadcast(params: Tree, n: int) -> Tree:
    """A stack of ``n`` equal members, whose leaves are expanded views without copies.

    >>> broadcast({"a": torch.ones(3)}, 4)["a"].shape
    torch.Size([4, 3])
    """
    size = count(n, "n", "members the stack has", least=1)
    check_tree(params)
    for name, leaf in named(params):
        if isinstance(leaf, Tensor):
            dense(name, leaf)
    return pytree.tree_map_only(Tensor, lambda leaf: marked(leaf.expand(size, *leaf.shape), leaf), params)


def members(stack: Any) -> int:
    """The number of members n: the length of the first axis of every leaf.

    Raises ``StackError`` naming a leaf without a member axis, or two leaves that disagree.

    >>> members({"a": torch.ones(3, 2), "b": torch.ones(3)})
    3
    """
    return leading(stack)


def checked_chunk(chunk_size: int, of: str = "members") -> int:
    """``chunk_size`` as an int; raises ``ParamsError`` unless it is a whole number of at least 1.

    >>> checked_chunk(2)
    2
    """
    return count(chunk_size, "chunk_size", f"{of} run at a time", least=1, most=sys.maxsize)


def slices(n: int, chunk_size: int) -> list[slice]:
    """The slices of n members into chunks of ``chunk_size``; the last one may be shorter.

    Raises ``ParamsError`` unless ``chunk_size`` is a whole number of at least 1.

    >>> slices(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    step = checked_chunk(chunk_size)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _join(trees: Iterable[Any], function: str, what: str, join: Callable[..., Tensor], skip: int) -> Any:
    """Apply ``join([leaf_0, leaf_1, ...])`` to every leaf; shapes must agree after the first ``skip`` axes."""
    if isinstance(trees, Mapping):
        raise ParamsError(f"{function} takes a list of pytrees; found one dict. Write fd.{function}([params, ...]).")
    if not isinstance(trees, Iterable) or isinstance(trees, str | Tensor):
        raise ParamsError(
            f"{function} takes a list of pytrees; found {type(trees).__name__}. Write fd.{function}([params, ...])."
        )
    trees = list(trees)
    if not trees:
        raise ParamsError(f"{function} needs at least one {what}; found an empty list.")
    for tree in trees:
        check_tree(tree)
    rows = [align(trees[0], tree, first_is=f"{what} 0", other_is=f"{what} {i}") for i, tree in enumerate(trees)]
    joined = []
    for position, column in enumerate(zip(*rows, strict=True)):
        first = column[0]
        for index, leaf in enumerate(column):
            problem = _difference(first, leaf, f"that of {what} 0", skip)
            if problem:
                name = named(trees[0])[position][0]
                raise ParamsError(f"Leaf {shown(name)} of {what} {index} {problem}")
        joined.append(marked(join(column), *column) if isinstance(first, Tensor) else first)
    return pytree.tree_unflatten(joined, pytree.tree_structure(trees[0]))


def _difference(first: Any, leaf: Any, first_is: str, skip: int) -> str:
    """Why ``leaf`` cannot be joined with ``first``, or an empty string."""
    if not isinstance(first, Tensor) or not isinstance(leaf, Tensor):
        if type(first) is type(leaf) and first == leaf:
            return ""
        return f"is {_kind(leaf)}; {first_is} is {_kind(first)}. Only tensors may differ between members."
    if problem := not_dense(leaf):
        return problem
    if leaf.shape[skip:] != first.shape[skip:]:
        after = " after the member axis" if skip else ""
        return (
            f"has shape {tuple(leaf.shape)}; {first_is} has {tuple(first.shape)}. "
            f"Members of one stack have equal shapes{after}: keep members of other shapes in other stacks."
        )
    if leaf.dtype != first.dtype:
        return f"is {leaf.dtype}; {first_is} is {first.dtype}. Convert one: leaf.to({first.dtype})."
    if leaf.device != first.device:
        place = str(first.device)
        return f"is on {leaf.device}; {first_is} on {place}. Move one: leaf.to({place!r})."
    return ""


def _kind(leaf: Any) -> str:
    """What an error message calls a leaf."""
    return f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)


def _row(row: Any, n: int) -> int:
    """``row`` as an index of one of ``n`` members; negative indices count from the end."""
    try:
        index = operator.index(row)
    except TypeError:
        raise ParamsError(
            f"Members are selected by an int, a list or 1-D tensor of ints, or a slice; found {row!r} "
            f"({type(row).__name__})."
        ) from None
    if isinstance(row, bool) or not -n <= index < n:
        raise ParamsError(_no_member(row, n))
    return index


def _no_member(row: Any, n: int) -> str:
    has = f"{n} members, 0 to {n - 1}" if n else "no members"
    return f"There is no member {shown(row)}: the stack has {has}."
