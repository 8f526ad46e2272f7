"""Records what modules hold besides their parameters, to compare it later and to restore it.

Modules hold dicts, lists and objects, which may hold further ones. All are compared in one pass in C: identical objects
count as equal without being compared, so tensors are not compared by value.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import enum
import functools
import operator
import pickle
import random
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .references import LONGEST

OWN = frozenset(vars(nn.Module()))
"""The dicts of every module, left out because parameters are swapped and hooks belong to the skeleton."""
PLAIN = (type(None), enum.Enum, bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
CONTAINERS = (dict, list, set, collections.deque, bytearray)
"""Types that can be emptied and filled again."""
DEPTH = 12
"""How deep to follow objects."""
PRIVATE = ("torch", "funcdelta", "logging", "threading", "_thread", "weakref", "_weakref", "concurrent", "asyncio")
"""Packages whose objects are not a model's state: handles, locks, loggers, process groups."""


class Owner(NamedTuple):
    """The owner of a container: the module's path, the attribute, and whether entries are attributes or items."""

    path: str
    name: str = ""
    attributes: bool = False
    module: bool = False

    @property
    def at(self) -> str:
        """Its dotted name."""
        return ".".join(part for part in (self.path, self.name) if part)

    @property
    def base(self) -> str:
        """The attribute's own name."""
        return self.name.rpartition(".")[2]

    def word(self, key: Any) -> str:
        """The name of an entry.

        >>> Owner("0", "scales").word(1), Owner("0", "config", True).word("k"), Owner("0", "", True).word("act")
        ('0.scales[1]', '0.config.k', '0.act')
        """
        at = self.at
        return (f"{at}.{key}" if at else str(key)) if self.attributes else f"{at}[{key!r}]"

    def inner(self, key: Any) -> Owner:
        """The owner of the container in the entry ``key``."""
        name = f"{self.name}.{key}" if self.name and self.attributes else str(key) if self.attributes else self.name
        return Owner(self.path, name)


NOBODY = Owner("")


class Other(NamedTuple):
    """State outside containers: a function that reads it, its former value, and a function that restores it."""

    read: Callable[[], Any]
    before: Any
    put_back: Callable[[], Any]


class Noted:
    """The containers in which modules keep state, each with its recorded content.

    >>> cache, noted = {}, Noted()
    >>> noted.follow(cache, set())
    >>> cache["bias"] = torch.ones(2)
    >>> noted.restore()
    >>> cache
    {}
    """

    def __init__(self) -> None:
        self.now: list[Any] = []
        self.before: list[Any] = []
        self.owners: list[Owner] = []
        self.others: list[Other] = []
        self.iterators: list[tuple[Any, Any, Any]] = []

    @classmethod
    def together(cls, parts: Iterable[Noted]) -> Noted:
        """The union of several records."""
        found = cls()
        for part in parts:
            found.now += part.now
            found.before += part.before
            found.owners += part.owners
            found.others += part.others
            found.iterators += part.iterators
        return found

    def keep(self, container: Any, owner: Owner = NOBODY) -> Any:
        """Record the content of a container; returns the record."""
        self.now.append(container)
        self.before.append(copied(container))
        self.owners.append(owner)
        return self.before[-1]

    def keep_module(self, module: nn.Module, path: str, seen: set[int], tables: bool = True) -> None:
        """Record a module's attributes and what they hold, with ``tables`` also its tables of buffers and children."""
        seen.add(id(module))
        own = vars(module)
        self.keep(own, Owner(path, "", True, True))
        for name in ("_buffers", "_modules") if tables else ():
            if isinstance(own.get(name), dict):
                self.keep(own[name], Owner(path, name))
        for name, value in list(own.items()):
            if name not in OWN:
                self.follow(value, seen, DEPTH, Owner(path, name), (own, name), tables)

    def follow(
        self,
        value: Any,
        seen: set[int],
        depth: int = DEPTH,
        owner: Owner = NOBODY,
        place: tuple[Any, Any] | None = None,
        tables: bool = True,
    ) -> None:
        """Record the containers that ``value`` is or holds; ``place`` is the container and key that it is at."""
        if isinstance(value, (*PLAIN, *FUNCTIONS, Tensor)) or id(value) in seen or not depth:
            return
        if isinstance(value, nn.Module):
            self.keep_module(value, owner.at, seen, tables)
            return
        seen.add(id(value))
        for inner, key, entry, held in self._inside(value, owner, place):
            self.follow(entry, seen, depth - 1, inner.inner(key), held, tables)

    def _inside(
        self, value: Any, owner: Owner, place: tuple[Any, Any] | None
    ) -> Iterator[tuple[Owner, Any, Any, tuple[Any, Any] | None]]:
        """Record ``value`` itself; yields ``(owner, key, entry, place to replace it or None)`` of what it holds."""
        if isinstance(value, CONTAINERS):
            self.keep(value, owner)
            if len(value) <= LONGEST:
                keyed = isinstance(value, (dict, list))
                for key, entry in list(value.items() if isinstance(value, dict) else enumerate(value)):
                    yield owner, key, entry, (value, key) if keyed else None
            return
        if isinstance(value, tuple):
            yield from ((owner, i, entry, None) for i, entry in enumerate(value))
            return
        other = _other(value)
        if other is not None:
            self.others.append(other)
        if is_private(value):
            return
        inside = owner._replace(attributes=True)
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self.keep(attributes, inside)
            yield from ((inside, key, entry, (attributes, key)) for key, entry in list(attributes.items()))
        yield from ((inside, key, entry, None) for key, entry in _slots_of(value).items())
        if place is not None and isinstance(value, Iterator):
            before = _another(value)
            if before is not None:
                self.iterators.append((*place, before))

    def differs(self) -> bool:
        """Whether any container has changed."""
        try:
            return any(map(operator.ne, self.now, self.before))
        except Exception:  # objects that cannot be compared, such as tensors, count as different
            return True

    def changed(self) -> Iterator[tuple[Any, Any]]:
        """Every container that has changed, with its record."""
        if self.differs():
            yield from (pair for pair in zip(self.now, self.before, strict=True) if differ(*pair))

    def restore(self) -> None:
        """Restore what has changed in containers."""
        for now, before in self.changed():
            fill(now, before)

    def restore_others(self) -> None:
        """Restore state outside containers."""
        for other in self.others:
            if differ(other.read(), other.before):
                other.put_back()
        for container, key, before in self.iterators:
            fresh = _another(before)
            for table in (container, *(b for n, b in zip(self.now, self.before, strict=True) if n is container)):
                table[key] = fresh


def is_private(value: Any) -> bool:
    """Whether an object's content is not a model's state.

    >>> is_private(torch.Generator()), is_private(types.SimpleNamespace())
    (True, False)
    """
    kind = value.func if isinstance(value, functools.partial) else type(value)
    return (getattr(kind, "__module__", None) or "").partition(".")[0] in PRIVATE


def copied(container: Any) -> Any:
    """A shallow copy of a container.

    >>> copied(collections.OrderedDict(a=1))
    OrderedDict([('a', 1)])
    """
    return container.copy() if type(container) is dict else copy.copy(container)


def differ(now: Any, before: Any) -> bool:
    """Whether the contents of two containers differ.

    >>> differ({"a": torch.ones(2)}, {"a": torch.ones(2)}), differ([1], [1.0])
    (True, False)
    """
    try:
        return bool(now != before)
    except Exception:  # objects that cannot be compared count as different
        return True


def fill(container: Any, content: Any) -> None:
    """Replace the content of a container; lists and dicts are never empty for another thread meanwhile.

    >>> last = collections.deque([1, 2], maxlen=2)
    >>> fill(last, [3])
    >>> last
    deque([3], maxlen=2)
    """
    if isinstance(container, (list, bytearray)):
        container[:] = content
    elif not isinstance(container, dict):
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(content)
    else:
        for key in [key for key in container if key not in content]:
            del container[key]
        container.update(content)
        if list(container) != list(content):
            container.clear()
            container.update(content)


def _slots_of(value: Any) -> dict[str, Any]:
    """The values in an object's slots, by name."""
    found: dict[str, Any] = {}
    for kind in type(value).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            own = f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
            if own not in ("__dict__", "__weakref__") and hasattr(value, own):
                found[own] = getattr(value, own)
    return found


def _other(value: Any) -> Other | None:
    """A record of an object whose state is not in a dict: numpy arrays, random generators, objects with slots."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return _noted(lambda: value.get_state().numpy().tobytes(), lambda: value.set_state(state))
    if isinstance(value, random.Random):
        now = value.getstate()
        return _noted(value.getstate, lambda: value.setstate(now))
    if type(value).__module__.partition(".")[0] == "numpy":
        bits = getattr(value, "bit_generator", getattr(value, "_bit_generator", None))
        if bits is not None:
            drawn = copy.deepcopy(bits.state)
            return _noted(lambda: pickle.dumps(bits.state), lambda: setattr(bits, "state", drawn))
        if hasattr(value, "tobytes") and getattr(getattr(value, "flags", None), "writeable", False):
            numbers = value.copy()
            return _noted(value.tobytes, lambda: value.__setitem__(..., numbers))
        return None
    if _slots_of(value):
        slots = _slots_of(value)
        return _noted(lambda: _slots_of(value), lambda: _put_in_slots(value, slots))
    return None


def _noted(read: Callable[[], Any], put_back: Callable[[], Any]) -> Other:
    return Other(read, read(), put_back)


def _put_in_slots(value: Any, slots: dict[str, Any]) -> None:
    for name in _slots_of(value).keys() - slots.keys():
        object.__delattr__(value, name)
    for name, entry in slots.items():
        object.__setattr__(value, name, entry)


def _another(iterator: Any) -> Any:
    """An independent iterator at the same position; ``None`` if it cannot be copied."""
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = copy.copy(iterator)
        return None if found is iterator else found
    return None
