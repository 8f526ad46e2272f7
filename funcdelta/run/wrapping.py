"""Methods around an attention: ``y = around(p, q, k, v, run)``, where ``run`` is what the model itself computes.

In a fold the method's function is mapped over members, and ``run`` steps out of that map: the model's attention is
called with all members' rows, its mask and its position bias, as it would be without the method, whatever kernel it is.
Shapes as in :class:`funcdelta.methods.acts.Acts`; the model's attention function gives (rows, queries, heads, size).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, FoldError
from ..transforms import current_transform, innermost, outside_of_map
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
        self._written = 0

    def result(self) -> Tensor:
        """Of what was given, (rows, heads, queries, size)."""
        if self._result is None:
            output, self.scores = self.attention(*self.given)
            self._result = output.transpose(1, 2)
            self._written = _times_written(self._result)
        elif self._written != _times_written(self._result):
            raise ConfigError(
                "What run(q, k, v) gave was changed in place and is needed again: write y = y * 2 instead of y.mul_(2)."
            )
        return self._result

    def of(self, values: Triple) -> Tensor:
        """Of ``values``, whose shapes are those that were given."""
        output, scores = self.attention(*values)
        self.scores = scores if self._result is None else self.scores
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
    watch = call.watch
    if watch is not None and lift is not None and {watch.axis(path, t) for t in (query, own.result())} != {0}:
        raise FoldError(f"{path} attends with rows that are not on the first axis")

    def compute() -> Tensor:
        if lift is None:
            return function(p, *given, own)
        together = functools.partial(_together, function, p, own, lift, path)
        return together() if watch is None else watch.lifted(lambda: (together(), 0))[0]

    output = checked(call, path, bound, module.training, p, given, compute)
    return output.transpose(1, 2).contiguous(), own.scores


def _times_written(tensor: Tensor) -> int:
    """How often torch has counted a write into ``tensor``; it counts none in compiled code and inference mode."""
    if torch.compiler.is_compiling():
        return 0
    plain = innermost(tensor)
    return 0 if plain.is_inference() else plain._version


def _together(function: Callable[..., Tensor], p: Params, own: OwnAttention, lift: Lift, path: str) -> Tensor:
    """The function of every member, on its rows of the batch."""
    q, k, v = (split_rows(value, 0, lift.n, lift.rows, path) for value in own.given)
    split: Triple = q, k, v
    mapped = _replayed if torch.compiler.is_compiling() else _stepping_out
    output = mapped(function, p, split, own).flatten(0, 1)
    if lift.present is None:
        return output
    mask = lift.present.repeat_interleave(output.shape[0] // lift.n).view(-1, 1, 1, 1)
    return torch.where(mask, output, own.result())


def _stepping_out(function: Callable[..., Tensor], p: Params, split: Triple, own: OwnAttention) -> Tensor:
    """Mapped over members; the model's attention is computed outside of the map, when it is asked for."""

    def member(p: Params, *given: Tensor) -> Tensor:
        inside = current_transform().level()

        def run(*values: Tensor) -> Tensor:
            if current_transform().level() != inside:
                raise FoldError("run(q, k, v) was called within a transform of the method's own")
            if _same(values, given):
                return outside_of_map(lambda: _by_member(own.result(), split))
            return outside_of_map(
                lambda *all_members: _by_member(own.of(_joined(all_members)), split), *_fitting(values, given)
            )

        return function(p, *given, run)

    return torch.vmap(member, randomness="different")(p, *split)


def _replayed(function: Callable[..., Tensor], p: Params, split: Triple, own: OwnAttention) -> Tensor:
    """The same for the compiler, which knows no rules for ``vmap``: the function is run again with each result.

    What it asked for, and was given zeros for, is computed between two runs; the compiler drops what is not used.
    """
    known = [_by_member(own.result(), split)]
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
        known = [*known, _by_member(own.of(_joined(asked)), split)]


def _by_member(output: Tensor, split: Triple) -> Tensor:
    return output.unflatten(0, split[0].shape[:2])


def _joined(values: Sequence[Tensor]) -> Triple:
    """(n, rows, …) → (n·rows, …)"""
    q, k, v = (value.flatten(0, 1) for value in values)
    return q, k, v


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
