"""Corrects references that ``copy.deepcopy`` leaves alone: in closures, globals, defaults and weak references.

A forward patched by a function, or a hook, may hold modules and tensors of the backbone. ``copy.deepcopy`` treats
functions as constants, so a copy would go on calling the original layer. Functions are therefore rebuilt around the
copy's own modules. What cannot be rebuilt (globals of other files, functions written in C) stays as it is.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

LONGEST = 10_000
"""Containers with more entries are considered data, and not searched for modules."""

REGISTERED = ("_parameters", "_buffers", "_modules")

ATOMS = frozenset((bool, int, float, complex, str, bytes, type(None), type, types.BuiltinFunctionType))
CONTAINERS = frozenset((list, tuple, dict, OrderedDict, set, frozenset))

COMPILED = "_torchdynamo_orig_callable"
"""Attribute in which ``torch.compile`` keeps the original function."""


def rewire(module: nn.Module, memo: Mapping[int, Any]) -> None:
    """Make everything in ``module``, a deep copy, refer to copies; ``memo`` is that of ``copy.deepcopy``.

    >>> import copy
    >>> layer, memo = nn.Linear(2, 2), {}
    >>> old = layer.forward
    >>> layer.forward = lambda x: old(x) * 1.0
    >>> copied = copy.deepcopy(layer, memo)
    >>> rewire(copied, memo)
    >>> copied.forward.__globals__["old"].__self__ is copied
    True
    """
    references = _References(memo)
    copies = {id(value) for value in memo.values()}
    waiting: list[Any] = [vars(child) for child in every_module(module)]
    seen: set[int] = set()
    while waiting:
        holder = waiting.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        for key, value in _worthwhile(holder):
            new = value if isinstance(value, (list, dict)) else references.moved(value)
            if new is not value:
                holder[key] = new
            elif isinstance(value, (list, dict)):
                waiting.append(value)
            elif id(value) in copies and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor)):
                waiting.append(vars(value))


class _References:
    """Translates values of the original to values for the copy; rebuilds functions that reach something copied."""

    def __init__(self, memo: Mapping[int, Any]) -> None:
        self._memo = memo
        self._done: dict[int, tuple[Any, Any]] = {}
        self._cells: dict[int, tuple[Any, types.CellType]] = {}

    def moved(self, value: Any) -> Any:
        """``value`` with copies in place of originals; ``value`` itself if it reaches none."""
        if self._is_copied(value):
            return self._memo[id(value)]
        if id(value) in self._done:
            return self._done[id(value)][1]
        if not _is_looked_into(value) or not self._reaches(value, set()):
            return value
        compiled = getattr(value, COMPILED, None)
        if compiled is not None:
            return self.moved(compiled)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        new = self._rebuilt(value)
        self._done[id(value)] = value, new
        return new

    def _rebuilt(self, value: Any) -> Any:
        if isinstance(value, types.MethodType):
            return types.MethodType(self.moved(value.__func__), self.moved(value.__self__))
        if isinstance(value, functools.partial):
            args = [self.moved(arg) for arg in value.args]
            keywords = {key: self.moved(arg) for key, arg in value.keywords.items()}
            return functools.partial(self.moved(value.func), *args, **keywords)
        if isinstance(value, weakref.ref):
            return weakref.ref(self.moved(value()))
        if isinstance(value, dict):
            return type(value)((key, self.moved(entry)) for key, entry in value.items())
        return type(value)(self.moved(entry) for entry in value)

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        closure = tuple(self._cell(cell) for cell in function.__closure__ or ())
        read = _globals_of(function)
        own = {name: entry for name, entry in read.items() if self._reaches(entry, set())}
        known = Globals(function.__globals__) if own else function.__globals__
        new = types.FunctionType(
            function.__code__, known, function.__name__, None, closure if function.__closure__ else None
        )
        # Registered before its contents are examined, because a function may refer to itself.
        self._done[id(function)] = function, new
        for cell, copied in zip(function.__closure__ or (), closure, strict=True):
            if copied is not cell and not _is_filled(copied):
                copied.cell_contents = self.moved(cell.cell_contents)
        known.update({name: self.moved(entry) for name, entry in own.items()})
        new.__defaults__ = self.moved(function.__defaults__)
        new.__kwdefaults__ = self.moved(function.__kwdefaults__)
        new.__dict__.update({key: self.moved(entry) for key, entry in vars(function).items()})
        for name in ("__qualname__", "__doc__", "__module__", "__annotations__"):
            setattr(new, name, getattr(function, name))
        return new

    def _cell(self, cell: types.CellType) -> types.CellType:
        """A new cell if its content was copied; others stay shared, so that a hook still fills the user's list."""
        if not _is_filled(cell) or not self._reaches(cell.cell_contents, set()):
            return cell
        if id(cell) not in self._cells:
            self._cells[id(cell)] = cell, types.CellType()
        return self._cells[id(cell)][1]

    def _is_copied(self, value: Any) -> bool:
        return id(value) in self._memo and self._memo[id(value)] is not value

    def _reaches(self, value: Any, seen: set[int]) -> bool:
        """Whether ``value`` is, or refers to, something that was copied."""
        if self._is_copied(value):
            return True
        if id(value) in seen or not _is_looked_into(value):
            return False
        seen.add(id(value))
        return any(self._reaches(entry, seen) for entry in _held(value))


class Globals(dict[str, Any]):
    """The globals of a function with replacements for a few of them.

    >>> own = Globals({"a": 1, "b": 2})
    >>> own["a"] = 3
    >>> own["a"], own["b"], "b" in own, "c" in own
    (3, 2, True, False)
    """

    def __init__(self, others: dict[str, Any]) -> None:
        super().__init__()
        self.others = others

    def __missing__(self, name: str) -> Any:
        # Read on access, because a script may change them in the meantime.
        return self.others[name]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.others


def _globals_of(function: types.FunctionType) -> dict[str, Any]:
    """The globals that a function reads; functions among them only if they are of its own file, not a library's."""
    names: set[str] = set()
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes.extend(inner for inner in code.co_consts if isinstance(inner, types.CodeType))
    known = function.__globals__
    found = {name: known[name] for name in names if name in known}
    return {
        name: value
        for name, value in found.items()
        if not isinstance(value, types.FunctionType) or value.__globals__ is known
    }


def _is_looked_into(value: Any) -> bool:
    kinds = (types.FunctionType, types.MethodType, functools.partial, weakref.ref)
    if isinstance(value, kinds):
        return True
    return type(value) in CONTAINERS and len(value) <= LONGEST


def _held(value: Any) -> Iterator[Any]:
    """The values that a function or a container refers to."""
    if isinstance(value, types.FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell))
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield from vars(value).values()
        yield from _globals_of(value).values()
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, weakref.ref):
        yield value()
    else:
        yield from value.values() if isinstance(value, dict) else value


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


# -- values outside the registered slots ---------------------------------------------------------------------------


class Entry:
    """Makes ``place[key] = value`` work for an item of a tuple or the cell of a closure.

    >>> owner = {"pair": (1, 2)}
    >>> Entry(owner, "pair")[1] = 3
    >>> owner
    {'pair': (1, 3)}
    """

    def __init__(self, owner: Any, at: Any) -> None:
        self.owner, self.at = owner, at

    def __getitem__(self, key: Any) -> Any:
        held = self.owner[self.at] if not isinstance(self.owner, types.CellType) else self.owner.cell_contents
        return held if key is None else held[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if key is not None:
            held = self[None]
            value = type(held)(value if i == key else entry for i, entry in enumerate(held))
        if isinstance(self.owner, types.CellType):
            self.owner.cell_contents = value
        else:
            self.owner[self.at] = value


def holders(module: nn.Module) -> dict[str, list[tuple[Any, Any]]]:
    """``{name: [(place, key)]}``: where else each parameter and buffer is held, as ``place[key]``.

    Such places are plain attributes of modules, lists, tuples and dicts in them, and closures of functions. The name is
    the tensor's first one. Code that swaps a tensor has to swap it there, too.

    >>> lstm = nn.LSTM(2, 2)
    >>> [(place, key)] = holders(lstm)["weight_hh_l0"]
    >>> place is lstm._flat_weights, key
    (True, 1)
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    names = {id(tensor): name for name, tensor in tensors}
    found: dict[str, list[tuple[Any, Any]]] = {}
    for place, key, value in _places(module):
        if id(value) in names:
            found.setdefault(names[id(value)], []).append((place, key))
    return found


def every_module(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` and all modules inside it, including those in plain lists, tuples and dicts.

    >>> class Hidden(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.kept = [nn.Linear(2, 2)]
    >>> [type(child).__name__ for child in every_module(Hidden())]
    ['Hidden', 'Linear']
    """
    known: set[int] = set()
    waiting = [module]
    while waiting:
        root = waiting.pop()
        for child in root.modules():
            if id(child) in known:
                continue
            known.add(id(child))
            yield child
            waiting.extend(value for _, _, value in _inside(vars(child)) if isinstance(value, nn.Module))


def held_tensors(module: nn.Module) -> list[Tensor]:
    """The tensors that a module holds outside its registered slots, in attributes and containers there.

    >>> layer = nn.Linear(2, 2)
    >>> layer.table = {"ones": torch.ones(2)}
    >>> held_tensors(layer)
    [tensor([1., 1.])]
    """
    return [value for _, _, value in _inside(vars(module)) if isinstance(value, Tensor)]


def _places(module: nn.Module) -> Iterator[tuple[Any, Any, Any]]:
    """``(place, key, value)`` of everything outside the registered slots of ``module`` and the modules inside it."""
    registered = {id(child) for child in module.modules()}
    for child in every_module(module):
        yield from _inside(vars(child), functions=True)
        if id(child) not in registered:
            yield from ((child._parameters, name, own) for name, own in child._parameters.items())
            yield from ((child._buffers, name, own) for name, own in child._buffers.items())


def _inside(attributes: dict[str, Any], functions: bool = False) -> Iterator[tuple[Any, Any, Any]]:
    """``(place, key, value)`` of plain attributes and of the contents of containers and functions among them.

    The contents of functions are included only on request, because they may not belong to the module.
    """
    entries = _worthwhile(attributes)
    if not entries:
        return
    waiting: list[tuple[Any, Any, Any]] = [(attributes, name, value) for name, value in entries]
    seen: set[int] = set()
    while waiting:
        place, key, value = waiting.pop()
        if isinstance(value, (Tensor, nn.Module)):
            yield place, key, value
            continue
        if id(value) in seen or not _is_looked_into(value):
            continue
        seen.add(id(value))
        if isinstance(value, (list, dict)):
            waiting.extend((value, at, entry) for at, entry in _worthwhile(value))
        elif isinstance(value, tuple):
            inside = Entry(place, key)
            waiting.extend((inside, at, entry) for at, entry in enumerate(value))
        elif functions and isinstance(value, types.FunctionType):
            cells = [cell for cell in value.__closure__ or () if _is_filled(cell)]
            waiting.extend((Entry(cell, None), None, cell.cell_contents) for cell in cells)
            waiting.extend((value.__globals__, name, entry) for name, entry in _globals_of(value).items())


def _worthwhile(container: Any) -> list[tuple[Any, Any]]:
    """The entries worth a look; nearly all of a module's some twenty attributes are empty or numbers."""
    if len(container) > LONGEST:
        return []
    return [
        (key, value)
        for key, value in (container.items() if isinstance(container, dict) else enumerate(container))
        if (kind := value.__class__) not in ATOMS and (kind not in CONTAINERS or value) and key not in REGISTERED
    ]
