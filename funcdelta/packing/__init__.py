"""Unlike members in one stack."""

from .unlike import pack, unpack

__all__ = ["pack", "unpack"]
