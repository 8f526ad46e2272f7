"""Steering: what a delta does, turned up, down, off and around (Ilharco et al. 2023, "Editing Models with Task
Arithmetic").

To learn one thing and forget another, add deltas up: ``fd.algebra.sum_exact([a, b], weights=[1.0, -0.5])``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import funcdelta as fd

Params = dict[str, Tensor]


def dial(delta: fd.DeltaModel, params: Params, strengths: Sequence[float] | Tensor) -> tuple[fd.DeltaModel, Params]:
    """One member a strength, s·ΔW: 1 as it is, 0 the bare backbone, negative its opposite, all as one stack.

    A whole curve of doses is then one ``apply_many``, and ``bind_rows(stack, range(n)).generate`` writes with each.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
    >>> params = fd.tree.randn_like(delta.init(0), seed=0)
    >>> dialled, stack = dial(delta, params, [-1.0, 0.0, 2.0])
    >>> dense = fd.algebra.materialise(dialled, stack)["0.weight"]
    >>> torch.allclose(dense[2], 2 * fd.algebra.materialise(delta, params)["0.weight"])
    True
    """
    doses = torch.as_tensor(strengths, dtype=torch.float32, device="cpu")
    return fd.algebra.scale(delta, fd.broadcast(params, len(doses)), doses)
