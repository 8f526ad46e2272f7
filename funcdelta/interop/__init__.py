"""Deltas in the formats of other libraries: one package a library."""

from .opendelta import load_opendelta, save_opendelta

__all__ = ["load_opendelta", "save_opendelta"]
