"""Marks constants, leaves of params that never train; the tensor itself carries the mark.

``delta.init`` marks them (LoRA's ``scale``, a frozen base, a mask), and whatever funcdelta makes of a marked leaf is
marked as well (``fd.stack``, ``fd.take``, ``fd.tree.add``), as are copies and pickles. torch's own operations,
transforms and compiled code drop the mark, so nothing may rely on it alone: an optimiser that sees it keeps no moments
for the leaf and applies no weight decay; otherwise gradients show what trains (:mod:`funcdelta.optim.moving`).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_constant", "marked", "still"]

MARK = "_funcdelta_constant"


def still(params: Mapping[str, Tensor], constants: Container[str]) -> dict[str, Tensor]:
    """``params`` whose ``constants`` are replaced by marked tensors that share their storage.

    >>> params = still({"q.lora_A": torch.ones(2), "q.scale": torch.ones(())}, ["q.scale"])
    >>> [is_constant(leaf) for leaf in params.values()]
    [False, True]
    """
    return {name: _alias(leaf) if name in constants else leaf for name, leaf in params.items()}


def is_constant(leaf: Any) -> bool:
    """Whether ``leaf`` carries the mark.

    >>> is_constant(torch.ones(2))
    False
    """
    return isinstance(leaf, Tensor) and getattr(leaf, MARK, False)


def marked(made: Tensor, *of: Any) -> Tensor:
    """``made``, a new tensor, which gets the mark if all tensors in ``of`` carry it.

    >>> params = still({"q.scale": torch.ones(3)}, ["q.scale"])
    >>> is_constant(marked(params["q.scale"] + 1, params["q.scale"])), is_constant(params["q.scale"] + 1)
    (True, False)
    """
    if not torch.compiler.is_compiling() and all(map(is_constant, of)):
        setattr(made, MARK, True)
    return made


def _alias(leaf: Tensor) -> Tensor:
    alias = leaf.detach()
    setattr(alias, MARK, True)
    return alias
