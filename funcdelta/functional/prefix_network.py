"""The network that computes prefixes: ``W₂ tanh(W₀ E + b₀) + b₂`` for each of P tokens.

Shapes: E ``wte.weight`` (P, e), W₀ ``control_trans.0.weight`` (m, e), W₂ ``control_trans.2.weight`` (outputs, m), and
biases. Source: Li and Liang 2021, "Prefix-Tuning"; names and initial values are OpenDelta's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def fresh_network(tokens: int, embedding: int, hidden: int, outputs: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Initial leaves: a table from N(0, 1), and layers initialised like ``torch.nn.Linear``.

    >>> leaves = fresh_network(3, embedding=4, hidden=5, outputs=6, rng=torch.Generator())
    >>> {name: tuple(leaf.shape) for name, leaf in leaves.items()}["control_trans.2.weight"]
    (6, 5)
    """

    def linear(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        bound = 1 / math.sqrt(columns)
        weight = torch.empty(rows, columns).uniform_(-bound, bound, generator=rng)
        return weight, torch.empty(rows).uniform_(-bound, bound, generator=rng)

    table = torch.randn(tokens, embedding, generator=rng)
    first, second = linear(hidden, embedding), linear(outputs, hidden)
    return {
        "wte.weight": table,
        "control_trans.0.weight": first[0],
        "control_trans.0.bias": first[1],
        "control_trans.2.weight": second[0],
        "control_trans.2.bias": second[1],
    }


def written(p: Mapping[str, Tensor]) -> Tensor:
    """``W₂ tanh(W₀ E + b₀) + b₂``, (P, outputs).

    >>> written(fresh_network(3, 4, 5, outputs=6, rng=torch.Generator())).shape
    torch.Size([3, 6])
    """
    hidden = F.linear(p["wte.weight"], p["control_trans.0.weight"], p["control_trans.0.bias"]).tanh()
    return F.linear(hidden, p["control_trans.2.weight"], p["control_trans.2.bias"])
