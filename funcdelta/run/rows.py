"""The rows of a call's inputs: which axis of each input counts them, read off the inputs themselves; and picking rows.

The axes of rows of all tensors must have one size, except that a single row may serve for all. If they disagree (fewer
images than texts, tokens in one flat list), nothing is guessed: the reading says so, and only a fold has to refuse.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import EngineError
from ..transforms import concrete
from ..trees.opaque import spare

COUNT_POSITIONS = ("cache_position", "logits_to_keep")
"""Transformers' inputs whose only axis counts positions, never rows."""

COUNTS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Reading:
    """The rows of one call's inputs.

    Attributes:
        count: the rows of one member; ``None`` if no input counts them.
        axes: the axis of rows of every leaf that has rows, by position; a member axis is not counted.
        odd: the positions of inputs whose axis of rows has another size.
        first: the position of the input that decided ``count``.
    """

    count: int | None
    axes: dict[int, int]
    odd: tuple[int, ...] = ()
    first: int = 0


def sizes(leaf: Any, mapped: bool = False) -> tuple[int, ...] | None:
    """The shape of one member's tensor or array; ``None`` if its rows cannot be picked along an axis.

    >>> sizes(torch.zeros(3, 4)), sizes(torch.zeros(5, 3, 4), mapped=True), sizes(torch.eye(2).to_sparse()), sizes(7)
    ((3, 4), (3, 4), None, None)
    """
    if isinstance(leaf, Tensor):
        if leaf.is_nested or leaf.layout != torch.strided:
            return None
    elif not isinstance(leaf, np.ndarray):
        return None
    return tuple(leaf.shape[1:] if mapped else leaf.shape)


def read_rows(
    leaves: Sequence[Any],
    places: Sequence[str],
    is_mapped: Sequence[bool],
    whole: Collection[int] = (),
    axis: int = 0,
    entries: int | None = None,
    main: str | None = None,
) -> Reading:
    """The rows of these inputs: how many there are, and the axis of each input that counts them.

    Args:
        whole: positions of inputs that all members share as they are.
        axis: the axis of rows (``batch_dim``).
        entries: the length of an index with one member per row; there are as many rows, or a multiple.
        main: the name of the input that decides if it is there and fits the index (``main_input_name``).

    >>> x, mask, scale = torch.zeros(4, 7), torch.ones(1, 7), torch.tensor(2.0)
    >>> read_rows([x, mask, scale], ["x", "mask", "scale"], [False] * 3).axes
    {0: 0}
    """
    shapes = [None if i in whole else sizes(leaf, is_mapped[i]) for i, leaf in enumerate(leaves)]
    able = [i for i, shape in enumerate(shapes) if shape is not None and len(shape) > axis]
    special = [i for i in able if _may_count_positions(places[i], leaves[i], shapes[i] or ())]
    # Inputs that may count positions vote only if there are no others.
    votes = [i for i in able if i not in special] or able
    # A vector may count anything (where sequences end), so tensors with more axes take precedence.
    votes = [i for i in votes if len(shapes[i] or ()) > 1] or votes
    counts = [(i, (shapes[i] or ())[axis]) for i in votes]
    first, count = _decide(counts, entries, [i for i in votes if entries is not None and places[i] == main])
    if count is None:
        return Reading(None, {})
    axes, odd = {}, []
    for i in able:
        shape, at = shapes[i] or (), axis
        if i in special:
            at = _axis_of_positions(places[i], leaves[i], shape, axis, count, is_mapped[i], [shapes[j] for j in votes])
            if at is None:
                continue
        if shape[at] == count or (shape[at] == 1 and is_mapped[i]):
            axes[i] = at
        elif shape[at] != 1 and i not in special:
            odd.append(i)
    return Reading(count, axes, tuple(odd), first)


def _decide(counts: list[tuple[int, int]], entries: int | None, main: list[int]) -> tuple[int, int | None]:
    """The position of the input that decides, and the number of rows."""
    if not counts:
        return 0, None
    if entries == 1:
        return next((pair for pair in counts if pair[0] in main), counts[0])
    if entries:
        # As many rows as the index has entries, or a multiple: with beams, generate repeats each row.
        fitting = [pair for pair in counts if pair[1] > 1 and pair[1] % entries == 0]
        exact = [pair for pair in fitting if pair[1] == entries]
        for pair in (*[pair for pair in fitting if pair[0] in main], *exact, *fitting):
            return pair
    return next((pair for pair in counts if pair[1] != 1), counts[0])


def _may_count_positions(place: str, leaf: Any, shape: tuple[int, ...]) -> bool:
    """Whether these may be positions (3, b, s), for time, height and width, or (s,) for all rows; not (b, s)."""
    name = place.rpartition(".")[2]
    if name.endswith("position_ids") and len(shape) == 3:
        return True
    told = "position" in name or name.endswith(COUNT_POSITIONS)
    return len(shape) == 1 and told and isinstance(leaf, Tensor) and leaf.dtype in COUNTS


def _axis_of_positions(
    place: str,
    leaf: Tensor,
    shape: tuple[int, ...],
    axis: int,
    count: int,
    mapped: bool,
    others: list[tuple[int, ...] | None],
) -> int | None:
    """The axis of rows of an input that may count positions; ``None`` if it has no rows."""
    if len(shape) == 3:
        # If both axes fit, a first axis of 3 or 4 is time, height, width (and text).
        later = axis < 2 and shape[axis + 1] == count
        return axis + 1 if later and (shape[axis] != count or count in (3, 4)) else axis
    if place.rpartition(".")[2].endswith(COUNT_POSITIONS) or shape[0] != count:
        return None
    # Either one number per row (where an answer starts), or one per token, which then counts up.
    tokens = any(other is not None and len(other) > 1 and other[1] == shape[0] for other in others)
    return None if tokens and not mapped and _counts_up(leaf) else 0


def _counts_up(leaf: Tensor) -> bool:
    if torch.compiler.is_compiling() or leaf.is_meta:
        return False  # no values to read
    values = concrete(leaf)
    return bool((values.diff() == 1).all())


# -- rows of one leaf: a tensor, a numpy array, a list with one entry per row, a cache ---------------------------------


def some_rows(leaf: Any, axis: int, b: int, which: Sequence[int]) -> Any:
    """The rows ``which`` of the ``b`` rows on an axis; a leaf with a single row, which serves for all, stays as it is.

    >>> some_rows(torch.tensor([5, 6, 7]), 0, 3, [2, 0])
    tensor([7, 5])
    """
    if isinstance(leaf, list):
        return [leaf[i] for i in which]
    if leaf.shape[axis] != b:
        return leaf
    if isinstance(leaf, np.ndarray):
        return leaf.take(which, axis)
    return leaf.index_select(axis, torch.tensor(which, device=leaf.device))


def some_members(leaf: Any, start: int, stop: int, place: str) -> Any:
    """The members from ``start`` to ``stop`` of a tensor or an array with a member axis; ``place`` names it in errors.

    >>> some_members(torch.tensor([5, 6, 7]), 1, 3, "x")
    tensor([6, 7])
    """
    if isinstance(leaf, np.ndarray) or leaf.layout == torch.strided:
        return leaf[start:stop]
    try:
        return leaf.index_select(0, torch.arange(start, stop, device=leaf.device))
    except RuntimeError as error:
        raise EngineError(
            f"The input {place} has the layout {leaf.layout}, which cannot be split into chunks of members. Leave out "
            f"chunk_size, or give a dense tensor."
        ) from error


def rows_of_cache(cache: Any, which: Sequence[int]) -> Any:
    """A copy of a cache with the rows ``which``, in this order; a row may occur several times.

    >>> from transformers import DynamicCache
    >>> cache = DynamicCache()
    >>> _ = cache.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    >>> rows_of_cache(cache, [1, 0, 1]).layers[0].keys.shape, cache.layers[0].keys.shape
    (torch.Size([3, 1, 3, 4]), torch.Size([2, 1, 3, 4]))
    """
    cache = spare(cache)
    cache.reorder_cache(torch.tensor(which))
    return cache
