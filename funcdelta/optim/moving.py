"""Decides which leaves an optimiser moves, and applies a rule to them.

The decision depends only on what the optimiser is given. A delta's constants carry a mark
(:mod:`funcdelta.trees.constants`) and get no moments. Transforms, compiled code and ``leaf.to(...)`` drop the mark; but
the gradient of a constant is zero, so every rule leaves it in place. Only weight decay would move it. So if nothing
says what trains, a leaf decays only after its first nonzero gradient (:func:`alive`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ParamsError, StackError
from ..kinds import count
from ..match import near
from ..trees.constants import is_constant, marked
from ..trees.leaves import check_tree, compute_dtype, dense, like, named
from ..trees.selecting import Selector, select
from .hyper import Hyper, members_of

__all__ = ["How", "Moving", "Tree", "alive", "begin", "decayed", "told", "zeros"]


def begin(
    params: Any, hypers: dict[str, Hyper], trainable: Selector | None, n: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """``(step 0, the leaves that move)``, where the step is () or (n,)."""
    check_tree(params)
    pairs = [(name, dense(name, leaf)) for name, leaf in named(params) if isinstance(leaf, Tensor)]
    leaves = dict(pairs)
    if len(leaves) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ParamsError(f"Two leaves are called {twice!r}, but names must differ because moments are kept by name.")
    device = pairs[0][1].device if pairs else torch.device("cpu")
    found = members_of(hypers, torch.zeros((), dtype=torch.int64, device=device))
    n = n if n is None else count(n, "n", "members the stack has", least=1)
    if n is not None and found is not None and n != found:
        raise StackError(f"opt.init was given n={n}, but the hyper-parameters have {found} values.")
    n = found if n is None else n
    moving = _moving(leaves, trainable)
    for name, leaf in moving.items():
        if n is not None and (leaf.ndim == 0 or leaf.shape[0] != n):
            raise StackError(
                f"Leaf {name!r} has shape {tuple(leaf.shape)}; a stack of {n} members has ({n}, ...). "
                f"Make one with fd.broadcast(params, {n}) or delta.init(seed, n={n})."
            )
    shape = () if n is None else (n,)
    return torch.zeros(shape, dtype=torch.int64, device=device), moving


def _moving(leaves: dict[str, Tensor], trainable: Selector | None) -> dict[str, Tensor]:
    """The floating-point leaves that are selected; constants only if a predicate selects them."""
    chosen = set(leaves) if trainable is None else select(leaves, trainable)
    if not callable(trainable):
        chosen = {name for name in chosen if not is_constant(leaves[name])}
    for name in chosen:
        if leaves[name].is_complex():
            raise ParamsError(f"Leaf {name!r} is {leaves[name].dtype}, but optimisers move real leaves only.")
    return {name: leaf for name, leaf in leaves.items() if name in chosen and leaf.is_floating_point()}


def told(trainable: Selector | None, params: Any, *moments: Mapping[str, Tensor]) -> bool:
    """Whether all leaves with moments are known to train: a predicate selected them, or others were marked.

    >>> w, scale = torch.ones(2), torch.ones(())
    >>> told(None, {"w": w, "scale": scale}, {"w": w}), told(None, {"w": w, "scale": scale}, {"w": w, "scale": scale})
    (True, False)
    """
    if trainable is not None:
        return callable(trainable)
    known = {name for kept in moments for name in kept}
    pairs = [(name, leaf) for name, leaf in named(params) if name not in known]
    return any(isinstance(leaf, Tensor) and leaf.is_floating_point() for _, leaf in pairs)


def alive(known: bool, step: Tensor, *evidence: Tensor) -> Tensor | None:
    """Whether a leaf trains, judging by a nonzero entry in its gradient or moments (``evidence``).

    The result is (), or one value per member, (n, 1, ...), if the step is (n,). It is ``None`` if the leaf is already
    ``known`` to train.

    >>> alive(False, torch.tensor([3, 3]), torch.tensor([[0.0, 0.0], [0.0, 0.1]]))
    tensor([[False],
            [ True]])
    """
    if known:
        return None
    found = [one.any(dim=tuple(range(step.ndim, one.ndim)), keepdim=True) for one in evidence if one.ndim > step.ndim]
    found += [one != 0 for one in evidence if one.ndim <= step.ndim]
    return functools.reduce(torch.logical_or, found)


def decayed(change: Tensor, leaf: Tensor, factor: Tensor, live: Tensor | None) -> Tensor:
    """``change + factor * leaf`` where the leaf is ``live``, elsewhere ``change`` alone.

    >>> decayed(torch.zeros(2), torch.ones(2), torch.tensor(-0.1), torch.tensor(False))
    tensor([0., 0.])
    """
    both = torch.addcmul(change, leaf, factor)
    # where(), not a factor of 0, because a constant may be a mask of infinities.
    return both if live is None else torch.where(live, both, change)


def zeros(leaf: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """A zero moment for a leaf."""
    return leaf.new_zeros(leaf.shape if shape is None else shape, dtype=compute_dtype(leaf.dtype))


class Moving(NamedTuple):
    """A leaf that moves, with its value and gradient in the dtype to compute in."""

    name: str
    leaf: Tensor
    value: Tensor
    gradient: Tensor


class How(NamedTuple):
    """How to run a rule.

    Attributes:
        onto: return the new leaves instead of the updates.
        donated: state and params were given away, so their tensors may be overwritten.
        known: overrides :func:`told` if the caller knows whether all leaves with moments train.
    """

    onto: bool = False
    donated: bool = False
    known: bool | None = None

    def result(self, one: Moving, update: Tensor) -> Tensor:
        """The update in the leaf's dtype, or the updated leaf."""
        update = update if update.dtype is one.leaf.dtype else update.to(one.leaf.dtype)
        return torch.add(one.leaf, update) if self.onto else update


class Tree:
    """Params with their gradients: finds the leaves that move, and builds a tree of the results.

    >>> tree = Tree({"w": torch.ones(2)}, {"w": torch.zeros(2)}, {"w": torch.zeros(2), "b": torch.ones(1)}, None)
    >>> [one.name for one in tree.moving], tree.filled({"w": torch.ones(2)}, How())
    (['w'], {'w': tensor([1., 1.]), 'b': tensor([0.])})
    """

    def __init__(self, grads: Any, moments: Mapping[str, Tensor], params: Any, trainable: Selector | None) -> None:
        check_tree(params)
        self._like, self._pairs = params, named(params)
        names = [name for name, _ in self._pairs]
        gradients, known = dict(named(grads)), set(names)
        for given, what in ((gradients, "The gradients have"), (moments, "The state has moments for")):
            unknown = next((name for name in given if name not in known), None)
            if unknown is not None:
                raise ParamsError(f"{what} a leaf {unknown!r} that params do not have.{near(unknown, names)}")
        self.moving: list[Moving] = []
        for name, leaf in self._pairs:
            if not isinstance(leaf, Tensor):
                continue
            dense(name, leaf)
            gradient = gradients.get(name)
            if gradient is None:
                continue
            if name not in moments:
                _meant_to_stay(name, leaf, gradient, trainable)
                continue
            _fits(name, leaf, gradient)
            _same_members(name, leaf, moments[name])
            wide = compute_dtype(leaf.dtype)
            self.moving.append(Moving(name, leaf, _as(leaf, wide), _as(gradient, wide)))

    def moved(self, move: Callable[[str, Tensor, Tensor], Tensor], how: How) -> Any:
        """:meth:`filled` with the update ``move(name, value, gradient)`` of each leaf that moves."""
        results = {one.name: how.result(one, move(one.name, one.value, one.gradient)) for one in self.moving}
        return self.filled(results, how)

    def filled(self, results: Mapping[str, Tensor], how: How) -> Any:
        """A tree like params with ``results``; other leaves do not move."""
        found = [self._result(name, leaf, results, how) for name, leaf in self._pairs]
        return like(self._like, found)

    @staticmethod
    def _result(name: str, leaf: Any, results: Mapping[str, Tensor], how: How) -> Any:
        if name in results:
            return marked(results[name], leaf) if how.onto else results[name]
        return leaf if how.onto or not isinstance(leaf, Tensor) else leaf.new_zeros(()).expand(leaf.shape)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _fits(name: str, leaf: Tensor, gradient: Any) -> None:
    """Raise unless the gradient is a dense real tensor with the leaf's shape and device."""
    if not isinstance(gradient, Tensor) or gradient.shape != leaf.shape:
        found = f"shape {tuple(gradient.shape)}" if isinstance(gradient, Tensor) else repr(gradient)
        raise ParamsError(f"The gradient of leaf {name!r} has {found}; the leaf has shape {tuple(leaf.shape)}.")
    if gradient.dtype is leaf.dtype and gradient.device == leaf.device and gradient.layout is torch.strided:
        return
    if gradient.is_complex():
        raise ParamsError(f"The gradient of leaf {name!r} is {gradient.dtype}; the leaf is {leaf.dtype}.")
    if gradient.device != leaf.device:
        raise ParamsError(
            f"The gradient of leaf {name!r} is on {gradient.device}, but the leaf on {leaf.device}. Move one: "
            f"gradient.to({str(leaf.device)!r})."
        )
    dense(f"gradient of {name}", gradient)


def _same_members(name: str, leaf: Tensor, moment: Tensor) -> None:
    """Raise unless a moment has its leaf's shape, or, if it is an empty placeholder (..., 0), its members."""
    if moment.shape[-1:] == (0,):
        fits = leaf.shape[: moment.ndim - 1] == moment.shape[:-1]
    else:
        fits = leaf.shape == moment.shape
    if not fits:
        raise StackError(
            f"Leaf {name!r} has shape {tuple(leaf.shape)}, but its moment in the state has {tuple(moment.shape)}: the "
            "state was made for other params. Apply fd.take, fd.stack and fd.cat to the state as to the params."
        )


def _meant_to_stay(name: str, leaf: Tensor, gradient: Any, trainable: Selector | None) -> None:
    """Raise if a leaf has a gradient and should move, but has no moments because the state was made without it."""
    if trainable is not None and not callable(trainable):
        return
    # A constant that has lost its mark has a gradient of zeros.
    if name in _moving({name: leaf}, trainable) and (callable(trainable) or _moves(gradient)):
        raise ParamsError(
            f"Leaf {name!r} has a gradient but no moments in the state, which was made for other params. "
            "Write state = opt.init(params)."
        )


def _moves(gradient: Any) -> bool:
    """Whether a gradient is known to be nonzero."""
    try:
        return not torch.compiler.is_compiling() and bool(torch.as_tensor(gradient).any())
    except RuntimeError:  # a transform or the meta device hides it
        return False
