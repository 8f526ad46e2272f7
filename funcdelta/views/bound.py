"""Views: a bound delta as an ordinary module of the backbone's class, for ``generate``, ``Trainer`` and pipelines.

A view is a skeleton whose call never ends. Its leaves are parameters of its own, copied from params; everything else
shares the backbone's storage and is held where nobody who iterates a module's parameters finds it (:mod:`.frozen`). So
it holds what it trains and nothing else: in an optimiser, in a parent's state dict, in a copy, between processes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ParamsError, StaleBackboneError
from ..match import near, within
from ..planning.sharing import Expanding
from ..pytrees.constants import still
from ..run.call import Call, Params
from ..run.fsdp import check_bound
from ..run.layout import Run
from ..run.program import Program
from ..run.reading import ORIGINAL, watch_reads
from ..run.single import tell_missed
from ..run.skeleton import Skeleton
from ..sites.references import holders
from .calls import Calls, MemberCalls
from .copies import Born, attributes_of, give, given_since, hold, part_of, tensors_held
from .frozen import ABOUT, BUFFERS, PATH, Leaves, Moved, building, dress, show, take_out
from .saving import Counted, Saved


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
        aliases: what it shares of the backbone's, with how often it had been written.
        born: what its modules were like when it was bound.
    """

    __slots__ = ("aliases", "born", "calls", "delta", "leaves", "skeleton")

    def __init__(self, delta: Bindable, skeleton: Skeleton, calls: Calls, leaves: Mapping[str, Tensor]) -> None:
        self.delta, self.skeleton, self.calls, self.leaves = delta, skeleton, calls, leaves
        self.aliases: list[tuple[str, Tensor, int]] = []
        self.born: Born = {}


class Viewlike:
    """What every view has, whatever it holds."""

    @property
    def _view(self) -> Any:
        return self.__dict__[ABOUT]


class View(Viewlike, nn.Module):
    """What a view has besides its backbone's class: what it holds, and how it is filled and copied."""

    def params(self) -> dict[str, Tensor]:
        """What :func:`unbind` gives."""
        return unbind(self)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The delta's leaves under their names in params, and the view's running statistics."""
        found = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        at = prefix or (args[1] if len(args) > 1 else "")
        known = set(self._view.leaves) | set(_statistics(self))
        for key in [key for key in found if key.startswith(at) and key[len(at) :] not in known]:
            del found[key]  # other names of a tied leaf; shards of a sharded backbone
        found.update({at + name: tensor for name, tensor in learned(self).items() if name not in known})
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy values into the delta's leaves and the running statistics; the backbone's tensors are never written."""
        leaves, buffers = self._view.leaves, _persistent(self)
        missing = [name for name in leaves if name not in state_dict]
        unexpected = [name for name in state_dict if name not in leaves and name not in buffers]
        if strict and (missing or unexpected):
            raise ParamsError(
                f"A view holds the delta's leaves only. Missing: {missing[:3]}; unexpected: {unexpected[:3]}."
                f"{near(unexpected[0], list(leaves)) if unexpected else ''}"
            )
        for name in state_dict:
            own = leaves[name] if name in leaves else buffers.get(name)
            if own is not None and state_dict[name].shape != own.shape:
                raise ParamsError(
                    f"{name} has the shape {tuple(state_dict[name].shape)}; the view has {tuple(own.shape)}."
                )
        if len(leaves) == len(missing) and not any(name in buffers for name in state_dict):
            raise ParamsError(_nothing(list(state_dict), list(leaves)))
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return nn.modules.module._IncompatibleKeys(missing, unexpected)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        """The same through a parent, whose own ``load_state_dict`` comes by here."""
        given = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
        buffers, registered = _persistent(self), _statistics(self)
        if given and not any(name in self._view.leaves or name in buffers for name in given) and self._view.leaves:
            errors.append(_nothing(given, list(self._view.leaves)))
        for name, ends in self._view.delta.program.plan.ends.items():
            for end in ends[1:] if name in self._view.leaves and name in given else ():
                state_dict[prefix + end] = state_dict[prefix + name]
        for name, buffer in buffers.items():
            if name in registered:
                # What learned nothing is not saved, and what is not saved stays as it is.
                state_dict.setdefault(prefix + name, buffer)
            elif name in given:
                with torch.no_grad():
                    buffer.copy_(state_dict.pop(prefix + name))
        super()._load_from_state_dict(state_dict, prefix, local, strict, missing, unexpected, errors)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Another view, with leaves and statistics of its own and the same share of the backbone."""
        own = self._view
        other = _bound(own.delta, {name: leaf.detach() for name, leaf in own.leaves.items()}, own.skeleton.dtypes)
        memo[id(self)] = other
        modules = dict(other.named_modules())
        memo.update({id(module): modules[path] for path, module in self.named_modules() if path in modules})
        memo.update({id(leaf): other._view.leaves[name] for name, leaf in own.leaves.items()})
        for _, module, name, tensor, frozen in tensors_held(self):
            hold(memo[id(module)], name, tensor if frozen else tensor.clone())
        return _given(other, copy.deepcopy(given_since(self, own.born), memo), _trains(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A view travels as its delta, with the whole backbone, and what it holds."""
        own = self._view
        fresh = dict(own.delta.program.backbone.named_parameters(remove_duplicate=False))
        moved, buffers = {}, {}
        for name, _, _, tensor, frozen in tensors_held(self):
            if not frozen:
                buffers[name] = tensor
            elif (tensor.dtype, tensor.device) != (fresh[name].dtype, fresh[name].device):
                moved[name] = tensor.dtype, tensor.device
        leaves = {name: leaf.detach() for name, leaf in own.leaves.items()}
        since = given_since(self, own.born)
        return _unpickled, (own.delta, leaves, _trains(self), own.skeleton.dtypes, moved, buffers, since)


def _trains(view: Any) -> dict[str, bool]:
    return {name: leaf.requires_grad for name, leaf in view._view.leaves.items()}


def _given(other: Any, since: Any, trains: Mapping[str, bool]) -> nn.Module:
    give(other, since)
    for name, leaf in other._view.leaves.items():
        if leaf.is_floating_point():
            leaf.requires_grad_(trains[name])
    return other


def _unpickled(
    delta: Bindable, leaves: Params, trains: Any, dtypes: Any, moved: Any, buffers: Any, since: Any
) -> nn.Module:
    view = _bound(delta, leaves, dtypes)
    for name, module, own, tensor, frozen in list(tensors_held(view)):
        if frozen and name in moved:
            hold(module, own, tensor.to(*reversed(moved[name])))
        elif not frozen:
            hold(module, own, buffers[name])
    return _given(view, since, trains)


def _tie_again(view: Any, _: Any) -> None:
    """After a load that put other tensors in the places of leaves: all names of one are one."""
    for name, ends in view._view.delta.program.plan.ends.items():
        for end in ends[1:] if name in view._view.leaves else ():
            path, _, own = end.rpartition(".")
            table = view.get_submodule(path)._parameters
            if own in table:
                table[own] = view._view.leaves[name]


def _nothing(given: list[str], leaves: list[str]) -> str:
    return (
        f"Nothing of this state dict is the view's: it has {', '.join(given[:3]) or 'no keys'}, and the view holds "
        f"{', '.join(leaves[:3])}. Give what view.state_dict() or fd.unbind(view) gave."
    )


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


def bind(delta: Bindable, params: Params) -> nn.Module:
    """A module of the backbone's class that runs with ``params``; see :meth:`DeltaModel.bind`.

    ``params`` may hold other tensors of the backbone's, trained ones and running statistics among them.
    """
    return _bound(delta, params)


def _bound(delta: Bindable, params: Params, dtypes: Mapping[str, torch.dtype] | None = None) -> nn.Module:
    """The same, where the model's tensors have been converted to ``dtypes``."""
    program = delta.program
    with torch.inference_mode(False), torch.no_grad():
        skeleton = program.skeletons.build(program.training, view=True)
        skeleton.dtypes.update(dtypes or {})
        module, plan = skeleton.module, program.plan
        names = [name for name in delta.names if name in params]
        others = [name for name in params if name not in delta.names]
        check_bound(skeleton.units, [name for name in (*names, *others) if name in plan.ends])
        kept = holders(module) if any(name in plan.ends for name in (*names, *others)) else {}
        for name in (*names, *others):
            value = params[name].detach().clone()
            if name in plan.ends:
                _replace(skeleton, plan.ends[name], value, name in plan.trained, kept.get(name, []))
            else:
                _place(module, name, value, trains=name not in delta.constants)
        buffers = _persistent(module)
        own = [name for name in (*names, *others) if name not in buffers]
        leaves = Held(module, own)
        given = Expanding(plan.shared, leaves)
        call = Call(given, runs={path: Run(keys) for path, keys in _runners(skeleton, given).items()}, never_ends=True)
        if "" in call.runs:
            skeleton.open("")
        _lower_reads(skeleton, [end for name in names if name in plan.trained for end in plan.trained[name]])
        known = program.is_verified(leaves)
        calls = MemberCalls(
            call, given, len(given) > len(leaves), None if known else lambda call: _verify(program, call)
        )
        skeleton.call = call
        return as_view(delta, skeleton, View, calls, leaves)


def as_view(
    delta: Bindable,
    skeleton: Skeleton,
    view: type[nn.Module],
    calls: Calls,
    leaves: Mapping[str, Tensor],
    moved: Moved | None = None,
) -> nn.Module:
    """The skeleton's module as a ``view`` of the backbone's class, which holds ``leaves`` and nothing else.

    ``moved`` is asked where others' tensors may go; without it they and the running statistics are the view's own.
    """
    module = skeleton.module
    aliases = take_out(module, leaves if moved is None else (), statistics=moved is None)
    _guard_sites(skeleton, calls)
    dress(module, calls, moved or functools.partial(_follow_dtypes, skeleton), part_of)
    kind: Any = type(module)
    bases = (view, *[mixin for mixin, method in MIXINS if hasattr(kind, method)], kind)
    namespace = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    module.__class__ = type(kind.__name__, bases, {**namespace, "__init__": building(kind), ORIGINAL: kind})
    about = vars(module)[ABOUT] = About(delta, skeleton, calls, leaves)
    about.aliases = [(name, alias, alias._version) for name, alias in aliases.items() if not alias.is_inference()]
    about.born = attributes_of(module)
    module.register_load_state_dict_post_hook(_tie_again)
    return module


MIXINS: tuple[tuple[type, str], ...] = ((Saved, "save_pretrained"), (Counted, "num_parameters"))
"""What a view has where its backbone's class has a method of that name."""


def _guard_sites(skeleton: Skeleton, calls: Calls) -> None:
    """Show the tensors of sites guarded, too, where no delta is written into them."""
    read = skeleton.read_outside

    def outside(path: str, name: str, tensor: Tensor) -> Tensor:
        found = read(path, name, tensor)
        if found is not tensor or calls.sees_all():
            return found
        return show(tensor, skeleton.module.get_submodule(path), name, calls.guards)

    skeleton.read_outside = outside


def _lower_reads(skeleton: Skeleton, ends: Iterable[str]) -> None:
    """Give leaves of another precision than their module in the module's, to whoever reads them outside of it."""
    lowered = [end for end in ends if skeleton.module.get_parameter(end).dtype != skeleton.dtypes[end]]
    for path in dict.fromkeys(end.rpartition(".")[0] for end in lowered):
        opened = skeleton.open(path)

        def outside(name: str, tensor: Tensor, path: str = path) -> Tensor:
            dtype = skeleton.dtypes.get(f"{path}.{name}" if path else name, tensor.dtype)
            found = skeleton.read_outside(path, name, tensor)
            return found if found.dtype == dtype else found.to(dtype)

        watch_reads(opened.module, lambda opened=opened: opened.running > 0, outside)


def _follow_dtypes(skeleton: Skeleton, module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """The precision that leaves are lowered to where they take the place of the backbone's tensors."""
    path = vars(module)[PATH]
    for own in module._parameters:
        name = f"{path}.{own}" if path else own
        if module._parameters[own] is not None and name in skeleton.dtypes:
            like = torch.empty(0, dtype=skeleton.dtypes[name], device=module._parameters[own].device)  # pyright: ignore[reportOptionalMemberAccess]
            skeleton.dtypes[name] = fn(like).dtype


def _verify(program: Program, call: Call) -> None:
    """After the view's first call: which sites nothing has passed through, then or before."""
    assert call.reached is not None
    tell_missed(program, call.params, call.reached)


def _replace(skeleton: Skeleton, ends: tuple[str, ...], value: Tensor, trains: bool, places: list[Any]) -> None:
    """Put ``value`` in the place of one of the backbone's tensors, under all of its names and wherever it is held."""
    made: Any = None
    for end in ends:
        path, _, own = end.rpartition(".")
        owner = skeleton.module.get_submodule(path)
        if own in owner._buffers:
            made = value.to(skeleton.dtypes.get(end, value.dtype)) if made is None else made
            owner._buffers[own] = made
        else:
            if made is None:
                value = value if trains else value.to(skeleton.dtypes[end])
                made = nn.Parameter(value, requires_grad=trains and value.is_floating_point())
            owner._parameters[own] = made
    for place, key in places:
        place[key] = made


def _place(module: nn.Module, name: str, value: Tensor, trains: bool) -> None:
    """Register ``value`` under its dotted name, with modules for the tokens that the backbone does not have."""
    *path, own = name.split(".")
    owner = module
    for token in path:
        if token not in owner._modules:
            owner.add_module(token, Leaves())
        owner = owner.get_submodule(token)
    if trains and value.is_floating_point():
        owner.register_parameter(own, nn.Parameter(value))
    else:
        owner.register_buffer(own, value)


def _runners(skeleton: Skeleton, leaves: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Modules whose tensors are rewritten at each call, with the keys that say how."""
    plan: Any = skeleton.plan
    found: dict[str, list[str]] = {}
    for attachment in plan.all():
        if attachment.by_weights and attachment.among(leaves):
            found.setdefault(attachment.site.path, []).extend(attachment.leaves.values())
    for name, ends in plan.trained.items():
        # A leaf of another precision than its module is lowered at each call; others have taken its place.
        for end in ends if name in leaves and leaves[name].dtype != skeleton.dtypes[name] else ():
            found.setdefault(end.rpartition(".")[0], []).append(name)
    outermost = {path for path in found if not any(path != other and within(path, other) for other in found)}
    keys: dict[str, tuple[str, ...]] = {}
    for path in outermost:
        reached = [a for a in plan.all() if any(within(end, path) for end in a.ends)]
        inside = [key for a in reached for key in a.leaves.values()]
        keys[path] = tuple(key for key in dict.fromkeys(found[path] + inside) if key in leaves)
    return keys


# -- what a view has learned -------------------------------------------------------------------------------------------


def _buffers(root: nn.Module, wanted: Callable[[nn.Module, str], bool]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, module in root.named_modules():
        for own in vars(module).get(BUFFERS, ()):
            tensor = module._buffers.get(own, vars(module).get(own))
            if tensor is not None and wanted(module, own):
                found[f"{path}.{own}" if path else own] = tensor
    return found


def _persistent(root: nn.Module) -> dict[str, Tensor]:
    """The buffers of the backbone's structure that a state dict has, as the view has them now."""
    return _buffers(root, lambda module, own: own not in module._non_persistent_buffers_set)


def _statistics(root: nn.Module) -> dict[str, Tensor]:
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
    own = _persistent(view)
    if not own:
        return {}
    before = dict(view._view.delta.program.backbone.named_buffers(remove_duplicate=False))
    found = {name: tensor for name, tensor in own.items() if name in before}
    return {name: t for name, t in found.items() if not _is_equal(t, before[name])}


def _is_equal(own: Tensor, before: Tensor) -> bool:
    return own.shape == before.shape and torch.equal(own, before.to(own))


def unbind(view: nn.Module) -> dict[str, Tensor]:
    """The params of a view as they are now, detached copies in the delta's order.

    Running statistics that it has learned are among them, under the backbone's names. ``view`` may stand in a wrapper
    that has one module (``DistributedDataParallel``, ``torch.compile``, an average of models).

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["0"])
    >>> view = delta.bind(delta.init(0))
    >>> list(fd.unbind(view)) == list(delta.names)
    True
    >>> fd.unbind(torch.optim.swa_utils.AveragedModel(view)).keys() == fd.unbind(view).keys()
    True
    """
    found = within_wrappers(view)
    if not isinstance(found, Viewlike):
        raise ParamsError(f"{type(view).__name__} is not a view: unbind takes what delta.bind(params) returned.")
    for name, alias, version in found._view.aliases:
        if alias._version != version:
            raise StaleBackboneError(
                f"{name} was written in place since the view was bound, and it is the backbone's own storage. A view "
                f"trains its delta only: name {name} in unfrozen_modules to train a copy."
            )
    held = {**found._view.leaves, **learned(found)}
    constants = [name for name in held if name in found._view.delta.constants or name not in found._view.leaves]
    return still({name: leaf.detach().clone() for name, leaf in held.items()}, constants)


def within_wrappers(module: nn.Module) -> nn.Module:
    """The view inside of modules that wrap one other; ``module`` itself where there is none.

    >>> within_wrappers(nn.Linear(2, 2))
    Linear(in_features=2, out_features=2, bias=True)
    """
    found = module
    while not isinstance(found, Viewlike):
        inner = [found._modules.get(name) for name in ("module", "_orig_mod")]
        inner = [child for child in inner if child is not None]
        if not inner:
            return module
        found = inner[0]
    return found
