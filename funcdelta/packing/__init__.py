"""Members of different deltas in one stack: ``pack`` and ``unpack``."""

from .unlike import pack, unpack

__all__ = ["pack", "unpack"]
