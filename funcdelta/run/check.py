"""Checks params before a call: are all keys known, all leaves there, and do their shapes fit one member or a stack?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ParamsError, StackError, shown
from ..match import near

Shapes = Mapping[str, tuple[int, ...]]


def check_member(params: Any, shapes: Shapes, groups: Mapping[str, frozenset[str]], others: Shapes) -> None:
    """Raise unless ``params`` are one member's: ``params[name]`` has the shape ``shapes[name]``.

    Args:
        groups: the leaves of each delta and of each trained tensor, which are given together or not at all.
        others: the shapes of the backbone's own tensors, which may be given too.
    """
    _check(params, shapes, groups, others, None)


def check_stack(params: Any, shapes: Shapes, groups: Mapping[str, frozenset[str]], others: Shapes) -> int:
    """The number of members n of a stack, whose leaves have the shapes ``(n, *shapes[name])``; raises if it is none."""
    if not isinstance(params, Mapping) or not params:
        raise ParamsError(
            f"A stack is a dict {{name: tensor}} whose leaves have a member axis; found {type(params).__name__} with "
            f"{len(params) if isinstance(params, Mapping) else 0} leaves. Make one with delta.init(seed, n=...)."
        )
    for name, leaf in params.items():
        _is_dense(name, leaf)
    name = next((name for name in params if name in shapes), None)
    n = None
    if name is not None and isinstance(params[name], Tensor):
        shape = tuple(params[name].shape)
        if shape == shapes[name] and all(_shape(params[k]) == shapes[k] for k in params if k in shapes):
            raise StackError(
                f"This is one member: {name} has the shape {shape}, without a member axis. Write "
                f"delta.apply(params, ...), or make it a stack with fd.stack([params])."
            )
        n = shape[0] if shape else None
    for name in params:
        if name in others:
            raise ParamsError(
                f"{name} belongs to the backbone, and a stack can hold it only if it is trained: name it in "
                f"unfrozen_modules=['deltas', '{name}'], or leave it out."
            )
    if n == 0:
        raise StackError("This stack has no members (n=0), so there is nothing to run; give at least one.")
    _check(params, shapes, groups, {}, n if n is not None else -1)
    if n is None:
        found = ", ".join(map(shown, [*params][:3]))
        raise ParamsError(f"None of the keys of this stack is a leaf of this delta, as in delta.names; found {found}.")
    return n


def _shape(leaf: Any) -> tuple[int, ...] | None:
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else None


def _check(params: Any, shapes: Shapes, groups: Mapping[str, frozenset[str]], others: Shapes, n: int | None) -> None:
    if not isinstance(params, Mapping):
        raise ParamsError(
            f"params is a dict {{name: tensor}}, as delta.init(seed) returns it; found {type(params).__name__}. "
            f"Write delta.apply(params, inputs...)."
        )
    found = 0
    for name, leaf in params.items():
        _is_dense(name, leaf)
        shape = shapes.get(name)
        if shape is None:
            shape = others.get(name)
            if shape is None:
                raise ParamsError(
                    f"params has the key {shown(name)}, which is not a leaf of this delta."
                    f"{near(name[-200:], [*shapes])}"
                )
        else:
            found += 1
        given = leaf.shape if isinstance(leaf, Tensor) else None
        if given != (shape if n is None else (n, *shape)):
            _wrong_shape(name, leaf, shape, n)
    if found != len(shapes):
        # A delta that is left out as a whole is allowed: the call then runs without it.
        for group in groups.values():
            missing = [name for name in shapes if name in group and name not in params]
            if missing and len(missing) < len(group):
                raise ParamsError(
                    f"params lacks {len(missing)} of the {len(group)} leaves of one delta, first {missing[0]!r}. Give "
                    f"all of them, or none to run without that delta."
                )


def _is_dense(name: Any, leaf: Any) -> None:
    if not isinstance(name, str):
        raise ParamsError(f"params has the key {shown(name)}; keys are the dotted names of leaves, as in delta.names.")
    if isinstance(leaf, Tensor) and (leaf.is_meta or leaf.layout != torch.strided or leaf.is_nested):
        kind = "on the meta device" if leaf.is_meta else "nested" if leaf.is_nested else f"of layout {leaf.layout}"
        raise ParamsError(f"{name} is {kind}; expected a dense tensor that holds numbers.")


def _wrong_shape(name: str, leaf: Any, shape: tuple[int, ...], n: int | None) -> None:
    if not isinstance(leaf, Tensor):
        raise ParamsError(f"{name} is a {type(leaf).__name__}; expected a tensor of shape {shape}.")
    given = tuple(leaf.shape)
    if n is None and given[1:] == shape and len(given) == len(shape) + 1:
        raise StackError(
            f"This is a stack of {given[0]} members: {name} has the shape {given} where one member has {shape}. Write "
            f"delta.apply_many(stack, ...), or pick one with fd.take(stack, 0)."
        )
    expected = f"({', '.join(map(str, ('n', *shape)))})" if n is not None else str(shape)
    if n is not None and given[1:] == shape and len(given) == len(shape) + 1:
        raise StackError(
            f"Leaves disagree about the number of members: {name} has the shape {given}; expected {expected} with "
            f"n={n}, as in the leaves before it. The first axis of every leaf of a stack is the member axis."
        )
    raise ParamsError(f"{name} has the shape {given}; expected {expected}.")
