"""Reads and writes the formats of other libraries, with one package per library."""

from .opendelta import load_opendelta, save_opendelta

__all__ = ["load_opendelta", "save_opendelta"]
