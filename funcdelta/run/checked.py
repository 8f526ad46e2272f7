"""The checks of a delta's params before its calls, remembered for params that look the same.

What :mod:`.check` and :mod:`funcdelta.plan.kinds` find depends only on the names of the leaves, their shapes, dtypes
and layouts, and on whether they hold numbers: params that agree in these with some that passed need no second check.
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
"""How many structures are remembered; there is one for each size of a stack."""


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
        """``(1, dtypes)``, where ``dtypes`` says which constants to convert to what; remembered by ``key``.

        Raises ``ParamsError`` unless ``params`` are one member's.
        """
        check_member(params, self.shapes, self.groups, self.others)
        return self._of_kinds(1, params, key)

    def stack(self, params: Any, key: Hashable | None = None) -> tuple[int, dict[str, torch.dtype]]:
        """``(n, dtypes)`` of a stack of n members, as for :meth:`member`; raises ``ParamsError`` unless it is one."""
        return self._of_kinds(check_stack(params, self.shapes, self.groups, self.others), params, key)

    def is_stack(self, params: Any) -> bool:
        """Whether ``params`` are a stack; raises ``ParamsError`` unless they are either one member's or a stack."""
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
        # Mixed dtypes pass under autocast alone, and the key does not say whether it is on.
        if key is not None and not mixed:
            if len(self.passed) >= MOST:
                self.passed.clear()
            with contextlib.suppress(TypeError):  # symbolic sizes cannot be hashed
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
