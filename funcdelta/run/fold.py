"""The fold: rows of all members in one batch, and how each member's function acts on its own rows at a site.

At a site the hidden value is split by member, (n·b, …) → (n, b, …), along the axis that the layout gives; the function
is mapped over members by a local ``torch.vmap``; and the rows are joined again. A function of each token alone takes
all members in one call instead (:func:`all_tokens`), which is faster.
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
    """Lifts a member's function to all members' rows: split by member, map (or batch) the function, join.

    Args:
        n: members.
        rows: of each member.
        present: False for the rows (n,) that run the bare backbone: they keep the site's first value.
    """

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
        """The outputs of a whole module that runs once per member, each time with that member's tensors.

        What it writes into its inputs is written, for each row as the row's member writes it.
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
        # Bare rows need a second run, row by row as well: the module may mix rows that share a batch.
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
        """The outputs of all members, joined to one batch, with the axis of rows of each output."""
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
                joined.append((out[0], None))  # the probe found it equal for all members
            else:
                joined.append(self._join(out if dim is None else out.movedim(0, dim), dim, site))
        return joined

    def _mapped(self, function: Any, p: Any, split: list[Tensor], dims: Any) -> list[Tensor]:
        """One call under vmap; every output has the member axis in front."""

        def member(p: Any, *values: Tensor) -> tuple[Tensor, ...]:
            return tuple(function(p, *values))

        if not p and all(dim is None for dim in dims):
            return [out.expand(self.n, *out.shape) for out in function(p, *split)]  # vmap needs a mapped input
        return list(torch.vmap(member, in_dims=(0, *dims), randomness="different")(p, *split))

    def _in_turn(self, function: Any, p: Any, split: list[Tensor], dims: Any) -> list[Tensor]:
        """One member after the other; every output has the member axis in front."""
        columns: list[list[Tensor]] = []
        for i in range(self.n):
            own = {key: leaf[i] for key, leaf in p.items()}
            # A member may write into a tensor that all share. All but the last get copies, so it is written once.
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
                    f"Output {place} has another size for one member than for another ({shapes}), so it cannot be part "
                    f"of one batch."
                )
            joined.append(torch.stack(outputs))
        return joined

    def _join(self, out: Tensor, dim: int | None, site: str) -> tuple[Tensor, int | None]:
        if dim is not None:
            return out.flatten(dim, dim + 1), dim
        if out.ndim > 1 and out.shape[1] == 1:
            # One row for all (a table of positions, say) is repeated for each row. The probe compares the outputs.
            return out.expand(self.n, self.rows, *out.shape[2:]).flatten(0, 1), 0
        raise FoldError(
            f"The output of {site} has no batch axis (its shape is {tuple(out.shape[1:])}), but its delta differs by "
            f'member, so members cannot share a batch. Use engine="auto" or "loop", or leave {site} out.'
        )

    def _mask(self, out: Tensor, dim: int | None) -> Tensor:
        assert self.present is not None
        axis = dim or 0
        mask = self.present.repeat_interleave(out.shape[axis] // self.n)
        return mask.view(*[1] * axis, -1, *[1] * (out.ndim - axis - 1))


# -- all members' rows in one batch ------------------------------------------------------------------------------------


def join_members(leaf: Any, axis: int, n: int, b: int, mapped: bool) -> Any:
    """All members' rows on one axis: (…, b, …), or (n, …, b, …) if ``mapped``, to (…, n·b, …).

    If a member has a single row, it is repeated for all b.

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
    """The rows split by member, (…, n·b, …) → (…, n, b, …); axis ``dim`` may have several entries per row.

    Raises :class:`LayoutMismatchError`, naming ``place``, if the size of the axis is not a multiple of n·rows.

    >>> split_rows(torch.zeros(6, 4), 0, n=3, rows=2, place="dense").shape
    torch.Size([3, 2, 4])
    """
    size = value.shape[dim] if dim < value.ndim else -1
    if size % (n * rows) or size < 0:
        raise LayoutMismatchError(
            f"{place} has the shape {tuple(value.shape)}, but its axis {dim} should have the same number of entries "
            f"for each of the {n * rows} rows of {n} members: it cannot be told which rows belong to which member."
        )
    return value.view(*value.shape[:dim], n, size // n, *value.shape[dim + 1 :])  # Dynamo cannot always unflatten


def members_of(leaf: Tensor, dim: int | None, n: int, rows: int, name: str = "of the model") -> Tensor:
    """An output split by member, (n·b, …) → (n, b, …); one that all members share, (b, …) or (…), is expanded.

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
    """``function`` of the tokens of all members at once: values (n·b, …, d) → (n·b, …, d'); ``None``: use vmap instead.

    The function sees values (n, tokens, d) and leaves that broadcast against them: (n, 1, 1), (n, 1, d) or (n, k, d).
    It cannot if the values do not agree on their tokens, or a leaf has more axes. Raises ``ConfigError`` if the output
    is not one vector per token.

    >>> p = {"gain": torch.tensor([1.0, 10.0])}
    >>> all_tokens(lambda p, y: y * p["gain"], p, (torch.ones(4, 3),), 2, "layer")[:, 0]
    tensor([ 1.,  1., 10., 10.])
    """
    y = values[0]
    tokens: list[Tensor] = []  # not list[Tensor](): dynamo cannot trace that
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
            f"The method at {site} says that it is tokenwise, but of {n} members' tokens {tuple(tokens[0].shape)} it "
            f"made {tuple(out.shape)}. Write it with matrix products over the last axis and elementwise operations "
            f"(fd.linear(x, weight, bias), leaf.mT, axes counted from the last), or leave tokenwise out."
        )
    return out.reshape(*y.shape[:-1], out.shape[-1])
