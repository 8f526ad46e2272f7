"""Views: a bound delta as an ordinary module of the backbone's class, for ``generate``, ``Trainer`` and pipelines.

A view is a skeleton whose call never ends. Its leaves are parameters of its own, copied from params; everything else
aliases the backbone's storage and does not train. Its state dict holds the delta's leaves and nothing else, so
loading one can never write into the backbone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..run.call import Call, Params
from ..run.fsdp import check_bound
from ..run.layout import Run
from ..run.single import missed_sites
from ..run.skeleton import Skeleton
from ..errors import MatchError, ParamsError, StaleBackboneError
from ..match import near, within
from ..planning.sharing import Expanding

if TYPE_CHECKING:
    from ..model import DeltaModel


class Leaves(Mapping[str, Tensor]):
    """The view's leaves by their key in params, looked up where they stand now: ``view.to(...)`` replaces tensors."""

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


class View(nn.Module):
    """What a view has besides its backbone's class: a state dict of the delta alone."""

    _delta: Any
    _leaves: Any  # Transformers evaluates the annotations of its classes where these names are unknown
    _aliases: Any

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:  # type: ignore[override]
        """The delta's leaves under their names in params."""
        found = OrderedDict() if destination is None else destination
        for name, leaf in self._leaves.items():
            found[prefix + name] = leaf if keep_vars else leaf.detach()
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy values into the delta's leaves; the backbone's tensors are never written."""
        missing = [name for name in self._leaves if name not in state_dict]
        unexpected = [name for name in state_dict if name not in self._leaves]
        if strict and (missing or unexpected):
            raise ParamsError(
                f"A view holds the delta's leaves only. Missing: {missing[:3]}; unexpected: {unexpected[:3]}."
                f"{near(unexpected[0], list(self._leaves)) if unexpected else ''}"
            )
        with torch.no_grad():
            for name, leaf in self._leaves.items():
                if name in state_dict:
                    if state_dict[name].shape != leaf.shape:
                        raise ParamsError(
                            f"{name} has the shape {tuple(state_dict[name].shape)}; the view has {tuple(leaf.shape)}."
                        )
                    leaf.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys(missing, unexpected)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A view of its own: the hooks of a plain copy would still compute with this one's leaves."""
        other = bind(self._delta, {name: leaf.detach() for name, leaf in self._leaves.items()})
        for mine, its in zip(self.modules(), other.modules(), strict=True):
            its.training = mine.training
        for (_, mine), (_, its) in zip(self.named_parameters(), other.named_parameters(), strict=True):
            if (mine.dtype, mine.device) != (its.dtype, its.device):  # after view.to(...)
                its.data = mine.detach().clone()
        memo[id(self)] = other
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ParamsError("A view holds hooks on the backbone and cannot be pickled: save fd.unbind(view) instead.")


def bind(delta: DeltaModel, params: Params) -> nn.Module:
    """A module of the backbone's class that runs with ``params``; see :meth:`DeltaModel.bind`."""
    skeleton = delta.program.skeletons.build(delta.mode_flag, view=True)
    module = skeleton.module
    names = [name for name in delta.names if name in params]
    check_bound(skeleton.units, [name for name in names if name in delta.plan.trained])
    for name in names:
        value = params[name].detach().clone()
        if name in delta.plan.trained:
            parameter = nn.Parameter(value)
            for end in delta.plan.trained[name]:
                path, _, own = end.rpartition(".")
                module.get_submodule(path)._parameters[own] = parameter
        else:
            _place(module, name, value, trains=name not in delta.constants)
    leaves = Leaves(module, names)
    given = Expanding(delta.plan.shared, leaves)
    if len(given) > len(leaves):
        module.register_forward_pre_hook(given.begin, prepend=True)
        module.register_forward_hook(given.end, always_call=True)
    runners = _runners(delta, given)
    if "" in runners:
        skeleton.open("")
    skeleton.call = Call(given, runs={path: Run(keys) for path, keys in runners.items()}, never_ends=True)
    return as_view(delta, skeleton, View, leaves)


def as_view(delta: DeltaModel, skeleton: Skeleton, view: type[View], leaves: Mapping[str, Tensor]) -> nn.Module:
    """The skeleton's module as a ``view`` of the backbone's class over ``leaves``; its first call is verified."""
    module, kind = skeleton.module, type(delta.backbone)
    module.__class__ = type(kind.__name__, (view, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
    object.__setattr__(module, "_delta", delta)
    object.__setattr__(module, "_leaves", leaves)
    aliases = [(name, p, p._version) for name, p in module.named_parameters() if name not in leaves]
    object.__setattr__(module, "_aliases", aliases)
    if not delta.program.is_verified(leaves):
        _verify_first_call(delta, skeleton)
    return module


def _verify_first_call(delta: DeltaModel, skeleton: Skeleton) -> None:
    """After the view's first call: was every site passed through, then or before (an encoder called by itself)?"""
    call = skeleton.call
    assert call is not None
    call.reached = reached = set()

    def verify(module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        hook.remove()
        call.reached = None
        missed = missed_sites(delta.plan, call.params, reached)
        if missed:
            raise MatchError(
                f"{missed[0]} was not called by the view's first call, so the delta there would do nothing. Call "
                f"delta.apply(params, ...) once and bind again: it finds out whether the module above reads its "
                f"tensors."
            )

    hook = skeleton.module.register_forward_hook(verify)


def _place(module: nn.Module, name: str, value: Tensor, trains: bool) -> None:
    """Register ``value`` under its dotted name, with empty modules for the tokens that the backbone does not have."""
    *path, own = name.split(".")
    owner = module
    for token in path:
        if token not in owner._modules:
            owner.add_module(token, nn.Module())
        owner = owner.get_submodule(token)
    if trains and value.is_floating_point():
        owner.register_parameter(own, nn.Parameter(value))
    else:
        owner.register_buffer(own, value)


def _runners(delta: DeltaModel, leaves: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Modules whose tensors are rewritten at each call, with the keys that say how."""
    found: dict[str, list[str]] = {}
    for attachment in delta.plan.all():
        if attachment.by_weights and attachment.among(leaves):
            found.setdefault(attachment.site.path, []).extend(attachment.leaves.values())
    for name, ends in delta.plan.trained.items():
        # A leaf of another precision than its module is lowered at each call; others stand in their place.
        if name in leaves and leaves[name].dtype != delta.backbone.get_parameter(name).dtype:
            for end in ends:
                found.setdefault(end.rpartition(".")[0], []).append(name)
    outermost = {path for path in found if not any(path != other and within(path, other) for other in found)}
    keys: dict[str, tuple[str, ...]] = {}
    for path in outermost:
        reached = [a for a in delta.plan.all() if any(within(end, path) for end in a.ends)]
        inside = [key for a in reached for key in a.leaves.values()]
        keys[path] = tuple(key for key in dict.fromkeys(found[path] + inside) if key in leaves)
    return keys


def unbind(view: nn.Module) -> dict[str, Tensor]:
    """The params of a view as they are now, detached copies in the delta's order.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["0"])
    >>> view = delta.bind(delta.init(0))
    >>> list(fd.unbind(view)) == list(delta.names)
    True
    """
    if not isinstance(view, View):
        raise ParamsError(f"{type(view).__name__} is no view: unbind takes what delta.bind(params) returned.")
    for name, alias, version in view._aliases:
        if alias._version != version:
            raise StaleBackboneError(
                f"{name} was written in place since the view was bound, and it is the backbone's own storage. A "
                f"view trains "
                f"its delta only: name {name} in unfrozen_modules to train a copy."
            )
    return {name: leaf.detach().clone() for name, leaf in view._leaves.items()}
