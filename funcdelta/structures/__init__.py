"""Backbone-independent names of modules (``attn@.q@``, ``ff@.w2@``): one table a family of Transformers models.

Methods name their default sites in common names, so a family with a table has defaults for every method.
"""

from .families import FAMILIES
from .names import Names, Parts, common_names, families, resolve
from .rows import Fused, Table

__all__ = ["FAMILIES", "Fused", "Names", "Parts", "Table", "common_names", "families", "resolve"]
