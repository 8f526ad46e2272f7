"""Initial values of hypercomplex layers: rules near zero, and weights by Glorot or from a narrow normal distribution.

Source: Karimi Mahabadi et al. 2021, "Compacter"; the distributions and their names are OpenDelta's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .glorot import GLOROT, glorot

WEIGHT_STARTS = (*GLOROT, "normal")
RULE_STARTS = ("normal", "uniform")
RULE_SPREAD = 0.01


def fresh_rule(kind: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """A rule, or a factor of one: ``normal`` N(0, 0.01²) or ``uniform`` U(±0.01).

    >>> bool(fresh_rule("uniform", (4, 4, 4), torch.Generator()).abs().max() <= 0.01)
    True
    """
    if kind == "normal":
        return torch.randn(shape, generator=rng) * RULE_SPREAD
    return torch.empty(shape).uniform_(-RULE_SPREAD, RULE_SPREAD, generator=rng)


def fresh_blocks(kind: str, shape: tuple[int, ...], spread: float, rng: torch.Generator) -> Tensor:
    """Blocks (n, rows, columns), or factors of them: ``normal`` N(0, spread²), or one of Glorot's distributions.

    >>> fresh_blocks("normal", (2, 3, 1), 0.0, torch.Generator()).abs().sum()
    tensor(0.)
    """
    return torch.randn(shape, generator=rng) * spread if kind == "normal" else glorot(kind, shape, rng)
