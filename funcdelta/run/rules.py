"""Where the rows of an operation's results are, as far as its name and the shapes tell.

Views move an axis by arithmetic on shapes; products, reductions, look-ups and attention keep the rows that they do not
sum over. Operations without a rule are run again on the blocks of single members (:mod:`.tracking`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..randomness import may_draw


class Rows(NamedTuple):
    """A tensor's axis ``axis`` is (outer, members, inner), flattened; ``outer`` is nearly always 1."""

    axis: int
    outer: int = 1


MIXED = Rows(-1)
"""The tag of a tensor that depends on rows which cannot be assigned to members."""

DRAWN = Rows(-2)
"""The tag of random numbers: every row has its own, and it does not matter which."""

Tag = Rows | None

SAME = {
    *("alias", "detach", "clone", "_to_copy", "contiguous", "lift_fresh", "lift_fresh_copy", "positive"),
    *("view_as_real", "view_as_complex", "_conj", "conj_physical", "_neg_view", "resolve_conj"),
}
RESHAPE = {"view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy"}
MOVE = {"permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "movedim", "swapaxes"}
NEW = {"new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like"}
NEW |= {"new_empty_strided", "empty_strided", "scalar_tensor", "_local_scalar_dense", "sym_size", "sym_numel"}
CUT = {"slice", "select", "split", "split_with_sizes", "unbind", "chunk", "unsafe_split", "narrow"}
ALONG = {
    *("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort", "topk", "flip", "roll"),
    *("_softmax", "_log_softmax", "kthvalue", "median", "mode", "_cummax_helper", "_cummin_helper"),
}
"""Operations that make entries along an axis depend on each other, even if these values do not show it."""
REDUCE = {
    *("sum", "mean", "prod", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "logsumexp"),
    *("var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm"),
}
PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1}
"""Matrix products, with the position of the first factor among their operands."""
ATTENTION = {
    f"_scaled_dot_product_{kind}"
    for kind in (
        *("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention", "attention_math"),
        "fused_attention_overrideable",
    )
}
READS = {"_local_scalar_dense", "equal", "is_nonzero", "item", "allclose"}
DYNAMIC = {"nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "bincount", "nonzero_static"}
ELEMENTWISE = {"copy_", "fill_", "masked_fill_", "masked_fill", "where"}


@dataclass(slots=True)
class Seen:
    """One run of an operation on ``n`` members: its operands ``given`` with their tags, and its results."""

    operator: Operator
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: list[Tensor]
    tags: list[Tag]
    results: list[Tensor]
    n: int

    @property
    def one(self) -> Rows | None:
        """The tag of the first tensor, if no other has one."""
        return self.tags[0] if self.tags.count(None) == len(self.tags) - 1 else None


Rule = Callable[[Seen], Sequence[Tag] | None]


@dataclass(frozen=True, slots=True)
class Operator:
    """What is known of one overload of an operation, independently of its arguments.

    Attributes:
        func: the overload; kept here, so that its id is not reused.
        draws: whether it may draw random numbers.
        seeded: whether its results are random numbers.
        written: the arguments that it writes into, by position and name.
        views: whether its results are views of its operands.
        pointwise: whether it is elementwise, with broadcasting.
        dynamic: whether the shape of its results depends on values.
        axis: the position of its argument ``dim``.
        rule: returns the tags of its results, or ``None`` if it cannot tell.
    """

    func: Any
    name: str
    draws: bool
    seeded: bool
    written: tuple[tuple[int, str], ...]
    views: bool
    pointwise: bool
    dynamic: bool
    axis: int | None
    rule: Rule | None


_known: dict[int, Operator] = {}


def operator_of(func: Any) -> Operator:
    """What is known of ``func``.

    >>> operator_of(torch.ops.aten.add_.Tensor).written, operator_of(torch.ops.aten.mm.default).pointwise
    (((0, 'self'),), False)
    """
    found = _known.get(id(func))
    if found is None:
        found = _known[id(func)] = _read(func)
    return found


def _read(func: Any) -> Operator:
    if not isinstance(func, torch._ops.OpOverload):  # a higher-order operator, which calls any functions
        return Operator(func, str(func), False, False, (), False, False, True, None, None)
    name, arguments, tags = func._overloadpacket.__name__, func._schema.arguments, func.tags
    writes = func._schema.is_mutable
    written = [
        (place, argument.name)
        for place, argument in enumerate(arguments)
        if writes and argument.alias_info is not None and argument.alias_info.is_write
    ]
    return Operator(
        func=func,
        name=name,
        draws=may_draw(func),
        seeded=torch.Tag.nondeterministic_seeded in tags,
        written=tuple(written),
        views=any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns),
        pointwise=torch.Tag.pointwise in tags or name in ELEMENTWISE,
        dynamic=torch.Tag.dynamic_output_shape in tags,
        axis=next((place for place, argument in enumerate(arguments) if argument.name == "dim"), None),
        rule=RULES.get(name),
    )


# -- one tensor with rows ----------------------------------------------------------------------------------------------


def _kept(seen: Seen) -> Sequence[Tag] | None:
    one = seen.one
    return None if one is None else [one] * len(seen.results)


def _viewed(seen: Seen) -> Sequence[Tag] | None:
    one = seen.one
    return None if one is None else [reshaped(seen.given[0].shape, one, seen.n, seen.results[0].shape)]


def reshaped(shape: Sequence[int], tag: Rows, n: int, new: Sequence[int]) -> Rows:
    """The tag of a tensor of ``shape`` and ``tag`` when it is read, row-major, with the shape ``new``.

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


def _moved(seen: Seen) -> Sequence[Tag] | None:
    tag = seen.one
    if tag is None:
        return None
    name, x, args, result, axis = seen.operator.name, seen.given[0], seen.args, seen.results[0], tag.axis
    if name == "expand":
        at = axis + result.ndim - x.ndim
        return [Rows(at, tag.outer) if result.shape[at] == x.shape[axis] else MIXED]
    if name == "permute":
        return [Rows([dim % x.ndim for dim in args[1]].index(axis), tag.outer)]
    if name in ("transpose", "t", "swapaxes"):
        one, two = (args[1] % x.ndim, args[2] % x.ndim) if len(args) > 2 else (0, x.ndim - 1)
        return [Rows({one: two, two: one}.get(axis, axis), tag.outer)]
    if name == "unsqueeze":
        return [Rows(axis + (args[1] % (x.ndim + 1) <= axis), tag.outer)]
    if name == "squeeze":
        dims = range(x.ndim) if len(args) < 2 else args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
        gone = {dim % x.ndim for dim in dims if x.shape[dim] == 1} if x.ndim else set()
        return [MIXED if axis in gone else Rows(axis - sum(dim < axis for dim in gone), tag.outer)]
    return [MIXED]


def _cut(seen: Seen) -> Sequence[Tag] | None:
    tag = seen.one
    if tag is None:
        return None
    name, x, args = seen.operator.name, seen.given[0], seen.args
    place = {"slice": 1, "select": 1, "unbind": 1, "narrow": 1}.get(name, 2)
    dim = (args[place] if len(args) > place else seen.kwargs.get("dim", 0)) % x.ndim
    if dim == tag.axis:
        return [tag if result.shape == x.shape else MIXED for result in seen.results]
    gone = name in ("select", "unbind") and dim < tag.axis
    return [Rows(tag.axis - gone, tag.outer)] * len(seen.results)


def _along(seen: Seen) -> Sequence[Tag] | None:
    """For operations along one axis: mixed if that is the axis of rows, otherwise unchanged."""
    tag = seen.one
    if tag is None:
        return None
    # topk and kthvalue have a count before the axis; all but median default to the last axis.
    name, x, kwargs = seen.operator.name, seen.given[0], seen.kwargs
    places = seen.args[2:] if name in ("topk", "kthvalue") else seen.args[1:]
    numbers = [a for a in places if isinstance(a, (int, list, tuple)) and not isinstance(a, bool)]
    given = kwargs.get("dim", kwargs.get("dims", None if numbers or name == "median" else -1))
    dims = [given] if given is not None else numbers
    flat = [dim for entry in dims for dim in (entry if isinstance(entry, (list, tuple)) else [entry])]
    if not flat or any(isinstance(dim, int) and -x.ndim <= dim < x.ndim and dim % x.ndim == tag.axis for dim in flat):
        return [MIXED] * len(seen.results)
    return [tag] * len(seen.results) if _as_long(seen, tag) else None


def _as_long(seen: Seen, tag: Rows) -> bool:
    """Whether every result has as many axes as the first tensor, and as many rows."""
    x = seen.given[0]
    return all(r.ndim == x.ndim and r.shape[tag.axis] == x.shape[tag.axis] for r in seen.results)


def _reduced(seen: Seen) -> Sequence[Tag] | None:
    tag, place, x = seen.one, seen.operator.axis, seen.given[0]
    if tag is None or place is None:
        return None
    dims = seen.args[place] if place < len(seen.args) else seen.kwargs.get("dim")
    gone = {dim % x.ndim for dim in (dims if isinstance(dims, (list, tuple)) else [dims]) if dim is not None}
    if not gone or tag.axis in gone:
        return None
    left = Rows(tag.axis - sum(dim < tag.axis for dim in gone), tag.outer)
    return [tag if result.ndim == x.ndim else left for result in seen.results]


def _normalised(seen: Seen) -> Sequence[Tag] | None:
    """Layer normalisation, over the last axes."""
    tag = seen.one
    if tag is None or tag.axis >= seen.given[0].ndim - len(seen.args[1]) or not _as_long(seen, tag):
        return None
    return [tag] * len(seen.results)


# -- several -----------------------------------------------------------------------------------------------------------


def _multiplied(seen: Seen) -> Sequence[Tag] | None:
    at, given, tags = PRODUCTS[seen.operator.name], seen.given, seen.tags
    if len(given) != at + 2 or any(tag is not None for tag in tags[:at]) or DRAWN in tags:
        return None
    (x, y), (one, other) = given[at:], tags[at:]
    if at and given[0].ndim > 1 and given[0].shape[0] != 1:
        return None  # an added matrix may hold a constant for each row
    if one is not None and other is None:
        return [one] if one.axis == x.ndim - 2 else None
    if one is not None and other is not None and x.ndim == 3 and one.axis == other.axis == 0:
        return [one] if one == other else None
    return [other] if one is None and other is not None and other.axis == y.ndim - 1 else None


def _joined(seen: Seen) -> Sequence[Tag] | None:
    """For ``cat`` along another axis than that of the rows."""
    tag, x = seen.tags[0], seen.given[0]
    if tag is None or tag is DRAWN or any(other != tag for other in seen.tags):
        return None
    dim = (seen.args[1] if len(seen.args) > 1 else seen.kwargs.get("dim", 0)) % x.ndim
    return None if dim == tag.axis or any(t.ndim != x.ndim for t in seen.given) else [tag]


def _looked_up(seen: Seen) -> Sequence[Tag] | None:
    """For look-ups in a table that has no rows."""
    return [seen.tags[1]] if len(seen.tags) == 2 and seen.tags[0] is None and seen.tags[1] is not DRAWN else None


def _attended(seen: Seen) -> Sequence[Tag] | None:
    """For attention with queries, keys and values of shape (rows, heads, tokens, width)."""
    rows, first = seen.given[0].shape[0], Rows(0)
    if len(seen.given) < 3 or any(t.ndim != 4 or t.shape[0] != rows for t in seen.given[:3]):
        return None
    if any(tag != first for tag in seen.tags[:3]):
        return None
    for mask, tag in zip(seen.given[3:], seen.tags[3:], strict=True):
        own = mask.ndim == 4 and mask.shape[0] == rows
        if (tag != first or not own) if tag is not None else own:
            return None  # an unmarked mask with as many entries as rows may or may not have one per row
    return [first if result.ndim > 2 and result.shape[0] == rows else MIXED for result in seen.results]


RULES: dict[str, Rule] = {
    **dict.fromkeys(SAME, _kept),
    **dict.fromkeys(RESHAPE, _viewed),
    **dict.fromkeys(MOVE, _moved),
    **dict.fromkeys(CUT, _cut),
    **dict.fromkeys(ALONG, _along),
    **dict.fromkeys(REDUCE, _reduced),
    **dict.fromkeys(PRODUCTS, _multiplied),
    **dict.fromkeys(ATTENTION, _attended),
    "native_layer_norm": _normalised,
    "cat": _joined,
    "embedding": _looked_up,
}
"""By the name of the operation."""
