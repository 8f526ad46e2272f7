"""A key of a call's inputs, equal for inputs whose rows are in the same places."""

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
"""Longer words are replaced by their digests."""

BY_VALUE = (
    *(bool, str, float, complex, bytes, type(None), enum.Enum, range, slice),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, np.generic),
)
"""Types whose ``repr`` is short and says everything."""


def input_key(
    leaves: Sequence[Any],
    names: Sequence[str],
    row_axis: Mapping[int, int],
    is_mapped: Sequence[bool] = (),
    *more: Any,
) -> tuple[str, ...]:
    """The key of these inputs: their names, kinds and plain values, and those in ``more``.

    A tensor enters with its dtype, layout, axis of rows and which other sizes are 1, but not with its sizes; a cache
    with its class and whether it is filled; any other object with its class and plain attributes.

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
        # Reads of an array cannot be observed, as a tensor's can: if all rows share it, its values belong to the key.
        shared = "" if mapped or axis is not None else f":{written(leaf)}"
        return f"{leaf.dtype}:numpy:{_sizes(leaf.shape[1:] if mapped else leaf.shape, axis)}{shared}"
    if is_cache(leaf):
        return f"{_kind(leaf)}:{_is_filled(leaf)}"
    if isinstance(leaf, list):  # one entry per row; Python may read the entries that are not tensors
        return f"list:{_digest(','.join('tensor' if isinstance(e, CARRIERS) else _plain(e) for e in leaf))}"
    return _plain(leaf)


def _sizes(shape: Sequence[int], axis: int | None) -> str:
    # Written with branches, so that torch.compile turns symbolic sizes into plain words.
    return "".join(["r" if i == axis else "1" if size == 1 else "n" for i, size in enumerate(shape)])


def _plain(value: Any, depth: int = 4) -> str:
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, (bool, enum.Enum)):
        # index() makes torch.compile specialise on a number that it would keep symbolic.
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
        return "tensor"  # reads of its values are observed (see values.py)
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
    """A number that no other object has or had; a new one each time if the object has no weak references."""
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
    except Exception:  # caches that hold states but no positions raise here, in various ways
        return str(getattr(cache, "has_previous_state", None))
