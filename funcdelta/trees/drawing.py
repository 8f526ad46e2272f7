"""Makes leaves independent of torch's default dtype and default device.

A method's ``init`` writes ``torch.randn(shape, generator=rng)`` and ``torch.tensor(alpha / r)``, for which torch takes
dtype and device from the state of the process. Inside :func:`own_defaults` they are fixed, for this thread alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["own_defaults"]

FLOATING = frozenset(
    getattr(torch, name)
    for name in (
        *("empty", "empty_permuted", "empty_strided", "eye", "linspace", "logspace", "normal", "ones", "rand"),
        *("randn", "zeros", "bartlett_window", "blackman_window", "hamming_window", "hann_window", "kaiser_window"),
    )
)
"""Functions that make tensors of the default dtype whatever their arguments."""
CONVERTING = frozenset({torch.as_tensor, torch.asarray, torch.scalar_tensor, torch.tensor})
INFERRING = CONVERTING | {torch.arange, torch.full}
"""Functions that make tensors of the default dtype from Python floats; those of CONVERTING make () of one number."""


@contextlib.contextmanager
def own_defaults() -> Iterator[None]:
    """A block in which new tensors are float32 on the CPU unless told otherwise, whatever torch's defaults are.

    A single number is kept in float64, so that a leaf made of it has the precision of its own dtype: in a float64
    model, 1/3 should not become 0.3333333433.

    >>> with own_defaults():
    ...     torch.ones(2).dtype, torch.tensor(1 / 3).dtype, (torch.ones(2) * torch.tensor(1 / 3)).dtype
    (torch.float32, torch.float64, torch.float32)
    """
    # Each mode adds a microsecond to every call of torch, and few programs set another default device.
    aside = contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with aside, _OwnDtype():
        yield


class _OwnDtype(TorchFunctionMode):
    """Replaces the default dtype by float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.get_default_dtype() is torch.float32:
            if func not in CONVERTING:
                return func(*args, **kwargs)
            if len(args) == 1 and type(args[0]) is float and not kwargs:
                return func(args[0], dtype=torch.float64)
        if kwargs.get("dtype") is not None or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if hasattr(leaf, "dtype")]
        if func in FLOATING and not given:
            return func(*args, **{**kwargs, "dtype": torch.float32})
        result = func(*args, **kwargs)
        default = torch.get_default_dtype()
        if not isinstance(result, Tensor) or result.dtype not in (default, default.to_complex()):
            return result
        if any(not _whole(leaf) for leaf in given):
            return result  # the dtype comes from an operand
        if func in INFERRING and not given:
            wide = func in CONVERTING and result.ndim == 0
            real = torch.float64 if wide else torch.float32
            return func(*args, **{**kwargs, "dtype": real if result.is_floating_point() else torch.complex64})
        if result.is_floating_point() and torch.finfo(default).bits < 32:
            # 1/7 of integers has already been rounded to half precision, so compute it again in float32.
            result = func(*pytree.tree_map_only(Tensor, _real, args), **pytree.tree_map_only(Tensor, _real, kwargs))
        return result.to(torch.float32 if result.is_floating_point() else torch.complex64)


def _real(leaf: Tensor) -> Tensor:
    """An operand, converted to float32 if it has integers."""
    return leaf.to(torch.float32) if _whole(leaf) and leaf.dtype != torch.bool else leaf


def _whole(leaf: Any) -> bool:
    """Whether an operand has integers or booleans, whose quotients have the default dtype."""
    return isinstance(leaf, Tensor) and not (leaf.is_floating_point() or leaf.is_complex())
