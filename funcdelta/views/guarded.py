"""Read-only tensors: what code outside a call gets when it reads the backbone's tensors from a view.

A view shares the storage of everything that it does not train. A write through ``view.head.weight``, by an
initialiser, a soft update or ``.data``, would write into the backbone and into every other view of it. So the
attribute returns a :class:`Guarded`, which allows every operation except those that change it. Tensors that share its
storage (a slice, ``.data``, ``.detach()``) are guarded as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import StaleBackboneError
from ..run.reading import FACTS, STANDS_FOR, written
from ..transforms import is_wrapped


class Guarded(Tensor):
    """A tensor that refuses to be written; see :func:`guarded`."""

    _place: str

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        _refuse(written(Guarded, func, args, kwargs))
        return _computed(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Operators called from C++ (such as a broadcast between processes): the schema says what they write.
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                _refuse(next((leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Guarded)), None))
        return _computed(func, args, kwargs)


def guarded(tensor: Tensor, place: str) -> Tensor:
    """A tensor that computes like ``tensor`` and raises when written; the error calls it ``place``.

    >>> weight = torch.ones(2)
    >>> shown = guarded(weight, "head.weight")
    >>> (shown * 3).sum(), shown.shape
    (tensor(6.), torch.Size([2]))
    >>> shown.data.zero_()
    Traceback (most recent call last):
    ...
    funcdelta.errors.StaleBackboneError: head.weight belongs to the backbone, and a view must not write it. ...
    """
    # A wrapper subclass has no data of its own, so code that bypasses the operators has nothing to write to.
    found = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
        Guarded,
        tensor.shape,
        strides=tensor.stride(),
        storage_offset=tensor.storage_offset(),
        dtype=tensor.dtype,
        layout=tensor.layout,
        device=tensor.device,
    )
    setattr(found, STANDS_FOR, tensor)
    found._place = place
    return found


def _refuse(written: Guarded | None) -> None:
    if written is not None:
        place = written._place
        raise StaleBackboneError(
            f"{place} belongs to the backbone, and a view must not write it. To train a copy of it, name it in the "
            f'config: unfrozen_modules=["deltas", "{place}"]. To compute with other numbers, write to a .clone().'
        )


def _computed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` of the tensors themselves; results that share a guarded tensor's storage are guarded."""
    guards = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Guarded)]
    args, kwargs = pytree.tree_map_only(Guarded, lambda t: getattr(t, STANDS_FOR), (args, kwargs))
    return pytree.tree_map(lambda made: _guarded_too(made, guards), func(*args, **kwargs))


def _guarded_too(made: Any, guards: list[Guarded]) -> Any:
    """``made``, guarded if it shares the storage of one of ``guards``."""
    for guard in guards:
        own = getattr(guard, STANDS_FOR)
        if made is own:
            return guard
        if isinstance(made, Tensor) and _place_of(made) == _place_of(own) is not None:
            return guarded(made, guard._place)
        if isinstance(made, np.ndarray) and own.device.type == "cpu" and np.shares_memory(made, own.numpy()):
            made.flags.writeable = False
    return made


def _place_of(tensor: Tensor) -> int | None:
    """An id of the tensor's storage; ``None`` if it has none that could be compared."""
    if tensor.layout != torch.strided or tensor.is_meta or is_wrapped(tensor) or isinstance(tensor, Guarded):
        return None
    return tensor.untyped_storage()._cdata
