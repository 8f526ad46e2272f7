"""To look at: trees of modules with the delta in them, figures, and what an optimiser moves.

A page or a printer needs ``folded(model)`` (or ``folded(tree(delta.backbone, delta.plan, params))``), a
:class:`Node` with ``name``, ``class_name``, ``paths``, ``leaves`` and ``children``, and ``unfold(node)``, which takes
a folded one apart. ``node.paths`` are real module paths whatever the label says: they are what a choice means.
"""

from .folding import folded as folded
from .folding import label as label
from .folding import unfold as unfold
from .graph import structure_graph as structure_graph
from .log import log as log
from .nodes import Leaf as Leaf
from .nodes import Node as Node
from .nodes import pruned as pruned
from .nodes import tree as tree
from .optimizers import OptimizerGroup as OptimizerGroup
from .optimizers import inspect_optimizer as inspect_optimizer
from .statistics import DeltaStatistics as DeltaStatistics
from .statistics import frozen_parameters_names as frozen_parameters_names
from .statistics import num_total_parameters as num_total_parameters
from .statistics import num_trainable_parameters as num_trainable_parameters
from .statistics import statistics as statistics
from .statistics import trainable_parameters_names as trainable_parameters_names
