"""The modules of a view: the backbone's structure, in which only the view's own tensors are registered.

Code that iterates over a module's parameters usually writes them: optimisers, averages, the synchronisation of a
reference model, a broadcast between processes, a parent's ``load_state_dict``. So the backbone's tensors are removed
from the registers and kept as plain attributes, where forwards still find them. Inside a call the modules list them
too, because forwards ask ``next(self.parameters()).dtype``. Outside they are shown guarded (:mod:`.guarded`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EngineError
from ..match import below
from ..run.reading import KEPT, ORIGINAL, held, put_back
from ..structures.statistics import STATISTICS
from .calls import Calls
from .guarded import guarded

BUFFERS = "_funcdelta_buffers"
"""Attribute with the names of a module's buffers; those that learn nothing are held as plain attributes."""

PATH, MOVED = "_funcdelta_path", "_funcdelta_moved"
"""Attributes with a module's path, and with the function to call before its tensors are converted or moved."""

ABOUT_TENSORS = ("dtype", "device")
"""Properties that some model classes compute from their parameters."""

ABOUT = "_funcdelta"
"""Attribute of a view's root that holds its :class:`About`."""

Moved = Callable[[nn.Module, Callable[[Tensor], Tensor]], None]
Part = Callable[[nn.Module], tuple[Any, ...]]


class Leaves(nn.Module):
    """Holds the leaves of one delta at one site; a module only so that the leaves get their names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise; code that calls all children of a module is not meant to call this one."""
        if torch.compiler.is_compiling() and len(args) == 1 and not kwargs:
            return args[0]  # nn.Sequential, compiled, iterates over all children
        raise EngineError("This module holds the leaves of a delta and computes nothing: call the view.")


class Children(dict[str, Any]):
    """The children of a module; inside a call, without those that hold leaves (for ``nn.Sequential`` and its like).

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
    """Hold all tensors of ``root`` except those named ``own`` as plain attributes; returns the parameters among them.

    If ``statistics`` is true, running statistics stay registered: the view trains its own.

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
            continue  # the view's leaves, or a TorchScript module, which holds copies
        attributes = vars(module)
        attributes[KEPT], attributes[BUFFERS] = tuple(module._parameters), tuple(module._buffers)
        for name, tensor in list(module._parameters.items()):
            if tensor is None or id(tensor) in kept or hasattr(tensor, "full_tensor"):
                continue  # fully_shard puts gathered tensors into the registers
            # A plain tensor: setting an nn.Parameter as an attribute would register it again.
            plain = type(tensor) is nn.Parameter
            alias = aliases.setdefault(id(tensor), tensor.detach() if plain else tensor)
            del module._parameters[name]
            attributes[name] = found[below(path, name)] = alias
        for name, tensor in list(module._buffers.items()):
            if tensor is not None and id(tensor) not in kept and not (statistics and learns(module, name)):
                attributes[name] = module._buffers.pop(name)
    return found


class _Whole:
    """The registers that a module of the backbone would have, with every value taken from ``read``."""

    def __init__(self, module: nn.Module, read: Callable[[nn.Module, str], Any]) -> None:
        names, buffers = vars(module).get(KEPT, ()), vars(module).get(BUFFERS, ())
        self._parameters = {name: read(module, name) for name in names}
        self._buffers = {name: module._buffers.get(name, vars(module).get(name)) for name in buffers}


def dress(root: nn.Module, calls: Calls, moved: Moved, reduced_part: Part) -> None:
    """Give every module of ``root`` a subclass of its class whose calls go through ``calls``.

    ``moved(module, function)`` is called before a module's tensors are converted or moved, and
    ``reduced_part(module)`` says how one module is copied without the others.
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
    """Whether a module is one of torch's layers with no children, whose calls need no special treatment."""
    return (
        type(module).__module__.startswith("torch.nn.modules.")
        and not module._modules
        and "forward" not in vars(module)
        and not isinstance(module, nn.RNNBase)  # RNNs keep their weights in a list as well
    )


def _namespace(kind: Any, names: tuple[str, ...], plain: bool, calls: Calls, reduced_part: Part) -> dict[str, Any]:
    """The namespace of the subclass that :func:`dress` makes of ``kind``."""
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
        # Frozen parameters are plain attributes, which torch's get_parameter does not find.
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
            own[name] = tensor  # a forward replaces a buffer; the new one stays a plain attribute
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
    # Modules at sites already have properties for their parameters.
    found |= {name: _shown(name, calls) for name in names if not isinstance(getattr(kind, name, None), property)}
    for name in ABOUT_TENSORS:
        if isinstance(getattr(kind, name, None), property):
            found[name] = _as_inside(getattr(kind, name), calls)
    return found


def _shallow(module: nn.Module) -> nn.Module:
    """``copy.copy`` of a part of a view: another module with the same tensors."""
    made = type(module).__new__(type(module))
    vars(made).update(vars(module))
    return made


def building(kind: Any) -> Callable[..., None]:
    """The ``__init__`` of a view's class: ``type(view)(config)`` builds an ordinary model of the backbone's class.

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
    """The backbone's class that ``kind`` was derived from.

    >>> original_kind(nn.Linear)
    <class 'torch.nn.modules.linear.Linear'>
    """
    while ORIGINAL in vars(kind):
        kind = vars(kind)[ORIGINAL]
    return kind


def _shown(name: str, calls: Calls) -> property:
    """A property for a frozen parameter: the tensor itself inside a call, guarded outside."""
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
    """``tensor`` as code outside a call reads it from a module of a view: guarded if it is the backbone's.

    >>> show(nn.Parameter(torch.ones(2)), nn.Linear(2, 2), "weight", {})
    Parameter containing:
    tensor([1., 1.], requires_grad=True)
    """
    if type(tensor) is not Tensor or tensor.layout != torch.strided or name not in module.__dict__:
        return tensor  # a leaf, or a tensor subclass, which defines its own operations
    if id(tensor) not in guards:
        guards[id(tensor)] = guarded(tensor, below(module.__dict__.get(PATH, ""), name))
    return guards[id(tensor)]


def _as_inside(about: property, calls: Calls) -> property:
    """A property of the model's class that sees all of the model's tensors."""
    read: Any = about.fget

    def inside(module: nn.Module) -> Any:
        if torch.compiler.is_compiling():
            return read(module)
        with calls.looking():
            return read(module)

    return property(inside, about.fset, about.fdel, about.__doc__)


def _convert(module: nn.Module, fn: Callable[[Tensor], Tensor], known: dict[int, Any]) -> None:
    """Replace the tensors that a module holds as attributes by ``fn`` of them."""
    attributes = vars(module)
    with torch.no_grad():
        for name in (*attributes[KEPT], *attributes[BUFFERS]):
            tensor = attributes.get(name)
            if isinstance(tensor, Tensor):
                made = known.setdefault(id(tensor), (tensor, fn(tensor)))[1]
                attributes[name] = made.detach() if type(made) is nn.Parameter else made
