"""The program of a delta: everything that its calls share, whoever makes them.

A program holds the backbone, the plan, the mode, the skeletons (one a thread and mode, one a mode for compiled code),
and what was learned of inputs: layouts, trunks, refusals. :class:`funcdelta.DeltaModel` is a facade over it; engines,
views, merging, files and inspection take a program or plain data.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import StaleBackboneError
from ..fresh import random_members
from ..locks import fork_safe_lock
from ..plan.plan import Plan
from ..structures.modules.code import Reach
from ..structures.modules.freshness import Fingerprint
from ..transforms import eager
from .call import Params, Prepare
from .checkpointing import FLAG, FUNCTION, REQUIRE_GRADS, flags_of
from .compiled_check import CompiledCheck
from .fsdp import Shards, refuse_sharded, settle
from .skeleton import Skeleton

Key = TypeVar("Key")
Value = TypeVar("Value")

_programs: weakref.WeakValueDictionary[int, Program] = weakref.WeakValueDictionary()


def program_of(handle: int) -> Program:
    """The living program with that handle; compiled code passes numbers where it cannot pass objects."""
    return _programs[handle]


class Bounded(MutableMapping[Key, Value]):
    """A table of at most ``limit`` entries; the least recently used one goes. Threads may share it.

    >>> table = Bounded(limit=2)
    >>> table["a"], table["b"] = 1, 2
    >>> table["a"]
    1
    >>> table["c"] = 3
    >>> list(table)
    ['a', 'c']
    """

    def __init__(self, limit: int = 256) -> None:
        self.limit = limit
        self._entries: OrderedDict[Key, Value] = OrderedDict()
        self._lock = fork_safe_lock()

    def __getitem__(self, key: Key) -> Value:
        if torch.compiler.is_compiling():
            return self._entries[key]  # a graph reads; it neither locks nor reorders
        with self._lock:
            value = self._entries[key]
            self._entries.move_to_end(key)
            return value

    def get(self, key: Key, default: Any = None) -> Any:  # type: ignore[override]
        """The value of ``key``, or ``default``."""
        if torch.compiler.is_compiling():
            return self._entries.get(key, default)
        with self._lock:
            if key not in self._entries:
                return default
            self._entries.move_to_end(key)
            return self._entries[key]

    def __setitem__(self, key: Key, value: Value) -> None:
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            while len(self._entries) > self.limit:
                self._entries.popitem(last=False)

    def __delitem__(self, key: Key) -> None:
        with self._lock:
            del self._entries[key]

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Key]:
        with self._lock:
            return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def setdefault(self, key: Key, default: Value) -> Value:  # type: ignore[override]
        """The value of ``key``, or ``default``, which from now on it has: one of several threads decides.

        >>> table = Bounded()
        >>> table.setdefault("a", 1), table.setdefault("a", 2)
        (1, 1)
        """
        with self._lock:
            value = self._entries.setdefault(key, default)
            self._entries.move_to_end(key)
            while len(self._entries) > self.limit:
                self._entries.popitem(last=False)
            return value

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {"limit": self.limit, "_entries": OrderedDict(self._entries)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=fork_safe_lock())


class Skeletons:
    """The skeletons of one plan: one a thread and mode, one a mode for compiled code, rebuilt when weights move."""

    def __init__(self, backbone: nn.Module, plan: Plan, prepare: Prepare | None) -> None:
        refuse_sharded(backbone)
        self.backbone, self.plan, self.prepare = backbone, plan, prepare
        self._local = threading.local()
        self._traced: dict[bool | None, Skeleton] = {}
        self.generation = self.followed = 0
        self._shards: Shards = {}
        self._check_compiled = CompiledCheck(self)
        # A mode belongs to the delta: what becomes of the backbone's flags later does not matter.
        self.flags = {path: module.training for path, module in backbone.named_modules()}
        self._fingerprint, self._checkpointing = Fingerprint(backbone), flags_of(backbone)

    def get(self, training: bool | None, hooked: bool = True) -> Skeleton:
        """This thread's skeleton in the given mode (``None``: the backbone's own flags), while no call uses it."""
        if torch.compiler.is_compiling():
            self._check_compiled()
            return self._traced[training]
        self.check()
        if getattr(self._local, "generation", None) != self.generation:
            self._local.cache, self._local.generation = {}, self.generation
        key = (training, hooked)
        skeleton = self._local.cache.get(key)
        if skeleton is not None and skeleton.call is not None:
            # A call within a call: a hook or a method calls the same delta again.
            return self.build(training, hooked)
        if skeleton is None or not skeleton.clean:
            skeleton = self._local.cache[key] = self.build(training, hooked)
        skeleton.memory.follow()
        return skeleton

    @eager
    def build(self, training: bool | None, hooked: bool = True, view: bool = False) -> Skeleton:
        """A skeleton that nobody else uses."""
        plan = self.plan if hooked else None
        skeleton = Skeleton(self.backbone, plan, training, self.prepare, self.flags, view)
        settle(skeleton.module, skeleton.units, self._shards)
        return skeleton

    def spare(self, training: bool | None) -> Skeleton:
        """A skeleton of this thread's that no call needs any more, for one that may be recomputed."""
        skeletons = self._local.cache.setdefault(("kept", training), [])
        free = next((skeleton for skeleton in skeletons if skeleton.kept is None or skeleton.kept() is None), None)
        if free is None:
            skeletons.append(free := self.build(training))
        free.memory.restore()
        return free

    def traced(self, training: bool | None) -> Skeleton:
        """The skeleton that compiled code uses."""
        return self._traced[training]

    def reserve(self, training: bool | None) -> None:
        """Build the skeleton that compiled code uses: tracing cannot build one."""
        if training not in self._traced:
            self._traced[training] = self.build(training)

    def refresh(self, plan: Plan | None = None) -> None:
        """Forget every skeleton; the next calls copy the backbone as it is now, opened as ``plan`` says."""
        self.plan = plan or self.plan
        self.generation += 1
        self._shards = {}
        self._fingerprint, self._checkpointing = Fingerprint(self.backbone), flags_of(self.backbone)
        self._traced = {training: self.build(training) for training in self._traced}

    @property
    def reach(self) -> Reach:
        """What the code of the backbone's forwards reads and writes, by names."""
        return self._fingerprint.reach

    def check(self) -> None:
        """Compare the backbone with what the skeletons copied, and follow its checkpointing.

        Raises :class:`StaleBackboneError` with what has changed.
        """
        for own, flag, function in self._checkpointing:
            if own.get(FLAG) is not flag or own.get(FUNCTION) is not function:
                self.refresh()
                break
        try:
            if self._fingerprint.check():
                self.followed += 1
                self.refresh()  # buffers were replaced: the skeletons copy from those that are there now
        except StaleBackboneError:
            if not self._fingerprint.differs_by_hooks(REQUIRE_GRADS):
                raise
            self.refresh()


class Program:
    """What all calls of one delta share; see the module's docstring.

    Attributes:
        training: the mode; ``None``: the backbone's own flags when the delta was built.
        layouts, trunks: what was learned, by input key.
        refusals: why an engine cannot run inputs of a key, ``{(engine, key): reason}``.
        checked: sizes of inputs for which a fold was found right.
        writes_inputs: whether the model was seen to write into its inputs.
        verified: with which leaves, in which mode, a call has been made.
    """

    def __init__(self, backbone: nn.Module, plan: Plan, batch_dim: int, prepare: Prepare | None) -> None:
        self.backbone, self.batch_dim = backbone, batch_dim
        self.training: bool | None = None
        self.skeletons = Skeletons(backbone, plan, prepare)
        self.skeletons.reserve(None)
        self.layouts: Bounded[Any, Any] = Bounded()
        self.trunks: Bounded[Any, Any] = Bounded()
        self.refusals: Bounded[Any, str] = Bounded()
        self.checked: Bounded[Any, bool] = Bounded(1024)
        self.writes_inputs = False
        self.warned: set[Any] = set()
        self.verified: set[Any] = set()
        self.lock = fork_safe_lock()
        self._members: Bounded[Any, Params] = Bounded()
        self._register()

    def _register(self) -> None:
        self.handle = id(self)
        _programs[self.handle] = self

    @property
    def plan(self) -> Plan:
        """Which delta acts where; shared by this program in every mode."""
        return self.skeletons.plan

    def mode(self, train: bool) -> Program:
        """This program in training or evaluation mode."""
        other = copy.copy(self)
        other.training = bool(train)
        other.skeletons.reserve(other.training)
        other._register()
        return other

    def flagged(self, flags: Mapping[str, bool]) -> Program:
        """This program with a mode for each module, by its path; it learns for itself."""
        other = copy.copy(self)
        other.training = None
        other.skeletons = Skeletons(self.backbone, self.plan, self.skeletons.prepare)
        other.skeletons.flags = dict(flags)
        other.skeletons.reserve(None)
        other.layouts, other.trunks, other.refusals = Bounded(), Bounded(), Bounded()
        other._register()
        return other

    def refresh(self, plan: Plan) -> None:
        """Read the backbone again."""
        self.skeletons.refresh(plan)
        for known in (self.layouts, self.trunks, self.refusals, self.checked, self._members):
            known.clear()
        self.verified.clear()

    def is_verified(self, names: Iterable[str]) -> bool:
        """Whether a call with these leaves was made in this mode."""
        return (self.training, frozenset(names)) in self.verified

    def random_members(self, n: int, present: frozenset[str]) -> Params:
        """n members away from their start, of the deltas and trained leaves that are ``present``."""
        key = (n, present)
        found = self._members.get(key)
        if found is None:
            found = self._members[key] = random_members(self.plan, self.backbone, self.plan.order, n, present)
        return found


def first_of(stack: Mapping[str, Tensor]) -> Tensor:
    """Any leaf of a stack, for its device and its number of members.

    >>> first_of({"a": torch.zeros(3)}).shape
    torch.Size([3])
    """
    return next(iter(stack.values()))
