"""Where every member's rows are, told operation by operation.

A fold is right if what it computes for a member depends on that member's rows alone. Comparing outputs cannot show it:
experts whose capacity is not reached, or a branch that these values do not take, look right until they are wrong. So
the probe follows the rows themselves. Each tensor of a folded run is known as

* *shared*: made from parameters and constants alone, the same for all members;
* :class:`Rows`: one axis has a block of equal size for each member, in order;
* *mixed*: anything else that depends on rows.

Views move an axis by arithmetic on shapes. Elementwise operations keep it. Any other operation is run again on the
blocks of single members: if that gives the blocks of its result, the axis is known, else the result is mixed. So a sum
over the batch, a running count of tokens, a sort or a shuffle is found where it happens, whatever its values are. What
Python reads of a tensor's values (``if``, ``tolist``, numpy) is noted too: there, members decide for each other. Where
it reads what comes from inputs without rows, all of them decide alike, and it is noted which inputs those are.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..randomness import ThreadMode, may_draw
from ..structures.rowwise import MASKS
from .layout import close
from .storages import Place, Storages, same_axis

aten = torch.ops.aten
MARK = "_funcdelta_rows"


@dataclass(frozen=True)
class Rows:
    """Axis ``axis`` is (outer, members, inner), flattened: ``outer`` is 1 nearly always."""

    axis: int
    outer: int = 1


MIXED = Rows(-1)
"""Depends on rows, and whose they are cannot be told."""

DRAWN = Rows(-2)
"""Random numbers: no two rows agree on them, and whose they are does not matter while each row has its own."""

Tag = Rows | None

NOTHING: frozenset[int] = frozenset()

SAME = {
    *("alias", "detach", "clone", "_to_copy", "contiguous", "lift_fresh", "lift_fresh_copy", "positive"),
    *("view_as_real", "view_as_complex", "_conj", "conj_physical", "_neg_view", "resolve_conj"),
}
RESHAPE = {"view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy"}
NEW = {"new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like"}
NEW |= {"new_empty_strided", "empty_strided", "scalar_tensor", "_local_scalar_dense", "sym_size", "sym_numel"}
CUT = {"slice", "select", "split", "split_with_sizes", "unbind", "chunk", "unsafe_split", "narrow"}
ALONG = {
    *("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort", "topk", "flip", "roll"),
    *("_softmax", "_log_softmax", "kthvalue", "median", "mode", "_cummax_helper", "_cummin_helper"),
}
"""Operations along one axis whose entries there depend on each other, also where these values do not show it."""
PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1}
"""Products of two matrices, by the place of the first: each row of it, or each entry of a batch, gives one."""
READS = {"_local_scalar_dense", "equal", "is_nonzero", "item", "allclose"}
DYNAMIC = {"nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "bincount", "nonzero_static"}


class Tracking(ThreadMode):
    """Follows the rows of ``n`` members through everything that is computed inside the block.

    Each has ``rows`` rows. ``on_read`` is called where Python reads values that depend on rows, ``on_mix`` where an
    operation first mixes them; both get its name. ``on_input`` is called where Python reads values that inputs without
    rows decide, with the places of these.

    >>> x = torch.arange(6.0).view(6, 1)
    >>> with Tracking(3, print, print) as tracking:
    ...     tracking.mark(x, Rows(0))
    ...     tracking.of(x * 2), tracking.of(x.view(3, 2)), tracking.of(x.cumsum(0)) is MIXED
    cumsum
    (Rows(axis=0, outer=1), Rows(axis=0, outer=1), True)
    """

    def __init__(
        self,
        n: int,
        on_read: Callable[[str], Any],
        on_mix: Callable[[str], Any],
        rows: int = 1,
        on_input: Callable[[frozenset[int]], Any] = lambda places: None,
    ) -> None:
        super().__init__()
        self.n, self.on_read, self.on_mix, self.on_input, self.rows = n, on_read, on_mix, on_input, rows
        self.paused = self.alone = 0
        self.hooked = False
        self.storages = Storages[Tag]()

    def __deepcopy__(self, memo: Any) -> Tracking:
        """Copies of tensors bear the same marks: what they are known by is not copied with them."""
        return self

    # -- marks -----------------------------------------------------------------------------------------------------

    def of(self, tensor: Tensor) -> Tag:
        """What is known of a tensor, or of its memory."""
        if self.storages.spoiled(tensor):
            return MIXED
        mark = getattr(tensor, MARK, None)
        if mark is not None and mark[0] is self and mark[1] is not None:
            return mark[1]
        return self.storages.find(tensor, self._carried, MIXED, lambda tag: tag is not None)

    def inputs(self, tensor: Tensor) -> frozenset[int]:
        """The inputs without rows that its numbers come from."""
        mark = getattr(tensor, MARK, None)
        return (mark[2] if mark is not None and mark[0] is self else NOTHING) | self.storages.inputs(tensor)

    def mark(self, tensor: Tensor, tag: Tag) -> None:
        """Note what is known of a tensor."""
        setattr(tensor, MARK, (self, tag, NOTHING))
        self.storages.note(tensor, tag)

    def mark_input(self, tensor: Tensor, inputs: frozenset[int]) -> None:
        """Note that a tensor's numbers come from these inputs without rows; what else is known of it stays."""
        mark = getattr(tensor, MARK, None)
        tag, before = mark[1:] if mark is not None and mark[0] is self else (None, NOTHING)
        setattr(tensor, MARK, (self, tag, before | inputs))
        self.storages.note_inputs(tensor, inputs)

    def _carried(self, place: Place, tag: Tag, other: Place) -> Tag:
        """What ``other`` is, in whose storage ``place`` is known."""
        if tag is None or tag is DRAWN:
            return tag
        if tag is MIXED or tag.outer != 1:
            return MIXED
        axis = same_axis(place, tag.axis, other)
        return MIXED if axis is None else Rows(axis)

    def part(self, tensor: Tensor, tag: Rows, member: int) -> Tensor:
        """The block of one member."""
        axis, size = tag.axis, tensor.shape[tag.axis]
        if tag.outer == 1:
            return tensor.narrow(axis, member * (size // self.n), size // self.n)
        split = tensor.unflatten(axis, (tag.outer, self.n, size // (self.n * tag.outer)))
        return split.select(axis + 1, member).flatten(axis, axis + 1)

    def pause(self, alone: bool = False) -> _Paused:
        """A block whose operations are not followed; of members that run ``alone``, what Python reads of inputs is."""
        return _Paused(self, alone)

    # -- operations ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused and not self.alone:
            return func(*args, **kwargs)
        given = [t for t in _flat(args, kwargs) if isinstance(t, Tensor)]
        # What is asked of tensors here is nothing that the model asks, and modes below have nothing to do with it.
        with torch._C.DisableTorchFunction():
            if may_draw(func) or any(type(t) not in (Tensor, nn.Parameter) for t in given):
                return self._follow(func, args, kwargs, given)
            with torch._C._DisableTorchDispatch():
                return self._follow(func, args, kwargs, given)

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]) -> Any:
        inputs = NOTHING.union(*map(self.inputs, given))
        name = func._overloadpacket.__name__
        if self.paused:
            return self._of_inputs(func, name, args, kwargs, inputs)
        tags = [self.of(t) for t in given]
        if name == "set_" and any(isinstance(value, torch.UntypedStorage) for value in args):
            return func(*args, **kwargs)  # what it is then is known of its storage
        if not any(tags) or all(tag is None or tag is DRAWN for tag in tags):
            out = self._of_inputs(func, name, args, kwargs, inputs)
            if any(tags) or torch.Tag.nondeterministic_seeded in func.tags:
                for result in pytree.tree_leaves(out):
                    if isinstance(result, Tensor):
                        self.mark(result, DRAWN)
            return out
        if name in READS:
            self.read(name)
            return func(*args, **kwargs)
        with self.pause():
            written = _written(func, args, kwargs)
            before = {id(t): t.clone() for t in written}
            out = func(*args, **kwargs)
            results = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
            found = self._tags(func, name, args, kwargs, given, tags, results, before)
        if MIXED in found and MIXED not in tags:
            self.on_mix(name)
        for result, tag in zip(results, found, strict=True):
            if id(result) in before:
                self.storages.written(result, tag is MIXED)
            if tag is not None or self.of(result) is not None:
                self.mark(result, tag)
            if id(result) in before:
                self._mark_base(result, tag)
        return out

    def _of_inputs(self, func: Any, name: str, args: Any, kwargs: Any, inputs: frozenset[int]) -> Any:
        """An operation on what has no rows: is it a reading of inputs, and what does it make of them?"""
        if not inputs:
            return func(*args, **kwargs)
        if name in READS or name in DYNAMIC or torch.Tag.dynamic_output_shape in func.tags:
            self.read_inputs(inputs)
        out = func(*args, **kwargs)
        for result in pytree.tree_leaves(out):
            if isinstance(result, Tensor) and name not in NEW:
                self.mark_input(result, inputs)
        return out

    def read(self, what: str) -> None:
        """Python reads values that depend on rows; known builders of masks do so harmlessly."""
        if not _in_masks():
            self.on_read(what)

    def read_inputs(self, inputs: frozenset[int]) -> None:
        """Python reads values that inputs without rows decide."""
        if inputs and not _in_masks():
            self.on_input(inputs)

    def _tags(
        self,
        func: Any,
        name: str,
        args: Any,
        kwargs: Any,
        given: list[Tensor],
        tags: list[Tag],
        results: list[Tensor],
        before: dict[int, Tensor],
    ) -> list[Tag]:
        if any(tag is MIXED for tag in tags):
            return [None if name in NEW else MIXED] * len(results)
        if name in NEW:
            return [None] * len(results)
        one = tags[0] if isinstance(tags[0], Rows) and sum(tag is not None for tag in tags) == 1 else None
        if one is not None:
            x = given[0]
            if name in SAME:
                return [one] * len(results)
            if name in RESHAPE:
                return [reshaped(x.shape, one, self.n, results[0].shape)]
            if name in ("permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "movedim", "swapaxes"):
                return [_moved(name, x, one, args, results[0])]
            if name in CUT:
                return _cut(name, x, one, args, kwargs, results)
        if name in PRODUCTS:
            tag = _product(name, given, tags)
            if tag is not None:
                return [tag]
        if name == "index":
            tag = self._indexed(args)
            if tag is not None:
                return [tag]
        masked = any(index is not None and index.dtype == torch.bool for index in args[1]) if name == "index" else True
        if name in DYNAMIC or (masked and torch.Tag.dynamic_output_shape in func.tags):
            return [MIXED] * len(results)
        if name in ALONG and one is not None and _along(name, args, kwargs, given[0], one):
            return [MIXED] * len(results)
        if torch.Tag.pointwise in func.tags or name in ("copy_", "fill_", "masked_fill_", "masked_fill", "where"):
            read = [before.get(id(t), t) for t in given]
            if name == "copy_":  # what was there before does not matter
                given, read, tags = given[1:], read[1:], tags[1:]
                if not any(tags):
                    return [None]
            return [self._pointwise(given, read, tags, result) for result in results]
        return self._by_parts(func, args, kwargs, given, tags, results, before)

    def _pointwise(self, given: list[Tensor], read: list[Tensor], tags: list[Tag], result: Tensor) -> Tag:
        """All that have rows have them on the same axis, counted from the last; the others say nothing of members."""
        rows = [(t, tag) for t, tag in _marked(given, tags) if tag is not DRAWN]
        places = {(result.ndim - t.ndim + tag.axis, tag.outer, t.shape[tag.axis]) for t, tag in rows}
        if len(places) != 1:
            return MIXED
        axis, outer, size = next(iter(places))
        if result.shape[axis] != size:
            return MIXED
        tag = Rows(axis, outer)
        for t, known in zip(read, tags, strict=True):
            own = axis - result.ndim + t.ndim
            if known is None and own >= 0 and t.shape[own] == size and not self.uniform(t, Rows(own, outer)):
                return MIXED
        return tag

    def uniform(self, tensor: Tensor, tag: Rows) -> bool:
        """Whether all rows have the same numbers in a tensor that nobody has marked."""
        size, total = tensor.shape[tag.axis], self.n * self.rows
        self.read_inputs(self.inputs(tensor))  # other numbers may be another answer
        if tag.outer == 1 and size % total == 0:
            split = tensor.unflatten(tag.axis, (total, size // total))
            first = split.narrow(tag.axis, 0, 1)
            return _equal(first.expand_as(split), split)
        first = self.part(tensor, tag, 0)
        return all(_equal(first, self.part(tensor, tag, i)) for i in range(1, self.n))

    def _indexed(self, args: Any) -> Tag:
        """``x[arange(rows), ...]``: every row is asked for itself."""
        x, indices = args[0], list(args[1])
        tag = self.of(x)
        if tag is None or tag is MIXED or tag.outer != 1 or tag.axis >= len(indices):
            return None
        own = indices[tag.axis]
        if own is None or own.dtype == torch.bool or self.of(own) is not None:
            return None
        counts = [axis for axis in range(own.ndim) if own.shape[axis] == x.shape[tag.axis] and own.numel() > 1]
        if len(counts) != 1 or own.numel() != x.shape[tag.axis]:
            return None
        self.read_inputs(self.inputs(own))
        if not torch.equal(own.flatten(), torch.arange(own.numel(), device=own.device, dtype=own.dtype)):
            return None
        asked = [index for index in indices if index is not None]
        positions = [i for i, index in enumerate(indices) if index is not None]
        if positions != list(range(positions[0], positions[0] + len(positions))):
            return None
        shape = torch.broadcast_shapes(*(index.shape for index in asked))
        at = len(shape) - own.ndim + counts[0]
        for index in asked:
            known, here = self.of(index), at - len(shape) + index.ndim
            if known is not None and (known is MIXED or known.axis != here):
                return None
            long = known is None and index is not own and here >= 0 and index.shape[here] == own.numel()
            if long and not self.uniform(index, Rows(here)):
                return None
        return Rows(positions[0] + at)

    def _by_parts(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        given: list[Tensor],
        tags: list[Tag],
        results: list[Tensor],
        before: dict[int, Tensor],
    ) -> list[Tag]:
        """The operation on the blocks of each member: do they give the blocks of its result?"""
        marked = [(t, tag) for t, tag in _marked(given, tags) if tag is not DRAWN]
        sizes = [(tag.outer, t.shape[tag.axis]) for t, tag in marked]
        found: list[Tag] = [MIXED] * len(results)
        # What is as long as the rows and the same for all of them may be one constant for each row, or not.
        for axes in ([], [(tag.axis, t.shape[tag.axis]) for t, tag in marked if tag.outer == 1]):
            try:
                parts = [self._alone(func, args, kwargs, before, axes, member) for member in range(self.n)]
            except Exception:  # the operation needs the rows of several members: that is the answer
                continue
            again = [self._match(result, [p[i] for p in parts], sizes) for i, result in enumerate(results)]
            found = [tag if tag is not MIXED else other for tag, other in zip(found, again, strict=True)]
            if MIXED not in found:
                break
        return found

    def _alone(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        before: dict[int, Tensor],
        axes: list[tuple[int, int]],
        member: int,
    ) -> list[Tensor]:
        """What the operation gives for the blocks of one member."""

        def own(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            tag, value = self.of(t), before.get(id(t), t)
            if tag is DRAWN:
                return value.clone() if id(t) in before else value
            if tag is None:
                long = [axis for axis, size in axes if t.ndim > axis and t.shape[axis] == size]
                tag = Rows(long[0]) if long and self.uniform(value, Rows(long[0])) else None
            value = value if tag is None else self.part(value, tag, member)
            return value.clone() if id(t) in before else value

        alone = func(*pytree.tree_map(own, args), **pytree.tree_map(own, kwargs))
        return [t for t in pytree.tree_leaves(alone) if isinstance(t, Tensor)]

    def _match(self, whole: Tensor, parts: list[Tensor], sizes: list[tuple[int, int]]) -> Tag:
        if any(part.ndim != whole.ndim for part in parts):
            return MIXED
        grown = [axis for axis in range(whole.ndim) if whole.shape[axis] != parts[0].shape[axis]]
        if len(grown) != 1 or any(whole.shape[grown[0]] != self.n * part.shape[grown[0]] for part in parts):
            return MIXED
        # Rows that were repeated, or joined with others like them, stand there as often as the axis is longer.
        size = whole.shape[grown[0]]
        often = [outer * (size // one) for outer, one in sizes if one and size % one == 0]
        for outer in dict.fromkeys([1, *(outer for outer, _ in sizes), *often]):
            tag = Rows(grown[0], outer)
            if size % (self.n * outer):
                continue
            if all(close(self.part(whole, tag, i), part) for i, part in enumerate(parts)):
                return tag
        return MIXED

    def _mark_base(self, view: Tensor, tag: Tag) -> None:
        """What is written through a view is in its base, too."""
        base = view._base
        if base is None or tag is None or tag is DRAWN:
            return
        known = self.of(base)
        if tag is not MIXED:
            if base.numel() == view.numel() and base.is_contiguous() and view.is_contiguous():
                tag = reshaped(view.shape, tag, self.n, base.shape)
            else:
                axis = same_axis(Place.of(view), tag.axis, Place.of(base)) if tag.outer == 1 else None
                tag = MIXED if axis is None else Rows(axis, tag.outer)
            if known is not None and known != tag:
                tag = MIXED
        self.mark(base, tag)


def _product(name: str, given: list[Tensor], tags: list[Tag]) -> Tag:
    """Where the rows of a product are, if that can be told from where those of its factors are."""
    at = PRODUCTS[name]
    if len(given) != at + 2 or any(tag is not None for tag in tags[:at]) or DRAWN in tags:
        return None
    (x, y), (one, other) = given[at:], tags[at:]
    if at and given[0].ndim > 1 and given[0].shape[0] != 1:
        return None  # a constant with as many rows
    if one is not None and other is None:
        return one if one.axis == x.ndim - 2 else None
    if one is not None and other is not None and x.ndim == 3 and one.axis == other.axis == 0:
        return one if one == other else None
    return other if one is None and other is not None and other.axis == y.ndim - 1 else None


class _Paused:
    """Operations inside the block are not followed."""

    def __init__(self, tracking: Tracking, alone: bool) -> None:
        self.tracking, self.alone, self.before = tracking, alone, 0

    def __enter__(self) -> None:
        self.before, self.tracking.alone = self.tracking.alone, int(self.alone)
        self.tracking.paused += 1

    def __exit__(self, *_: Any) -> None:
        self.tracking.paused -= 1
        self.tracking.alone = self.before


class Readings(TorchFunctionMode):
    """Notes what passes every dispatcher by: where values leave torch, copies of objects, hooks of the backward."""

    AWAY: ClassVar = frozenset(
        {
            *(Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__reduce_ex__),
            *(Tensor.untyped_storage, Tensor.storage, Tensor._typed_storage),
        }
    )
    HOOKS: ClassVar = frozenset(
        {
            *(Tensor.register_hook, Tensor.register_post_accumulate_grad_hook),
            Tensor.grad_fn.__get__,  # type: ignore[attr-defined]  (nodes take hooks as well)
        }
    )

    def __init__(self, tracking: Tracking) -> None:
        super().__init__()
        self.tracking = tracking

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tracking = self.tracking
        if func in self.HOOKS:
            tracking.hooked = True
        elif func in self.AWAY and (not tracking.paused or tracking.alone):
            if not tracking.paused and tracking.of(args[0]) is not None:
                tracking.read(getattr(func, "__name__", str(func)))
            tracking.read_inputs(tracking.inputs(args[0]))
        out = func(*args, **(kwargs or {}))
        if func is Tensor.__deepcopy__ and not tracking.paused:
            tracking.mark(out, tracking.of(args[0]))
            tracking.mark_input(out, tracking.inputs(args[0]))
        return out


def reshaped(shape: Any, tag: Rows, n: int, new: Any) -> Rows:
    """Where the rows are when a tensor of ``shape`` is read, row-major, as one of the shape ``new``.

    >>> reshaped((6, 5, 4), Rows(0), 3, (30, 4)), reshaped((5, 6, 4), Rows(1), 3, (30, 4))
    (Rows(axis=0, outer=1), Rows(axis=0, outer=5))
    """
    before = math.prod(shape[: tag.axis]) * tag.outer
    ahead = 1
    for axis, size in enumerate(new):
        if before % ahead == 0 and size % n == 0 and size % (before // ahead * n) == 0 and size > 1:
            return Rows(axis, before // ahead)
        if size and before % (ahead * size):
            break
        ahead *= size
    return MIXED


def _moved(name: str, x: Tensor, tag: Rows, args: Any, result: Tensor) -> Rows:
    axis = tag.axis
    if name == "expand":
        at = axis + result.ndim - x.ndim
        return Rows(at, tag.outer) if result.shape[at] == x.shape[axis] else MIXED
    if name == "permute":
        return Rows([dim % x.ndim for dim in args[1]].index(axis), tag.outer)
    if name in ("transpose", "t", "swapaxes"):
        one, two = (args[1] % x.ndim, args[2] % x.ndim) if len(args) > 2 else (0, x.ndim - 1)
        return Rows({one: two, two: one}.get(axis, axis), tag.outer)
    if name == "unsqueeze":
        return Rows(axis + (args[1] % (x.ndim + 1) <= axis), tag.outer)
    if name == "squeeze":
        dims = range(x.ndim) if len(args) < 2 else args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
        gone = {dim % x.ndim for dim in dims if x.shape[dim] == 1} if x.ndim else set()
        return MIXED if axis in gone else Rows(axis - sum(dim < axis for dim in gone), tag.outer)
    return MIXED


def _cut(name: str, x: Tensor, tag: Rows, args: Any, kwargs: Any, results: list[Tensor]) -> list[Tag]:
    place = {"slice": 1, "select": 1, "unbind": 1, "narrow": 1}.get(name, 2)
    dim = (args[place] if len(args) > place else kwargs.get("dim", 0)) % x.ndim
    if dim == tag.axis:
        return [tag if result.shape == x.shape else MIXED for result in results]
    gone = name in ("select", "unbind") and dim < tag.axis
    return [Rows(tag.axis - gone, tag.outer)] * len(results)


def _along(name: str, args: Any, kwargs: Any, x: Tensor, tag: Rows) -> bool:
    """Whether an operation along one axis goes along that of the rows."""
    # What counts entries comes before the axis, which is the last one where nothing says which.
    places = args[2:] if name in ("topk", "kthvalue") else args[1:]
    numbers = [a for a in places if isinstance(a, (int, list, tuple)) and not isinstance(a, bool)]
    given = kwargs.get("dim", kwargs.get("dims", None if numbers or name == "median" else -1))
    dims = [given] if given is not None else numbers
    flat = [dim for entry in dims for dim in (entry if isinstance(entry, (list, tuple)) else [entry])]
    return not flat or any(
        isinstance(dim, int) and -x.ndim <= dim < x.ndim and dim % x.ndim == tag.axis for dim in flat
    )


def _marked(given: list[Tensor], tags: list[Tag]) -> list[tuple[Tensor, Rows]]:
    return [(t, tag) for t, tag in zip(given, tags, strict=True) if tag is not None]


def _flat(args: Any, kwargs: Any) -> Iterator[Any]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that the operation writes into."""
    if not func._schema.is_mutable:
        return []
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [t for t in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(t, Tensor)]
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _in_masks() -> bool:
    """Whether one of Transformers' builders of attention masks is at work."""
    frame = sys._getframe(2)
    for _ in range(30):
        if frame.f_globals.get("__name__") in MASKS:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False
