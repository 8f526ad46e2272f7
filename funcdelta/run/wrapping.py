"""Methods around an attention: ``y = around(p, q, k, v, run)``, where ``run`` is what the model itself computes.

In a fold the method's function is mapped over members, and ``run`` steps out of that map: the model's attention is
called with all members' rows, its mask and its position bias, as it would be without the method, whatever kernel it is.
Shapes as in :class:`funcdelta.methods.acts.Acts`; the model's attention function gives (rows, queries, heads, size).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, FoldError
from .bound import Bound
from .call import Call, Lift, Params
from .fold import split_rows
from .opened import checked

Triple = tuple[Tensor, Tensor, Tensor]


class OwnAttention:
    """What ``attention`` computes of the queries, keys and values ``given``, at most once, and of others.

    >>> own = OwnAttention(lambda q, k, v: (q.transpose(1, 2), None), (torch.ones(1, 1, 2, 3),) * 3)
    >>> own(*own.given) is own.result(), own(own.given[0] * 2, *own.given[1:]).sum()
    (True, tensor(12.))
    """

    def __init__(self, attention: Callable[..., tuple[Tensor, Any]], given: Triple) -> None:
        self.attention, self.given = attention, given
        self.scores: Any = None
        self._result: Tensor | None = None

    def result(self) -> Tensor:
        """Of what was given, (rows, heads, queries, size)."""
        if self._result is None:
            self._result = self.of(self.given)
        return self._result

    def of(self, values: Triple) -> Tensor:
        """Of ``values``, whose shapes are those that were given."""
        output, self.scores = self.attention(*values)
        return output.transpose(1, 2)

    def __call__(self, *values: Tensor) -> Tensor:
        return self.result() if _same(values, self.given) else self.of(_fitting(values, self.given))


def wrapped(
    call: Call, path: str, bound: Bound, module: nn.Module, attention: Callable[..., tuple[Tensor, Any]], given: Triple
) -> tuple[Tensor, Any]:
    """What the module's attention gives with one method around it: (rows, queries, heads, size), and its scores."""
    query, key, value = given
    rows = query.shape[0]
    given = query, key.expand(rows, *key.shape[1:]), value.expand(rows, *value.shape[1:])
    own, lift, p = OwnAttention(attention, given), call.lift, bound.leaves(call.params)
    function = bound.functions[module.training]
    if lift is None:
        output = checked(path, p, given, lambda: function(p, *given, own))
    elif call.watch is None:
        output = checked(path, p, given, lambda: _together(function, p, own, lift, path))
    else:
        watch = call.watch
        if watch.axis(path, query) != 0 or watch.axis(path, own.result()) != 0:
            raise FoldError(f"{path} attends with rows that are not on the first axis")
        output, _ = checked(
            path, p, given, lambda: watch.lifted(lambda: (_together(function, p, own, lift, path), 0))
        )
    return output.transpose(1, 2).contiguous(), own.scores


def _together(function: Callable[..., Tensor], p: Params, own: OwnAttention, lift: Lift, path: str) -> Tensor:
    """The function of every member, on its rows of the batch."""
    split = tuple(split_rows(value, 0, lift.n, lift.rows, path) for value in own.given)
    mapped = _replayed if torch.compiler.is_compiling() else _stepping_out
    output = mapped(function, p, split, own).flatten(0, 1)
    if lift.present is None:
        return output
    mask = lift.present.repeat_interleave(output.shape[0] // lift.n).view(-1, 1, 1, 1)
    return torch.where(mask, output, own.result())


def _stepping_out(function: Callable[..., Tensor], p: Params, split: Triple, own: OwnAttention) -> Tensor:
    """Mapped over members; the model's attention is computed outside of the map, when it is asked for."""

    def member(p: Params, *given: Tensor) -> Tensor:
        def run(*values: Tensor) -> Tensor:
            same = _same(values, given)
            return _Outside.apply(own, same, given[0], *(() if same else _fitting(values, given)))

        return function(p, *given, run)

    return torch.vmap(member, randomness="different")(p, *split)


class _Outside(torch.autograd.Function):
    """The model's attention for all members at once, within a map over them.

    torch hands a function with a rule for ``vmap`` the tensors of all members, one level further out, where autograd
    and other transforms see what the rule does as they see everything else.
    """

    @staticmethod
    def forward(*args: Any) -> Tensor:
        raise FoldError("run was called within another transform than the map over members")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, dims: Any, own: OwnAttention, same: bool, *values: Tensor) -> tuple[Tensor, int]:
        n = info.batch_size
        if dims[2] is None:  # the axis of the queries that the method was given
            raise FoldError("run was called within another map than that over members")
        if same:
            return own.result().unflatten(0, (n, -1)), 0
        apart = (
            value.expand(n, *value.shape) if dim is None else value.movedim(dim, 0)
            for value, dim in zip(values[1:], dims[3:], strict=True)
        )
        q, k, v = (value.flatten(0, 1) for value in apart)
        return own.of((q, k, v)).unflatten(0, (n, -1)), 0


def _replayed(function: Callable[..., Tensor], p: Params, split: Triple, own: OwnAttention) -> Tensor:
    """The same for the compiler, which knows no rules for ``vmap``: the function is run again with each result.

    What it asked for, and was given zeros for, is computed between two runs; the compiler drops what is not used.
    """
    n = split[0].shape[0]
    known = [own.result().unflatten(0, (n, -1))]
    while True:

        def member(p: Params, given: Triple, results: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            asked: list[Tensor] = []
            later = results[1:]

            def run(*values: Tensor) -> Tensor:
                if _same(values, given):
                    return results[0]
                if later:
                    return later.pop(0)
                if not asked:
                    asked.extend(_fitting(values, given))
                return torch.zeros_like(results[0])

            return function(p, *given, run), asked

        output, asked = torch.vmap(member, randomness="different")(p, split, known)
        if not asked:
            return output
        q, k, v = (value.flatten(0, 1) for value in asked)
        known = [*known, own.of((q, k, v)).unflatten(0, (n, -1))]


def _same(values: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> bool:
    return len(values) == len(given) and all(value is own for value, own in zip(values, given, strict=True))


def _fitting(values: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> Triple:
    """``values``, which have the shapes of those given: the model's mask and cache are made for these."""
    found, wanted = [tuple(value.shape) for value in values], [tuple(value.shape) for value in given]
    if found != wanted:
        raise ConfigError(
            f"run(q, k, v) was called with the shapes {', '.join(map(str, found))}; expected those that the method was "
            f"given, {', '.join(map(str, wanted))}, which the model's mask is made for. Keys to be added are given by "
            f"attend(site, p)."
        )
    q, k, v = values
    return q, k, v
