"""Follows every member's rows through a folded run, operation by operation.

A fold is right if what it computes for a member depends only on that member's rows. Comparing outputs cannot prove it:
experts whose capacity is not reached, or a branch that these values do not take, look right until they are wrong. So
the probe follows the rows themselves. Each tensor of a folded run is one of

* *shared* (``None``): made only from parameters and constants, the same for all members;
* :class:`Rows`: one axis has a block of equal size for each member, in order;
* *mixed*: anything else that depends on rows.

Views move the axis by arithmetic on shapes, and elementwise operations keep it. Any other operation is run again on the
blocks of single members: if that returns the blocks of its result, the axis is known, otherwise the result is mixed. A
sum over the batch, a running count of tokens, a sort or a shuffle is thus found where it happens, for any values.
Python that reads a tensor's values (``if``, ``tolist``, numpy) is noted as well, because there one member's values
decide for another. If what it reads comes from inputs without rows, the decision is the same for all members, and the
inputs are noted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..randomness import Generators, ThreadMode, drawn
from ..structures.rowwise import MASKS
from .layout import close
from .rules import DRAWN, DYNAMIC, MIXED, NEW, READS, Operator, Rows, Seen, Tag, operator_of, reshaped
from .storages import Place, Storages, same_axis
from .undisturbed import WithoutDropout

MARK = "_funcdelta_rows"

NOTHING: frozenset[int] = frozenset()
WITHOUT_ROWS = frozenset({None, DRAWN})


class Tracking(ThreadMode):
    """Follows the rows of ``n`` members, ``rows`` each, through everything that is computed inside the block.

    Args:
        on_read: called with the operation's name when Python reads values that depend on rows.
        on_mix: called with the operation's name when one mixes rows that were not mixed before.
        on_input: called with the positions of inputs without rows when Python reads values that come from them.

    Attributes:
        generators: where random numbers come from.
        drew: whether any were drawn.
        hooked: whether a tensor got a hook for the backward pass.

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
        self.generators = Generators(0)
        self.paused = self.alone = 0
        self.hooked = self.drew = False
        self.storages = Storages[Tag]()

    def __deepcopy__(self, memo: Any) -> Tracking:
        """This object itself: marks refer to it, and copies of tensors keep their marks."""
        return self

    # -- marks -----------------------------------------------------------------------------------------------------

    def of(self, tensor: Tensor) -> Tag:
        """The tag of a tensor: its own mark, or what is known of its memory."""
        if self.storages.has_spoiled and self.storages.spoiled(tensor):
            return MIXED
        mark = getattr(tensor, MARK, None)
        if mark is not None and mark[0] is self and mark[1] is not None:
            return mark[1]
        return self.storages.find(tensor, self._carried, MIXED, lambda tag: tag is not None)

    def inputs(self, tensor: Tensor) -> frozenset[int]:
        """The inputs without rows that a tensor's numbers come from."""
        mark = getattr(tensor, MARK, None)
        return (mark[2] if mark is not None and mark[0] is self else NOTHING) | self.storages.inputs(tensor)

    def mark(self, tensor: Tensor, tag: Tag, memory: bool = True) -> None:
        """Tag a tensor, and with ``memory`` its memory, so that other tensors over the same memory are recognised."""
        setattr(tensor, MARK, (self, tag, NOTHING))
        if memory:
            self.storages.note(tensor, tag)

    def mark_input(self, tensor: Tensor, inputs: frozenset[int]) -> None:
        """Note that a tensor's numbers come from these inputs without rows; its tag stays."""
        mark = getattr(tensor, MARK, None)
        tag, before = mark[1:] if mark is not None and mark[0] is self else (None, NOTHING)
        setattr(tensor, MARK, (self, tag, before | inputs))
        self.storages.note_inputs(tensor, inputs)

    def _carried(self, place: Place, tag: Tag, other: Place) -> Tag:
        """The tag of a tensor at ``other``, from that of ``place`` in the same storage."""
        if tag is None or tag is DRAWN:
            return tag
        if tag is MIXED or tag.outer != 1:
            return MIXED
        axis = same_axis(place, tag.axis, other)
        return MIXED if axis is None else Rows(axis)

    def part(self, tensor: Tensor, tag: Rows, member: int) -> Tensor:
        """One member's block of a tensor."""
        axis, size = tag.axis, tensor.shape[tag.axis]
        if tag.outer == 1:
            return tensor.narrow(axis, member * (size // self.n), size // self.n)
        split = tensor.unflatten(axis, (tag.outer, self.n, size // (self.n * tag.outer)))
        return split.select(axis + 1, member).flatten(axis, axis + 1)

    def pause(self, alone: bool = False) -> _Paused:
        """A block in which operations are not followed; with ``alone``, reads of inputs in Python still are."""
        return _Paused(self, alone)

    # -- operations ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, operator = kwargs or {}, operator_of(func)
        if self.paused and not self.alone:
            return self._compute(operator, args, kwargs)
        given, plain = _tensors(args), not operator.draws
        if kwargs:
            given += _tensors(kwargs.values())
        for tensor in given:
            if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
                plain = False
        # The questions asked of tensors here are not the model's, so no other mode may see them.
        with torch._C.DisableTorchFunction():
            if not plain:
                return self._follow(operator, args, kwargs, given)
            with torch._C._DisableTorchDispatch():
                return self._follow(operator, args, kwargs, given)

    def _compute(self, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation itself, with random numbers from ``generators``."""
        if operator.draws:
            found = drawn(operator.func, args, kwargs, self.generators)
            if found is not NotImplemented:
                self.drew = True
                return found
        return operator.func(*args, **kwargs)

    def _follow(self, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]) -> Any:
        inputs = NOTHING.union(*map(self.inputs, given)) if self.storages.has_inputs else NOTHING
        if self.paused:
            return self._of_inputs(operator, args, kwargs, inputs)
        name, tags = operator.name, [self.of(tensor) for tensor in given]
        if name == "set_" and any(isinstance(value, torch.UntypedStorage) for value in args):
            return self._compute(operator, args, kwargs)  # the tensor's tag is then that of the storage
        kinds = set(tags)
        if kinds <= WITHOUT_ROWS:
            out = self._of_inputs(operator, args, kwargs, inputs)
            if DRAWN in kinds or operator.seeded:
                for result in _results(out):
                    self.mark(result, DRAWN)
            return out
        if name in READS:
            self.read(name)
            return self._compute(operator, args, kwargs)
        before: dict[int, Tensor] = {}
        self.paused += 1
        try:
            if operator.written:
                before = {id(t): t.clone() for t in _written(operator, args, kwargs)}
            out = self._compute(operator, args, kwargs)
            results = _results(out)
            found = self._tags(Seen(operator, args, kwargs, given, tags, results, self.n), before)
        finally:
            self.paused -= 1
        if MIXED in found and MIXED not in kinds:
            self.on_mix(name)
        for result, tag in zip(results, found, strict=True):
            written = id(result) in before
            if written:
                self.storages.written(result, tag is MIXED)
            if tag is not None or self.of(result) is not None:
                self.mark(result, tag, memory=not operator.views)  # a view's memory is marked already
            if written:
                self._mark_base(result, tag)
        return out

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """``F.linear`` as one operation that keeps rows apart, instead of its parts; ``None`` if that is unsure."""
        given = [t for t in (x, weight, bias) if t is not None]
        if self.paused or self.storages.has_inputs or any(type(t) not in (Tensor, nn.Parameter) for t in given):
            return None
        tag = self.of(x)
        if tag is None or not 0 <= tag.axis < x.ndim - 1 or any(self.of(t) is not None for t in given[1:]):
            return None
        with torch._C._DisableTorchDispatch():
            out = F.linear(x, weight, bias)
        self.mark(out, tag)
        return out

    def _of_inputs(self, operator: Operator, args: Any, kwargs: Any, inputs: frozenset[int]) -> Any:
        """An operation on tensors without rows: follow which inputs its results come from."""
        if not inputs:
            return self._compute(operator, args, kwargs)
        if operator.name in READS or operator.name in DYNAMIC or operator.dynamic:
            self.read_inputs(inputs)
        out = self._compute(operator, args, kwargs)
        for result in _results(out):
            if operator.name not in NEW:
                self.mark_input(result, inputs)
        return out

    def read(self, what: str) -> None:
        """Note that Python reads values that depend on rows; Transformers' mask builders do so harmlessly."""
        if not _in_masks():
            self.on_read(what)

    def read_inputs(self, inputs: frozenset[int]) -> None:
        """Note that Python reads values that come from inputs without rows."""
        if inputs and not _in_masks():
            self.on_input(inputs)

    def _tags(self, seen: Seen, before: dict[int, Tensor]) -> Sequence[Tag]:
        """The tags of the results; ``before`` holds copies of the tensors that the operation has written, by id."""
        operator, tags, results = seen.operator, seen.tags, seen.results
        if MIXED in tags:
            return [None if operator.name in NEW else MIXED] * len(results)
        if operator.name in NEW:
            return [None] * len(results)
        if operator.rule is not None:
            found = operator.rule(seen)
            if found is not None:
                return found
        masked = True
        if operator.name == "index":
            tag = self._indexed(seen.args)
            if tag is not None:
                return [tag]
            masked = any(index is not None and index.dtype == torch.bool for index in seen.args[1])
        if operator.name in DYNAMIC or (masked and operator.dynamic):
            return [MIXED] * len(results)
        if operator.pointwise:
            given, read = seen.given, [before.get(id(t), t) for t in seen.given]
            if operator.name == "copy_":  # the target's former values do not matter
                given, read, tags = given[1:], read[1:], tags[1:]
                if not any(tags):
                    return [None]
            return [self._pointwise(given, read, tags, result) for result in results]
        return self._by_parts(seen, before)

    def _pointwise(self, given: list[Tensor], read: list[Tensor], tags: list[Tag], result: Tensor) -> Tag:
        """The tag if all operands with rows have them on one axis of the result, and the others are equal for all."""
        tag, size = None, 0
        for t, own in zip(given, tags, strict=True):
            if own is None or own is DRAWN:
                continue
            found = Rows(result.ndim - t.ndim + own.axis, own.outer)
            if tag is not None and (found != tag or t.shape[own.axis] != size):
                return MIXED
            tag, size = found, t.shape[own.axis]
        if tag is None or result.shape[tag.axis] != size:
            return MIXED
        for t, known in zip(read, tags, strict=True):
            if known is None:
                own = tag.axis - result.ndim + t.ndim
                if own >= 0 and t.shape[own] == size and not self.uniform(t, Rows(own, tag.outer)):
                    return MIXED
        return tag

    def uniform(self, tensor: Tensor, tag: Rows) -> bool:
        """Whether all rows of an unmarked tensor hold the same numbers."""
        size, total = tensor.shape[tag.axis], self.n * self.rows
        self.read_inputs(self.inputs(tensor))  # with other inputs the answer may differ
        if tag.outer == 1 and size % total == 0:
            split = tensor.unflatten(tag.axis, (total, size // total))
            first = split.narrow(tag.axis, 0, 1)
            return _equal(first.expand_as(split), split)
        first = self.part(tensor, tag, 0)
        return all(_equal(first, self.part(tensor, tag, i)) for i in range(1, self.n))

    def _indexed(self, args: Any) -> Tag:
        """The tag of ``x[arange(rows), ...]``, which picks an entry of every row; ``None`` for other indices."""
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

    def _by_parts(self, seen: Seen, before: dict[int, Tensor]) -> list[Tag]:
        """The tags of the results: known if the operation on each member's blocks returns the blocks of its results."""
        marked = [(t, tag) for t, tag in _marked(seen.given, seen.tags) if tag is not DRAWN]
        sizes = [(tag.outer, t.shape[tag.axis]) for t, tag in marked]
        found: list[Tag] = [MIXED] * len(seen.results)
        # A constant as long as the rows, and equal for all, may hold one entry per row or not: try both.
        for axes in ([], [(tag.axis, t.shape[tag.axis]) for t, tag in marked if tag.outer == 1]):
            try:
                parts = [self._alone(seen, before, axes, member) for member in range(self.n)]
            except Exception:  # the operation cannot run on one member's rows, so it does not keep them apart
                continue
            again = [self._match(result, [p[i] for p in parts], sizes) for i, result in enumerate(seen.results)]
            found = [tag if tag is not MIXED else other for tag, other in zip(found, again, strict=True)]
            if MIXED not in found:
                break
        return found

    def _alone(self, seen: Seen, before: dict[int, Tensor], axes: list[tuple[int, int]], member: int) -> list[Tensor]:
        """The results of the operation on one member's blocks."""

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

        return _results(self._compute(seen.operator, *pytree.tree_map(own, (seen.args, seen.kwargs))))

    def _match(self, whole: Tensor, parts: list[Tensor], sizes: list[tuple[int, int]]) -> Tag:
        if any(part.ndim != whole.ndim for part in parts):
            return MIXED
        grown = [axis for axis in range(whole.ndim) if whole.shape[axis] != parts[0].shape[axis]]
        if len(grown) != 1 or any(whole.shape[grown[0]] != self.n * part.shape[grown[0]] for part in parts):
            return MIXED
        # Repeating rows, or joining them with others of their kind, adds an outer factor.
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
        """Tag the base of a view that was written."""
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


class _Paused:
    """The block of :meth:`Tracking.pause`."""

    def __init__(self, tracking: Tracking, alone: bool) -> None:
        self.tracking, self.alone, self.before = tracking, alone, 0

    def __enter__(self) -> None:
        self.before, self.tracking.alone = self.tracking.alone, int(self.alone)
        self.tracking.paused += 1

    def __exit__(self, *_: Any) -> None:
        self.tracking.paused -= 1
        self.tracking.alone = self.before


class Readings(WithoutDropout):
    """Turns dropout off, and notes what no dispatch mode sees.

    That is: values that leave torch, tensor objects that are copied, and hooks for the backward pass.
    """

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

    NOTED: ClassVar = AWAY | HOOKS | {Tensor.__deepcopy__}
    ANY: ClassVar = NOTED | WithoutDropout.WATCHED | {F.linear}

    def __init__(self, tracking: Tracking) -> None:
        super().__init__()
        self.tracking = tracking

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in self.ANY:
            return func(*args, **(kwargs or {}))
        tracking = self.tracking
        if func is F.linear:
            out = None if kwargs else tracking.linear(*args)
            return func(*args, **(kwargs or {})) if out is None else out
        if func not in self.NOTED:
            return super().__torch_function__(func, types, args, kwargs)
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


def _marked(given: list[Tensor], tags: list[Tag]) -> list[tuple[Tensor, Rows]]:
    return [(t, tag) for t, tag in zip(given, tags, strict=True) if tag is not None]


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among the arguments of an operation, and in lists among them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [entry for entry in value if isinstance(entry, Tensor)]
    return found


def _results(out: Any) -> list[Tensor]:
    """The tensors that an operation returned."""
    return [out] if isinstance(out, Tensor) else [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


def _written(operator: Operator, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that the operation writes into."""
    return _tensors(args[place] if place < len(args) else kwargs.get(name) for place, name in operator.written)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _in_masks() -> bool:
    """Whether one of Transformers' builders of attention masks is on the call stack."""
    frame = sys._getframe(2)
    for _ in range(30):
        if frame.f_globals.get("__name__") in MASKS:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False
