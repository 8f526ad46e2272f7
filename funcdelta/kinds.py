"""Checks of plain values: fields of configs against their annotated types, and counts against bounds."""

from __future__ import annotations

import numbers
import operator
from types import NoneType
from typing import Any

from .errors import ConfigError, ParamsError, shown

KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((numbers.Real,), "a number"),
    "bool": ((bool,), "True or False"),
    "int | None": ((int, NoneType), "a whole number or None (null in JSON)"),
    "str | None": ((str, NoneType), "a string or None (null in JSON)"),
    "bool | None": ((bool, NoneType), "True, False or None (null in JSON)"),
}
"""``{annotation: (allowed types, words for messages)}``; fields of other types are checked where they are used."""


def check_kind(name: str, value: Any, kind: str) -> None:
    """Raises `ConfigError` unless ``value`` of the field ``name`` has the annotated type ``kind`` (`KINDS`).

    >>> check_kind("backbone_class", 5, "str | None")
    Traceback (most recent call last):
    ...
    funcdelta.errors.ConfigError: backbone_class=5: write a string or None (null in JSON).
    """
    if kind in KINDS:
        allowed, words = KINDS[kind]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise ConfigError(f"{name}={value!r}: write {words}.")
        if isinstance(value, int) and abs(value) > MOST:
            raise ConfigError(f"{name}={shown(value)}: write {words} up to {MOST}.")


MOST = 2**31 - 1
"""The default upper bound of counts: no axis is longer, and nothing is repeated more often."""


def count(value: Any, name: str, of: str, least: int = 0, most: int = MOST) -> int:
    """``value`` as an int that counts ``of`` (a plural, for the message).

    Raises `ParamsError` unless it is a whole number from ``least`` to ``most``; ``True`` and ``2.0`` are refused.

    >>> count(3, "n", "members")
    3
    >>> count(2**70, "n", "members", least=1)
    Traceback (most recent call last):
    ...
    funcdelta.errors.ParamsError: n=1180591620717411303424: write how many members, a whole number, at most 2147483647.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        bound = f"at most {most}" if number is not None and number > most else f"at least {least}"
        raise ParamsError(f"{name}={shown(value)}: write how many {of}, a whole number, {bound}.")
    return number
