"""Steering: amplifies, weakens or reverses a delta (Ilharco et al. 2023, "Editing Models with Task Arithmetic").

To learn one thing and forget another, add deltas: ``fd.algebra.sum_exact([a, b], weights=[1.0, -0.5])``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import funcdelta as fd

Params = dict[str, Tensor]


def dial(delta: fd.DeltaModel, params: Params, strengths: Sequence[float] | Tensor) -> tuple[fd.DeltaModel, Params]:
    """A stack with one member s·ΔW per strength s: 1 is the delta itself, 0 the bare backbone, -1 the opposite.

    One ``apply_many`` then gives the response to all strengths, and ``bind_rows(stack, range(n)).generate`` a text for
    each.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
    >>> params = fd.tree.randn_like(delta.init(0), seed=0)
    >>> dialled, stack = dial(delta, params, [-1.0, 0.0, 2.0])
    >>> dense = fd.algebra.materialise(dialled, stack)["0.weight"]
    >>> torch.allclose(dense[2], 2 * fd.algebra.materialise(delta, params)["0.weight"])
    True
    """
    doses = torch.as_tensor(strengths, dtype=torch.float32, device="cpu")
    return fd.algebra.scale(delta, fd.broadcast(params, len(doses)), doses)
