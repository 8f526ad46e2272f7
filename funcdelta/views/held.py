"""What a view holds: the delta's leaves, and what it has learned beside them.

Running statistics of the backbone are copies of the view's own, which training moves. They are a part of params where
they have come to differ from the backbone's, under its names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..run.program import Program
from ..run.skeleton import Skeleton
from .calls import Calls
from .copies import Born
from .frozen import BUFFERS


class Bindable(Protocol):
    """What a view needs of a delta."""

    names: Any
    constants: Any
    program: Program

    def save_finetuned(self, params: Any, path: Any, **options: Any) -> Any:
        """Write a folder that :class:`AutoDeltaModel` reads."""
        ...


class Held(Mapping[str, Tensor]):
    """The view's leaves by their key in params, looked up where they are now: ``view.to(...)`` replaces tensors."""

    def __init__(self, root: nn.Module, names: list[str]) -> None:
        self._owners = {name: (root.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names}

    def __getitem__(self, name: str) -> Tensor:
        owner, own = self._owners[name]
        tensor = owner._parameters.get(own)
        found = tensor if tensor is not None else owner._buffers.get(own)
        if found is None:
            raise KeyError(name)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._owners

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)


class About:
    """What a view knows of itself; without a ``__dict__``, for it is none of the things that models remember.

    Attributes:
        leaves: what it holds, by the names in params.
        learns: whether its buffers are its own.
        born: what its modules were like when it was bound.
        params: gives its params as they are now.
    """

    __slots__ = ("born", "calls", "delta", "learns", "leaves", "params", "skeleton")

    def __init__(
        self,
        delta: Bindable,
        skeleton: Skeleton,
        calls: Calls,
        leaves: Mapping[str, Tensor],
        params: Callable[[], dict[str, Tensor]],
        learns: bool,
    ) -> None:
        self.delta, self.skeleton, self.calls, self.leaves = delta, skeleton, calls, leaves
        self.params, self.learns = params, learns
        self.born: Born = {}


class Viewlike:
    """What every view has, whatever it holds."""

    _funcdelta: Any  # an About; Transformers evaluates the annotations of its classes, where that name is unknown


def other_names(view: Any) -> dict[str, str]:
    """Every further name of a view's leaf that has several, with the one that it goes by.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> model[1].weight = model[0].weight
    >>> delta = fd.BitFitModel(model, modified_modules=["0"], unfrozen_modules=["deltas", "0.weight"])
    >>> other_names(delta.bind(delta.init(0)))
    {'1.weight': '0.weight'}
    """
    about = view._funcdelta
    known = {name: ends[1:] for name, ends in about.delta.program.plan.ends.items() if name in about.leaves}
    return {end: name for name, ends in known.items() for end in ends}


def sharded(view: Any) -> dict[str, Tensor]:
    """Shards of a sharded backbone, which are registered where they are and not the view's.

    >>> delta = fd.BitFitModel(nn.Sequential(nn.Linear(2, 2)), modified_modules=["0"])
    >>> sharded(delta.bind(delta.init(0)))
    {}
    """
    leaves = view._funcdelta.leaves
    return {k: p for k, p in view.named_parameters() if hasattr(p, "full_tensor") and k not in leaves}


def refuse_views(backbone: nn.Module) -> None:
    """Raise `ConfigError` if ``backbone`` is a view of a delta or holds one: it has no weights of its own to share.

    >>> refuse_views(nn.Linear(2, 2))
    """
    for path, module in backbone.named_modules():
        if isinstance(module, Viewlike):
            raise ConfigError(
                f"{path or 'backbone_model'} is a view of a delta, which shares its weights with a backbone: give that "
                f"backbone, with the configs of both deltas, DeltaModel(delta.backbone, *delta.configs, config), or a "
                f"model of its own, delta.merged(fd.unbind(view))."
            )


def _buffers(root: nn.Module, wanted: Callable[[nn.Module, str], bool]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, module in root.named_modules():
        for own in vars(module).get(BUFFERS, ()):
            tensor = module._buffers.get(own, vars(module).get(own))
            if tensor is not None and wanted(module, own):
                found[f"{path}.{own}" if path else own] = tensor
    return found


def persistent(root: nn.Module) -> dict[str, Tensor]:
    """The buffers of the backbone's structure that a state dict has, as the view has them now."""
    return _buffers(root, lambda module, own: own not in module._non_persistent_buffers_set)


def statistics(root: nn.Module) -> dict[str, Tensor]:
    """Those of them that are registered, for they may learn."""
    return _buffers(root, lambda module, own: own in module._buffers and own not in module._non_persistent_buffers_set)


def learned(view: Any) -> dict[str, Tensor]:
    """What a view's buffers have become, by the backbone's names: those that differ from the backbone's.

    >>> delta = fd.LoraModel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), modified_modules=["0"])
    >>> view = delta.bind(delta.init(0)).train()
    >>> y = view(torch.randn(8, 4))
    >>> list(learned(view))
    ['1.running_mean', '1.running_var', '1.num_batches_tracked']
    """
    own = persistent(view)
    if not own:
        return {}
    before = dict(view._funcdelta.delta.program.backbone.named_buffers(remove_duplicate=False))
    found = {name: tensor for name, tensor in own.items() if name in before}
    return {name: t for name, t in found.items() if not _is_equal(t, before[name])}


def _is_equal(own: Tensor, before: Tensor) -> bool:
    return own.shape == before.shape and torch.equal(own, before.to(own))
