"""Hypernetworks: a network writes a delta from a code of the task, one delta for every row.

Params need not be leaves of autograd, so the network trains by the loss of the backbone with what it wrote.
Ha et al. 2016, "HyperNetworks"; for LoRA, Charakorn et al. 2025, "Text-to-LoRA".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import funcdelta as fd

Params = dict[str, Tensor]


def width(delta: fd.DeltaModel, params: Params) -> int:
    """How many numbers a network has to write: those of the leaves that train.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
    >>> width(delta, delta.init(0))
    24
    """
    trained, _ = fd.partition(params, delta.trainable)
    return len(fd.tree.ravel(trained)[0])


def written(delta: fd.DeltaModel, params: Params, codes: Tensor) -> Params:
    """``params`` moved by ``codes`` (n, width): a stack of n members, constants as they are; differentiable in both.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
    >>> stack = written(delta, delta.init(0), torch.zeros(5, 24))
    >>> {name: tuple(leaf.shape) for name, leaf in stack.items()}
    {'0.lora.lora_A': (5, 2, 4), '0.lora.lora_B': (5, 8, 2), '0.lora.scale': (5,)}
    """
    trained, constants = fd.partition(params, delta.trainable)
    vector, unravel = fd.tree.ravel(trained)
    return fd.combine(torch.vmap(unravel)(vector + codes), fd.broadcast(constants, len(codes)))


def apply(delta: fd.DeltaModel, params: Params, codes: Tensor, **batch: Any) -> Any:
    """Row i of the batch with the delta that code i wrote, (b, width), all rows in one pass.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
    >>> apply(delta, delta.init(0), torch.zeros(5, 24), input=torch.randn(5, 4)).shape
    torch.Size([5, 8])
    """
    stack = written(delta, params, codes)
    return delta.apply_rows(stack, torch.arange(len(codes), device=codes.device), **batch)
