"""Params of a delta checked before its calls: in full where one comes in a new shape, else by one look in C.

What :mod:`.check` and :mod:`funcdelta.plan.kinds` find depends on the names of leaves and on their shapes, dtypes,
layouts and on whether they have numbers. Params that have passed with the same pass again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..plan.kinds import Kinds
from ..plan.plan import Plan
from .check import Shapes, check_member, check_stack

MOST = 256
"""How many structures are remembered: members may come in stacks of any size."""


class Checks:
    """The checks of one delta's params, and what has passed them.

    >>> delta = fd.BitFitModel(torch.nn.Sequential(torch.nn.Linear(2, 2)), modified_modules=["0"])
    >>> checks = Checks(delta.shapes, delta.plan.keys(), {}, delta.plan.kinds)
    >>> checks.member(delta.init(0), "one"), checks.stack(delta.init(0, n=3), "three"), checks.passed
    ((1, {}), (3, {}), {'one': (1, {}), 'three': (3, {})})
    """

    def __init__(self, shapes: Shapes, groups: Mapping[str, frozenset[str]], others: Shapes, kinds: Kinds) -> None:
        self.shapes, self.groups, self.others, self.kinds = shapes, groups, others, kinds
        self.passed: dict[Hashable, tuple[int, dict[str, torch.dtype]]] = {}

    def member(self, params: Any, key: Hashable | None = None) -> tuple[int, dict[str, torch.dtype]]:
        """One, and the constants to be converted; remembered by ``key``, if there is one.

        Raises ``ParamsError`` unless ``params`` are one member's.
        """
        check_member(params, self.shapes, self.groups, self.others)
        return self._of_kinds(1, params, key)

    def stack(self, params: Any, key: Hashable | None = None) -> tuple[int, dict[str, torch.dtype]]:
        """The number of members, and the constants to be converted, with their dtypes.

        Raises ``ParamsError`` unless ``params`` are a stack.
        """
        return self._of_kinds(check_stack(params, self.shapes, self.groups, self.others), params, key)

    def is_stack(self, params: Any) -> bool:
        """Whether ``params`` are a stack; raises ``ParamsError`` unless they are one, or one member's."""
        given = params if isinstance(params, Mapping) else {}
        stacked = any(
            isinstance(leaf, Tensor) and not leaf.is_nested and leaf.ndim > len(self.shapes[name])
            for name, leaf in given.items()
            if name in self.shapes
        )
        (self.stack if stacked else self.member)(params)
        return stacked

    def _of_kinds(self, n: int, params: Any, key: Hashable | None) -> tuple[int, dict[str, torch.dtype]]:
        mixed = self.kinds.check(params)
        found = n, self.kinds.casts(params)
        # What autocast lets pass does not pass without it.
        if key is not None and not mixed:
            if len(self.passed) >= MOST:
                self.passed.clear()
            with contextlib.suppress(TypeError):  # symbolic sizes, which no table takes
                self.passed[key] = found
        return found


class Described(Protocol):
    """A delta: the shapes of its leaves, and its plan."""

    @property
    def shapes(self) -> Shapes: ...

    @property
    def plan(self) -> Plan: ...


def checks_of(delta: Described) -> Checks:
    """The checks of params that hold leaves of ``delta`` and nothing else.

    >>> delta = fd.BitFitModel(torch.nn.Sequential(torch.nn.Linear(2, 2)), modified_modules=["0"])
    >>> checks_of(delta).is_stack(delta.init(0)), checks_of(delta).is_stack(delta.init(0, n=2))
    (False, True)
    """
    return Checks(delta.shapes, delta.plan.keys(), {}, delta.plan.kinds)
