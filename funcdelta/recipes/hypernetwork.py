"""Hypernetworks: a network generates a delta for every row from a code of its task.

Params need not be autograd leaves, so the loss of the backbone with the generated delta trains the network.
Ha et al. 2016, "HyperNetworks"; for LoRA, Charakorn et al. 2025, "Text-to-LoRA".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import funcdelta as fd

Params = dict[str, Tensor]


def width(delta: fd.DeltaModel, params: Params) -> int:
    """The number of outputs that the network needs: all entries of leaves that train.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
    >>> width(delta, delta.init(0))
    24
    """
    trained, _ = fd.partition(params, delta.trainable)
    return len(fd.tree.ravel(trained)[0])


def written(delta: fd.DeltaModel, params: Params, codes: Tensor) -> Params:
    """``params`` plus ``codes`` (n, width), as a stack of n members with unchanged constants; differentiable in both.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
    >>> stack = written(delta, delta.init(0), torch.zeros(5, 24))
    >>> {name: tuple(leaf.shape) for name, leaf in stack.items()}
    {'0.lora.lora_A': (5, 2, 4), '0.lora.lora_B': (5, 8, 2), '0.lora.scale': (5,)}
    """
    trained, constants = fd.partition(params, delta.trainable)
    vector, unravel = fd.tree.ravel(trained)
    return fd.combine(torch.vmap(unravel)(vector + codes), fd.broadcast(constants, len(codes)))


def apply(delta: fd.DeltaModel, params: Params, codes: Tensor, **batch: Any) -> Any:
    """Run row i of the batch with the delta of code i, (b, width), all rows in one pass.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
    >>> apply(delta, delta.init(0), torch.zeros(5, 24), input=torch.randn(5, 4)).shape
    torch.Size([5, 8])
    """
    stack = written(delta, params, codes)
    return delta.apply_rows(stack, torch.arange(len(codes), device=codes.device), **batch)
