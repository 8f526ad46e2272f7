"""Changes made to a view since it was bound, which its copies and pickles carry besides its leaves.

The hooks and functions in a view's modules belong to that view: a plain copy would still compute with the original's
leaves. So a copy is bound anew, then given the original's modes, converted tensors, attributes, settings and hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import ParamsError
from ..match import below
from ..run.reading import KEPT, WATCHED
from ..structures.modules.noted import FUNCTIONS, OWN, PLAIN
from .frozen import ABOUT, BUFFERS, MOVED, PATH, Leaves, original_kind

OF_VIEWS = {KEPT, WATCHED, BUFFERS, PATH, MOVED, ABOUT, "forward"} | OWN - {"training"}
"""Attributes that binding sets, so that no copy takes them over."""

Born = dict[str, tuple[dict[str, Any], dict[str, frozenset[int]], frozenset[str]]]
"""``{path: (attributes, keys of hooks, names of parameters)}`` of a view's modules when it was bound."""

HOOKS = tuple(name for name in OWN if "hooks" in name)


def attributes_of(root: nn.Module) -> Born:
    """Record the attributes, hooks and parameter names of a view's modules at binding.

    >>> sorted(attributes_of(nn.Linear(2, 2))[""][2])
    ['bias', 'weight']
    """
    found: Born = {}
    for path, module in root.named_modules():
        own = vars(module)
        held = {*own.get(KEPT, ()), *own.get(BUFFERS, ()), *OF_VIEWS}
        hooks = {name: frozenset(own[name]) for name in HOOKS if own.get(name)}
        named = {name: value for name, value in own.items() if name not in held}
        found[path] = named, hooks, frozenset(module._parameters)
    return found


def given_since(root: nn.Module, born: Born) -> dict[str, dict[str, Any]]:
    """``{path: what its owner set since}`` of a view: attributes, state of objects, hooks, children, parameters.

    >>> delta = fd.LoraModel(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), modified_modules=["0"])
    >>> view = delta.bind(delta.init(0))
    >>> born, view[1].inplace = attributes_of(view), True
    >>> given_since(view, born)["1"]["attributes"]
    {'training': True, 'inplace': True}
    """
    found: dict[str, dict[str, Any]] = {}
    known = {id(module) for module in root.modules() if is_of_view(module)}
    for path, module in root.named_modules():
        own = vars(module)
        if id(module) not in known or path not in born:
            continue  # a module that the owner added: it is copied with its parent
        before, hooks, registered = born[path]
        held = {*own.get(KEPT, ()), *own.get(BUFFERS, ()), *OF_VIEWS}
        named = {name: value for name, value in own.items() if name not in held}
        found[path] = {
            "attributes": {k: v for k, v in named.items() if k == "training" or v is not before.get(k, OWN)},
            "objects": {k: vars(v) for k, v in named.items() if v is before.get(k, OWN) and _is_object(v)},
            "hooks": {
                name: {key: hook for key, hook in own[name].items() if key not in hooks.get(name, ())}
                for name in HOOKS
                if own.get(name)
            },
            "children": {name: child for name, child in _others(module._modules) if id(child) not in known},
            "parameters": {k: p for k, p in module._parameters.items() if p is not None and k not in registered},
        }
    return found


def is_of_view(module: nn.Module) -> bool:
    """Whether a module is one of a view's own, and not added later by its owner.

    >>> is_of_view(nn.Linear(2, 2)), is_of_view(Leaves())
    (False, True)
    """
    return KEPT in vars(module) or isinstance(module, Leaves)


def _others(children: Any) -> Iterator[tuple[str, nn.Module]]:
    for name in dict.keys(children):
        child = dict.__getitem__(children, name)
        if child is not None and not isinstance(child, Leaves):
            yield name, child


def _is_object(value: Any) -> bool:
    """Whether a value has a state of its own, as a config has."""
    if isinstance(value, (*PLAIN, *FUNCTIONS, Tensor, nn.Module)) or type(value).__module__.startswith("torch"):
        return False
    return isinstance(getattr(value, "__dict__", None), dict)


def give(root: nn.Module, since: dict[str, dict[str, Any]]) -> None:
    """Apply what :func:`given_since` found to the modules of another view."""
    done: set[int] = set()
    modules = dict(root.named_modules())
    for path, given in since.items():
        module = modules[path]
        vars(module).update(given["attributes"])
        for name, state in given["objects"].items():
            mine = vars(module).get(name)
            if _is_object(mine) and id(mine) not in done:
                done.add(id(mine))
                vars(mine).clear()
                vars(mine).update(state)
        for name, hooks in given["hooks"].items():
            vars(module)[name].update(hooks)
        for name, child in given["children"].items():
            module._modules[name] = child
        for name, parameter in given["parameters"].items():
            module.register_parameter(name, parameter)


def held_by(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor, bool]]:
    """``(module, name, tensor, frozen)`` of a module's frozen parameters and of its buffers; no leaves."""
    own = vars(module)
    for name in own.get(KEPT, ()):
        if isinstance(own.get(name), Tensor):
            yield module, name, own[name], True
    for name in own.get(BUFFERS, ()):
        tensor = module._buffers.get(name, own.get(name))
        if isinstance(tensor, Tensor):
            yield module, name, tensor, False


def tensors_held(root: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor, bool]]:
    """``(full name, module, name, tensor, frozen)`` of everything that :func:`held_by` finds in a view."""
    for path, module in root.named_modules():
        for owner, name, tensor, frozen in held_by(module):
            yield below(path, name), owner, name, tensor, frozen


def hold(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the tensor that a module of a view holds as ``name``."""
    table: dict[str, Any] = module._buffers if name in module._buffers else vars(module)
    table[name] = tensor


class Twin:
    """Takes the place of a view's module while it is copied or pickled; see ``View.__reduce_ex__``.

    Python looks up ``__deepcopy__`` on the object rather than its class, so a wrapper that forwards unknown attributes
    to a view would be copied as that view. A wrapper has a ``__reduce_ex__`` of its own, so the view's is not found.

    >>> class Wrapper(nn.Module):
    ...     def __init__(self, model):
    ...         super().__init__()
    ...         self.model = model
    ...     def __getattr__(self, name):
    ...         try:
    ...             return super().__getattr__(name)
    ...         except AttributeError:
    ...             return getattr(self.model, name)
    >>> delta = fd.LoraModel(nn.Sequential(nn.Linear(2, 2)), modified_modules=["0"])
    >>> type(copy.deepcopy(Wrapper(delta.bind(delta.init(0))))).__name__
    'Wrapper'
    """

    def __init__(self, deep: Callable[[dict[int, Any]], nn.Module], reduced: Callable[[], tuple[Any, ...]]) -> None:
        self.deep, self.reduced = deep, reduced

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return self.deep(memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced()

    def reduce(self) -> tuple[Any, ...]:
        """What ``__reduce_ex__`` returns."""
        return made_of, (self,)


def made_of(twin: Any) -> Any:
    """The module that a twin became in a deep copy or when unpickled; an untouched twin is built here."""
    if isinstance(twin, Twin):
        function, arguments = twin.reduced()
        return function(*arguments)
    return twin


def part_of(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of a part of a view: an ordinary module of the model's class with its own tensors.

    Raises `ParamsError` where the part holds leaves or a delta acts in it.

    >>> delta = fd.LoraModel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), modified_modules=["0"])
    >>> view = delta.bind(delta.init(0))
    >>> list(copy.deepcopy(view[1]).state_dict())
    ['weight', 'bias']
    >>> copy.deepcopy(view[0])
    Traceback (most recent call last):
    ...
    funcdelta.errors.ParamsError: 0 is part of a view, and a delta acts in it...
    """
    own = vars(module)
    kept = own.get(KEPT, ())
    acts = "forward" in own or any(isinstance(child, Leaves) for child in dict.values(module._modules))
    if acts or any(module._parameters.get(name) is not None for name in kept):
        raise ParamsError(
            f"{own.get(PATH) or 'This'} is part of a view, and a delta acts in it. Copy the whole view, or take the "
            f"part of a merged model: delta.merged(fd.unbind(view))."
        )
    kind = original_kind(type(module))
    made = memo[id(module)] = kind.__new__(kind)
    held = {*kept, *own.get(BUFFERS, ())}
    rest = {k: v for k, v in own.items() if k not in held and k not in (KEPT, WATCHED, BUFFERS, PATH, MOVED)}
    vars(made).update(copy.deepcopy(rest, memo))
    made._parameters = dict.fromkeys(kept)
    for _, name, tensor, frozen in held_by(module):
        table: dict[str, Any] = made._parameters if frozen else made._buffers
        table[name] = memo[id(tensor)] if id(tensor) in memo else _own(tensor, frozen)
        memo[id(tensor)] = table[name]
    return made


def reduced_part(module: nn.Module) -> tuple[Any, ...]:
    """How a part of a view is copied and pickled; see :func:`part_of`.

    >>> reduced_part(nn.ReLU())[0] is made_of
    True
    """
    return Twin(lambda memo: part_of(module, memo), lambda: (made_of, (part_of(module, {}),))).reduce()


def _own(tensor: Tensor, parameter: bool) -> Tensor:
    plain = type(tensor) is Tensor and parameter
    return nn.Parameter(tensor.detach().clone(), requires_grad=False) if plain else copy.deepcopy(tensor)
