"""Layouts of fused projections: where q, k and v (or a gate and its values) are in the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .parts import Part, equal_parts


def side_by_side(config: Any, names: Sequence[str], width: int) -> tuple[Part, ...]:
    """Equal parts one after the other, ``[q; k; v]``.

    >>> side_by_side(None, ("q", "k", "v"), 6)[2]
    Part(name='v', start=4, stop=6, groups=1)
    """
    return equal_parts(names, width)


def by_head(config: Any, names: Sequence[str], width: int) -> tuple[Part, ...]:
    """Equal parts within each head, ``[q₁; k₁; v₁; q₂; k₂; v₂; …]``.

    >>> from types import SimpleNamespace
    >>> by_head(SimpleNamespace(num_attention_heads=2), ("q", "k", "v"), 12)[0]
    Part(name='q', start=0, stop=2, groups=2)
    """
    heads = config.num_attention_heads
    return tuple(Part(p.name, p.start, p.stop, heads) for p in equal_parts(names, width // heads))


def grouped_query(config: Any, names: Sequence[str], width: int) -> tuple[Part, ...]:
    """``[q; k; v]`` with fewer heads for keys and values than for queries.

    >>> from types import SimpleNamespace
    >>> heads = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2)
    >>> [(part.start, part.stop) for part in grouped_query(heads, ("q", "k", "v"), 16)]
    [(0, 8), (8, 12), (12, 16)]
    """
    queries = config.num_attention_heads
    others = config.num_key_value_heads or queries
    size = width // (queries + 2 * others)
    ends = [queries * size, (queries + others) * size, (queries + 2 * others) * size]
    return tuple(Part(name, start, stop) for name, start, stop in zip(names, [0, *ends], ends, strict=False))
