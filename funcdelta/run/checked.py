"""Params of a delta checked before its calls: in full where one comes in a new shape, else by one look in C.

What :mod:`.check` and :mod:`funcdelta.planning.kinds` find depends on the names of leaves and on their shapes, dtypes,
layouts and on whether they have numbers. Params that have passed with the same pass again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from ..planning.kinds import Kinds
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
        mixed = self.kinds.check(params)
        found = 1, self.kinds.casts(params)
        if not mixed:
            self._remember(key, found)
        return found

    def stack(self, params: Any, key: Hashable | None = None) -> tuple[int, dict[str, torch.dtype]]:
        """The number of members, and the constants to be converted, with their dtypes.

        Raises ``ParamsError`` unless ``params`` are a stack.
        """
        n = check_stack(params, self.shapes, self.groups, self.others)
        mixed = self.kinds.check(params)
        found = n, self.kinds.casts(params)
        if not mixed:
            self._remember(key, found)
        return found

    def _remember(self, key: Hashable | None, found: tuple[int, dict[str, torch.dtype]]) -> None:
        """What autocast lets pass does not pass without it, and is not remembered."""
        if key is None:
            return
        if len(self.passed) >= MOST:
            self.passed.clear()
        with contextlib.suppress(TypeError):  # symbolic sizes, which no table takes
            self.passed[key] = found
