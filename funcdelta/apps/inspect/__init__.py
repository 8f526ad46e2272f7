"""Trees of modules with the delta in them, their figures, and what an optimiser moves.

A page or a printer needs ``folded(model)`` (or ``folded(tree(delta.backbone, delta.plan, params))``), a
:class:`Node` with ``name``, ``class_name``, ``paths``, ``leaves`` and ``children``, and ``unfold(node)``, which takes
a folded node apart. ``node.paths`` are the paths of the real modules, whatever the label says: a choice means them.
"""

from ...structures import common_names
from .folding import folded, label, unfold
from .graph import structure_graph
from .log import log
from .nodes import Leaf, Node, pruned, tree
from .optimizers import OptimizerGroup, inspect_optimizer
from .statistics import (
    DeltaStatistics,
    frozen_parameters_names,
    num_total_parameters,
    num_trainable_parameters,
    statistics,
    trainable_parameters_names,
)

__all__ = [
    "DeltaStatistics",
    "Leaf",
    "Node",
    "OptimizerGroup",
    "common_names",
    "folded",
    "frozen_parameters_names",
    "inspect_optimizer",
    "label",
    "log",
    "num_total_parameters",
    "num_trainable_parameters",
    "pruned",
    "statistics",
    "structure_graph",
    "trainable_parameters_names",
    "tree",
    "unfold",
]
