"""Splits a flat dict of leaves by name, and joins the parts again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import MatchError, ParamsError, shown
from ..match import as_names, matches, near
from .leaves import check_tree

__all__ = ["Selector", "combine", "partition", "select"]

Selector = str | Iterable[str] | Callable[..., bool]


def partition(params: Mapping[str, Any], targets: Selector) -> tuple[dict[str, Any], dict[str, Any]]:
    """``(some, rest)``: two flat dicts with disjoint keys; each keeps the order of ``params``.

    ``targets`` is a predicate, ``keep(name)`` or ``keep(name, leaf)`` (two parameters without default), or names. A
    name selects every leaf whose dotted name contains it as a run of whole tokens: the leaf itself (``"lora_A"``) or a
    module that contains it (``"layer.0"``, which is not ``layer.10``). ``"[r]pattern"`` matches the same by a regular
    expression. A name that selects no leaf raises ``MatchError`` with near names; a predicate may select nothing.

    >>> p = {"layer.0.q.lora_A": 1, "layer.0.q.lora_B": 2, "layer.10.q.lora_A": 3, "head.weight": 4}
    >>> partition(p, "layer.0")
    ({'layer.0.q.lora_A': 1, 'layer.0.q.lora_B': 2}, {'layer.10.q.lora_A': 3, 'head.weight': 4})
    >>> partition(p, ["lora_A", "head"])[1]
    {'layer.0.q.lora_B': 2}
    >>> partition(p, lambda name: name.startswith("head"))[0]
    {'head.weight': 4}
    """
    if not isinstance(params, Mapping):
        raise ParamsError(f"partition takes a flat dict {{name: tensor}}; found {type(params).__name__}.")
    chosen = select(params, targets)
    some = {name: leaf for name, leaf in params.items() if name in chosen}
    return some, {name: leaf for name, leaf in params.items() if name not in chosen}


def select(params: Mapping[str, Any], targets: Selector) -> set[str]:
    """The names that ``targets`` selects; see :func:`partition`.

    >>> sorted(select({"a.w": 1, "a.b": 2, "c.w": 3}, "a"))
    ['a.b', 'a.w']
    """
    check_tree(params)
    if callable(targets):
        wants_leaf = _takes_leaf(targets)
        return {name for name, leaf in params.items() if (targets(name, leaf) if wants_leaf else targets(name))}
    chosen: set[str] = set()
    for target in as_names(targets):
        found = {name for name in params if any(matches(prefix, target) for prefix in _prefixes(name))}
        if not found:
            raise MatchError(f"No leaf is called {target!r} or is in a module of that name.{_near(target, params)}")
        chosen |= found
    return chosen


def combine(*parts: Mapping[str, Any], order: Iterable[str] | None = None) -> dict[str, Any]:
    """Join dicts with disjoint keys into one: the inverse of :func:`partition`.

    Keys are in the order of the parts. So ``combine(*partition(p, ...))`` equals ``p``, but its order may differ, which
    matters only where leaves are not looked up by name, as in ``fd.tree.ravel``. ``order=p`` (or ``delta.names``)
    restores an order; it may contain further names. Raises ``ParamsError`` for a key given twice.

    >>> p = {"a": 1, "b": 2, "c": 3}
    >>> combine(*partition(p, ["b"]))
    {'b': 2, 'a': 1, 'c': 3}
    >>> combine(*partition(p, ["b"]), order=p)
    {'a': 1, 'b': 2, 'c': 3}
    """
    whole: dict[str, Any] = {}
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping):
            raise ParamsError(
                f"combine takes dicts; argument {index} is a {type(part).__name__}. Write fd.combine(some, rest)."
            )
        check_tree(part)
        for name, leaf in part.items():
            if name in whole:
                raise ParamsError(f"Leaf {shown(name)} is given twice, the second time in argument {index}.")
            whole[name] = leaf
    if order is None:
        return whole
    ordered = {name: whole[name] for name in order if name in whole}
    if len(ordered) < len(whole):
        name = next(name for name in whole if name not in ordered)
        raise ParamsError(f"order does not name the leaf {name!r}.")
    return ordered


def _takes_leaf(predicate: Callable[..., Any]) -> bool:
    """Whether ``predicate`` takes ``(name, leaf)``, that is, has two parameters without a default."""
    try:
        parameters = inspect.signature(predicate).parameters.values()
    except ValueError:
        return False
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [one for one in parameters if one.default is one.empty and one.kind in places]
    if len(required) > 2:
        names = ", ".join(one.name for one in required)
        raise ParamsError(f"A predicate must take (name) or (name, leaf); found one that takes ({names}).")
    return len(required) == 2


def _prefixes(name: str) -> list[str]:
    """The leaf's name and those of the modules that contain it, longest first."""
    tokens = name.split(".")
    return [".".join(tokens[:end]) for end in range(len(tokens), 0, -1)]


def _near(target: str, params: Iterable[str]) -> str:
    """A sentence with the names near ``target`` among the leaves and the modules that contain them."""
    return near(target, list(dict.fromkeys(prefix for name in params for prefix in _prefixes(name))))
