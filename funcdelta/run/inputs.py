"""Inputs of many members: which tensors carry a member axis, where their rows are, and how to fold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import EngineError, FoldError, ParamsError
from ..match import near
from ..transforms import concrete
from ..trees.opaque import PLAIN, holds_tensors, spare
from .containers import CARRIERS, LEAF, Tree, flatten, is_cache
from .fold import join_members
from .forward import positional_names, without_cache
from .input_key import input_key
from .rows import Reading, read_rows, rows_of_cache, sizes, some_members, some_rows

InDims = int | None | Mapping[str, int | None]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]

SIMPLE = (type(None), bool, int, float, str)
MOST_READ = 256
"""How many structures and sizes are remembered: texts may have any length."""

OTHERS = 'Use engine="auto" or "loop", which do not have to know the rows'


class Inputs:
    """The flattened inputs of one call of n members.

    ``in_dims`` maps names of inputs to 0 (the input has a member axis, (n, b, …)) or ``None`` (all members share it
    whole, whatever its shape). Any other input is one batch (b, …) that all members see, whose rows are read off it
    (:mod:`.rows`), or has no rows. The entries of a list count as rows if there are as many.

    Args:
        model: its forward gives positional inputs their names.
        entries: the length of the index in ``apply_rows`` and views; inputs that count something else have no rows.

    Attributes:
        n: the number of members.
        leaves, names, places: every leaf, the name of its input, and the keys that lead to the leaf.
        is_mapped: whether each leaf has a member axis.
        row_axis: for every leaf with rows, by position: the axis that counts them, not counting a member axis.
        odd: the inputs whose axis of rows has another size.
        keys, checked: caches shared with inputs that are read :meth:`again`: input keys, and the layouts that were
            checked with inputs of these sizes.

    >>> inputs = Inputs(torch.nn.Linear(4, 8), 3, (torch.zeros(5, 4),), {}, None, 0)
    >>> inputs.b, inputs.row_axis, inputs.folded()[0][0].shape
    (5, {0: 0}, torch.Size([15, 4]))
    """

    def __init__(
        self,
        model: nn.Module,
        n: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        in_dims: InDims,
        batch_dim: int,
        entries: int | None = None,
    ) -> None:
        self.n, self.batch_dim, self.entries = n, batch_dim, entries
        self.keys: dict[Any, Any] = {}
        self.checked: dict[int, Any] = {}
        self._main = None if entries is None else getattr(model, "main_input_name", None)
        positional = positional_names(model) if args else ()
        names = [*positional[: len(args)], *map(str, range(len(positional), len(args))), *kwargs]
        self._chosen = _in_dims_by_name(in_dims, names)
        self._whole = {name for name in names if isinstance(in_dims, Mapping) and in_dims.get(name, 0) is None}
        self._positional, self._keywords = len(args), tuple(kwargs)
        self._values = list(zip(names, [*args, *kwargs.values()], strict=True))
        self._flatten(_is_list)
        if any(type(leaf) is list for leaf in self.leaves):
            self._read_lists()
        else:
            self._read()
        if 0 in self._chosen.values():
            self._check_members()

    # -- reading ---------------------------------------------------------------------------------------------------

    def _flatten(self, closed: Callable[[Any], bool] | None) -> None:
        """Find the leaves; lists for which ``closed`` is true stay leaves themselves."""
        self.leaves: list[Any] = []
        self.names: list[str] = []
        self.places: list[str] = []
        self.is_mapped: list[bool] = []
        self._trees: list[Tree] = []
        for name, value in self._values:
            mapped = self._chosen[name] == 0
            if isinstance(value, Tensor):
                leaves, tree, places = [value], LEAF, [name]
            else:
                leaves, tree = flatten(value, None if mapped or name in self._whole else closed)
                places = tree.places(name)
            self._trees.append(tree)
            self.leaves += leaves
            self.names += [name] * len(leaves)
            self.places += places
            self.is_mapped += [mapped and isinstance(leaf, CARRIERS) for leaf in leaves]

    def _read(self) -> Reading:
        whole = [i for i, name in enumerate(self.names) if name in self._whole] if self._whole else ()
        found = read_rows(self.leaves, self.places, self.is_mapped, whole, self.batch_dim, self.entries, self._main)
        self._rows, self.row_axis, self._unclear = found.count, found.axes, ""
        self.odd = tuple(self.places[i] for i in found.odd)
        nested = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor) and leaf.is_nested]
        if nested and nested[0] not in whole:
            self._unclear = (
                f"The input {self.places[nested[0]]} is a nested tensor, whose rows cannot be joined with those of "
                f"other members. Pad it, or let all members share it: in_dims={{'{self.names[nested[0]]}': None}}."
            )
        elif found.count is None:
            given = ", ".join(self.places) or "none"
            then = OTHERS if self.entries is None else f"The index has {self.entries} entries, one for each row"
            self._unclear = f"No input has an axis {self.batch_dim} that counts rows (inputs: {given}). {then}."
        elif found.odd and self.entries is None:
            self._unclear = self._why_odd(found)
        return found

    def _why_odd(self, found: Reading) -> str:
        i, j = found.odd[0], found.first
        rows = (sizes(self.leaves[i], self.is_mapped[i]) or ())[self.batch_dim]
        name = self.names[i]
        return (
            f"The input {self.places[i]} has {rows} rows (its shape is {tuple(self.leaves[i].shape)}), and "
            f"{self.places[j]} has {found.count}; axis {self.batch_dim} counts the rows. If all members share {name} "
            f"as it is, write in_dims={{'{name}': None}}. {OTHERS}."
        )

    def _read_lists(self) -> None:
        """Decide which lists have one entry per row: those of the right length, unless their tensors have the rows."""
        places = zip(self.leaves, self.places, strict=True)
        lists = [(leaf, place) for leaf, place in places if type(leaf) is list]
        count = self._read().count
        self._flatten(None)
        opened = self._read()
        if count is None:  # all inputs are lists: their tensors agree on the rows, or else their lengths do
            if opened.count is not None and not self._unclear:
                return
            lengths = {len(part) for part, _ in lists}
            count = lengths.pop() if len(lengths) == 1 else 0
        fitting = [pair for pair in lists if len(pair[0]) == count and not self._has_rows(pair[0], count)]
        numbers = [pair for pair in fitting if all(isinstance(entry, (int, float, complex)) for entry in pair[0])]
        kept = {id(part) for part, _ in fitting} - {id(part) for part, _ in numbers}
        if kept:
            self._flatten(lambda part: id(part) in kept)
            self._read()
            self.row_axis |= {i: 0 for i, leaf in enumerate(self.leaves) if id(leaf) in kept}
            if self._rows is None:
                self._rows, self._unclear = count, ""
        if numbers and count > 1:
            self._unclear = (
                f"The input {numbers[0][1]} is a list of {count} numbers, and there are {count} rows. Write a tensor "
                f"of shape ({count},) if there is one number per row, or a tuple if not."
            )

    def _has_rows(self, part: list[Any], count: int) -> bool:
        """Whether every tensor in a list has ``count`` rows."""
        shapes = [sizes(leaf) for leaf in flatten(part)[0] if isinstance(leaf, CARRIERS)]
        axis = self.batch_dim
        return bool(shapes) and all(shape and len(shape) > axis and shape[axis] == count for shape in shapes)

    def _check_members(self) -> None:
        for name, place, leaf, mapped in zip(self.names, self.places, self.leaves, self.is_mapped, strict=True):
            if self._chosen[name] != 0:
                continue
            nested = isinstance(leaf, Tensor) and leaf.is_nested
            if nested or holds_tensors(leaf):
                raise EngineError(
                    f"The input {place} is a {'nested tensor' if nested else type(leaf).__name__}, which cannot be "
                    f"split by member. Give a tensor, or a tuple or dict of tensors (n, b, …), or let all members "
                    f"share it: in_dims={{'{name}': None}}."
                )
            if mapped and (leaf.ndim == 0 or leaf.shape[0] != self.n):
                raise ParamsError(
                    f"The input {place} has the shape {tuple(leaf.shape)}; with in_dims=0 its first axis counts the "
                    f"{self.n} members: ({self.n}, b, …). To give all members the same input, write "
                    f"in_dims={{'{name}': None}}."
                )

    # -- what each leaf is -----------------------------------------------------------------------------------------

    @property
    def b(self) -> int:
        """The rows of one member; raises :class:`~funcdelta.errors.FoldError` if they are unknown."""
        if self._unclear:
            self.check_rows()
        return self._rows or 0

    def check_rows(self) -> None:
        """Raise :class:`~funcdelta.errors.FoldError` if the rows are unknown, naming the input that is to blame."""
        if self._unclear:
            raise FoldError(self._unclear)

    def key(self, *more: Any) -> tuple[str, ...]:
        """The key of these inputs and of ``more``; see :func:`.input_key`."""
        return input_key(self.leaves, self.places, self.row_axis, self.is_mapped, self._positional, *more)

    @property
    def has_single_rows(self) -> bool:
        """Whether each member has one row, so that no code of the model can treat rows of a member together."""
        return self._rows == 1

    def tensors(self) -> list[Tensor]:
        """The leaves that are tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def form(self) -> tuple[int, tuple[str, ...]]:
        """How many inputs were passed by position, and the names of the others."""
        return self._positional, self._keywords

    def concrete(self) -> Inputs:
        """The inputs with plain tensors in place of those wrapped by a transform."""
        return self._with([concrete(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves])

    def private(self) -> Inputs:
        """The inputs with copies of the tensors that all members share."""
        dense = [isinstance(t, Tensor) and t.layout == torch.strided and not t.is_nested for t in self.leaves]
        shared = zip(self.leaves, dense, self.is_mapped, strict=True)
        return self._with([leaf.clone() if is_dense and not mapped else leaf for leaf, is_dense, mapped in shared])

    def copied(self) -> Inputs:
        """The inputs with copies of everything that a run may write, so that an extra run leaves no trace."""
        return self._with([leaf.clone() if isinstance(leaf, Tensor) else spare(leaf) for leaf in self.leaves])

    # -- the inputs of each engine ---------------------------------------------------------------------------------

    def filled(self, leaves: list[Any]) -> Arguments:
        """The inputs with other leaves."""
        given = iter(leaves)
        values = [next(given) if tree is LEAF else tree(given) for tree in self._trees]
        return tuple(values[: self._positional]), dict(zip(self._keywords, values[self._positional :], strict=True))

    def shared(self) -> Arguments:
        """The inputs of all members."""
        return self.filled(self.leaves)

    def member(self, i: int) -> Arguments:
        """The inputs of member ``i``."""
        return self.filled(
            [leaf[i] if mapped else leaf for leaf, mapped in zip(self.leaves, self.is_mapped, strict=True)]
        )

    def mapped(self) -> list[Tensor]:
        """The tensors with a member axis, for ``torch.vmap``."""
        for place, leaf, mapped in zip(self.places, self.leaves, self.is_mapped, strict=True):
            if mapped and (isinstance(leaf, np.ndarray) or leaf.layout != torch.strided):
                what = "numpy array" if isinstance(leaf, np.ndarray) else f"tensor of layout {leaf.layout}"
                raise EngineError(
                    f"The input {place} with a member axis is a {what}, which torch.vmap cannot map. Give a dense "
                    f'tensor, or use engine="loop".'
                )
        return [leaf for leaf, mapped in zip(self.leaves, self.is_mapped, strict=True) if mapped]

    def fill_mapped(self, tensors: list[Tensor]) -> Arguments:
        """The inputs with ``tensors`` in place of those that :meth:`mapped` returns."""
        given = iter(tensors)
        return self.filled(
            [next(given) if mapped else leaf for leaf, mapped in zip(self.leaves, self.is_mapped, strict=True)]
        )

    def folded(self) -> Arguments:
        """The inputs with all members' rows in one batch axis: (n·b, …), member by member."""
        b, leaves = self.b, []
        for i, leaf in enumerate(self.leaves):
            axis = self.row_axis.get(i)
            if axis is not None:
                leaf = join_members(leaf, axis, self.n, b, self.is_mapped[i])
            elif isinstance(leaf, PLAIN) and not self.is_mapped[i]:
                pass
            elif self.is_mapped[i]:
                raise FoldError(
                    f"The input {self.places[i]} differs by member and has no rows, so it cannot be part of one batch. "
                    f"{OTHERS}."
                )
            elif self.is_cache(i):
                leaf = rows_of_cache(leaf, [*range(b)] * self.n)
            leaves.append(leaf)
        return self.filled(leaves)

    def is_cache(self, i: int) -> bool:
        """Whether leaf ``i`` is a cache whose rows can be picked."""
        leaf = self.leaves[i]
        return not isinstance(leaf, PLAIN) and self.names[i] not in self._whole and is_cache(leaf)

    # -- some of them ----------------------------------------------------------------------------------------------

    def chunk(self, start: int, stop: int) -> Inputs:
        """The inputs of the members from ``start`` to ``stop``."""
        leaves = [
            some_members(leaf, start, stop, place) if mapped else leaf
            for leaf, mapped, place in zip(self.leaves, self.is_mapped, self.places, strict=True)
        ]
        return self._with(leaves, n=stop - start)

    def turned(self) -> Inputs:
        """The inputs with members moved one place forward: the second becomes the first, the first the last."""
        leaves = [
            leaf if not mapped else np.roll(leaf, -1, 0) if isinstance(leaf, np.ndarray) else leaf.roll(-1, 0)
            for leaf, mapped in zip(self.leaves, self.is_mapped, strict=True)
        ]
        return self._with(leaves)

    def rows(self, which: Sequence[int]) -> Inputs:
        """The inputs with the rows ``which`` of each member, in this order; a row may occur several times.

        Inputs without rows stay as they are; a cache becomes a copy with these rows.

        >>> inputs = Inputs(torch.nn.Linear(1, 1), 2, (torch.arange(3.0)[:, None],), {}, None, 0)
        >>> inputs.rows([2, 0]).shared()[0][0].flatten()
        tensor([2., 0.])
        """
        b, leaves = self.b, []
        if not b:
            raise FoldError("The inputs have no rows, so none can be picked.")
        which = [i % b for i in which]
        for i, leaf in enumerate(self.leaves):
            axis = self.row_axis.get(i)
            if axis is not None:
                leaf = some_rows(leaf, axis + self.is_mapped[i], b, which)
            elif self.is_cache(i):
                leaf = rows_of_cache(leaf, which)
            leaves.append(leaf)
        return self._with(leaves, rows=len(which))

    def _with(self, leaves: list[Any], n: int | None = None, rows: int | None = None) -> Inputs:
        part = object.__new__(Inputs)
        part.__dict__.update(self.__dict__)
        part.leaves = leaves
        part.n = self.n if n is None else n
        part._rows = self._rows if rows is None else rows
        part.keys, part.checked = {}, {}
        return part

    def again(self, leaves: list[Any]) -> Inputs:
        """Other leaves with the same names, sizes and plain values, which share what is cached for these."""
        part = object.__new__(Inputs)
        part.__dict__.update(self.__dict__)
        part.leaves = leaves
        return part


class Readings:
    """Reads the inputs of calls as :class:`Inputs`, and remembers the result for each structure and size.

    Adds ``use_cache=False`` if the model understands it and the caller does not give it: a cache in the output could be
    neither mapped nor split by member.

    >>> readings = Readings(torch.nn.Linear(4, 8), 0)
    >>> one, other = readings.read(3, (torch.zeros(5, 4),), {}, None), readings.read(3, (torch.ones(5, 4),), {}, None)
    >>> one.row_axis is other.row_axis, float(other.folded()[0][0].sum())
    (True, 60.0)
    """

    def __init__(self, model: nn.Module, batch_dim: int) -> None:
        self.model, self.batch_dim = model, batch_dim
        self._known: dict[Any, Inputs] = {}

    def read(self, n: int, args: tuple[Any, ...], kwargs: dict[str, Any], in_dims: InDims) -> Inputs:
        """The inputs of ``n`` members, as :class:`Inputs` reads them."""
        key = None if torch.compiler.is_compiling() else _simple(n, args, kwargs, in_dims)
        known = self._known.get(key)
        if known is not None:
            more = known.leaves[len(args) + len(kwargs) :]
            return known.again([*args, *kwargs.values(), *more])
        inputs = Inputs(self.model, n, args, without_cache(self.model, kwargs), in_dims, self.batch_dim)
        if key is not None:
            if len(self._known) >= MOST_READ:
                self._known.clear()
            self._known[key] = inputs.again([None if isinstance(leaf, Tensor) else leaf for leaf in inputs.leaves])
        return inputs


def _simple(n: int, args: tuple[Any, ...], kwargs: dict[str, Any], in_dims: InDims) -> Any:
    """A key of all that reading depends on, for inputs that are plain tensors and values; ``None`` for others."""
    facts: list[Any] = [n, len(args), tuple(kwargs)]
    for leaf in (*args, *kwargs.values()):
        if type(leaf) is Tensor and leaf.layout is torch.strided and not leaf.is_nested:
            facts.append((leaf.shape, leaf.dtype))
        elif type(leaf) in SIMPLE:
            facts.append((type(leaf), repr(leaf)))  # in a dict True == 1 and 0.0 == -0.0
        else:
            return None
    if type(in_dims) is dict and all(dim is None or type(dim) is int for dim in in_dims.values()):
        return (*facts, *in_dims.items())
    return (*facts, in_dims) if in_dims is None or type(in_dims) is int else None


def _is_list(part: Any) -> bool:
    return type(part) is list


def _in_dims_by_name(in_dims: InDims, names: list[str]) -> dict[str, int | None]:
    if isinstance(in_dims, Mapping):
        for name, dim in in_dims.items():
            if not isinstance(name, str):
                raise ParamsError(f"in_dims has the key {name!r}; its keys are the names of inputs, which are strings.")
            if name not in names:
                raise ParamsError(f"in_dims names {name!r}, which is not an input of this call.{near(name, names)}")
            if dim not in (0, None):
                raise ParamsError(
                    f"in_dims[{name!r}]={dim!r}: write 0 (it has a member axis) or None (all members share it)."
                )
        return {name: in_dims.get(name) for name in names}
    if not (in_dims is None or (isinstance(in_dims, int) and in_dims == 0)):
        raise ParamsError(
            f"in_dims={in_dims!r}: write None (one batch for all members), 0, or {{input name: 0 or None}}."
        )
    return dict.fromkeys(names, in_dims)
