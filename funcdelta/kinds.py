"""Kinds of values: what a field of an annotated type may hold, and the words for it in an error."""

from __future__ import annotations

import numbers
from types import NoneType
from typing import Any

from .errors import ConfigError

KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((numbers.Real,), "a number"),
    "bool": ((bool,), "True or False"),
    "int | None": ((int, NoneType), "a whole number or None (null in JSON)"),
    "str | None": ((str, NoneType), "a text or None (null in JSON)"),
    "bool | None": ((bool, NoneType), "True, False or None (null in JSON)"),
}
"""What a field of an annotated type may hold; other types check themselves."""


def check_kind(name: str, value: Any, kind: str) -> None:
    """Raises `ConfigError` unless ``value``, of the field ``name``, is of the annotated type ``kind`` (`KINDS`).

    >>> check_kind("backbone_class", 5, "str | None")
    Traceback (most recent call last):
    ...
    funcdelta.errors.ConfigError: backbone_class=5: write a text or None (null in JSON).
    """
    if kind in KINDS:
        allowed, words = KINDS[kind]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise ConfigError(f"{name}={value!r}: write {words}.")
