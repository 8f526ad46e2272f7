"""The trunk: modules that compute the same for all members of one batch, run once on b rows instead of n·b.

Everything in a folded call has n·b rows, member by member. A module that runs before the first delta acts (or later, on
values that no delta has touched) sees the same b rows n times. It is given the first b rows, and its output is
repeated: (n·b, …) → (b, …) → module → (b, …) → (n·b, …). All other code of the model sees n·b rows as in any fold, so
masks, positions and indices fit. If deltas act in the last fraction q of the layers, n members cost (1 − q) + q n
forward passes instead of n.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import FoldError
from ..transforms import is_wrapped
from .call import Call
from .skeleton import Skeleton

WORTH = 0.05
"""The share of the arithmetic from which on ``engine="auto"`` uses the trunk; below, copying costs as much."""

TRUNK, OPEN = "trunk", "modules of the trunk"
"""The keys under which a call keeps its trunk, and those of its modules that are running."""

Axes = Mapping[str, int | None]
"""The axis of rows of every tensor among a module's arguments or results, by place; ``None`` if it has no rows."""


@dataclass(frozen=True)
class Ends:
    """Where the rows are in a module's inputs and outputs."""

    inputs: Axes
    outputs: Axes


@dataclass(frozen=True)
class Trunk:
    """The modules that run once for all members.

    Attributes:
        modules: for every call of a module, by path: where its rows are, or ``None`` for a call that is not shared.
        share: their share of the arithmetic of one forward pass.
        refused: why nothing is shared; otherwise empty.
    """

    modules: Mapping[str, tuple[Ends | None, ...]]
    share: float
    refused: str = ""

    def at(self, path: str, index: int | None) -> Ends | None:
        """Where the rows are at the ``index``-th call of the module at ``path``; ``None`` if it is not shared."""
        visits = self.modules[path]
        if index is None:
            raise FoldError(f'{path} runs again in a backward pass, where a trunk cannot be used. Use engine="fold".')
        if index >= len(visits):
            raise FoldError(
                f"{path} was called {index + 1} times, but {len(visits)} times when the shared modules were found: "
                f'which modules run depends on the rows. Use engine="fold".'
            )
        return visits[index]


def install(skeleton: Skeleton, trunk: Trunk) -> None:
    """Hook the trunk's modules in ``skeleton``; the hooks do nothing in calls that share nothing."""
    new = [path for path in trunk.modules if path not in skeleton.sharing]
    for path in new:
        skeleton.sharing.add(path)
        _hook(skeleton, path)
    if new:
        skeleton.memory.note()


def _hook(skeleton: Skeleton, path: str) -> None:
    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = skeleton.call
        trunk = None if call is None else call.notes.get(TRUNK)
        if call is None or trunk is None or path not in trunk.modules:
            return None
        ends = call.note(OPEN)[path] = trunk.at(path, call.visit(f"trunk {path}"))
        return None if ends is None else _replaced((args, kwargs), path, ends.inputs, call, _first_rows)

    def leave(module: Any, args: Any, output: Any) -> Any:
        call = skeleton.call
        ends = None if call is None else call.note(OPEN).pop(path, None)
        return None if call is None or ends is None else _replaced(output, path, ends.outputs, call, _repeated)

    module = skeleton.module.get_submodule(path)
    module.register_forward_pre_hook(enter, with_kwargs=True)
    module.register_forward_hook(leave)


def places(values: Any) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """Every leaf of ``values`` with its place, and the structure that rebuilds ``values``.

    >>> [place for place, _ in places(((1,), {"mask": 2}))[0]]
    ['[0][0]', "[1]['mask']"]
    """
    found, spec = pytree.tree_flatten_with_path(values)
    return [(pytree.keystr(path), leaf) for path, leaf in found], spec


def _replaced(values: Any, path: str, axes: Axes, call: Call, change: Any) -> Any:
    leaves, spec = places(values)
    changed = [
        change(leaf, place, path, axes, call) if isinstance(leaf, Tensor) and leaf.ndim else leaf
        for place, leaf in leaves
    ]
    return pytree.tree_unflatten(changed, spec)


def _first_rows(value: Tensor, place: str, path: str, axes: Axes, call: Call) -> Tensor:
    """The first member's rows, (n·b, …) → (b, …), which are the same as all others'."""
    n, rows = _members(call)
    axis = axes[place] if place in axes else _axis_by_value(value, n, rows, place, path)
    if axis is None:
        return value
    if value.shape[axis] % n:
        raise FoldError(
            f"{path} runs once for all {n} members, but its input at {place} has the shape {tuple(value.shape)}, "
            f'whose axis {axis} should count the rows of all of them. Use engine="fold".'
        )
    return value.narrow(axis, 0, value.shape[axis] // n)


def _repeated(value: Tensor, place: str, path: str, axes: Axes, call: Call) -> Tensor:
    """The rows of one member repeated for all, (b, …) → (n·b, …)."""
    if place not in axes:
        raise FoldError(
            f"{path} runs once for all members, but returns a tensor at {place} that it did not return when the shared "
            f'modules were found, so its rows are unknown. Use engine="fold".'
        )
    axis = axes[place]
    if axis is None:
        return value
    value = value.unsqueeze(axis)
    sizes = [-1] * value.ndim
    sizes[axis] = call.lift.n if call.lift is not None else 1
    return value.expand(sizes).flatten(axis, axis + 1)


def _members(call: Call) -> tuple[int, int]:
    assert call.lift is not None
    return call.lift.n, call.lift.n * call.lift.rows


def _axis_by_value(value: Tensor, n: int, rows: int, place: str, path: str) -> int | None:
    """The axis of rows of an input that is new since the trunk was found, such as a mask for the first padded row."""
    if value.shape[0] == 1:
        return None
    if value.shape[0] == rows and not torch.compiler.is_compiling() and not is_wrapped(value):
        each = value.detach().unflatten(0, (n, rows // n))
        if torch.equal(each, each[:1].expand_as(each)):
            return 0
    raise FoldError(
        f"{path} runs once for all members, but gets a tensor {tuple(value.shape)} at {place} that was not there when "
        f'the shared modules were found, and whose rows are unknown. Use engine="fold".'
    )
