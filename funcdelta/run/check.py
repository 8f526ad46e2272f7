"""Checks params before a call: every key known, every leaf complete and of its shape, one member or a stack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ParamsError, StackError, shown
from ..match import near

Shapes = Mapping[str, tuple[int, ...]]


def check_member(params: Any, shapes: Shapes, groups: Mapping[str, frozenset[str]], others: Shapes) -> None:
    """One member: ``params[name]`` has ``shapes[name]``; backbone names (``others``) may stand among them."""
    _check(params, shapes, groups, others, None)


def check_stack(params: Any, shapes: Shapes, groups: Mapping[str, frozenset[str]], others: Shapes) -> int:
    """A stack: every leaf has one member axis before its shape. The number of members."""
    if not isinstance(params, Mapping) or not params:
        raise ParamsError(
            f"A stack is a dict {{name: tensor}} with a member axis on every leaf; found {type(params).__name__} with "
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
                f"delta.apply(params, ...), "
                f"or make it a stack with fd.stack([params])."
            )
        n = shape[0] if shape else None
    for name in params:
        if name in others:
            raise ParamsError(
                f"{name} is the backbone's own; in a stack only trained leaves may stand beside the deltas: name it in "
                f"unfrozen_modules=['deltas', '{name}'], or leave it out."
            )
    if n == 0:
        raise StackError("A stack needs at least one member; this one has none, so there is nothing to run.")
    _check(params, shapes, groups, {}, n if n is not None else -1)
    if n is None:
        raise ParamsError(f"A stack has leaves of this delta; found {', '.join(map(shown, [*params][:3]))}.")
    return n


def _shape(leaf: Any) -> tuple[int, ...] | None:
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else None


def _check(params: Any, shapes: Shapes, groups: Mapping[str, frozenset[str]], others: Shapes, n: int | None) -> None:
    if not isinstance(params, Mapping):
        raise ParamsError(
            f"params is a dict {{name: tensor}}, as delta.init(seed) gives it; found {type(params).__name__}. "
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
                    f"params has the key {shown(name)}, which is no leaf of this delta.{near(name[-200:], [*shapes])}"
                )
        else:
            found += 1
        given = leaf.shape if isinstance(leaf, Tensor) else None
        if given != (shape if n is None else (n, *shape)):
            _wrong_shape(name, leaf, shape, n)
    if found != len(shapes):
        # Each delta and each trained leaf is there or not as a whole.
        for group in groups.values():
            missing = [name for name in shapes if name in group and name not in params]
            if missing and len(missing) < len(group):
                raise ParamsError(
                    f"params lacks {len(missing)} of the {len(group)} leaves of one delta, the first is "
                    f"{missing[0]!r}. Give "
                    f"all of them, or none to run without that delta."
                )


def _is_dense(name: Any, leaf: Any) -> None:
    if not isinstance(name, str):
        raise ParamsError(f"params has the key {shown(name)}; keys are the dotted names of leaves, as in delta.names.")
    if isinstance(leaf, Tensor) and (leaf.is_meta or leaf.layout != torch.strided or leaf.is_nested):
        kind = "on the device meta" if leaf.is_meta else "nested" if leaf.is_nested else f"of the layout {leaf.layout}"
        raise ParamsError(f"{name} is {kind}; expected a dense tensor with numbers.")


def _wrong_shape(name: str, leaf: Any, shape: tuple[int, ...], n: int | None) -> None:
    if not isinstance(leaf, Tensor):
        raise ParamsError(f"{name} is a {type(leaf).__name__}; expected a tensor of the shape {shape}.")
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
            f"n={n}, as of the leaves before it. The first axis of every leaf of a stack is the member axis."
        )
    raise ParamsError(f"{name} has the shape {given}; expected {expected}.")
