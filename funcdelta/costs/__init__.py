"""``funcdelta plan``: what n members on one backbone cost in memory and time, and which layout fits.

:mod:`.sizes` counts a backbone and a member, :mod:`.formulas` turns counts into bytes, operations and seconds,
:mod:`.layouts` spreads them over devices, :mod:`.report` prints. Nothing is trained and no weights are loaded.
"""

from .devices import DEVICES, Device
from .formulas import Cost, Job, decode_cost, training_cost
from .layouts import Placed, layouts
from .sizes import Backbone, Member, from_config, from_numbers

__all__ = [
    "DEVICES",
    "Backbone",
    "Cost",
    "Device",
    "Job",
    "Member",
    "Placed",
    "decode_cost",
    "from_config",
    "from_numbers",
    "layouts",
    "training_cost",
]
