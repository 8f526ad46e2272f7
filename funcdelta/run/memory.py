"""A skeleton has no memory: whatever a call leaves behind in its modules is put back when the call is over.

Models keep things between calls: running statistics, cached tables, counters. Of a backbone that no call may change
this would be a hidden input of the next call, and a tensor that was computed from one member's params would be used for
another member. So the attributes of all modules are noted once, and restored where they differ.
"""

from __future__ import annotations

import copy
import operator
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..match import within
from ..transforms import outside_transforms

VERSION = operator.attrgetter("_version")
OWN = frozenset(vars(nn.Module()))
"""The dicts that every module has: parameters are swapped and hooks belong to the skeleton itself."""
PLAIN = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
DEPTH = 3
"""How deep objects are followed: a cache object has a dict of layers."""


class Memory:
    """The attributes of every module of ``skeleton``, as they are now; buffers follow those of ``backbone``.

    >>> class Counts(nn.Module):
    ...     calls = 0
    ...     def forward(self, x):
    ...         self.calls += 1
    ...         return x
    >>> backbone, skeleton = Counts(), Counts()
    >>> memory = Memory(backbone, skeleton)
    >>> y = skeleton(torch.ones(1))
    >>> memory.restore()
    >>> skeleton.calls
    0
    """

    def __init__(self, backbone: nn.Module, skeleton: nn.Module) -> None:
        self.skeleton = skeleton
        self.copies = copied_tensors(backbone, skeleton)
        self.tensors = [tensor for copied in self.copies for tensor in (copied.source, copied.own)]
        self.versions = list(map(VERSION, self.tensors))
        self.writes_buffers = False
        self.note()

    def note(self) -> None:
        """Note the attributes as they are: what the skeleton's owner has changed is meant to stay."""
        self._hooks = [hooks for module in self.skeleton.modules() for hooks in _hooks_of(module)]
        self._hooks_before = [dict(hooks) for hooks in self._hooks]
        self._hook_counts = list(map(len, self._hooks))
        self._before: dict[int, dict[Any, Any]] = {}
        self._noted: dict[str, Noted] = {}
        self._inside: dict[str, tuple[Noted, list[int]]] = {}
        seen: set[int] = set()
        for path, module in self.skeleton.named_modules():
            noted = self._noted[path] = Noted()
            own = vars(module)
            for table in (own, module._buffers, module._modules):
                self._before[id(table)] = noted.keep(table)
            for name, value in own.items():
                if name not in OWN:
                    noted.follow(value, seen, DEPTH)
        self._all = Noted.together(self._noted.values())

    def note_changes(self) -> None:
        """What the skeleton's owner has changed since is meant to stay: note it."""
        if self._all.differs() or list(map(len, self._hooks)) != self._hook_counts:
            self.note()

    def left(self) -> list[Left]:
        """What a call has left behind: of each container that it changed, the entries that are others now."""
        found = [Left(now, before) for now, before in self._all.changed()]
        if list(map(len, self._hooks)) != self._hook_counts:
            pairs = zip(self._hooks, self._hooks_before, strict=True)
            found += [Left(now, before) for now, before in pairs if now != before]
        return found

    def accept(self, table: dict[str, Any], name: str) -> None:
        """The entry ``name`` of a module's table is meant to stay as it is."""
        if id(table) in self._before and name in table:
            self._before[id(table)][name] = table[name]

    def give(self, module: nn.Module, forward: Any) -> Any:
        """Another forward for a module, which stays; ``None``: its class's. Gives the one that it had of its own."""
        own = vars(module)
        had = own.get("forward")
        for attributes in (own, self._before.get(id(own), {})):
            if forward is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = forward
        return had

    def restore(self) -> None:
        """Put back what a call has changed, and copy the backbone's buffers again where either side was written."""
        self.restore_attributes()
        self.follow()

    def restore_attributes(self) -> None:
        """Put back what a call has changed but for what it wrote into tensors."""
        self._all.restore()
        if list(map(len, self._hooks)) != self._hook_counts:
            # Models install hooks in their first call, and mark that they have: neither stays.
            for hooks, before in zip(self._hooks, self._hooks_before, strict=True):
                _fill(hooks, before)

    def restore_inside(self, path: str) -> None:
        """The same for the modules at and below ``path``: what one member leaves there is not for the next."""
        if path not in self._inside:
            inside = [noted for at, noted in self._noted.items() if within(at, path)]
            self._inside[path] = (
                Noted.together(inside),
                [i for i, copied in enumerate(self.copies) if within(copied.path, path)],
            )
        noted, places = self._inside[path]
        noted.restore()
        for at in places:
            self._follow_one(at)

    def follow(self) -> None:
        """Copy the backbone's buffers, and its tensors that are plain attributes, where either side was written."""
        # One pass in C over all of them, for models may have thousands.
        if list(map(VERSION, self.tensors)) != self.versions:
            for at in range(len(self.copies)):
                self._follow_one(at)

    def _follow_one(self, at: int) -> None:
        copied, place = self.copies[at], 2 * at
        now = [copied.source._version, copied.own._version]
        if now == self.versions[place : place + 2]:
            return
        self.writes_buffers |= now[1] != self.versions[place + 1]
        with torch.inference_mode(False), torch.no_grad(), outside_transforms():
            # Another tensor, for a graph may still need the one that was written.
            copied.own = copied.source.clone()
        for table, name in copied.holders:
            table[name] = copied.own
            if id(table) in self._before:
                self._before[id(table)][name] = copied.own
        self.tensors[place + 1] = copied.own
        self.versions[place : place + 2] = [now[0], copied.own._version]


class Noted:
    """The containers that hold what modules remember, each with what was in it.

    >>> cache, noted = {}, Noted()
    >>> noted.follow(cache, set(), 1)
    >>> cache["bias"] = torch.ones(2)
    >>> noted.restore()
    >>> cache
    {}
    """

    def __init__(self) -> None:
        self.now: list[Any] = []
        self.before: list[Any] = []

    @classmethod
    def together(cls, parts: Iterable[Noted]) -> Noted:
        """All that is noted in several."""
        found = cls()
        for part in parts:
            found.now += part.now
            found.before += part.before
        return found

    def keep(self, container: Any) -> Any:
        """Note what is in a dict, a list or a set; gives what was noted."""
        self.now.append(container)
        self.before.append(copy.copy(container) if type(container) is not dict else dict(container))
        return self.before[-1]

    def follow(self, value: Any, seen: set[int], depth: int) -> None:
        """Note the containers that ``value`` is or holds."""
        if isinstance(value, (*PLAIN, *FUNCTIONS, Tensor, nn.Module)) or id(value) in seen or not depth:
            return
        seen.add(id(value))
        inside: Any = ()
        if isinstance(value, dict):
            self.keep(value)
            inside = value.values()
        elif isinstance(value, (list, set)):
            self.keep(value)
            inside = value
        elif isinstance(value, tuple):
            inside = value
        elif isinstance(getattr(value, "__dict__", None), dict) and not _is_private_to_torch(value):
            inside = vars(value).values()
            self.keep(vars(value))
        for item in list(inside):
            self.follow(item, seen, depth - 1)

    def differs(self) -> bool:
        """Whether anything has changed."""
        try:
            # In C: identical values are equal without a look at them, and no tensor is compared by its numbers.
            return any(map(operator.ne, self.now, self.before))
        except Exception:  # what cannot be compared, as tensors cannot, is another object
            return True

    def changed(self) -> Iterator[tuple[Any, Any]]:
        """Every container that has changed, with what was noted of it."""
        if self.differs():
            yield from (pair for pair in zip(self.now, self.before, strict=True) if _differs(*pair))

    def restore(self) -> None:
        """Put back what has changed."""
        for now, before in self.changed():
            _fill(now, before)


class Left:
    """What a call left in a container; :meth:`bring` puts it there again, where nobody has put something else since.

    >>> states = {"steps": 0}
    >>> before, states["steps"], states["last"] = dict(states), 1, "a"
    >>> left = Left(states, before)
    >>> states.clear(), states.update(before)
    (None, None)
    >>> left.bring()
    >>> states
    {'steps': 1, 'last': 'a'}
    """

    def __init__(self, now: Any, before: Any) -> None:
        self.container, self.before = now, before
        self.entries: Any = copy.copy(now)
        if isinstance(now, dict):
            missing = object()
            self.entries = {k: v for k, v in now.items() if before.get(k, missing) is not v}
            self.before = {k: before[k] for k in self.entries if k in before}

    def bring(self) -> None:
        """Put it there again."""
        if isinstance(self.container, dict):
            for key, value in self.entries.items():
                known = key in self.before
                if (key in self.container) == known and (not known or self.container[key] is self.before[key]):
                    self.container[key] = value
        elif not _differs(self.container, self.before):
            _fill(self.container, self.entries)


def _fill(container: Any, content: Any) -> None:
    """Make the content of a container another, without a moment in which another thread would find it empty."""
    if not isinstance(container, dict):
        container.clear()
        (container.extend if isinstance(container, list) else container.update)(content)
        return
    for key in [key for key in container if key not in content]:
        del container[key]
    container.update(content)
    if list(container) != list(content):
        container.clear()
        container.update(content)


def _hooks_of(module: nn.Module) -> list[dict[Any, Any]]:
    """The tables of what runs before and after a module's forward."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    own = vars(module)
    return [own[name] for name in (*names, "_forward_hooks_always_called", "_backward_hooks") if name in own]


def _differs(now: Any, before: Any) -> bool:
    try:
        return now != before
    except Exception:  # an object that cannot be compared is another object
        return True


def _is_private_to_torch(value: Any) -> bool:
    """Handles, process groups and the state of sharded modules belong to torch."""
    return type(value).__module__.startswith(("torch.", "torch._"))


@dataclass
class Copied:
    """A tensor of the backbone that is no parameter, and the skeleton's copy of it.

    Attributes:
        path: the module that holds it.
        holders: every table and name under which the skeleton has the copy.
    """

    path: str
    source: Tensor
    own: Tensor
    holders: list[tuple[dict[str, Any], str]]


def copied_tensors(backbone: nn.Module, skeleton: nn.Module) -> list[Copied]:
    """Every buffer of the backbone and every tensor that is a plain attribute, with the skeleton's copy.

    >>> copied_tensors(nn.BatchNorm1d(2), nn.BatchNorm1d(2))[0].source
    tensor([0., 0.])
    """
    modules = dict(skeleton.named_modules())
    found: dict[int, Copied] = {}
    for path, module in backbone.named_modules():
        twin = modules.get(path)
        if twin is None:
            continue
        for own, its in ((module._buffers, twin._buffers), (vars(module), vars(twin))):
            for name, tensor in own.items():
                other = its.get(name)
                if not isinstance(tensor, Tensor) or not isinstance(other, Tensor) or other is tensor:
                    continue
                plain = type(tensor) in (Tensor, nn.Buffer) and other.is_leaf
                # Tensors made in inference mode count no versions.
                if plain and not tensor.is_inference() and not other.is_inference():
                    known = found.setdefault(id(other), Copied(path, tensor, other, []))
                    known.holders.append((its, name))
    return list(found.values())
