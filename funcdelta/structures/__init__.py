"""Backbone-independent names of modules (``attn@.q@``, ``ff@.w2@``), with one table per family of Transformers models.

Methods give their default sites as common names, so every method has defaults on every family with a table.
"""

from .families import FAMILIES
from .names import Names, Parts, common_names, families, resolve
from .rows import Fused, Table

__all__ = ["FAMILIES", "Fused", "Names", "Parts", "Table", "common_names", "families", "resolve"]
