"""The lift of a fold: how a member's function acts at a site when all members' rows share one batch.

The hidden value is split by member, (n·b, …) → (n, b, …), the function is mapped over members by a local
``torch.vmap``, and the rows are joined again. The layout tells where the rows are. A function of each token alone
takes all members in one call instead (:mod:`funcdelta.functional.tokenwise`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import FoldError
from ..functional.tokenwise import Tokenwise, all_tokens
from .layout import Ends, LayoutMismatchError, Run, split_rows
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
