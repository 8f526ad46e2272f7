"""The tensors of the backbone's module at a site, for methods whose leaves start from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn


class Own(Mapping[str, Tensor]):
    """``{own name: tensor}`` of a module, to be read only; ``module`` is the backbone's own.

    >>> own = Own(nn.Linear(2, 3))
    >>> list(own), own["weight"].shape, own["weight"].requires_grad
    (['weight', 'bias'], torch.Size([3, 2]), False)
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.module._parameters.get(name)
        # A parametrised or hooked weight is computed when it is asked for.
        found = getattr(self.module, name, None) if tensor is None else tensor
        if not isinstance(found, Tensor):
            raise KeyError(name)
        return found.detach()

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, tensor in self.module._parameters.items() if tensor is not None])

    def __len__(self) -> int:
        return len(list(iter(self)))
