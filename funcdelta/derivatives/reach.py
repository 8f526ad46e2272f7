"""Finds the leaves that a function's gradient reaches; a delta's constants are in params too, but get no gradient.

Nobody has to list what trains: ``apply`` detaches constants, so autograd's graph shows it. The graph is read rather
than the gradient because LoRA's A has a zero gradient while B = 0, and trains all the same.
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
"""Functions that read a tensor's numbers; torch refuses or warns if the tensor has a gradient."""


@eager
def reached(f: Callable[..., Any], params: Mapping[str, Tensor], *data: Any) -> frozenset[str]:
    """The names of the leaves that ``f(params, *data)`` can be differentiated in.

    It leaves out what ``f`` detaches or does not use: a delta's constants, and leaves of sites that the call does not
    reach. A leaf counts even if the output has lost its derivative (an accuracy has none) or ``f`` turns gradients
    off. If there is only one leaf, it counts as reached.

    ``f`` runs once, with the memory of a forward pass. Works under ``torch.func`` transforms and ``no_grad``.

    Raises ``ParamsError`` if no gradient is seen at all (``f`` computes in numpy, or in other threads).

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
        # Each alias has a node in the graph that identifies it, also under transforms.
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
            "No gradient reaches any leaf, so it is unknown which of them train. Say so: trainable=delta.trainable, or "
            "some, rest = fd.partition(params, delta.trainable)."
        )
    return frozenset(found)


_lock = threading.Lock()
_begun: list[Any] = []


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """A block in which compiled functions run eagerly, because compiled code has one graph node for all its inputs.

    torch keeps the stance for the whole process: of several threads, the first sets it and the last resets it.
    """
    with _lock:
        # Only the first thread's stance remembers the process's original one.
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
    """Collects in ``mixed`` the leaves behind every tensor that depends on several of them.

    A tensor that depends on one leaf may be a constant, sliced from a stack or copied to another device before
    ``apply`` detaches it. A tensor that depends on two is an activation.
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
            # Writing into a tensor (copy_, out=) may require one without a gradient, as f has if it turns them off.
            result = func(*_detached(args), **(kwargs or {}))
        # The arguments, too: results of an inner vmap are first seen when they are used.
        for leaf in pytree.tree_leaves((args, kwargs, result)):
            names = self.behind(leaf)
            if len(names) > 1:
                self.mixed |= names
        return result

    def behind(self, tensor: Any) -> frozenset[str]:
        """The names of the leaves that a tensor depends on; empty for other objects."""
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
