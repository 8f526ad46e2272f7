"""The lift of a fold: how a member's function acts at a site when all members' rows stand in one batch.

The hidden value is split by member, (n·b, …) → (n, b, …), the function is mapped over members by a local
``torch.vmap``, and the rows are joined again. Where the rows stand is told by the layout. A function of each token
alone takes all members in one call instead (:mod:`funcdelta.functional.tokenwise`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import FoldError
from ..functional.tokenwise import Tokenwise, all_tokens
from .layout import SiteLayout, scalar_message


class Folded:
    """The lift of a fold: split the rows by member, map the member's function (or batch it), join the rows."""

    def __init__(self, n: int, rows: int, present: Tensor | None = None) -> None:
        self.n, self.rows, self.present = n, rows, present
        self.widened: list[str] = []

    def suspects(self) -> str:
        """Where a value without rows was given one row a member, which its reader may not expect."""
        return f", after {self.widened[0]} was called on a value without a batch axis" if self.widened else ""

    def __call__(
        self,
        function: Callable[..., Tensor],
        p: Any,
        values: tuple[Tensor, ...],
        dims: tuple[int | None, ...],
        site: str,
    ) -> tuple[Tensor, int | None]:
        out, dim = None, 0
        if isinstance(function, Tokenwise) and all(at == 0 for at in dims):
            out = all_tokens(function, p, values, self.n, site)
        if out is None:
            split = [self._split(value, at) for value, at in zip(values, dims, strict=True)]
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
        layout: SiteLayout,
        site: str,
        bare: Callable[[], list[Tensor]],
    ) -> list[Tensor]:
        """A whole module once per member, with weights of the member's own."""
        dims = layout.inputs if len(layout.inputs) == len(values) else tuple(self._axis_by_size(v) for v in values)
        split = [self._split(value, dim) for value, dim in zip(values, dims, strict=True)]
        outputs = torch.vmap(lambda p, *split: tuple(function(p, *split)), in_dims=(0, *dims), randomness="different")(
            p, *split
        )
        out_dims = layout.outputs or tuple(0 for _ in outputs)
        if len(layout.dtypes) == len(outputs):
            outputs = tuple(out.to(dtype) for out, dtype in zip(outputs, layout.dtypes, strict=True))
        joined = [
            self._join(out if dim is None else out.movedim(0, dim), dim, site)
            for out, dim in zip(outputs, out_dims, strict=True)
        ]
        if self.present is None:
            return [out for out, _ in joined]
        return [torch.where(self._mask(out, dim), out, base) for (out, dim), base in zip(joined, bare(), strict=True)]

    def _split(self, value: Tensor, dim: int | None) -> Tensor:
        return value if dim is None else value.unflatten(dim, (self.n, value.shape[dim] // self.n))

    def _join(self, out: Tensor, dim: int | None, site: str) -> tuple[Tensor, int | None]:
        if dim is not None:
            return out.flatten(dim, dim + 1), dim
        if out.ndim > 1 and out.shape[1] == 1:
            # One row for all becomes one row each: whatever it is added to has as many. The probe checks it.
            self.widened.append(site)
            return out.expand(self.n, self.rows, *out.shape[2:]).flatten(0, 1), 0
        raise FoldError(
            f"The output of {site} has no batch axis (shape {tuple(out.shape[1:])}), but its delta differs by "
            f"member, so "
            f'members cannot share a batch. Use engine="vmap" or "loop", or leave {site} out.'
        )

    def _axis_by_size(self, value: Tensor) -> int | None:
        return 0 if value.ndim and value.shape[0] == self.n * self.rows else None

    def _mask(self, out: Tensor, dim: int | None) -> Tensor:
        assert self.present is not None
        axis = dim or 0
        mask = self.present.repeat_interleave(out.shape[axis] // self.n)
        return mask.view(*[1] * axis, -1, *[1] * (out.ndim - axis - 1))


def split_members(leaf: Tensor, dim: int | None, n: int) -> Tensor:
    """(n·b, …) → (n, b, …); a leaf without rows is the same for every member."""
    if leaf.ndim == 0:
        raise FoldError(scalar_message("of the model"))
    if dim is None:
        return leaf.expand(n, *leaf.shape)
    return leaf.unflatten(dim, (n, leaf.shape[dim] // n)).movedim(dim, 0)
