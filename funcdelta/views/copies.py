"""What the owner of a view has done to it since it was bound: what a copy or a pickle of it has besides the leaves.

The hooks and functions in a view's modules belong to it: a plain copy of them would still compute with the leaves of
the view that was copied. So a copy is bound anew, and is given the modes, converted tensors, attributes, settings of
its config and hooks of the other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import ParamsError
from ..run.reading import KEPT, WATCHED
from ..structures.modules.noted import FUNCTIONS, OWN, PLAIN
from .frozen import ABOUT, BUFFERS, MOVED, PATH, Leaves, original_kind

OF_VIEWS = {KEPT, WATCHED, BUFFERS, PATH, MOVED, ABOUT, "forward"} | OWN - {"training"}
"""Attributes that every view has of its own."""

Born = dict[str, tuple[dict[str, Any], dict[str, frozenset[int]], frozenset[str]]]
"""By path, a module's attributes, its hooks' keys and its parameters' names, as they were when the view was bound."""

HOOKS = tuple(name for name in OWN if "hooks" in name)


def attributes_of(root: nn.Module) -> Born:
    """What the modules of a view are like when it is bound.

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
    """By path, what the modules of a view were given since: attributes, what objects there have become, hooks.

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
            continue  # a module that the view was given: it goes with the one above it
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
    """Whether a module is one that a view was made of.

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
    """Whether a value has settings of its own, as a config has."""
    if isinstance(value, (*PLAIN, *FUNCTIONS, Tensor, nn.Module)) or type(value).__module__.startswith("torch"):
        return False
    return isinstance(getattr(value, "__dict__", None), dict)


def give(root: nn.Module, since: dict[str, dict[str, Any]]) -> None:
    """Give the modules of another view the same."""
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
    """``(module, name, tensor, frozen)`` of what a module of a view holds beside leaves: frozen parameters, buffers."""
    own = vars(module)
    for name in own.get(KEPT, ()):
        if isinstance(own.get(name), Tensor):
            yield module, name, own[name], True
    for name in own.get(BUFFERS, ()):
        tensor = module._buffers.get(name, own.get(name))
        if isinstance(tensor, Tensor):
            yield module, name, tensor, False


def tensors_held(root: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor, bool]]:
    """The same of all modules of a view, each after its full name."""
    for path, module in root.named_modules():
        for owner, name, tensor, frozen in held_by(module):
            yield (f"{path}.{name}" if path else name), owner, name, tensor, frozen


def hold(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where a module of a view holds the one of that name."""
    table: dict[str, Any] = module._buffers if name in module._buffers else vars(module)
    table[name] = tensor


class Twin:
    """Stands for a module of a view where it is copied or pickled: what its ``__reduce_ex__`` gives.

    Python asks objects, and not their classes, for ``__deepcopy__``, so whatever hands on what it does not have to a
    view would be copied as that view. For ``__reduce_ex__`` it asks nobody else.

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
    """The module that a twin has become, in a deep copy or when it was read; another one of an untouched twin."""
    if isinstance(twin, Twin):
        function, arguments = twin.reduced()
        return function(*arguments)
    return twin


def part_of(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of a part of a view: an ordinary module of the model's class, with tensors of its own.

    Raises `ParamsError` where the part holds leaves or a delta acts in it.

    >>> delta = fd.LoraModel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), modified_modules=["0"])
    >>> view = delta.bind(delta.init(0))
    >>> list(copy.deepcopy(view[1]).state_dict())
    ['weight', 'bias']
    >>> copy.deepcopy(view[0])
    Traceback (most recent call last):
    ...
    funcdelta.errors.ParamsError: 0 is a part of a view in which a delta acts...
    """
    own = vars(module)
    kept = own.get(KEPT, ())
    acts = "forward" in own or any(isinstance(child, Leaves) for child in dict.values(module._modules))
    if acts or any(module._parameters.get(name) is not None for name in kept):
        raise ParamsError(
            f"{own.get(PATH) or 'This'} is a part of a view in which a delta acts: copy the whole view, or take the "
            f"part of a merged model, delta.merged(fd.unbind(view))."
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
