"""The tensors of the backbone's module at a site, and of those below it, for methods that read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import ConfigError
from ..match import below
from ..structures.modules.structure import copy_structure


class Own(Mapping[str, Tensor]):
    """``{own name: tensor}`` of a module, each a copy: neither a leaf nor what a method computes touches the backbone.

    Listed are those of the module itself; those of modules below it are found by their dotted names.

    Attributes:
        module: the backbone's own.
        path: its path.

    >>> own = Own(nn.Sequential(nn.Linear(2, 3)), "block")
    >>> list(own), own["0.weight"].shape, own["0.weight"].requires_grad, "1.weight" in own
    ([], torch.Size([3, 2]), False, False)
    """

    def __init__(self, module: nn.Module, path: str) -> None:
        self.module, self.path = module, path

    def __getitem__(self, name: str) -> Tensor:
        found = self.get(name)
        if found is None:
            there = ", ".join(self) or "none"
            raise ConfigError(
                f"A method asks for {below(self.path, name)}, and {type(self.module).__name__} has no such tensor; it "
                f'has {there}. Write own.get("{name}"), which gives None then, or refuse the site in check.'
            )
        return found

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def get(self, key: str, default: Any = None) -> Any:
        found = self._find(key)
        return default if found is None else found.detach().clone()

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, tensor in self.module._parameters.items() if tensor is not None])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _find(self, name: str) -> Tensor | None:
        owner, own = owner_of(self.module, name)
        if owner is None:
            return None
        if is_parametrized(owner, own):
            computed: Any = owner.parametrizations
            # On a copy: some write what they have seen into buffers when they are in training mode.
            with torch.no_grad():
                return copy_structure(computed[own]).eval()()
        tensor = owner._parameters.get(own)
        # A hooked weight is a plain attribute.
        found = getattr(owner, own, None) if tensor is None else tensor
        return found if isinstance(found, Tensor) else None


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """The module at or below ``module`` that has the tensor ``name``, and its name there; ``None``: there is none.

    >>> owner_of(nn.Sequential(nn.Linear(2, 3)), "0.weight")
    (Linear(in_features=2, out_features=3, bias=True), 'weight')
    """
    path, _, own = name.rpartition(".")
    found: nn.Module | None = module
    for token in path.split(".") if path else ():
        found = None if found is None else found._modules.get(token)
    return found, own
