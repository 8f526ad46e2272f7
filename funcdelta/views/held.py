"""What a view holds: the delta's leaves, and the running statistics that it has learned.

A view has its own copies of the backbone's running statistics, and training updates them. Those that differ from the
backbone's are part of params, under the backbone's names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..match import below
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
    """The view's leaves by their keys in params, looked up at each access because ``view.to(...)`` replaces them."""

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
    """A view's own bookkeeping, in slots so that it is not mistaken for state that a model remembers between calls.

    Attributes:
        leaves: the tensors that the view holds, by their names in params.
        learns: whether its buffers are its own.
        born: the state of its modules when it was bound.
        params: returns its current params.
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
    """Base class of all views."""

    _funcdelta: Any  # an About; Transformers evaluates annotations of its classes in places where About is undefined


def other_names(view: Any) -> dict[str, str]:
    """``{further name: first name}`` of a view's leaves that have several names (tied tensors).

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
    """The shards of a sharded backbone, which stay registered although they are not the view's.

    >>> delta = fd.BitFitModel(nn.Sequential(nn.Linear(2, 2)), modified_modules=["0"])
    >>> sharded(delta.bind(delta.init(0)))
    {}
    """
    leaves = view._funcdelta.leaves
    return {k: p for k, p in view.named_parameters() if hasattr(p, "full_tensor") and k not in leaves}


def refuse_views(backbone: nn.Module) -> None:
    """Raise `ConfigError` if ``backbone`` is a view of a delta or contains one, which has no weights to share."""
    for path, module in backbone.named_modules():
        if isinstance(module, Viewlike):
            raise ConfigError(
                f"{path or 'backbone_model'} is a view of a delta, whose weights belong to a backbone. Pass that "
                f"backbone with the configs of both deltas: DeltaModel(delta.backbone, *delta.configs, config). Or "
                f"pass an independent model: delta.merged(fd.unbind(view))."
            )


def _buffers(root: nn.Module, wanted: Callable[[nn.Module, str], bool]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, module in root.named_modules():
        for own in vars(module).get(BUFFERS, ()):
            tensor = module._buffers.get(own, vars(module).get(own))
            if tensor is not None and wanted(module, own):
                found[below(path, own)] = tensor
    return found


def persistent(root: nn.Module) -> dict[str, Tensor]:
    """The view's current values of the buffers that the backbone's state dict contains."""
    return _buffers(root, lambda module, own: own not in module._non_persistent_buffers_set)


def statistics(root: nn.Module) -> dict[str, Tensor]:
    """Those of the :func:`persistent` buffers that are registered in the view, because they may learn."""
    return _buffers(root, lambda module, own: own in module._buffers and own not in module._non_persistent_buffers_set)


def learned(view: Any) -> dict[str, Tensor]:
    """The view's buffers whose values differ from the backbone's, by the backbone's names.

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
