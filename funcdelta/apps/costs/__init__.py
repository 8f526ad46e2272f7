"""``funcdelta plan``: the memory and the operations that n members on one backbone take, counted without any numbers.

:mod:`.measured` runs one member on the meta device under torch's own counters, :mod:`.fused` has attention there keep
what fused kernels keep, :mod:`.report` builds a backbone from its config and prints.
"""

from .measured import Cost, measure
from .report import backbone_of

__all__ = ["Cost", "backbone_of", "measure"]
