"""Reads folders that OpenDelta wrote, and writes folders that it can read."""

from .reading import load_opendelta
from .writing import save_opendelta

__all__ = ["load_opendelta", "save_opendelta"]
