"""Arithmetic of what deltas do, ΔW: the change of every weight, not the leaves that make it.

Leaves of a low-rank delta are coordinates, and no unique ones: ``B A = (B G)(G⁻¹ A)`` for every invertible G. Averaging
leaves (``fd.tree``) therefore averages something else than the changes; the functions here give the same
result for every choice of G. They take and give ``(delta, params)``, for ranks change: what comes out is a delta of
its own, with one config, on the same backbone. ``params`` is one member or a stack, whose members are then treated one
by one. All are differentiable; where a singular value decomposition is part, its docstring says where.

Each merge says in which space it works: ``ties``, ``dare``, ``prune`` and ``task_arithmetic`` take and give dense
changes, ``{name of a weight: ΔW}``; ``knots`` aligns changes by a basis that they share, and merges there; ``soup``
averages leaves, and warns where that means nothing.
"""

from .aligned import knots, soup
from .dense import from_dense, materialise
from .merging import dare, prune, task_arithmetic, ties
from .ranks import canonical, truncate
from .sums import add, scale, sum_exact

__all__ = [
    "add",
    "canonical",
    "dare",
    "from_dense",
    "knots",
    "materialise",
    "prune",
    "scale",
    "soup",
    "sum_exact",
    "task_arithmetic",
    "ties",
    "truncate",
]
