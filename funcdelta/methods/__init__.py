"""What a delta method is written on: leaves, what it does at a site, and what methods are composed of."""

from .acts import Acts
from .additive import Additive
from .combine import AverageConfig, ChainConfig, MixtureConfig, ParallelConfig
from .composition import Composition
from .layers import from_weight, to_weight
from .leaf import Leaf
from .leaf import Leaves as Leaves  # a type, without a docstring of its own
from .low_rank import LowRank

__all__ = [
    "Acts",
    "Additive",
    "AverageConfig",
    "ChainConfig",
    "Composition",
    "Leaf",
    "LowRank",
    "MixtureConfig",
    "ParallelConfig",
    "from_weight",
    "to_weight",
]
