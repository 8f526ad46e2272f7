"""Detects changes to a backbone since it was copied: to modules, parameters, storage, hooks and forwards.

A copy shares the storage of parameters, so it sees values that are written in place. It does not see a replaced layer,
another parameter object, tensors that moved, a hook, a patched forward or a new value of an attribute. The check runs
at every call, so it is a few passes in C over all modules; only if one of them differs does Python look for the change.
An attribute counts if some forward reads its name and none writes it: what forwards write is the model's state.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from ...errors import StaleBackboneError
from ...match import below
from .code import Reach, reach_of, reach_of_functions
from .noted import FUNCTIONS, OWN, Noted, Owner, copied

HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
PARTS = ("_parameters", "_buffers", "_modules", *HOOKS)
SHOWN = 3
"""The number of changes that an error lists."""
LOOKED_AFTER = frozenset(("training", "forward", *OWN))
"""Attributes that are compared separately, or belong to the mode, which the delta chooses."""
FOLLOWED = frozenset(("gradient_checkpointing", "_gradient_checkpointing_func"))
"""Attributes that do not affect outputs: a change of them is copied, not reported."""
NOTHING = object()
NONE: dict[Any, Any] = {}
"""The copy of any empty table."""
LONGEST_TEXT = 60

_flat = chain.from_iterable
_pointer, _strides, _numbers = Tensor.data_ptr, Tensor.stride, Tensor.numel


@dataclass
class _Facts:
    """One module's former state."""

    path: str
    module: nn.Module
    kind: type[nn.Module]
    parts: dict[str, dict[Any, Any]]
    forward: Any
    class_forward: Any


class Fingerprint:
    """A record of a backbone's state; :meth:`check` compares it with the present one.

    ``aliases`` maps names of the backbone's parameters to tensors that share their storage, such as a skeleton's
    parameters; without it the fingerprint makes its own. They distinguish storage that moved with everything that uses
    it (into shared memory, for another process) from a tensor that got another storage.

    >>> backbone = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> fingerprint = Fingerprint(backbone)
    >>> with torch.no_grad():
    ...     _ = backbone[0].weight.add_(1.0)
    >>> fingerprint.check()
    False
    >>> backbone[1] = nn.Linear(2, 2)
    >>> fingerprint.check()
    Traceback (most recent call last):
    ...
    funcdelta.errors.StaleBackboneError: The backbone changed after this delta was built: 1 is another Linear...
    """

    def __init__(self, backbone: nn.Module, aliases: Mapping[str, Tensor] | None = None) -> None:
        self.backbone = backbone
        modules = {path: module for path, module in backbone.named_modules() if _is_plain(module)}
        self._facts = [_facts_of(path, module) for path, module in modules.items()]
        self._modules = list(modules.values())
        self._kinds = list(dict.fromkeys(map(type, self._modules)))
        named = dict(backbone.named_parameters())
        self._parameters = list(named.values())
        self._names = list(named)
        given = aliases or {}
        # An alias keeps its storage alive, so that no other tensor can get the same address.
        self._aliases = [given.get(name, _alias(parameter)) for name, parameter in named.items()]
        self._attributes_noted = Noted()
        self._seen = set(map(id, backbone.modules()))
        for path, module in modules.items():
            self._attributes_noted.keep_module(module, path, self._seen, tables=False)
        self._reach: Reach | None = None
        self._renewed = False
        self._settle()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied backbone, here or in another process, has other addresses, so take a new record.
        return Fingerprint, (self.backbone,)

    def check(self) -> bool:
        """Raises `StaleBackboneError`, with what changed, if the backbone is not the recorded one.

        Returns ``True`` if only buffers were replaced by others of their kind, as some models do in their forward;
        callers that copy buffers then have to look them up again.
        """
        try:
            # In C, and without comparing the values of tensors, because identical objects count as equal.
            differs = self._before != self._attributes_noted.now or self._now() != self._then
        except Exception:  # a new object whose comparison fails, such as a tensor
            differs = True
        return differs and self._look()

    def differs_by_hooks(self, name: str) -> bool:
        """Whether the only change is that forward hooks of that name were added or removed.

        >>> backbone = nn.Sequential(nn.Linear(2, 2))
        >>> fingerprint = Fingerprint(backbone)
        >>> def noted(module, args, output): ...
        >>> _ = backbone[0].register_forward_hook(noted)
        >>> fingerprint.differs_by_hooks("noted"), fingerprint.differs_by_hooks("other")
        (True, False)
        """
        if not all(change.startswith("a forward hook was") for change in self._changes()):
            return False
        for facts in self._facts:
            was, found = facts.parts["_forward_hooks"], facts.module._forward_hooks
            if any(
                getattr(hook, "__name__", "") != name for _, *pair in _differences(was, found) for hook in pair if hook
            ):
                return False
        return True

    def _now(self) -> tuple[list[Any], ...]:
        """The present values of what is compared, as lists because C code makes and compares those."""
        return (
            list(map(type, self._modules)),
            list(map(id, _flat(map(dict.values, map(operator.getitem, self._owners, self._parts))))),
            list(map(_forward, self._kinds)),
            list(map(_pointer, self._parameters)),
            list(map(_strides, self._parameters)),
            list(map(_numbers, self._parameters)),
            list(map(_pointer, self._buffers)),
            list(map(_kind, self._without_storage)),
        )

    def _settle(self) -> None:
        """Record the backbone's present state as the one to compare with."""
        self._buffers = list(self.backbone.buffers())
        self._without_storage = [p for p in self._parameters if p.data_ptr() == 0]
        noted = self._attributes_noted
        self._before = [_copied(*pair) for pair in zip(noted.now, noted.owners, strict=True)]
        # Compare by identity where a different object could be equal, and where the order matters.
        tables = [(vars(facts.module), part) for facts in self._facts for part in PARTS]
        tables = [(own, part) for own, part in tables if len(own[part]) > 1 or any(map(_may_equal, own[part].values()))]
        self._owners, self._parts = [own for own, _ in tables], [part for _, part in tables]
        self._then = self._now()

    def _look(self) -> bool:
        self._reach, self._renewed = None, False
        changes = list(self._changes())
        if changes:
            more = f", and {len(changes) - SHOWN} more changes" if len(changes) > SHOWN else ""
            raise StaleBackboneError(
                f"The backbone changed after this delta was built: {'; '.join(changes[:SHOWN])}{more}. Call "
                f"delta.refresh(), which reads the backbone again."
            )
        renewed = self._renewed or self._now()[-2] != self._then[-2]
        for facts in self._facts:
            own = facts.module._buffers
            renewed |= any(own.get(name) is not tensor for name, tensor in facts.parts["_buffers"].items())
            facts.parts.update({name: dict(vars(facts.module)[name]) for name in ("_buffers", *HOOKS)})
        self._note_attributes()
        self._settle()
        return renewed

    def _note_attributes(self) -> None:
        noted = self._attributes_noted
        for at, (now, before) in enumerate(zip(noted.now, noted.before, strict=True)):
            if _other(now, before):
                owner = noted.owners[at]
                noted.before[at] = copied(now)
                pairs = now.items() if isinstance(now, dict) else enumerate(now)
                for key, value in list(pairs):
                    if not (owner.module and key in OWN):
                        noted.follow(value, self._seen, owner=owner.inner(key), tables=False)

    # -- what changed, in words ------------------------------------------------------------------------------------

    def _changes(self) -> Iterator[str]:
        # Do not report the descendants of a replaced module.
        gone: set[int] = set()
        for facts in self._facts:
            if id(facts.module) in gone:
                continue
            for name, was, found in _differences(facts.parts["_modules"], facts.module._modules):
                gone |= {id(child) for child in was.modules()} if was is not None else set()
                yield _of_module(below(facts.path, name), was, found)
        for name, parameter, alias in zip(self._names, self._parameters, self._aliases, strict=True):
            if not _is_one(parameter, alias):
                yield f"{name} has other storage (it was {_words(alias)}, is {_words(parameter)})"
        for facts in self._facts:
            if id(facts.module) not in gone:
                yield from _changes_of(facts, self._is_its_own)
        noted = self._attributes_noted
        for now, before, owner in zip(noted.now, noted.before, noted.owners, strict=True):
            if _other(now, before):
                yield from self._changes_inside(now, before, owner)

    def _is_its_own(self, hook: Any) -> bool:
        """Whether a forward installs this hook itself, as some do in their first call."""
        return getattr(hook, "__code__", None) in self.reach.codes

    @property
    def reach(self) -> Reach:
        """The names that forwards, hooks and functions held by modules read and write."""
        if self._reach is None:
            held = [value for now in self._attributes_noted.now if isinstance(now, dict) for value in now.values()]
            kinds = {type(module) for module in self.backbone.modules()}
            kinds |= {type(value) for value in held if hasattr(value, "__dict__") and not isinstance(value, type)}
            self._reach = Reach()
            self._reach.take(reach_of(frozenset(kinds)))
            hooks = [hook for facts in self._facts for part in HOOKS for hook in facts.parts[part].values()]
            self._reach.take(reach_of_functions([*hooks, *(v for v in held if isinstance(v, FUNCTIONS))]))
        return self._reach

    def _changes_inside(self, now: Any, before: Any, owner: Owner) -> Iterator[str]:
        """The changes of attributes, or of a container in one of them."""
        reach = self.reach
        if not isinstance(now, dict):
            if not isinstance(now, (list, tuple)):
                if owner.base in reach.reads and owner.base not in reach.fills:
                    yield f"{owner.at} was {_short(before)}, is {_short(now)}"
                return
            now, before = dict(enumerate(now)), dict(enumerate(before))
        for key in dict.fromkeys((*before, *now)):
            was, found = before.get(key, NOTHING), now.get(key, NOTHING)
            name = str(key) if owner.attributes else owner.base
            if was is found or (owner.module and key in LOOKED_AFTER):
                continue
            read = reach.may_read(owner.base or "self", name) if owner.attributes else name in reach.reads
            if not read or name in (reach.writes if owner.attributes else reach.fills):
                continue
            if owner.module and was is NOTHING and not self._shadows(owner.path, name):
                continue  # a new attribute that shadows nothing is a note of the user's
            rates = owner.module and _are_rates(was, found) and not self._has_matrix(owner.path)
            tensors = isinstance(was, Tensor) and isinstance(found, Tensor) and _kind(was) == _kind(found)
            inside = not owner.module and not self._formula_reads(name)
            if name in FOLLOWED or rates or tensors or inside:
                self._renewed = True
            elif not _equal(was, found):
                yield f"{owner.word(key)} {_told(was, found)}"

    def _has_matrix(self, path: str) -> bool:
        """Whether a module has a weight matrix, for whose product a delta's formulas were determined."""
        tensors = (t for facts in self._facts if facts.path == path for t in facts.module._parameters.values())
        return any(tensor is not None and tensor.ndim > 1 for tensor in tensors)

    def _formula_reads(self, name: str) -> bool:
        """Whether the forward of a module with a weight matrix, if it is not torch's own, reads ``name``.

        Its formula may have been determined by running it with the former value.
        """
        kinds = {facts.kind for facts in self._facts if self._has_matrix(facts.path)}
        own = [_forward(kind) for kind in kinds if not _forward(kind).__module__.startswith("torch.")]
        return name in reach_of_functions(own).reads

    def _shadows(self, path: str, name: str) -> bool:
        """Whether an attribute shadows one of the module's class."""
        return any(facts.path == path and hasattr(facts.kind, name) for facts in self._facts)


def _changes_of(facts: _Facts, is_its_own: Callable[[Any], bool]) -> Iterator[str]:
    """The changes of one module itself, except hooks that forwards install."""
    path, module = facts.path, facts.module
    if type(module) is not facts.kind:
        yield f"{path or 'it'} became a {type(module).__name__}"
    elif _forward(facts.kind) is not facts.class_forward:
        yield f"{facts.kind.__name__}.forward is another function"
    if vars(module).get("forward") is not facts.forward:
        yield f"{below(path, 'forward')} was patched on the instance"
    for name, was, found in _differences(facts.parts["_parameters"], module._parameters):
        yield _of_parameter(below(path, name), was, found)
    for name, was, found in _differences(facts.parts["_buffers"], module._buffers):
        if not _is_followed(module, name, was, found):
            yield _of_parameter(below(path, name), was, found)
    for attribute, word in HOOKS.items():
        was, found = facts.parts[attribute], vars(module)[attribute]
        if any(found.get(key) is not hook for key, hook in was.items()):
            yield f"a {word} was removed from {path or 'it'}"
        if any(key not in was and not is_its_own(hook) for key, hook in found.items()):
            yield f"a {word} was added to {path or 'it'}"


def _is_followed(module: nn.Module, name: str, was: Tensor | None, found: Tensor | None) -> bool:
    """Whether a replaced buffer is of the same kind, or a table that forwards recompute with another size or dtype.

    A buffer that is not in the state dict is computed from something else.
    """
    if was is not None and found is not None and _kind(was) == _kind(found):
        return True
    devices = {tensor.device for tensor in (was, found) if tensor is not None}
    return len(devices) == 1 and name in module._non_persistent_buffers_set


def _of_module(path: str, was: nn.Module | None, found: nn.Module | None) -> str:
    if found is None:
        return f"{path} is gone"
    if was is None:
        return f"{path} is new"
    sizes = [
        len(one) if isinstance(one, (nn.ModuleList, nn.Sequential, nn.ModuleDict)) else None for one in (was, found)
    ]
    if None not in sizes and sizes[0] != sizes[1]:
        return f"{path} has {sizes[1]} modules, it had {sizes[0]}"
    return f"{path} is another {type(found).__name__}"


def _of_parameter(name: str, was: Tensor | None, found: Tensor | None) -> str:
    if found is None or was is None:
        return f"{name} is {'gone' if found is None else 'new'}"
    told = "" if _kind(was) == _kind(found) else f" (it was {_words(was)}, is {_words(found)})"
    return f"{name} is another tensor{told}"


def _differences(was: Mapping[Any, Any], found: Mapping[Any, Any]) -> Iterator[tuple[Any, Any, Any]]:
    """``(key, was, found)`` of every key whose value is another object, or that is in only one of the mappings."""
    for key in dict.fromkeys((*was, *found)):
        if was.get(key) is not found.get(key):
            yield key, was.get(key), found.get(key)
    if list(was) != list(found) and was.keys() == found.keys():
        key = next(a for a, b in zip(was, found, strict=True) if a != b)
        yield key, was[key], found[key]


def _facts_of(path: str, module: nn.Module) -> _Facts:
    own = vars(module)
    parts = {name: dict(own[name]) for name in PARTS}
    return _Facts(path, module, type(module), parts, own.get("forward"), _forward(type(module)))


def _copied(container: Any, owner: Owner) -> Any:
    """A copy of a container; of a module's attributes, its tables (parameters, hooks, ...) are copied as well."""
    found = copied(container)
    if owner.module:
        found.update((part, dict(container[part]) or NONE) for part in PARTS if isinstance(container.get(part), dict))
    return found


def _may_equal(value: Any) -> bool:
    """Whether another object could be equal to this one: a tensor with one entry, or a type with its own equality."""
    if type(value) in (Tensor, nn.Parameter, nn.Buffer):
        return value.numel() == 1
    return isinstance(value, Tensor) or type(value).__eq__ is not object.__eq__


def _is_plain(module: nn.Module) -> bool:
    """Whether the module keeps its parts in ordinary dicts; TorchScript modules do not."""
    own = vars(module)
    return all(isinstance(own.get(name), dict) for name in PARTS)


def _alias(parameter: Tensor) -> Tensor:
    return parameter.detach() if type(parameter) is nn.Parameter else parameter


_forward: Callable[[type[nn.Module]], Any] = operator.attrgetter("forward")


def _is_one(tensor: Tensor, alias: Tensor) -> bool:
    """Whether both have the same storage, layout and kind."""
    same = tensor.data_ptr() == alias.data_ptr() and tensor.stride() == alias.stride()
    return same and _kind(tensor) == _kind(alias)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tuple(tensor.shape)


def _words(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _other(now: Any, before: Any) -> bool:
    """Whether a container has other entries, compared by identity because equal objects may change separately."""
    if isinstance(now, dict):
        return len(now) != len(before) or any(before.get(key, NOTHING) is not value for key, value in now.items())
    if isinstance(now, (set, bytearray)):
        return now != before
    return len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True))


def _are_rates(was: Any, found: Any) -> bool:
    """Whether both are real numbers, such as a rate or an epsilon, which do not change a forward's control flow."""
    return {type(was), type(found)} in ({float}, {float, int})


def _equal(was: Any, found: Any) -> bool:
    if was is NOTHING or found is NOTHING:
        return False
    try:
        return type(was) is type(found) and bool(was == found or (was != was and found != found))
    except Exception:  # objects that cannot be compared count as different
        return False


def _told(was: Any, found: Any) -> str:
    if was is NOTHING:
        return f"is {_short(found)}, and was its class's"
    return "is gone" if found is NOTHING else f"was {_short(was)}, is {_short(found)}"


def _short(value: Any) -> str:
    """A short description of a value for an error."""
    if isinstance(value, Tensor):
        return f"a tensor {_words(value)}"
    name = getattr(value, "__name__", None)
    if isinstance(name, str):
        return name
    plain = value is None or isinstance(value, (bool, int, float, complex, str, list, tuple, dict, set))
    text = repr(value) if plain else f"another {type(value).__name__}"
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"
