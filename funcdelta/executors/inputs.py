"""Inputs of many members: which tensors carry a member axis, where their rows are, and how to fold them."""

from __future__ import annotations

import inspect
from collections import UserDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import FoldError, ParamsError
from ..match import near
from ..pytrees.opaque import holds_tensors, why_opaque

InDims = int | None | Mapping[str, int | None]


class Inputs:
    """The flattened inputs of one call of n members.

    Attributes:
        n, b: members, and rows of each.
        row_axis: for every leaf with rows, by position: the axis that counts them once folded.
    """

    def __init__(
        self,
        model: nn.Module,
        n: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        in_dims: InDims,
        batch_dim: int,
    ) -> None:
        self.n, self.batch_dim = n, batch_dim
        names = _names(model, args, kwargs)
        chosen = _in_dims_by_name(in_dims, names)
        self.leaves: list[Any] = []
        self.names: list[str] = []
        self.is_mapped: list[bool] = []
        specs = []
        for name, value in zip(names, [*args, *kwargs.values()], strict=True):
            # What a tokenizer returns is a dict to torch only once it is one.
            value = dict(value) if isinstance(value, UserDict) else value
            leaves, spec = pytree.tree_flatten(value)
            specs.append((spec, len(leaves)))
            self.leaves += leaves
            self.names += [name] * len(leaves)
            self.is_mapped += [chosen[name] == 0 and isinstance(leaf, Tensor) for leaf in leaves]
        self.explicit = {name for name in chosen if isinstance(in_dims, Mapping) and name in in_dims}
        self._rebuild = (specs, len(args), list(kwargs))
        self._check_members(chosen)
        self.b = self._rows()
        self.row_axis = {i: batch_dim for i in range(len(self.leaves)) if self._kind(i) in ("rows", "mapped")}

    # -- what each leaf is -----------------------------------------------------------------------------------------

    def _member_shape(self, i: int) -> tuple[int, ...]:
        shape = tuple(self.leaves[i].shape)
        return shape[1:] if self.is_mapped[i] else shape

    def _check_members(self, chosen: Mapping[str, int | None]) -> None:
        for name, leaf, mapped in zip(self.names, self.leaves, self.is_mapped, strict=True):
            if mapped and (leaf.ndim == 0 or leaf.shape[0] != self.n):
                raise ParamsError(
                    f"The input {name} has the shape {tuple(leaf.shape)}; with in_dims=0 its first axis counts the "
                    f"{self.n} members: ({self.n}, b, …). To show all members the same input write "
                    f"in_dims={{'{name}': None}}."
                )
            if chosen[name] == 0 and holds_tensors(leaf):
                raise ParamsError(f"The input {name} of many members {why_opaque(leaf)}")

    def _rows(self) -> int:
        """The rows of one member: the first input that has more than one decides, for a single row stands for all."""
        shapes = [self._member_shape(i) for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        rows = [shape[self.batch_dim] for shape in shapes if len(shape) > self.batch_dim]
        if not rows:
            given = ", ".join(self.names) or "none"
            raise ParamsError(f"No input has an axis {self.batch_dim} that counts rows (inputs: {given}).")
        return next((count for count in rows if count != 1), 1)

    def _kind(self, i: int) -> str:
        """``rows``, ``mapped`` (rows of each member's own), ``value`` (one a member, without rows), ``one`` (a single
        row for all) or ``shared``."""
        leaf, name = self.leaves[i], self.names[i]
        if not isinstance(leaf, Tensor):
            return "shared"
        shape = self._member_shape(i)
        rows = shape[self.batch_dim] if len(shape) > self.batch_dim else None
        if rows is None and self.is_mapped[i]:
            return "value"
        if rows == self.b or (rows == 1 and self.is_mapped[i]):
            return "mapped" if self.is_mapped[i] else "rows"
        if rows == 1 or (not self.is_mapped[i] and (rows is None or name in self.explicit)):
            return "one" if rows == 1 else "shared"
        raise ParamsError(
            f"The input {name} has {rows} rows where the first input has {self.b} (its shape is "
            f"{tuple(leaf.shape)}). Rows "
            f"are counted by axis {self.batch_dim}; an input without rows is passed on as it is with "
            f"in_dims={{'{name}': None}}."
        )

    # -- the inputs of each executor -------------------------------------------------------------------------------

    def _fill(self, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        specs, positional, keywords = self._rebuild
        given = iter(leaves)
        values = [pytree.tree_unflatten([next(given) for _ in range(count)], spec) for spec, count in specs]
        return tuple(values[:positional]), dict(zip(keywords, values[positional:], strict=True))

    def shared(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs as they were given."""
        return self._fill(self.leaves)

    def member(self, i: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs of member ``i``."""
        return self._fill(
            [leaf[i] if mapped else leaf for leaf, mapped in zip(self.leaves, self.is_mapped, strict=True)]
        )

    def mapped(self) -> list[Tensor]:
        """The tensors with a member axis."""
        return [leaf for leaf, mapped in zip(self.leaves, self.is_mapped, strict=True) if mapped]

    def fill_mapped(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs with other tensors in the places of :meth:`mapped`."""
        given = iter(tensors)
        return self._fill(
            [next(given) if mapped else leaf for leaf, mapped in zip(self.leaves, self.is_mapped, strict=True)]
        )

    def folded(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs with all members' rows in one batch axis."""
        leaves = []
        for i, leaf in enumerate(self.leaves):
            kind = self._kind(i)
            if kind == "value":
                raise FoldError(
                    f"The input {self.names[i]} is one value a member, without rows, so it has no place in one "
                    f"batch. Use "
                    f'engine="vmap" or "loop".'
                )
            if kind in ("rows", "mapped"):
                axis = self.batch_dim
                leaf = leaf.movedim(0, axis) if kind == "mapped" else leaf.unsqueeze(axis)
                sizes = list(leaf.shape)
                sizes[axis], sizes[axis + 1] = self.n, self.b
                leaf = leaf.expand(sizes).flatten(axis, axis + 1)
            leaves.append(leaf)
        return self._fill(leaves)

    def chunk(self, start: int, stop: int) -> Inputs:
        """The inputs of the members from ``start`` to ``stop``."""
        part = object.__new__(Inputs)
        part.__dict__.update(self.__dict__)
        part.n = stop - start
        part.leaves = [
            leaf[start:stop] if mapped else leaf for leaf, mapped in zip(self.leaves, self.is_mapped, strict=True)
        ]
        return part


def _names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    positional = [
        name
        for name, parameter in inspect.signature(type(model).forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ][1:]
    named = positional[: len(args)] + [str(i) for i in range(len(positional), len(args))]
    return [*named, *kwargs]


def _in_dims_by_name(in_dims: InDims, names: list[str]) -> dict[str, int | None]:
    if isinstance(in_dims, Mapping):
        for name, dim in in_dims.items():
            if name not in names:
                raise ParamsError(f"in_dims names {name!r}, which is no input of this call.{near(name, names)}")
            if dim not in (0, None):
                raise ParamsError(f"in_dims[{name!r}]={dim!r}: write 0 (an axis of members) or None (shared).")
        return {name: in_dims.get(name) for name in names}
    if in_dims not in (0, None):
        raise ParamsError(
            f"in_dims={in_dims!r}: write None (one batch for all members), 0, or {{input name: 0 or None}}."
        )
    return dict.fromkeys(names, in_dims)


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has a parameter called ``name``.

    >>> accepts(torch.nn.Linear(2, 2), "input")
    True
    """
    return name in inspect.signature(type(model).forward).parameters
