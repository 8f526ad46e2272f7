"""A key for an input structure: what decides where the batch is."""

from __future__ import annotations

import contextlib
import enum
import hashlib
import itertools
import operator
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..trees.opaque import PLAIN
from .containers import CARRIERS, is_cache
from .values import written

SHORT = 200
"""A longer word stands in a key by its digest."""

BY_VALUE = (
    *(bool, str, float, complex, bytes, type(None), enum.Enum, range, slice),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, np.generic),
)
"""What says in a few characters all there is to it."""


def input_key(
    leaves: Sequence[Any],
    names: Sequence[str],
    row_axis: Mapping[int, int],
    is_mapped: Sequence[bool] = (),
    *more: Any,
) -> tuple[str, ...]:
    """What decides where the batch is: the names, kinds and plain values of the inputs, and whatever is in ``more``.

    Of a tensor it tells the dtype, the layout, the axis of rows and which other sizes are 1, but not the sizes; of a
    cache its class and whether it is filled; of other objects the class and their plain attributes.

    >>> x, y = torch.zeros(4, 1, 3), torch.zeros(9, 1, 8)
    >>> input_key([x, True], ["x", "flag"], {0: 0})
    ('x', 'torch.float32:torch.strided:r1n', 'flag', 'True')
    >>> input_key([x], ["x"], {0: 0}) == input_key([y], ["x"], {0: 0})
    True
    """
    pairs = [
        (name, _fact(leaf, row_axis.get(i), bool(is_mapped) and is_mapped[i]))
        for i, (name, leaf) in enumerate(zip(names, leaves, strict=True))
    ]
    return (*[word for pair in pairs for word in pair], *map(_plain, more))


def _fact(leaf: Any, axis: int | None, mapped: bool) -> str:
    if isinstance(leaf, Tensor):
        if leaf.is_nested:
            return f"{leaf.dtype}:nested"
        return f"{leaf.dtype}:{leaf.layout}:{_sizes(leaf.shape[1:] if mapped else leaf.shape, axis)}"
    if isinstance(leaf, PLAIN):
        return _plain(leaf)
    if isinstance(leaf, np.ndarray):
        # What Python reads of an array cannot be seen, so where all rows share one, its values belong to the key.
        shared = "" if mapped or axis is not None else f":{written(leaf)}"
        return f"{leaf.dtype}:numpy:{_sizes(leaf.shape[1:] if mapped else leaf.shape, axis)}{shared}"
    if is_cache(leaf):
        return f"{_kind(leaf)}:{_is_filled(leaf)}"
    if isinstance(leaf, list):  # with an entry a row, of which Python may read whatever is no tensor
        return f"list:{_digest(','.join('tensor' if isinstance(e, CARRIERS) else _plain(e) for e in leaf))}"
    return _plain(leaf)


def _sizes(shape: Sequence[int], axis: int | None) -> str:
    # Branches, for a symbolic size must become a plain word here.
    return "".join(["r" if i == axis else "1" if size == 1 else "n" for i, size in enumerate(shape)])


def _plain(value: Any, depth: int = 4) -> str:
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, (bool, enum.Enum)):
        # A number that torch.compile would keep symbolic becomes one that its graph is for.
        return repr(operator.index(value))
    if isinstance(value, BY_VALUE):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"({','.join(map(_plain, value))})"
    if isinstance(value, (set, frozenset)):
        return f"{{{','.join(sorted(map(_plain, value)))}}}"
    if torch.compiler.is_compiling():
        return _kind(value)
    if isinstance(value, Mapping):
        return f"{_kind(value)}({_digest(','.join(f'{_plain(k)}={_plain(v, depth - 1)}' for k, v in value.items()))})"
    if isinstance(value, Tensor):
        return "tensor"  # whose values are looked after by themselves
    if isinstance(value, (bytearray, memoryview)):
        return f"{_kind(value)}({_digest(repr(bytes(value)))})"
    held = getattr(value, "__dict__", None)
    if isinstance(value, (type, nn.Module)) or callable(value) or not isinstance(held, dict) or not depth:
        return f"{_kind(value)}@{_number_of(value)}"
    own = f"@{_number_of(value)}" if any("__slots__" in vars(kind) for kind in type(value).__mro__) else ""
    return f"{_kind(value)}({_digest(','.join(f'{name}={_plain(v, depth - 1)}' for name, v in held.items()))}){own}"


def _digest(word: str) -> str:
    return word if len(word) <= SHORT else hashlib.blake2b(word.encode(), digest_size=16).hexdigest()


_numbers: dict[int, tuple[Any, int]] = {}
_next_number = itertools.count()


def _number_of(value: Any) -> int:
    """A number that no other object has or had; a new one each time where objects cannot be referred to weakly."""
    known = _numbers.get(id(value))
    if known is not None and known[0]() is value:
        return known[1]
    number, at = next(_next_number), id(value)
    with contextlib.suppress(TypeError):
        _numbers[at] = weakref.ref(value, lambda _: _numbers.pop(at, None)), number
    return number


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _is_filled(cache: Any) -> str:
    try:
        return str(cache.get_seq_length() > 0)
    except Exception:  # a cache of states alone, without positions, says so in ways of its own
        return str(getattr(cache, "has_previous_state", None))
