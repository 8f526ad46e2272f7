"""Which leaves a function differentiates in: a delta's constants stand in params, and no gradient reaches them.

Nobody has to be told which leaves train: ``apply`` detaches its constants, so autograd's graph knows. The *graph* is
asked, not the gradient: at B = 0 the gradient of LoRA's A is zero, too, and A trains.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import ParamsError
from ..transforms import eager, inside_transform
from ..trees.leaves import check_tree, dense

__all__ = ["reached"]

READING = frozenset(
    getattr(Tensor, name) for name in ("__array__", "__complex__", "__float__", "__int__", "item", "numpy", "tolist")
)
"""How numbers are read from a tensor, which torch does without a gradient alone, or warns."""


@eager
def reached(f: Callable[..., Any], params: Mapping[str, Tensor], *data: Any) -> frozenset[str]:
    """The names of the leaves that ``f(params, *data)`` differentiates in.

    A leaf that ``f`` detaches or does not use is none of them: a delta's constants, and leaves of sites that the call
    passes by. Derivatives count also where what ``f`` gives has lost them again, as the share of right answers has, and
    where ``f`` turns gradients off. An only leaf is taken as reached.

    ``f`` runs once, and holds the memory of a forward pass. Works under ``torch.func`` transforms and ``no_grad``.

    Raises ``ParamsError`` where no gradient is seen at all (``f`` computes in numpy, or in other threads).

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
    >>> sorted(fd.grad.reached(delta.apply, delta.init(0), torch.ones(3, 4)))
    ['0.lora.lora_A', '0.lora.lora_B']
    """
    if not isinstance(params, Mapping):
        raise ParamsError(f"reached takes a flat dict {{name: tensor}}; found {type(params).__name__}.")
    check_tree(params)
    leaves = {name: dense(name, leaf) for name, leaf in params.items() if isinstance(leaf, Tensor)}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.is_floating_point() or leaf.is_complex()}
    if len(leaves) < 2:
        return frozenset(leaves)
    found: set[str] = set()

    def run(leaves: dict[str, Tensor]) -> Tensor:
        # An alias has a node in the graph by which it is known, also under transforms.
        aliases = {name: leaf.view_as(leaf) for name, leaf in leaves.items()}
        with _Watch(aliases) as watch:
            output = f({**params, **aliases}, *data)
        found.update(watch.mixed, *map(watch.behind, pytree.tree_leaves(output)))
        return torch.zeros(())

    with _uncompiled():
        if inside_transform():
            torch.func.vjp(run, leaves)
        else:
            with torch.enable_grad():
                run({name: leaf.detach().requires_grad_() for name, leaf in leaves.items()})
    if not found:
        raise ParamsError(
            "No gradient reaches any leaf, so nothing shows which of them train. Say it: "
            "trainable=delta.trainable, or some, rest = fd.partition(params, delta.trainable)."
        )
    return frozenset(found)


_lock = threading.Lock()
_begun: list[Any] = []


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """A block in which compiled functions run as they were written: compiled code has one node for all of its inputs.

    torch keeps this for the whole process, so that of several threads the first begins it and the last ends it.
    """
    with _lock:
        # Only the first one's knows what was there before all.
        _begun.append(None if _begun else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _lock:
            if len(_begun) == 1:
                _begun[0].__exit__(None, None, None)
                _begun.clear()
            else:
                _begun.pop()


class _Watch(TorchFunctionMode):
    """Notes the leaves behind every tensor that depends on several (``mixed``): one alone may yet be detached.

    A constant is often cut out of a stack, or copied to another device, before ``apply`` detaches it; what depends on
    two leaves is an activation.
    """

    def __init__(self, aliases: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.mixed: set[str] = set()
        self._known: dict[Any, frozenset[str]] = {t.grad_fn: frozenset([name]) for name, t in aliases.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING:
            args = _detached(args)
        try:
            with torch.enable_grad():
                result = func(*args, **(kwargs or {}))
        except RuntimeError:
            # Copies and out= are of tensors without a gradient alone, as these are where f turns gradients off.
            result = func(*_detached(args), **(kwargs or {}))
        # What comes out of an inner map is first seen where it goes in elsewhere.
        for leaf in pytree.tree_leaves((args, kwargs, result)):
            names = self.behind(leaf)
            if len(names) > 1:
                self.mixed |= names
        return result

    def behind(self, tensor: Any) -> frozenset[str]:
        """The names of the leaves that a tensor depends on; none for anything else."""
        if not isinstance(tensor, Tensor) or tensor.grad_fn is None:
            return frozenset()
        waiting: list[Any] = [tensor.grad_fn]
        while waiting:
            node = waiting[-1]
            before = [node for node, _ in node.next_functions if node is not None] if node not in self._known else []
            unknown = [node for node in before if node not in self._known]
            waiting += unknown
            if not unknown:
                waiting.pop()
                self._known.setdefault(node, frozenset().union(*(self._known[one] for one in before)))
        return self._known[tensor.grad_fn]


def _detached(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
