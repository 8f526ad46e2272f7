"""Finds the names that the code of forwards reads and writes, from its instructions, without running it.

Code decides whether a changed attribute matters and whether it is the model's own state: a forward that writes
``self.steps`` changes it in every call, and no forward reads ``config.architectures``. Calls by name are followed from
the forwards of all classes. Only names are compared, so two attributes of the same name are not distinguished.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

STARTS = ("forward", "__call__")
_ENDS = ("append", "appendleft", "extend", "extendleft", "pop", "popleft", "popitem", "rotate")
FILLS = frozenset((*_ENDS, "add", "clear", "discard", "insert", "remove", "reverse", "setdefault", "sort", "update"))
"""Methods that change containers, or other objects that change themselves."""
IN_PLACE = frozenset(name for name in dir(Tensor) if name.endswith("_") and not name.endswith("__"))
OF_TENSORS = frozenset(dir(Tensor))


@dataclass
class Reach:
    """The names that some functions, and everything they call, read and write.

    Attributes:
        reads: every name that is read: attributes, globals, and strings, which may be names for ``getattr``.
        pairs: attributes that are read, each with the name that it is read from: ``("config", "dtype")``.
        writes: attributes that are set or deleted.
        fills: names that are read in code that changes containers.
        stores: attributes that may have been read to set an entry: ``self.table[0] = x``.
        writes_tensors: whether some function writes into the ``data`` of a tensor.
        codes: the code objects, including those of nested functions.
    """

    reads: set[str] = field(default_factory=set)
    pairs: set[tuple[str, str]] = field(default_factory=set)
    writes: set[str] = field(default_factory=set)
    fills: set[str] = field(default_factory=set)
    stores: set[str] = field(default_factory=set)
    writes_tensors: bool = False
    codes: set[types.CodeType] = field(default_factory=set)

    def may_read(self, owner: str, name: str) -> bool:
        """Whether the attribute ``name`` of an object called ``owner`` is read.

        Names that tensors have, too, are read everywhere, so they count only if they are read from ``owner``.
        """
        return (owner, name) in self.pairs if name in OF_TENSORS else name in self.reads

    def in_place(self, name: str) -> bool:
        """Whether a method that writes into a tensor is called on something called ``name``."""
        return any((name, method) in self.pairs for method in IN_PLACE)

    def take(self, other: Reach) -> None:
        """Add everything in ``other``."""
        self.reads |= other.reads
        self.pairs |= other.pairs
        self.writes |= other.writes
        self.fills |= other.fills
        self.stores |= other.stores
        self.codes |= other.codes
        self.writes_tensors |= other.writes_tensors


@functools.lru_cache(maxsize=256)
def reach_of(kinds: frozenset[type]) -> Reach:
    """The reach of these classes' forwards, through their own methods and functions that they call by name.

    >>> class Counts(nn.Module):
    ...     def forward(self, x):
    ...         self.calls += 1
    ...         return x * self.scale
    >>> found = reach_of(frozenset([Counts]))
    >>> sorted(found.reads), sorted(found.writes)
    (['calls', 'scale'], ['calls'])
    """
    pool: dict[str, list[Any]] = {}
    for base in dict.fromkeys(base for kind in kinds for base in kind.__mro__ if base not in (object, nn.Module)):
        for name, value in vars(base).items():
            if name not in ("__init__", "__new__"):
                pool.setdefault(name, []).append(value)
    starts = [value for name in STARTS for value in pool.get(name, ())]
    return _reach(starts, pool)


def reach_of_functions(functions: Iterable[Any]) -> Reach:
    """The reach of given functions, such as hooks and patched forwards."""
    return _reach(functions, {})


def _reach(starts: Iterable[Any], pool: dict[str, list[Any]]) -> Reach:
    found, names, seen = Reach(), set[str](), set[int]()
    waiting = list(starts)
    while waiting:
        for function in _functions(waiting.pop()):
            if id(function) in seen:
                continue
            seen.add(id(function))
            facts = facts_of(function.__code__)
            found.take(facts)
            waiting += _held(function, facts.reads)
            for name in (facts.reads | facts.writes) - names:
                names.add(name)
                waiting += pool.get(name, ())
    return found


@functools.lru_cache(maxsize=8192)
def facts_of(code: types.CodeType) -> Reach:
    """The names that one function's code itself reads and writes, including nested functions.

    >>> def forward(self, x):
    ...     self.cache["last"] = x
    ...     self.weight.data.clamp_(min=0)
    >>> found = facts_of(forward.__code__)
    >>> sorted(found.fills & {"cache"}), found.writes_tensors
    (['cache'], True)
    """
    reads, writes, changes = set(code.co_names), set[str](), False
    found = Reach(codes={code})
    steps = list(dis.get_instructions(code))
    stored = [step.argval for step in steps if step.opname == "STORE_FAST"]
    before, attribute, last, same = ("",), "", "", dict[str, str]()
    augmented = False
    for step in steps:
        if step.opname.startswith("LOAD_") and isinstance(step.argval, str) and step.opname != "LOAD_CONST":
            names = (step.argval,)
            if step.opname == "LOAD_FAST" and step.argval in same:
                # A variable that is assigned several times may hold another value than the last one above.
                names = (same[step.argval], *(names if stored.count(step.argval) > 1 else ()))
            found.pairs.update((owner, name) for owner in before for name in names)
            before = names
            attribute = step.argval if step.opname in ("LOAD_ATTR", "LOAD_METHOD") else attribute
        elif step.opname == "STORE_FAST":
            # An alias: w = self.weight.
            same[step.argval] = before[0] if last.startswith("LOAD_") else step.argval
        elif step.opname in ("STORE_ATTR", "DELETE_ATTR"):
            writes.add(step.argval)
            if augmented:
                found.pairs.add((step.argval, "copy_"))  # self.total += 1 writes into a tensor in place
        elif step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"):
            changes = True
            found.stores.add(attribute)
        augmented = (step.opname == "BINARY_OP" and step.argrepr.endswith("=")) or (augmented and step.opname == "SWAP")
        last = step.opname
    for constant in code.co_consts:
        if isinstance(constant, str) and constant.isidentifier():
            reads.add(constant)
        elif isinstance(constant, types.CodeType):
            found.take(facts_of(constant))
    if "setattr" in reads or (changes and not {"__dict__", "vars"}.isdisjoint(reads)):
        writes |= {text for text in code.co_consts if isinstance(text, str) and text.isidentifier()}
    if changes or not FILLS.isdisjoint(reads):
        found.fills |= reads
    found.writes_tensors |= "data" in writes or (changes and ("data" in reads)) or found.in_place("data")
    found.reads |= reads
    found.writes |= writes
    return found


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """The Python functions behind an attribute of a class or an object."""
    if isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
        yield from _functions(value.__func__)
    elif isinstance(value, property):
        yield from (f for part in (value.fget, value.fset, value.fdel) for f in _functions(part))
    elif isinstance(value, (functools.partial, functools.cached_property)):
        yield from _functions(value.func)
    elif hasattr(value, "__wrapped__") and not isinstance(value, type):
        yield from _functions(inspect.unwrap(value))


def _held(function: types.FunctionType, names: set[str]) -> Iterator[Any]:
    """What a function may call: its closure, and functions that it names; torch's own functions are not followed."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # an empty cell
            continue
    if _is_torchs(function.__globals__.get("__name__")):
        return
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, types.ModuleType) and not _is_torchs(value.__name__):
            yield from (vars(value)[at] for at in names if at in vars(value))
        elif value is not None and not _is_torchs(getattr(value, "__module__", None)):
            yield value


def _is_torchs(name: str | None) -> bool:
    """Whether code belongs to torch or the standard library, which keep no state of a model."""
    return name is not None and name.partition(".")[0] in ("torch", *sys.stdlib_module_names)
