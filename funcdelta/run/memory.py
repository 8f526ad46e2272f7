"""Calls leave no trace: everything that a call changes in a skeleton's modules is undone when the call is over.

Models keep things between calls: running statistics, cached tables, counters. They would be a hidden input of the next
call, and a tensor that was computed from one member's params would be used for another. So the attributes of all
modules are recorded once, and restored after each call where they differ.
"""

from __future__ import annotations

import collections
import copy
import ctypes
import functools
import operator
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StaleBackboneError
from ..match import within
from ..structures.modules.code import Reach, reach_of
from ..structures.modules.noted import CONTAINERS, DEPTH, FUNCTIONS, OWN, PLAIN, Noted, differ, fill, is_private
from ..structures.modules.structure import own_table
from ..transforms import outside_transforms

VERSION = operator.attrgetter("_version")
NOTHING = object()
SMALL = 2**16
"""Buffers up to this many bytes are compared byte by byte: writes through ``.data`` or NumPy count no version."""


class Glance:
    """Whether any of many containers differs from its recorded copy; fast, because every call asks.

    A module has a dozen dicts that are nearly always empty; for those it is enough that they still are.

    >>> cache, steps = {}, [1, 2]
    >>> glance = Glance([(cache, {}), (steps, [1, 2])])
    >>> glance.differs(), steps.append(3), glance.differs()
    (False, None, True)
    """

    def __init__(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        self._empty: list[Any] = []
        self._now: list[Any] = []
        self._before: list[Any] = []
        for container, content in pairs:
            if not content and type(container) in (dict, collections.OrderedDict):
                self._empty.append(container)
            else:
                self._now.append(container)
                self._before.append(content)

    def differs(self) -> bool:
        """Whether any container differs."""
        try:
            # One comparison in C. Identical objects count as equal, so the numbers in tensors are not compared.
            return any(self._empty) or self._before != self._now
        except Exception:  # two different tensors have no truth value: something was replaced
            return True


class Memory:
    """Records the attributes of every module of ``skeleton`` and restores them; its buffers follow ``backbone``'s.

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
        kinds = frozenset(map(type, skeleton.modules()))
        own_class_containers(skeleton, reach_of(kinds).fills)
        self._caches = method_caches(kinds)
        self.copies = copied_tensors(backbone, skeleton)
        self.tensors = [tensor for copied in self.copies for tensor in (copied.source, copied.own)]
        self.versions = list(map(VERSION, self.tensors))
        self._small: tuple[list[Tensor], list[Tensor], list[int]] | None = None
        self._settle_traced()
        self.writes_buffers = False
        self.lends = any(copied.fixed for copied in self.copies)
        """Whether an output may be a tensor of the skeleton, which a later call would write."""
        # Graphs of earlier calls may need the buffers that a call writes, so each call writes into copies.
        # Torch's own layers are exempt: they write only running statistics, which skeletons do not have.
        reach = reach_of(frozenset(kind for kind in kinds if not kind.__module__.startswith("torch.nn.")))
        self._written_by_calls = [one for one in self.copies if one.is_written(reach)]
        # Skeletons share the backbone's parameters: a call that writes one is refused, or its .data is put back.
        named = skeleton.named_parameters() if skeleton is not backbone else ()
        own = {name: p for name, p in named if type(p) is nn.Parameter and not p.is_inference()}
        self._names, self._own_parameters = list(own), list(own.values())
        self._aliases = [parameter.detach() for parameter in self._own_parameters]
        self._written = list(map(VERSION, self._own_parameters))
        self._addresses = list(map(Tensor.data_ptr, self._own_parameters))
        # Objects that skeleton and backbone share (singletons) are not the skeleton's state.
        theirs, ours, noted = set[int](), set[int](), Noted()
        for root, seen in ((backbone, theirs), (skeleton, ours)):
            for path, module in root.named_modules():
                noted.keep_module(module, path, seen)
        self._shared, self._alive = theirs & ours, noted.now
        self.note()

    def note(self) -> None:
        """Record the attributes as they are now, with all that the skeleton's owner has changed on purpose."""
        modules = dict(self.skeleton.named_modules())
        self._hooks = [hooks for module in modules.values() for hooks in _hooks_of(module)]
        self._hooks_before = [dict(hooks) for hooks in self._hooks]
        self._noted: dict[str, Noted] = {}
        self._inside: dict[str, tuple[Noted, list[int], Noted]] = {}
        self._registered: dict[str, Noted] = {}
        seen = self._shared | set(map(id, modules.values()))
        for path, module in modules.items():
            noted = self._noted[path] = Noted()
            noted.keep_module(module, path, seen)
            registered = self._registered[path] = Noted()
            registered.keep(own_table(module))
        self._all = Noted.together(self._noted.values())
        self._parameters = Noted.together(self._registered.values())
        self._before = dict(zip(map(id, self._all.now), self._all.before, strict=True))
        pairs = [pair for noted in (self._all, self._parameters) for pair in zip(noted.now, noted.before, strict=True)]
        pairs += zip(self._hooks, self._hooks_before, strict=True)
        self._glance = Glance(pairs)

    def note_changes(self) -> None:
        """Record the attributes anew if any has changed."""
        if self._glance.differs():
            self.note()

    def left(self) -> list[Left]:
        """The entries that a call has changed, for each container that it changed."""
        if not self._glance.differs():
            return []
        found = [Left(now, before) for noted in (self._all, self._parameters) for now, before in noted.changed()]
        pairs = zip(self._hooks, self._hooks_before, strict=True)
        return found + [Left(now, before) for now, before in pairs if now != before]

    def accept(self, table: dict[str, Any], name: str) -> None:
        """Record the entry ``name`` of a module's table as it is now, so that it stays."""
        if id(table) in self._before and name in table:
            self._before[id(table)][name] = table[name]

    def give(self, module: nn.Module, forward: Any) -> Any:
        """Give a module another forward for good (``None``: its class's); returns the instance's former one."""
        own = vars(module)
        had = own.get("forward")
        for attributes in (own, self._before.get(id(own), {})):
            if forward is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = forward
        return had

    def restore(self) -> None:
        """Undo all that a call has changed, and copy the backbone's buffers again if either side was written."""
        self.end_call()
        self.follow()

    def end_call(self) -> None:
        """Undo what a call has changed in attributes and parameters; buffers wait until :meth:`follow`."""
        self.restore_attributes()
        if self._written != list(map(VERSION, self._own_parameters)):
            self._refuse_writes()
        if self._addresses != list(map(Tensor.data_ptr, self._own_parameters)):
            for parameter, alias in zip(self._own_parameters, self._aliases, strict=True):
                parameter.data = alias
        if self._all.others or self._all.iterators:
            self._all.restore_others()

    def restore_attributes(self) -> None:
        """Undo what a call has changed, except writes into tensors, arrays and random generators."""
        if self._glance.differs():
            self._all.restore()
            self._parameters.restore()
            # Models install hooks in their first call and set a flag that they have: both have to go.
            for hooks, before in zip(self._hooks, self._hooks_before, strict=True):
                if differ(hooks, before):
                    fill(hooks, before)
        for cache in self._caches:
            if cache.cache_info().currsize:
                cache.cache_clear()

    def restore_inside(self, path: str) -> None:
        """Undo what one member has changed at and below ``path``, before the next member runs there."""
        if path not in self._inside:
            inside = [at for at in self._noted if within(at, path)]
            self._inside[path] = (
                Noted.together([self._noted[at] for at in inside]),
                [i for i, copied in enumerate(self.copies) if within(copied.path, path)],
                Noted.together([self._registered[at] for at in inside]),
            )
        noted, places, registered = self._inside[path]
        noted.restore()
        noted.restore_others()
        for cache in self._caches:
            cache.cache_clear()
        if list(map(len, registered.now)) != list(map(len, registered.before)):
            # Parameters may be swapped while the call lasts, so they are not restored; new ones are removed.
            for now, before in zip(registered.now, registered.before, strict=True):
                for name in now.keys() - before.keys():
                    del now[name]
        for at in places:
            self._follow_one(at)

    def follow(self) -> None:
        """Copy the backbone's buffers and tensor attributes again if either side was written."""
        self._written = list(map(VERSION, self._own_parameters))
        # Models may have thousands of them: passes in C, not a loop in Python.
        if self._small is None:
            small = [copied for copied in self.copies if copied.is_small()]
            sizes = [one.own.numel() * one.own.element_size() for one in small]
            self._small = [one.source for one in small], [one.own for one in small], sizes
        sources, owns, sizes = self._small
        theirs, ours = map(Tensor.data_ptr, sources), map(Tensor.data_ptr, owns)
        if list(map(VERSION, self.tensors)) != self.versions or any(map(_other_bytes, theirs, ours, sizes)):
            for at in range(len(self.copies)):
                self._follow_one(at)

    def _refuse_writes(self) -> None:
        """Raise after a call that has written a parameter, whose storage is the backbone's."""
        versions = zip(self._names, self._own_parameters, self._written, strict=True)
        written = [name for name, parameter, version in versions if parameter._version != version]
        if sys.exc_info()[0] is None:  # otherwise the call's own error is on its way, and tells more
            raise StaleBackboneError(
                f"{written[0]} was written in place by the backbone's own forward (or by other code during the call), "
                f"but calls of a delta never change the backbone. Let the forward compute with a changed copy, such as "
                f"weight = self.weight.clamp(min=0), instead of changing the parameter."
            )

    # -- compiled calls: nothing above can be traced -------------------------------------------------------------

    def buffers_now(self, entry: str) -> dict[str, Tensor]:
        """Copies of the backbone's buffers below ``entry``; traced, so that compiled code makes them in each call."""
        start = f"{entry}." if entry else ""
        return {name: source.clone() for name, source in self._sources_by_name.items() if name.startswith(start)}

    def put_back_traced(self) -> None:
        """Undo what forwards set in modules, one attribute at a time, which is what a trace can do."""
        for module, name, before in self._set_by_forwards:
            if before is NOTHING:
                if name in module.__dict__:
                    delattr(module, name)
            else:
                setattr(module, name, before)

    def _settle_traced(self) -> None:
        modules = dict(self.skeleton.named_modules())
        own = {id(module._buffers): path for path, module in modules.items()}
        self._sources_by_name: dict[str, Tensor] = {
            f"{own[id(table)]}.{name}" if own[id(table)] else name: copied.source
            for copied in self.copies
            for table, name in copied.holders
            if id(table) in own
        }
        self._set_by_forwards: list[tuple[nn.Module, str, Any]] = []
        kinds: dict[type, set[str]] = {}
        for module in modules.values():
            kind = type(module)
            if kind not in kinds:
                ours = bool(_kinds_of_their_own(kind)) and not kind.__module__.startswith("torch.")
                kinds[kind] = reach_of(frozenset([kind])).writes if ours else set()
            registered = {*module._parameters, *module._buffers, *module._modules, "training"}
            for name in sorted(name for name in kinds[kind] - registered if not name.startswith("__")):
                if name in vars(module) or not isinstance(getattr(kind, name, None), property):
                    self._set_by_forwards.append((module, name, vars(module).get(name, NOTHING)))

    def lend(self) -> list[Copied]:
        """Put copies in place of the tensors that a call may write; returns what to put back afterwards."""
        for copied in self._written_by_calls:
            copied.put(copied.own.clone())
        return self._written_by_calls

    def storages(self) -> frozenset[int]:
        """The addresses of the storages of the skeleton's own tensors."""
        return frozenset(copied.own.untyped_storage().data_ptr() for copied in self.copies)

    def replaced(self) -> None:
        """Copies were replaced: forget which ones are compared by their bytes."""
        self._small = None

    def _follow_one(self, at: int) -> None:
        copied, place = self.copies[at], 2 * at
        now = [copied.source._version, copied.own._version]
        if now == self.versions[place : place + 2] and not copied.differs():
            return
        if now[1] != self.versions[place + 1]:
            self.writes_buffers = True
            if not (copied.fixed or copied in self._written_by_calls):
                self._written_by_calls.append(copied)
        self.lends |= self.writes_buffers
        with torch.inference_mode(False), torch.no_grad(), outside_transforms():
            if copied.fixed:
                copied.own.copy_(copied.source)
            else:
                # A new tensor, because a graph may still need the written one.
                copied.own = copied.source.clone()
        copied.put(copied.own)
        for table, name in copied.holders:
            if id(table) in self._before:
                self._before[id(table)][name] = copied.own
        self.tensors[place + 1] = copied.own
        self.versions[place : place + 2] = [now[0], copied.own._version]
        self.replaced()


class Left:
    """The entries that a call left in a container; :meth:`bring` puts back those that nobody has changed since.

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
        """Put the entries back."""
        if isinstance(self.container, dict):
            for key, value in self.entries.items():
                known = key in self.before
                if (key in self.container) == known and (not known or self.container[key] is self.before[key]):
                    self.container[key] = value
        elif not differ(self.container, self.before):
            fill(self.container, self.entries)


def _hooks_of(module: nn.Module) -> list[dict[Any, Any]]:
    """The tables of a module's forward and backward hooks."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    own = vars(module)
    return [own[name] for name in (*names, "_forward_hooks_always_called", "_backward_hooks") if name in own]


@dataclass(eq=False)
class Copied:
    """A tensor of the backbone that is not a parameter, and the skeleton's copy of it.

    Attributes:
        path: the module that holds it.
        source, own: the backbone's tensor, and the skeleton's.
        holders: every table, and the name in it, under which the skeleton holds the copy.
        fixed: whether something immutable (a tuple) holds it, so that it cannot be replaced.
    """

    path: str
    source: Tensor
    own: Tensor
    holders: list[tuple[Any, Any]] = field(default_factory=list)
    fixed: bool = False

    def is_written(self, reach: Reach) -> bool:
        """Whether the code of a forward writes a tensor of this name, and a copy can take its place."""
        names = [name for _, name in self.holders if isinstance(name, str)]
        return not self.fixed and any(reach.in_place(name) or name in reach.stores for name in names)

    def put(self, tensor: Tensor) -> None:
        """Put ``tensor`` in every place of the skeleton's copy."""
        for table, name in self.holders:
            table[name] = tensor

    def is_small(self) -> bool:
        """Whether both are small enough to be compared byte by byte."""
        return _is_small(self.source) and _is_small(self.own)

    def differs(self) -> bool:
        """Whether both are small and their bytes differ."""
        if not self.is_small():
            return False
        size = self.own.numel() * self.own.element_size()
        return bool(_other_bytes(self.source.data_ptr(), self.own.data_ptr(), size))


def copied_tensors(backbone: nn.Module, skeleton: nn.Module) -> list[Copied]:
    """Every buffer of the backbone, and every tensor in its modules' attributes, with the skeleton's copy.

    >>> copied_tensors(nn.BatchNorm1d(2), nn.BatchNorm1d(2))[0].source
    tensor([0., 0.])
    """
    modules = dict(skeleton.named_modules())
    found: dict[int, Copied] = {}
    seen = set(map(id, backbone.modules()))
    for path, module in backbone.named_modules():
        twin = modules.get(path)
        if twin is None:
            continue
        for tensor, own, table, name in _twins_of_modules(module, twin, seen):
            plain = type(tensor) in (Tensor, nn.Buffer) and own.is_leaf and own.shape == tensor.shape
            # Tensors made in inference mode have no version counter, so writes into them cannot be seen.
            if plain and own is not tensor and not tensor.is_inference() and not own.is_inference():
                known = found.setdefault(id(own), Copied(path, tensor, own))
                if table is None:
                    known.fixed = True
                else:
                    known.holders.append((table, name))
    return list(found.values())


Twin = tuple[Tensor, Tensor, Any, Any]


def _twins_of_modules(module: nn.Module, twin: nn.Module, seen: set[int]) -> Iterator[Twin]:
    """Pairs of tensors in the same place of both modules, with the table and name of the second."""
    yield from _twins(module._buffers, twin._buffers, seen)
    own = vars(twin)
    yield from _twins({name: value for name, value in vars(module).items() if name not in OWN}, own, seen, own)


def _twins(value: Any, twin: Any, seen: set[int], table: Any = None, depth: int = DEPTH) -> Iterator[Twin]:
    if type(value) is not type(twin) or value is twin or id(value) in seen or not depth:
        return
    if isinstance(value, nn.Module):
        seen.add(id(value))
        yield from _twins_of_modules(value, twin, seen)
        return
    seen.add(id(value))
    if isinstance(value, dict):
        pairs = [(key, entry, twin[key]) for key, entry in value.items() if key in twin]
    elif isinstance(value, (list, tuple)):
        pairs = [(i, *pair) for i, pair in enumerate(zip(value, twin, strict=False))]
    elif isinstance(getattr(value, "__dict__", None), dict) and not is_private(value):
        yield from _twins(vars(value), vars(twin), seen, None, depth)
        return
    else:
        return
    own = None if isinstance(twin, tuple) else twin
    for key, entry, other in pairs:
        if isinstance(entry, Tensor) and isinstance(other, Tensor):
            yield entry, other, own, key
        elif not isinstance(entry, (*PLAIN, *FUNCTIONS, Tensor)):
            yield from _twins(entry, other, seen, None, depth - 1)


def own_class_containers(skeleton: nn.Module, filled: set[str]) -> None:
    """Give each module its own copies of its class's containers that forwards fill: the class is the backbone's, too.

    >>> class Cached(nn.Module):
    ...     cache = {}
    >>> model = Cached()
    >>> own_class_containers(model, {"cache"})
    >>> model.cache["a"] = 1
    >>> Cached.cache
    {}
    """
    for module in skeleton.modules():
        own = vars(module)
        for kind in _kinds_of_their_own(type(module)):
            for name, value in vars(kind).items():
                if name in filled and name not in own and isinstance(value, CONTAINERS):
                    own[name] = copy.deepcopy(value)


def method_caches(kinds: frozenset[type]) -> list[Any]:
    """Methods of these classes under ``functools.lru_cache``, whose keys include the module."""
    cache = type(functools.lru_cache(is_private))
    own = dict.fromkeys(base for kind in kinds for base in _kinds_of_their_own(kind))
    return [value for kind in own for value in vars(kind).values() if isinstance(value, cache)]


def _kinds_of_their_own(kind: type) -> list[type]:
    """The classes of a module that are not torch's."""
    return [base for base in kind.__mro__ if base is not object and base.__module__.partition(".")[0] != "torch"]


def _is_small(tensor: Tensor) -> bool:
    """Whether a tensor is small and plain enough to be compared byte by byte."""
    plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.is_contiguous()
    return (
        plain and 0 < tensor.numel() * tensor.element_size() <= SMALL and not tensor.is_conj() and not tensor.is_neg()
    )


def _bytes_differ() -> Any:
    """C's ``memcmp``, a function of two addresses and a number of bytes; always 0 on systems without it."""
    try:
        function = ctypes.PyDLL(None).memcmp
    except (OSError, TypeError, AttributeError):
        return lambda one, other, size: 0
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int
    return lambda one, other, size: one and other and function(one, other, size)


_other_bytes = _bytes_differ()
