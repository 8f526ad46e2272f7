"""A skeleton has no memory: whatever a call leaves behind in its modules is put back when the call is over.

Models keep things between calls: running statistics, cached tables, counters. Of a backbone that no call may change
this would be a hidden input of the next call, and a tensor that was computed from one member's params would be used for
another member. So the attributes of all modules are noted once, and restored where they differ.
"""

from __future__ import annotations

import operator
import types
from typing import Any

import torch
from torch import Tensor, nn

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
        self.tensors = paired_tensors(backbone, skeleton)
        self.versions = list(map(VERSION, self.tensors))
        self.writes_buffers = False
        self.note()

    def note(self) -> None:
        """Note the attributes as they are: what is changed by the skeleton's owner is meant to stay."""
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._sets: list[tuple[set[Any], set[Any]]] = []
        self._attributes: dict[int, dict[Any, Any]] = {}
        seen: set[int] = set()
        for module in self.skeleton.modules():
            own = vars(module)
            self._attributes[id(own)] = before = dict(own)
            self._dicts += [(own, before), (module._buffers, dict(module._buffers))]
            for name, value in own.items():
                if name not in OWN:
                    self._follow(value, seen, DEPTH)

    def give(self, module: nn.Module, forward: Any) -> Any:
        """Another forward for a module, which stays; ``None``: its class's. Gives the one that it had of its own."""
        own = vars(module)
        had = own.get("forward")
        for attributes in (own, self._attributes.get(id(own), {})):
            if forward is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = forward
        return had

    def _follow(self, value: Any, seen: set[int], depth: int) -> None:
        if isinstance(value, (*PLAIN, *FUNCTIONS, Tensor, nn.Module)) or id(value) in seen or not depth:
            return
        seen.add(id(value))
        inside: Any = ()
        if isinstance(value, dict):
            self._dicts.append((value, dict(value)))
            inside = value.values()
        elif isinstance(value, list):
            self._lists.append((value, list(value)))
            inside = value
        elif isinstance(value, set):
            self._sets.append((value, set(value)))
        elif isinstance(value, tuple):
            inside = value
        elif isinstance(getattr(value, "__dict__", None), dict) and not _is_private_to_torch(value):
            own = vars(value)
            self._dicts.append((own, dict(own)))
            inside = own.values()
        for item in list(inside):
            self._follow(item, seen, depth - 1)

    def restore(self) -> None:
        """Put back what a call has changed, and copy the backbone's buffers again where either side was written."""
        for now, before in self._dicts:
            if _differs(now, before):
                now.clear()
                now.update(before)
        for now, before in self._lists:
            if len(now) != len(before) or any(map(operator.is_not, now, before)):
                now[:] = before
        for now, before in self._sets:
            if now != before:
                now.clear()
                now.update(before)
        self.follow()

    def follow(self) -> None:
        """Copy the backbone's buffers, and its tensors that are plain attributes, where either side was written."""
        # One pass in C over all of them, for models may have thousands.
        if list(map(VERSION, self.tensors)) == self.versions:
            return
        with torch.no_grad():
            for at in range(0, len(self.tensors), 2):
                source, own = self.tensors[at : at + 2]
                if [source._version, own._version] != self.versions[at : at + 2]:
                    self.writes_buffers |= own._version != self.versions[at + 1]
                    own.copy_(source)
        self.versions = list(map(VERSION, self.tensors))


def _differs(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    try:
        # Identical values are equal to a dict without a look at them: fast, and no tensor is compared by its numbers.
        return now != before
    except Exception:  # an object that cannot be compared is another object
        return True


def _is_private_to_torch(value: Any) -> bool:
    """Handles, process groups and the state of sharded modules belong to torch."""
    return type(value).__module__.startswith(("torch.", "torch._"))


def paired_tensors(backbone: nn.Module, skeleton: nn.Module) -> list[Tensor]:
    """Every buffer of the backbone and every tensor that is a plain attribute, each followed by the skeleton's copy.

    >>> paired_tensors(nn.BatchNorm1d(2), nn.BatchNorm1d(2))[0]
    tensor([0., 0.])
    """
    copies = dict(skeleton.named_modules())
    found: list[Tensor] = []
    for path, module in backbone.named_modules():
        copy = copies.get(path)
        if copy is None:
            continue
        for own, its in ((module._buffers, copy._buffers), (vars(module), vars(copy))):
            for name, tensor in own.items():
                other = its.get(name)
                # Tensors made in inference mode count no versions.
                plain = type(tensor) in (Tensor, nn.Buffer) and isinstance(other, Tensor) and other is not tensor
                if plain and not tensor.is_inference() and not other.is_inference() and other.is_leaf:
                    found += [tensor, other]
    return found
