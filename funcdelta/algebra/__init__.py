"""Arithmetic on ΔW, the change that a delta makes to each weight, rather than on the leaves that produce it.

The leaves of a low-rank delta are not unique: ``B A = (B G)(G⁻¹ A)`` for every invertible G. So averaging leaves
(``fd.tree``) does not average the changes, whereas the functions here give the same result for every G. They take and
return ``(delta, params)`` because ranks change: the result is a new delta with one config on the same backbone.
``params`` is one member or a stack, whose members are treated separately. All functions are differentiable, except
where the docstring of one with a singular value decomposition says otherwise.

Merges work in different spaces: ``ties``, ``dare``, ``prune`` and ``task_arithmetic`` on dense changes,
``{name of a weight: ΔW}``; ``knots`` in a basis that the changes share; ``soup`` on leaves, with a warning if that is
not meaningful.
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
