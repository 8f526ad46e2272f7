"""Explains why ``torch.func`` refuses an old-style ``autograd.Function``, and what to write instead."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

import torch

from ..errors import EngineError, FuncdeltaError
from ..transforms import current_transform


@contextlib.contextmanager
def named_functions() -> Iterator[None]:
    """A block in which torch's refusal to transform an ``autograd.Function`` becomes an ``EngineError`` naming it.

    >>> class Double(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x):
    ...         return 2 * x
    >>> def call(x):
    ...     with named_functions():
    ...         return Double.apply(x).sum()
    >>> torch.func.grad(call)(torch.ones(2))
    Traceback (most recent call last):
    ...
    funcdelta.errors.EngineError: The model uses Double, an autograd.Function without setup_context, which...
    """
    try:
        yield
    except FuncdeltaError:
        raise
    except RuntimeError as error:
        if torch.compiler.is_compiling() or current_transform() is None or "setup_context" not in str(error):
            raise
        raise EngineError(
            f"The model uses {_name_of(error)}, an autograd.Function without setup_context, which torch.func cannot "
            f"transform. For gradients use autograd: fd.value_and_grad(loss), or loss.backward(). For many members "
            f'use delta.apply_many(stack, ...) with engine="auto" or "loop".'
        ) from error


def _name_of(error: Exception) -> str:
    """The class whose ``apply`` raised."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        kind = frame.f_locals.get("cls")
        if isinstance(kind, type) and issubclass(kind, torch.autograd.Function):
            return kind.__name__
    return "a function of its own"
