"""The error of functions that take one member's params when they are given a stack."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..errors import StackError


@contextlib.contextmanager
def one_member(call: str, instead: str = "map it over a stack with torch.vmap") -> Iterator[None]:
    """A block that expects one member's params; if ``apply`` meets a stack there, the error says what to write.

    >>> with one_member("hvp(loss, ...)"):
    ...     raise fd.errors.StackError("This is a stack.")
    Traceback (most recent call last):
    ...
    funcdelta.errors.StackError: fd.grad.hvp(loss, ...) takes one member's params; map it over a stack ... This is...
    """
    try:
        yield
    except StackError as error:
        raise StackError(f"fd.grad.{call} takes one member's params; {instead}. {error}") from error
