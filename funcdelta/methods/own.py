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

    Those of the module itself are listed; those of modules below it are found by their dotted names.

    Attributes:
        module: the backbone's own.
        path: where it stands.

    >>> own = Own(nn.Sequential(nn.Linear(2, 3)), "block")
    >>> list(own), own["0.weight"].shape, own["0.weight"].requires_grad, "0.scale" in own
    ([], torch.Size([3, 2]), False, False)
    """

    def __init__(self, module: nn.Module, path: str) -> None:
        self.module, self.path = module, path

    def __getitem__(self, name: str) -> Tensor:
        found = self._find(name)
        if found is None:
            there = ", ".join(self) or "none"
            raise ConfigError(
                f"A method asks for {below(self.path, name)}, and {type(self.module).__name__} has no such tensor; it "
                f'has {there}. Write own.get("{name}"), which gives None then, or refuse the site in check.'
            )
        return found.detach().clone()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, tensor in self.module._parameters.items() if tensor is not None])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _find(self, name: str) -> Tensor | None:
        inner, _, name = name.rpartition(".")
        module: Any = dict(self.module.named_modules()).get(inner) if inner else self.module
        if module is None:
            return None
        if is_parametrized(module, name):
            # On a copy: some write what they have seen into buffers when they are in training mode.
            with torch.no_grad():
                return copy_structure(module.parametrizations[name]).eval()()
        tensor = module._parameters.get(name)
        # A hooked weight is a plain attribute.
        found = getattr(module, name, None) if tensor is None else tensor
        return found if isinstance(found, Tensor) else None
