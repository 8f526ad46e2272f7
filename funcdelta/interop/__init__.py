"""Reads and writes the formats of other libraries, with one package per library."""

from .opendelta import load_opendelta, save_opendelta
from .peft import from_peft, load_peft, save_peft, to_peft

__all__ = ["from_peft", "load_opendelta", "load_peft", "save_opendelta", "save_peft", "to_peft"]
