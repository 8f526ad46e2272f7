"""The modules of a view: those of the backbone's structure, with nothing registered in them but what the view owns.

Whoever iterates a view's parameters writes them: optimisers, averages, a reference model's synchronisation, a broadcast
between processes, a parent's ``load_state_dict``. So tensors that belong to the backbone are taken out of the registers
and held as plain attributes, where forwards find them all the same. While a thread is inside of a call its modules list
them too, because forwards ask ``next(self.parameters()).dtype``. Outside they are shown guarded (:mod:`.guarded`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EngineError
from ..run.reading import KEPT, ORIGINAL, held, put_back
from ..structures.statistics import STATISTICS
from .calls import Calls
from .guarded import guarded

BUFFERS = "_funcdelta_buffers"
"""Where a module of a view has the names of its buffers, of which it holds those that learn nothing as attributes."""

PATH, MOVED = "_funcdelta_path", "_funcdelta_moved"
"""Where it has its path, and whom to tell when its tensors move."""

ABOUT_TENSORS = ("dtype", "device")
"""Properties by which classes of modules tell what their parameters are."""


ABOUT = "_funcdelta"
"""Where the root of a view has what the view knows of itself."""

Moved = Callable[[nn.Module, Callable[[Tensor], Tensor]], None]
Part = Callable[[nn.Module], tuple[Any, ...]]


class Leaves(nn.Module):
    """Holds the leaves of one delta at one site, a module of a view by its name only."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A module that calls all of its children is not meant to call this one."""
        if torch.compiler.is_compiling() and len(args) == 1 and not kwargs:
            return args[0]  # what nn.Sequential hands to the next
        raise EngineError("This module holds the leaves of a delta and computes nothing: call the view.")


class Children(dict[str, Any]):
    """The children of a module that calls them in turn: without those that hold leaves, while it is called.

    >>> children = Children({"0": nn.ReLU(), "lora": Leaves()}, lambda: True)
    >>> list(children), "lora" in children
    (['0'], True)
    """

    def __init__(self, children: dict[str, Any], inside: Callable[[], bool]) -> None:
        super().__init__(children)
        self._inside = inside

    def __copy__(self) -> dict[str, Any]:
        return dict(super().items())

    def _shown(self) -> dict[str, Any]:
        found = dict(super().items())
        return {k: v for k, v in found.items() if not isinstance(v, Leaves)} if self._inside() else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._shown())

    def __len__(self) -> int:
        return len(self._shown())

    def keys(self) -> Any:
        """As of a dict."""
        return self._shown().keys()

    def values(self) -> Any:
        """As of a dict."""
        return self._shown().values()

    def items(self) -> Any:
        """As of a dict."""
        return self._shown().items()


def learns(module: nn.Module, name: str) -> bool:
    """Whether the buffer ``name`` is a running statistic: part of what a module learns in training.

    >>> learns(nn.BatchNorm1d(2), "running_mean"), learns(nn.BatchNorm1d(2), "mask")
    (True, False)
    """
    return name in STATISTICS and name not in module._non_persistent_buffers_set


def take_out(root: nn.Module, own: Iterable[str], statistics: bool) -> dict[str, Tensor]:
    """Hold all tensors of ``root`` but those named ``own`` as plain attributes; gives the parameters among them.

    Running statistics stay registered if ``statistics`` are the view's own.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> list(take_out(model, ["1.weight"], statistics=True))
    ['0.weight', '0.bias', '1.bias']
    >>> list(model.state_dict()), model[0].weight.shape
    (['1.weight', '1.running_mean', '1.running_var', '1.num_batches_tracked'], torch.Size([2, 2]))
    """
    names = set(own)
    registered = (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))
    kept = {id(tensor) for name, tensor in registered if name in names}
    aliases: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    for path, module in root.named_modules():
        if isinstance(module, Leaves) or not isinstance(vars(module).get("_parameters"), dict):
            continue  # the view's own; or a compiled script, which has copies
        attributes = vars(module)
        attributes[KEPT], attributes[BUFFERS] = tuple(module._parameters), tuple(module._buffers)
        for name, tensor in list(module._parameters.items()):
            if tensor is None or id(tensor) in kept or hasattr(tensor, "full_tensor"):
                continue  # what fully_shard gathers it sets in the registers
            # Plain tensors, for a parameter that is set again as an attribute would be registered again.
            plain = type(tensor) is nn.Parameter
            alias = aliases.setdefault(id(tensor), tensor.detach() if plain else tensor)
            del module._parameters[name]
            attributes[name] = found[f"{path}.{name}" if path else name] = alias
        for name, tensor in list(module._buffers.items()):
            if tensor is not None and id(tensor) not in kept and not (statistics and learns(module, name)):
                attributes[name] = module._buffers.pop(name)
    return found


class _Whole:
    """A module as the backbone's own would list its tensors; within a call as readers outside of it are shown them."""

    def __init__(self, module: nn.Module, read: Callable[[nn.Module, str], Any]) -> None:
        names, buffers = vars(module).get(KEPT, ()), vars(module).get(BUFFERS, ())
        self._parameters = {name: read(module, name) for name in names}
        self._buffers = {name: module._buffers.get(name, vars(module).get(name)) for name in buffers}


def dress(root: nn.Module, calls: Calls, moved: Moved, reduced_part: Part) -> None:
    """Give every module of ``root`` a class of its own kind whose calls go through ``calls``.

    ``moved(module, function)`` is told before tensors of a module are converted or put elsewhere, and
    ``reduced_part(module)`` tells how one module is copied without the others.
    """
    kinds: dict[tuple[type, tuple[str, ...], bool], type] = {}
    for path, module in root.named_modules():
        attributes, kind = vars(module), type(module)
        if KEPT not in attributes:
            continue
        names = tuple(name for name in attributes[KEPT] if isinstance(attributes.get(name), Tensor))
        key = kind, names, _is_plain_layer(module)
        if key not in kinds:
            kinds[key] = type(kind.__name__, (kind,), _namespace(*key, calls, reduced_part))
        attributes[PATH], attributes[MOVED] = path, moved
        module.__class__ = kinds[key]
        own = [isinstance(child, Leaves) for child in module._modules.values()]
        if any(own) and not all(own):
            attributes["_modules"] = Children(module._modules, calls.inside)


def _is_plain_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of torch's in which nothing is done but to compute: its calls need no care."""
    return (
        type(module).__module__.startswith("torch.nn.modules.")
        and not module._modules
        and "forward" not in vars(module)
        and not isinstance(module, nn.RNNBase)  # which keep their weights in a list as well
    )


def _namespace(kind: Any, names: tuple[str, ...], plain: bool, calls: Calls, reduced_part: Part) -> dict[str, Any]:
    """What the modules of one class have besides it."""
    enter, trace, inside, sees_all, own_call = calls.enter, calls.trace, calls.inside, calls.sees_all, kind.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return trace(self, self.__dict__[PATH], own_call, args, kwargs)
        if calls.thread == get_ident():  # the usual case, a part of a call
            return own_call(self, *args, **kwargs)
        return enter(self, self.__dict__[PATH], own_call, args, kwargs)

    def members(self: nn.Module, get: Any, *args: Any, **kwargs: Any) -> Any:
        read = getattr if inside() else held

        def listed(module: nn.Module) -> Any:
            return get(_Whole(module, read) if sees_all() else module)

        return kind._named_members(self, listed, *args, **kwargs)

    def get_parameter(self: nn.Module, target: str) -> Any:
        path, _, own = target.rpartition(".")
        # Frozen ones are plain attributes.
        return getattr(self.get_submodule(path), own) if inside() else kind.get_parameter(self, target)

    def apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        with calls.moving() as known:
            calls.guards.clear()
            self.__dict__[MOVED](self, fn)
            _convert(self, fn, known)
            return kind._apply(self, fn, recurse)

    def register_buffer(self: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        own = self.__dict__
        if name in own.get(BUFFERS, ()) and name not in self._buffers:
            own[name] = tensor  # a forward sets one anew, and it is held as the one before it
            return
        kind.register_buffer(self, name, tensor, persistent)

    found: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__init__": building(kind),
        "_named_members": members,
        "get_parameter": get_parameter,
        "_apply": apply,
        "register_buffer": register_buffer,
        "__reduce_ex__": lambda self, protocol: reduced_part(self),
        "__copy__": _shallow,
        ORIGINAL: kind,
    }
    if not plain:
        found["__call__"] = call
    # Modules at sites have properties already.
    found |= {name: _shown(name, calls) for name in names if not isinstance(getattr(kind, name, None), property)}
    for name in ABOUT_TENSORS:
        if isinstance(getattr(kind, name, None), property):
            found[name] = _as_inside(getattr(kind, name), calls)
    return found


def _shallow(module: nn.Module) -> nn.Module:
    """What ``copy.copy`` makes of a part of a view: another one with the same tensors."""
    made = type(module).__new__(type(module))
    vars(made).update(vars(module))
    return made


def building(kind: Any) -> Callable[..., None]:
    """The ``__init__`` of a class made for a view: ``type(view)(config)`` builds another model, which is no view.

    >>> kind = type("Linear", (nn.Linear,), {"__init__": building(nn.Linear)})
    >>> type(kind(2, 3)) is nn.Linear
    True
    """
    original = original_kind(kind)

    @functools.wraps(original.__init__)
    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.__class__ = original
        original.__init__(self, *args, **kwargs)

    return build


def original_kind(kind: Any) -> Any:
    """The backbone's class of which ``kind`` was made.

    >>> original_kind(nn.Linear)
    <class 'torch.nn.modules.linear.Linear'>
    """
    while ORIGINAL in vars(kind):
        kind = vars(kind)[ORIGINAL]
    return kind


def _shown(name: str, calls: Calls) -> property:
    """A frozen parameter: as it is inside of a call, else guarded."""
    sees_all = calls.sees_all

    def read(module: nn.Module) -> Any:
        tensor = held(module, name)
        if tensor is None:
            raise AttributeError(name)
        return tensor if sees_all() else show(tensor, module, name, calls.guards)

    def write(module: nn.Module, value: Any) -> None:
        module.__dict__[name] = put_back(module, name, value)

    def delete(module: nn.Module) -> None:
        del module.__dict__[name]

    return property(read, write, delete)


def show(tensor: Tensor, module: nn.Module, name: str, guards: dict[int, Tensor]) -> Tensor:
    """What somebody outside of a call gets for a tensor that a module of a view holds.

    >>> show(nn.Parameter(torch.ones(2)), nn.Linear(2, 2), "weight", {})
    Parameter containing:
    tensor([1., 1.], requires_grad=True)
    """
    if type(tensor) is not Tensor or tensor.layout != torch.strided or name not in module.__dict__:
        return tensor  # a leaf, or of a class of its own, whose operations are its own
    if id(tensor) not in guards:
        path = module.__dict__.get(PATH)
        guards[id(tensor)] = guarded(tensor, f"{path}.{name}" if path else name)
    return guards[id(tensor)]


def _as_inside(about: property, calls: Calls) -> property:
    """A property of the model's class, which is answered from all of its tensors."""
    read: Any = about.fget

    def inside(module: nn.Module) -> Any:
        if torch.compiler.is_compiling():
            return read(module)
        with calls.looking():
            return read(module)

    return property(inside, about.fset, about.fdel, about.__doc__)


def _convert(module: nn.Module, fn: Callable[[Tensor], Tensor], known: dict[int, Any]) -> None:
    """Put what ``fn`` makes of the tensors that a module holds as attributes in their place."""
    attributes = vars(module)
    with torch.no_grad():
        for name in (*attributes[KEPT], *attributes[BUFFERS]):
            tensor = attributes.get(name)
            if isinstance(tensor, Tensor):
                made = known.setdefault(id(tensor), (tensor, fn(tensor)))[1]
                attributes[name] = made.detach() if type(made) is nn.Parameter else made
