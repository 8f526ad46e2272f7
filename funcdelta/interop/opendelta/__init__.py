"""Folders that OpenDelta wrote, read; and folders that it reads back, written."""

from .reading import load_opendelta
from .writing import save_opendelta

__all__ = ["load_opendelta", "save_opendelta"]
