"""Derives seeds from a seed and a path of words, the same on every machine."""

from __future__ import annotations

import hashlib
import operator

from ..errors import ParamsError, shown
from ..kinds import count

__all__ = ["derive", "seeds"]

MOST = 2**24
"""The most seeds to make at once, which takes half a minute."""


def derive(seed: int, *path: str | int) -> int:
    """The seed at ``path`` below ``seed``: sha256 of both, cut to 63 bits.

    A leaf's random numbers come from ``derive(seed, name)``, so they depend on the seed and the name alone, and not on
    how many other leaves were drawn before. Words are hashed with their lengths, so ``("a", "b")`` and ``("ab",)``
    are different paths.

    >>> derive(0, "query.lora.lora_A")
    3858330526505661550
    >>> derive(0, "a", "b") == derive(0, "ab")
    False
    """
    try:
        words = [str(operator.index(seed)), *map(str, path)]
    except (TypeError, ValueError):  # str() refuses very long integers
        raise ParamsError(f"A seed must be an integer; found {shown(seed)} ({type(seed).__name__}).") from None
    coded = b"".join(b"%d:%b" % (len(word), word) for word in (text.encode() for text in words))
    return int.from_bytes(hashlib.sha256(coded).digest()[:8], "big") >> 1


def seeds(seed: int, n: int) -> list[int]:
    """Seeds of ``n`` members; the i-th is ``derive(seed, "member", i)`` and does not depend on ``n``.

    So the ranks of a distributed run can share a sweep: ``fd.seeds(0, 64)[rank::world]``.

    >>> seeds(0, 64)[:8] == seeds(0, 8)
    True
    >>> len(set(seeds(0, 64) + seeds(1, 64)))
    128
    """
    return [derive(seed, "member", index) for index in range(count(n, "n", "seeds", most=MOST))]
