"""Tiny architectures on which every law is tested, built offline from configs and fixed seeds.

``ZOO`` maps a name to its ``Architecture``. ``python tests/zoo/zoo_flags.py`` measures and prints the table.
"""

from __future__ import annotations

from zoo_architecture import FLAGS, Architecture, DoublePrecision, cast, convert, padding, take_rows, tokens
from zoo_plain import PLAIN
from zoo_transformers import TRANSFORMERS

__all__ = [
    "FLAGS",
    "ZOO",
    "Architecture",
    "DoublePrecision",
    "cast",
    "convert",
    "padding",
    "take_rows",
    "tokens",
    "with_flag",
]

ZOO: dict[str, Architecture] = {architecture.name: architecture for architecture in (*TRANSFORMERS, *PLAIN)}


def with_flag(flag: str) -> list[str]:
    """Names of the architectures that have the flag; an unknown flag raises ``KeyError``."""
    if flag not in FLAGS:
        raise KeyError(f"{flag!r} is no flag of the zoo; there are {sorted(FLAGS)}")
    return [name for name, architecture in ZOO.items() if flag in architecture.flags]
