"""Watches one call of a model: which modules run, on which tensors, and where members begin to differ."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from ..randomness import Generators, PrivateRandom, ThreadMode, drawn
from ..trees.opaque import PLAIN
from .skeleton import Skeleton
from .trunk import places
from .undisturbed import WithoutDropout

STATELESS = (*PLAIN, torch.dtype, torch.device, torch.Size)
"""Types that a module may take or return besides tensors; other objects might carry state from one to another."""


@dataclass
class Visit:
    """One call of a module.

    Attributes:
        parent: the index of the call inside which it runs.
        alike: whether all members compute the same in it.
        sharable: ``alike``, and it writes none of its inputs and takes and returns only tensors and plain values.
        inputs, outputs: the shapes of its tensors, by place.
        flops: its floating-point operations.
    """

    path: str
    parent: int | None
    alike: bool
    sharable: bool
    inputs: dict[str, tuple[int, ...]]
    other: tuple[Any, ...]
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    flops: int = 0


class Watch:
    """Notes every module call in one run of a skeleton, in which members differ from the modules ``acting`` on."""

    def __init__(self, skeleton: Skeleton, acting: set[int], dropout: CountedDropout) -> None:
        self.skeleton, self.acting, self.dropout = skeleton, acting, dropout
        self.visits: list[Visit] = []
        self.flops = Flops()
        self._open: list[tuple[int, int, int, list[Tensor], list[int]]] = []
        self._events = 0
        self._drawn = (0, 0)
        self.random = CountedRandom()
        self._alike: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def run(self, call: Callable[[], Any]) -> Any:
        """The output of ``call()``, during which module calls are noted."""
        handles = []
        for path, module in self.skeleton.module.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving, with_kwargs=True))
        try:
            self.random = CountedRandom()
            with self.flops, self.random:
                self._drawn, self._events = (self.random.count, self.dropout.count), 0
                return call()
        finally:
            for handle in handles:
                handle.remove()

    def _note_randomness(self) -> None:
        """Count new random numbers as an event from which on members differ: each member's rows draw their own."""
        drawn = self.random.count, self.dropout.count
        self._events += drawn != self._drawn
        self._drawn = drawn

    def _entering(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            leaves, _ = places((args, kwargs))
            tensors = [leaf for _, leaf in leaves if isinstance(leaf, Tensor)]
            self._note_randomness()
            if id(module) in self.acting:
                self._events += 1
            alike = not self._events or (bool(tensors) and all(map(self._is_alike, tensors)))
            if alike:
                self._remember(tensors)
            others = tuple((place, leaf) for place, leaf in leaves if not isinstance(leaf, Tensor))
            plain = all(isinstance(leaf, STATELESS) for _, leaf in others)
            shapes = {place: tuple(leaf.shape) for place, leaf in leaves if isinstance(leaf, Tensor)}
            visit = Visit(
                path, self._open[-1][0] if self._open else None, alike, plain, shapes, others if plain else ()
            )
            versions = [_version(tensor) for tensor in tensors]
            self._open.append((len(self.visits), self._events, self.flops.total, tensors, versions))
            self.visits.append(visit)

        return enter

    def _leaving(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        index, events, flops, tensors, versions = self._open.pop()
        visit = self.visits[index]
        self._note_randomness()
        visit.alike &= self._events == events and id(module) not in self.acting
        visit.flops = self.flops.total - flops
        leaves, _ = places(output)
        visit.outputs = {place: tuple(leaf.shape) for place, leaf in leaves if isinstance(leaf, Tensor)}
        # A shared module that writes its inputs would write the first member's rows only.
        visit.sharable &= visit.alike and [_version(tensor) for tensor in tensors] == versions
        # A module that returns its input (dropout that is off) saves nothing.
        handed_on = any(leaf is tensor for _, leaf in leaves for tensor in tensors)
        visit.sharable &= not handed_on and all(isinstance(leaf, STATELESS) for _, leaf in leaves)
        if visit.alike:
            self._remember([leaf for _, leaf in leaves if isinstance(leaf, Tensor)])

    def _remember(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            self._alike[id(tensor)] = weakref.ref(tensor), _version(tensor)

    def _is_alike(self, tensor: Tensor) -> bool:
        """Whether no delta has touched a tensor: it is one that was remembered, and was not written since."""
        known = self._alike.get(id(tensor))
        return known is not None and known[0]() is tensor and known[1] == _version(tensor)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class Flops(ThreadMode):
    """Counts the floating-point operations of the matrix products inside the block.

    >>> with Flops() as flops:
    ...     product = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> flops.total
    48
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


class CountedDropout(WithoutDropout):
    """Turns dropout off, but returns a clone where it would have acted: with it on, members would differ from there."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self.count
        out = super().__torch_function__(func, types, args, kwargs)
        return out.clone() if func in self.OFF and self.count != before else out


class CountedRandom(PrivateRandom):
    """Random numbers from a private generator, with a count of the calls that draw.

    >>> with CountedRandom() as random:
    ...     numbers = torch.rand(3) + torch.rand(3)
    >>> random.count
    2
    """

    def __init__(self) -> None:
        super().__init__(Generators(0))
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = drawn(func, args, kwargs, self.generators)
        if found is NotImplemented:
            return func(*args, **(kwargs or {}))
        self.count += 1
        return found
