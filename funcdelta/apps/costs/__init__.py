"""``funcdelta plan``: the memory and operations that n members on one backbone take, counted without computing.

:mod:`.measured` runs one member on the meta device under torch's own counters, :mod:`.fused` makes attention there keep
only what fused kernels keep, and :mod:`.report` builds a backbone from its config and prints.
"""

from .measured import Cost, measure
from .report import backbone_of

__all__ = ["Cost", "backbone_of", "measure"]
