"""Signatures as they are written in the source: types without quotes, functions by name."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from typing import Any, ForwardRef

from .public import fields_of, function_of

WIDTH = 100


class Verbatim:
    """A value that a signature shows as the text given.

    >>> Verbatim("int | None")
    int | None
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signature_of(path: str, value: Any) -> str:
    """``path`` with the parameters of the function or class ``value`` and what it gives.

    >>> signature_of("fd.cat", fd.cat)
    'fd.cat(stacks: Iterable[Tree]) -> Tree'
    >>> signature_of("fd.errors.StackError", fd.errors.StackError)
    'class fd.errors.StackError(ParamsError)'
    """
    if isinstance(value, property | functools.cached_property):
        return f"{path}: {type_of(inspect.signature(function_of(value)).return_annotation)}"
    if not inspect.isclass(value):
        return _wrapped(path, _shown(inspect.signature(function_of(value) or value)))
    if issubclass(value, Exception):
        return f"class {path}({', '.join(base.__name__ for base in value.__bases__)})"
    # Configs check their fields in __new__, whose own signature says nothing; what bases declare is told there.
    fields = fields_of(value)
    made = inspect.signature(value.__init__ if dataclasses.is_dataclass(value) else value)
    parameters = [each for name, each in made.parameters.items() if not fields or name in fields]
    made = made.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    return _wrapped(f"class {path}", _shown(made))


def _wrapped(path: str, signature: str) -> str:
    """On one line where it fits, else a parameter a line."""
    if len(path) + len(signature) <= WIDTH:
        return path + signature
    inside, closing, given = signature[1:].rpartition(")")
    lines = re.split(r", (?=\*{0,2}\w+: |\*, |/, )", inside)
    return "\n".join([f"{path}(", *(f"    {line}," for line in lines), closing + given])


def type_of(annotation: Any) -> str:
    """An annotation as it is written.

    >>> type_of("Tensor | None"), type_of(int), type_of(inspect.Parameter.empty)
    ('Tensor | None', 'int', '')
    """
    if annotation is inspect.Parameter.empty:
        return ""
    named = annotation.__forward_arg__ if isinstance(annotation, ForwardRef) else annotation
    return named if isinstance(named, str) else inspect.formatannotation(named)


def default_of(value: Any) -> str:
    """A default as it is written; a function's name stands for it; nothing where there is no default.

    >>> default_of(0.5), default_of(torch.relu), default_of(inspect.Parameter.empty)
    ('0.5', 'relu', '')
    """
    if value is inspect.Parameter.empty:
        return ""
    return value.__name__ if callable(value) and hasattr(value, "__name__") else repr(value)


def _shown(signature: inspect.Signature) -> str:
    parameters = [
        each.replace(
            annotation=each.annotation if each.annotation is each.empty else Verbatim(type_of(each.annotation)),
            default=each.default if each.default is each.empty else Verbatim(default_of(each.default)),
        )
        for name, each in signature.parameters.items()
        if name not in ("self", "cls")
    ]
    given = signature.return_annotation
    given = given if given is signature.empty else Verbatim(type_of(given))
    return str(signature.replace(parameters=parameters, return_annotation=given))
