"""Functional optimisers and schedules whose hyper-parameters may be one value per member.

:mod:`funcdelta.optim.rules` explains their protocol; :mod:`~funcdelta.optim.schedules` has functions of the step, and
:mod:`~funcdelta.optim.groups` has factors that depend on the leaf.
"""

from .lion import LionState, lion
from .muon import MuonState, muon
from .rules import AdamState, Optimizer, SGDState, adam, adamw, apply_updates, clip_by_norm, sgd
from .schedules import cosine, linear

__all__ = [
    "AdamState",
    "LionState",
    "MuonState",
    "Optimizer",
    "SGDState",
    "adam",
    "adamw",
    "apply_updates",
    "clip_by_norm",
    "cosine",
    "linear",
    "lion",
    "muon",
    "sgd",
]
