"""Views: a bound delta as an ordinary module of the backbone's class, for ``generate``, ``Trainer`` and pipelines.

A view is a skeleton whose call never ends. Its leaves are its own parameters, copied from params. Everything else
shares the backbone's storage and is hidden from code that iterates over a module's parameters (:mod:`.frozen`). An
optimiser, a parent's state dict, a copy and another process therefore see only what the view trains.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ParamsError, shown
from ..match import near
from ..plan.sharing import Expanding
from ..run.call import Call, Params
from ..run.fsdp import check_bound
from ..run.layout import Run
from ..run.program import Program
from ..run.reading import ORIGINAL
from ..run.single import tell_missed
from ..run.skeleton import Skeleton
from ..structures.modules.references import holders
from ..trees.leaves import check_leaves
from .calls import Calls, MemberCalls
from .conditioned import Conditioned
from .copies import Twin, attributes_of, give, given_since, hold, made_of, reduced_part, tensors_held
from .frozen import ABOUT, Moved, building, dress, take_out
from .held import About, Bindable, Held, Viewlike, learned, other_names, persistent, sharded, statistics
from .placed import follow_dtypes, guard_sites, lower_reads, place, replace, runners
from .remembering import Remembered
from .saving import Counted, Saved
from .unbound import unbind


class View(Viewlike, nn.Module):
    """What a view adds to its backbone's class: its state dict, and how it is loaded, copied and pickled."""

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The delta's leaves under their names in params, and the view's running statistics."""
        found = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        at = prefix or (args[1] if len(args) > 1 else "")
        for name in (*other_names(self), *sharded(self)):
            found.pop(at + name, None)
        found.update({at + name: tensor for name, tensor in learned(self).items() if at + name not in found})
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy values into the delta's leaves and the running statistics; the backbone's tensors are never written."""
        check_leaves(state_dict, "load_state_dict")
        leaves, buffers, own = self._funcdelta.leaves, persistent(self), self.state_dict()
        missing = [name for name in own if name not in state_dict and name not in buffers]
        unexpected = [name for name in state_dict if name not in own and name not in buffers]
        if strict and (missing or unexpected):
            raise ParamsError(
                f"A view holds the delta's leaves only. Missing: {missing[:3]}; unexpected: "
                f"{shown(unexpected[:3], 300)}.{near(unexpected[0][-200:], list(leaves)) if unexpected else ''}"
            )
        for name in state_dict:
            mine = own[name] if name in own else buffers.get(name)
            if mine is not None and state_dict[name].shape != mine.shape:
                raise ParamsError(
                    f"{name} has the shape {tuple(state_dict[name].shape)}; the view has {tuple(mine.shape)}."
                )
        if leaves and not any(name in own or name in buffers for name in state_dict):
            raise ParamsError(_nothing(list(state_dict), list(leaves)))
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return nn.modules.module._IncompatibleKeys(missing, unexpected)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load as above when a parent's ``load_state_dict`` reaches this view."""
        given = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
        buffers, registered, leaves = persistent(self), statistics(self), self._funcdelta.leaves
        if given and leaves and not any(name in leaves or name in buffers for name in given):
            errors = args[-1] if args else kwargs["error_msgs"]
            errors.append(_nothing(given, list(leaves)))
        for end, name in other_names(self).items():
            if name in given:
                state_dict[prefix + end] = state_dict[prefix + name]
        for name, shard in sharded(self).items():
            state_dict.setdefault(prefix + name, shard)
        for name, buffer in buffers.items():
            if name in registered:
                # Statistics that equal the backbone's are not saved, so a missing one keeps its value.
                state_dict.setdefault(prefix + name, buffer)
            elif name in given:
                with torch.no_grad():
                    buffer.copy_(state_dict.pop(prefix + name))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _copied(self, memo: dict[int, Any]) -> nn.Module:
        """Another view with its own leaves and statistics, sharing the same backbone."""
        own = self._funcdelta
        other: Any = _bound(own.delta, {name: leaf.detach() for name, leaf in own.leaves.items()}, own.skeleton.dtypes)
        memo[id(self)] = other
        modules = dict(other.named_modules())
        memo.update({id(module): modules[path] for path, module in self.named_modules() if path in modules})
        memo.update({id(leaf): other._funcdelta.leaves[name] for name, leaf in own.leaves.items()})
        for _, module, name, tensor, frozen in tensors_held(self):
            hold(memo[id(module)], name, tensor if frozen else tensor.clone())
        return _given(other, copy.deepcopy(given_since(self, own.born), memo), _trains(self))

    def __copy__(self) -> nn.Module:
        return made_of(Twin(self._copied, self._reduced))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies share the backbone; pickles contain all of it."""
        return Twin(self._copied, self._reduced).reduce()

    def _reduced(self) -> tuple[Any, ...]:
        """What a pickle contains: the delta with the whole backbone, and everything the view itself holds."""
        own = self._funcdelta
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
    return {name: leaf.requires_grad for name, leaf in view._funcdelta.leaves.items()}


def _given(other: Any, since: Any, trains: Mapping[str, bool]) -> nn.Module:
    give(other, since)
    for name, leaf in other._funcdelta.leaves.items():
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
    """Tie a leaf's names again after ``load_state_dict(assign=True)`` replaced the tensor under one of them."""
    for end, name in other_names(view).items():
        path, _, own = end.rpartition(".")
        table = view.get_submodule(path)._parameters
        if own in table:
            table[own] = view._funcdelta.leaves[name]


def _nothing(given: list[str], leaves: list[str]) -> str:
    return (
        f"This state dict has nothing for the view: it has {', '.join(given[:3]) or 'no keys'}, while the view holds "
        f"{', '.join(leaves[:3])}. Pass a state dict from view.state_dict() or fd.unbind(view)."
    )


def bind(delta: Bindable, params: Params) -> nn.Module:
    """A module of the backbone's class that runs with ``params``; see :meth:`DeltaModel.bind`.

    ``params`` may also hold tensors of the backbone, such as trained weights and running statistics.
    """
    return _bound(delta, params)


def _bound(delta: Bindable, params: Params, dtypes: Mapping[str, torch.dtype] | None = None) -> nn.Module:
    """As :func:`bind`, for a model whose tensors have been converted to ``dtypes``."""
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
                replace(skeleton, plan.ends[name], value, name in plan.trained, kept.get(name, []))
            else:
                place(module, name, value, trains=name not in delta.constants)
        leaves = Held(module, [*names, *[name for name in others if not _is_persistent(module, name)]])
        given = Expanding(plan.shared, leaves)
        call = Call(given, runs={path: Run(keys) for path, keys in runners(skeleton, given).items()}, never_ends=True)
        if "" in call.runs:
            skeleton.open("")
        lower_reads(skeleton, [end for name in names if name in plan.trained for end in plan.trained[name]])
        verify = None if program.is_verified(leaves) else functools.partial(_verify, program)
        calls = MemberCalls(module, call, leaves, given, verify)
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
    """Turn the skeleton's module into a ``view`` of the backbone's class that holds ``leaves`` and nothing else.

    ``moved`` is called before tensors are converted or moved; without it the view owns its leaves and statistics.
    """
    module = skeleton.module
    aliases = take_out(module, leaves if moved is None else (), statistics=moved is None)
    guard_sites(skeleton, calls)
    dress(module, calls, moved or functools.partial(follow_dtypes, skeleton), reduced_part)
    kind: Any = type(module)
    bases = (view, *[mixin for mixin, method in MIXINS if hasattr(kind, method)], kind)
    if skeleton.conditions is not None:
        calls.conditioned = skeleton.conditions.entries
        bases = (Conditioned, *bases) if hasattr(kind, "generate") else bases
    namespace = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    module.__class__ = type(kind.__name__, bases, {**namespace, "__init__": building(kind), ORIGINAL: kind})
    calls.shared = {name: alias for name, alias in aliases.items() if not alias.is_inference()}
    about = vars(module)[ABOUT] = About(
        delta, skeleton, calls, leaves, functools.partial(unbind, module), moved is None
    )
    if moved is None:
        module.register_load_state_dict_post_hook(_tie_again)
    about.born = attributes_of(module)
    if not skeleton.units:
        calls.remembered = Remembered(skeleton, calls.depends, learns=moved is None)
    return module


MIXINS: tuple[tuple[type, str], ...] = ((Saved, "save_pretrained"), (Counted, "num_parameters"))
"""Base classes that a view gets if its backbone's class has the method of that name."""


def _verify(program: Program, call: Call) -> None:
    """After the view's first call, report the sites that no call has reached."""
    assert call.reached is not None
    tell_missed(program, call.params, call.reached)


def _is_persistent(root: nn.Module, name: str) -> bool:
    """Whether ``name`` is a buffer that the backbone's state dict contains, and so not a leaf."""
    path, _, own = name.rpartition(".")
    module = root.get_submodule(path)
    return own in module._buffers and own not in module._non_persistent_buffers_set
