"""Adapters as PEFT makes them, with what PEFT computes: made live, on tiny models, for the tests of `fd.load_peft`."""

from __future__ import annotations

import copy
import importlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import funcdelta as fd


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT and Transformers warn of much that is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def peft_model(backbone: nn.Module, config: Any, seed: int = 0) -> Any:
    """A PEFT model on a copy of ``backbone``, all that trains in it moved away from its start."""
    import peft

    with quiet():
        model = peft.get_peft_model(copy.deepcopy(backbone), config).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor in sorted(model.named_parameters()):
            if tensor.requires_grad:
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=rng))
    return model


def saved(model: Any, folder: Path) -> Path:
    """The folder that PEFT writes."""
    with quiet():
        model.save_pretrained(str(folder))
    return folder


def read_by_peft(backbone: nn.Module, folder: Path) -> nn.Module:
    """What PEFT reads from ``folder``, on a copy of ``backbone``."""
    import peft

    with quiet():
        return peft.PeftModel.from_pretrained(copy.deepcopy(backbone), str(folder), is_trainable=True).eval()


def gradients_of(model: Any, loss: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """PEFT's gradients of all that trains, under the keys that its files have."""
    import peft

    model.zero_grad()
    loss(model).backward()
    grads = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    rest = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items() if name not in grads}
    with quiet():
        found = peft.get_peft_model_state_dict(model, state_dict=rest | grads, save_embedding_layers=False)
    return {key: tensor for key, tensor in found.items() if tensor.any()}


def gradients_here(
    delta: fd.DeltaModel, params: dict[str, Tensor], loss: Callable[[Any], Tensor], **options: Any
) -> dict[str, Tensor]:
    """The same of a delta, under PEFT's keys: how leaves become tensors of a file is linear."""
    some, rest = fd.partition(params, delta.trainable)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in some.items()}
    loss(lambda *args, **kwargs: delta.apply(leaves | rest, *args, **kwargs)).backward()
    grads = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    found = fd.interop.to_peft(delta, grads | rest, **options)[1]
    buffers = [
        name for name, _ in delta.backbone.named_buffers()
    ]  # which are written with modules that are saved whole
    return {key: tensor for key, tensor in found.items() if tensor.any() and not key.endswith(tuple(buffers))}


def cases_in(folder: Path) -> types.ModuleType:
    """The module ``make_cases`` of a folder of cases."""
    sys.path.insert(0, str(folder))
    try:
        with quiet():
            return importlib.import_module("make_cases")
    finally:
        sys.path.remove(str(folder))
