"""The rows of all members in one batch: joined, split again, and how a member's function acts on them at a site.

The hidden value is split by member, (n·b, …) → (n, b, …), the function is mapped over members by a local
``torch.vmap``, and the rows are joined again. The layout tells where the rows are. A function of each token alone
takes all members in one call instead (:func:`all_tokens`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, FoldError
from ..functional.tokenwise import Tokenwise
from .layout import Ends, LayoutMismatchError, Run, scalar_message
from .written import Copies


class Folded:
    """The lift of a fold: split the rows by member, map the member's function (or batch it), join the rows."""

    def __init__(self, n: int, rows: int, present: Tensor | None = None) -> None:
        self.n, self.rows, self.present = n, rows, present

    def __call__(
        self,
        function: Callable[..., Tensor],
        p: Any,
        values: tuple[Tensor, ...],
        dims: tuple[int | None, ...],
        site: str,
    ) -> tuple[Tensor, int | None]:
        out, dim = None, 0
        if isinstance(function, Tokenwise) and dims.count(0) == len(dims):
            if values[0].shape[0] % (self.n * self.rows):
                split_rows(values[0], 0, self.n, self.rows, site)
            out = all_tokens(function.function, p, values, self.n, site)
        if out is None:
            split = [
                value if at is None else split_rows(value, at, self.n, self.rows, site)
                for value, at in zip(values, dims, strict=True)
            ]
            out_dim = dims[0] or 0
            out = torch.vmap(function, in_dims=(0, *dims), out_dims=out_dim, randomness="different")(p, *split)
            out, dim = self._join(out, dims[0], site)
        if self.present is not None:
            out = torch.where(self._mask(out, dim), out, values[0])
        return out, dim

    def run(
        self,
        function: Callable[..., list[Tensor]],
        p: Any,
        values: list[Tensor],
        run: Run,
        index: int | None,
        site: str,
    ) -> list[Tensor]:
        """A whole module once per member, with tensors of the member's own.

        What it writes into its inputs is there afterwards, for each row by the member that the row has.
        """
        ends = run.at(site, index)
        if len(ends.inputs) != len(values):
            raise LayoutMismatchError(
                f"{site} was given {len(values)} tensors, but {len(ends.inputs)} when the layout of these inputs was "
                f"learned."
            )
        if self.present is None:
            return [out for out, _ in self._each(function, p, values, run, ends, site)]
        copies = Copies(values, ends.writes)
        # Rows of the bare backbone each by themselves, too: the module may mix what is in one batch.
        plain = self._each(function, {}, copies.made, run, ends, site)
        own = copies.apart()
        joined = self._each(function, p, own, run, ends, site)
        for value, members, without, dim in copies.written(own, ends.inputs):
            value.copy_(without if dim is None else torch.where(self._mask(value, dim), members, without))
        pairs = zip(joined, plain, strict=True)
        return [torch.where(self._mask(out, dim), out, base) for (out, dim), (base, _) in pairs]

    def _each(
        self, function: Any, p: Any, values: list[Tensor], run: Run, ends: Ends, site: str
    ) -> list[tuple[Tensor, int | None]]:
        """Each member's outputs joined to one batch, with the axis of rows of each."""
        split = [
            value if at is None else split_rows(value, at, self.n, self.rows, site)
            for value, at in zip(values, ends.inputs, strict=True)
        ]
        each = self._mapped if run.how == "map" else self._in_turn
        return self._all_joined(each(function, p, split, ends.inputs), run, ends, site)

    def _all_joined(self, outputs: list[Tensor], run: Run, ends: Ends, site: str) -> list[tuple[Tensor, int | None]]:
        """Outputs with the member axis in front, each joined to one batch, with its axis of rows."""
        if len(outputs) != len(ends.outputs):
            raise LayoutMismatchError(f"{site} returned {len(outputs)} tensors, but {len(ends.outputs)} before.")
        if ends.dtypes:
            outputs = [out.to(dtype) for out, dtype in zip(outputs, ends.dtypes, strict=True)]
        joined: list[tuple[Tensor, int | None]] = []
        for out, dim in zip(outputs, ends.outputs, strict=True):
            if dim is None and run.how == "loop":
                joined.append((out[0], None))  # found equal for all members
            else:
                joined.append(self._join(out if dim is None else out.movedim(0, dim), dim, site))
        return joined

    def _mapped(self, function: Any, p: Any, split: list[Tensor], dims: Any) -> list[Tensor]:
        """One mapped call; every output with the member axis in front."""

        def member(p: Any, *values: Tensor) -> tuple[Tensor, ...]:
            return tuple(function(p, *values))

        if not p and all(dim is None for dim in dims):
            return [out.expand(self.n, *out.shape) for out in function(p, *split)]  # nothing differs
        return list(torch.vmap(member, in_dims=(0, *dims), randomness="different")(p, *split))

    def _in_turn(self, function: Any, p: Any, split: list[Tensor], dims: Any) -> list[Tensor]:
        """Member after member; every output with the member axis in front."""
        columns: list[list[Tensor]] = []
        for i in range(self.n):
            own = {key: leaf[i] for key, leaf in p.items()}
            # What one member writes into a tensor that all share is not for the next; it is written once.
            last = i == self.n - 1
            values = [
                value.select(at, i) if at is not None else value if last else value.clone()
                for value, at in zip(split, dims, strict=True)
            ]
            columns.append(function(own, *values))
        joined: list[Tensor] = []
        for place, outputs in enumerate(zip(*columns, strict=True)):
            if any(out.shape != outputs[0].shape for out in outputs):
                shapes = ", ".join(str(tuple(out.shape)) for out in outputs[:3])
                raise FoldError(
                    f"Output {place} differs in size by member ({shapes}), so it has no place in one batch."
                )
            joined.append(torch.stack(outputs))
        return joined

    def _join(self, out: Tensor, dim: int | None, site: str) -> tuple[Tensor, int | None]:
        if dim is not None:
            return out.flatten(dim, dim + 1), dim
        if out.ndim > 1 and out.shape[1] == 1:
            # One row for all becomes one row each: whatever it is added to has as many. The probe checks it.
            return out.expand(self.n, self.rows, *out.shape[2:]).flatten(0, 1), 0
        raise FoldError(
            f"The output of {site} has no batch axis (shape {tuple(out.shape[1:])}), but its delta differs by "
            f'member, so members cannot share a batch. Use engine="auto" or "loop", or leave {site} out.'
        )

    def _mask(self, out: Tensor, dim: int | None) -> Tensor:
        assert self.present is not None
        axis = dim or 0
        mask = self.present.repeat_interleave(out.shape[axis] // self.n)
        return mask.view(*[1] * axis, -1, *[1] * (out.ndim - axis - 1))


# -- all members' rows in one batch ------------------------------------------------------------------------------------


def join_members(leaf: Any, axis: int, n: int, b: int, mapped: bool) -> Any:
    """All members' rows on one axis: (…, b, …), or (n, …, b, …) where it is ``mapped``, to (…, n·b, …).

    A single row of a member stands for all of its rows.

    >>> join_members(torch.tensor([5, 6]), 0, 2, 2, mapped=False), join_members(["a", "b"], 0, 2, 2, mapped=False)
    (tensor([5, 6, 5, 6]), ['a', 'b', 'a', 'b'])
    """
    if isinstance(leaf, list):
        return leaf * n
    if isinstance(leaf, np.ndarray):
        wide = np.moveaxis(leaf, 0, axis) if mapped else np.expand_dims(leaf, axis)
        before, after = wide.shape[:axis], wide.shape[axis + 2 :]
        return np.broadcast_to(wide, (*before, n, b, *after)).reshape(*before, n * b, *after)
    wide = leaf.movedim(0, axis) if mapped else leaf.unsqueeze(axis)
    shape = list(wide.shape)
    shape[axis], shape[axis + 1] = n, b
    return wide.expand(shape).flatten(axis, axis + 1)


def split_rows(value: Tensor, dim: int, n: int, rows: int, place: str) -> Tensor:
    """(…, n·b, …) → (…, n, b, …), where axis ``dim`` has the same whole number of entries for each row.

    Raises :class:`LayoutMismatchError` with the place where it has not: rows of different members are then mixed.

    >>> split_rows(torch.zeros(6, 4), 0, n=3, rows=2, place="dense").shape
    torch.Size([3, 2, 4])
    """
    size = value.shape[dim] if dim < value.ndim else -1
    if size % (n * rows) or size < 0:
        raise LayoutMismatchError(
            f"{place} has the shape {tuple(value.shape)}, whose axis {dim} should have the same number of entries for "
            f"each of the {n * rows} rows of {n} members: which rows are whose cannot be told there."
        )
    return value.view(*value.shape[:dim], n, size // n, *value.shape[dim + 1 :])  # Dynamo cannot always unflatten


def members_of(leaf: Tensor, dim: int | None, n: int, rows: int, name: str = "of the model") -> Tensor:
    """An output (n·b, …) → (n, b, …); one without rows, or that a shared module gave, (b, …), is every member's.

    >>> members_of(torch.zeros(6, 4), 0, n=3, rows=2).shape, members_of(torch.zeros(2, 4), 0, n=3, rows=2).shape
    (torch.Size([3, 2, 4]), torch.Size([3, 2, 4]))
    """
    if leaf.ndim == 0:
        raise FoldError(scalar_message(name))
    if dim is None:
        return leaf.expand(n, *leaf.shape)
    if dim < leaf.ndim and leaf.shape[dim] == rows:
        leaf = leaf.movedim(dim, 0)
        return leaf.expand(n, *leaf.shape)
    return split_rows(leaf, dim, n, rows, f"The output {name}").movedim(dim, 0)


def all_tokens(
    function: Callable[..., Tensor], p: Mapping[str, Tensor], values: tuple[Tensor, ...], n: int, site: str
) -> Tensor | None:
    """``function`` on the tokens of all members, rows of values (n·b, …, d) to rows; ``None``: it has to be mapped.

    It has to be where values do not have one row, and one token, for each other's, or a leaf has three axes or more.
    Raises ``ConfigError`` where the function gives no value a token.

    >>> p = {"gain": torch.tensor([1.0, 10.0])}
    >>> all_tokens(lambda p, y: y * p["gain"], p, (torch.ones(4, 3),), 2, "layer")[:, 0]
    tensor([ 1.,  1., 10., 10.])
    """
    y = values[0]
    tokens: list[Tensor] = []  # plain ones, for tracing knows no others
    leaves: dict[str, Tensor] = {}
    if y.ndim < 2:
        return None
    for value in values:
        if value.shape[:-1] != y.shape[:-1]:
            return None
        tokens.append(value.reshape(n, -1, value.shape[-1]))
    for name, leaf in p.items():
        axes = leaf.ndim
        if axes == 3:
            leaves[name] = leaf
        elif axes == 1:
            leaves[name] = leaf.view(n, 1, 1)
        elif axes == 2:
            leaves[name] = leaf.unsqueeze(1)
        else:
            return None
    out = function(leaves, *tokens)
    if out.ndim != 3 or out.shape[:2] != tokens[0].shape[:2]:
        raise ConfigError(
            f"The method at {site} says that it is tokenwise, but of {n} members' tokens "
            f"{tuple(tokens[0].shape)} it made {tuple(out.shape)}: write it with matrix products over the last axis "
            f"and elementwise operations (fd.linear(x, weight, bias), leaf.mT, axes counted from the last), or leave "
            f"tokenwise out."
        )
    return out.reshape(*y.shape[:-1], out.shape[-1])
