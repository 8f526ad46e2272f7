"""The tensors of the backbone's module at a site, and of those below it, for methods that read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn


class Own(Mapping[str, Tensor]):
    """``{own name: tensor}`` of a module, to be read only; ``module`` is the backbone's own.

    Listed are those of the module itself; those of modules below it are found by their dotted names.

    >>> own = Own(nn.Sequential(nn.Linear(2, 3)))
    >>> list(own), own["0.weight"].shape, own["0.weight"].requires_grad, "1.weight" in own
    ([], torch.Size([3, 2]), False, False)
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getitem__(self, name: str) -> Tensor:
        module, (below, _, own) = self.module, name.rpartition(".")
        for token in below.split(".") if below else ():
            child = module._modules.get(token)
            if child is None:
                raise KeyError(name)
            module = child
        tensor = module._parameters.get(own)
        # A parametrised or hooked weight is computed when it is asked for.
        found = getattr(module, own, None) if tensor is None else tensor
        if not isinstance(found, Tensor):
            raise KeyError(name)
        return found.detach()

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, tensor in self.module._parameters.items() if tensor is not None])

    def __len__(self) -> int:
        return len(list(iter(self)))
