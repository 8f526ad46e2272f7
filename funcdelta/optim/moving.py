"""Which leaves an optimiser moves, and one pass of a rule over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ParamsError, StackError
from ..match import near
from ..pytrees.constants import is_constant, was_declared_constant
from ..pytrees.leaves import compute_dtype, named
from ..pytrees.selecting import Selector, select
from .hyper import Hyper, members_of

__all__ = ["begin", "updates_of", "zeros"]


def begin(
    params: Any, hypers: dict[str, Hyper], trainable: Selector | None, n: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Step 0, () or (n,), and the leaves that move."""
    pairs = [(name, leaf) for name, leaf in named(params) if isinstance(leaf, Tensor)]
    leaves = dict(pairs)
    if len(leaves) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ParamsError(f"Two leaves are called {twice!r}; moments are kept by name, so names must differ.")
    device = pairs[0][1].device if pairs else torch.device("cpu")
    found = members_of(hypers, torch.zeros((), dtype=torch.int64, device=device))
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
    """The leaves that an optimiser moves: of floating point, and chosen by ``trainable`` or no constant."""
    if trainable is None:
        chosen = {name for name in leaves if not is_constant(name)}
    elif callable(trainable):
        chosen = select(leaves, trainable)
    else:
        chosen = {name for name in select(leaves, trainable) if not is_constant(name)}
    for name in chosen:
        if leaves[name].is_complex():
            raise ParamsError(f"Leaf {name!r} is {leaves[name].dtype}; the optimisers move real leaves only.")
    return {name: leaf for name, leaf in leaves.items() if name in chosen and leaf.is_floating_point()}


def zeros(leaf: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """A zero moment of a leaf."""
    return leaf.new_zeros(leaf.shape if shape is None else shape, dtype=compute_dtype(leaf.dtype))


def updates_of(
    step: Callable[[str, Tensor, Tensor], Tensor],
    grads: Any,
    moments: dict[str, Tensor],
    params: Any,
    trainable: Selector | None,
) -> Any:
    """``step(name, leaf, gradient)`` for every leaf that moves and has a gradient, zeros for the others."""
    leaves, spec = pytree.tree_flatten(params)
    names = [name for name, _ in named(params)]
    gradients = dict(named(grads))
    for given, what in ((gradients, "The gradients have"), (moments, "The state has moments for")):
        unknown = next((name for name in given if name not in set(names)), None)
        if unknown is not None:
            raise ParamsError(f"{what} a leaf {unknown!r} that params do not have.{near(unknown, names)}")
    results = []
    for name, leaf in zip(names, leaves, strict=True):
        gradient = gradients.get(name)
        if not isinstance(leaf, Tensor):
            results.append(leaf)
            continue
        if gradient is None or name not in moments:
            if gradient is not None:
                _meant_to_stay(name, leaf, trainable)
            results.append(leaf.new_zeros(()).expand(leaf.shape))
            continue
        if not isinstance(gradient, Tensor) or gradient.shape != leaf.shape:
            found = f"shape {tuple(gradient.shape)}" if isinstance(gradient, Tensor) else repr(gradient)
            raise ParamsError(f"The gradient of leaf {name!r} has {found}; the leaf has shape {tuple(leaf.shape)}.")
        _same_members(name, leaf, moments[name])
        wide = compute_dtype(leaf.dtype)
        results.append(step(name, leaf.to(wide), gradient.to(wide)).to(leaf.dtype))
    return pytree.tree_unflatten(results, spec)


def _same_members(name: str, leaf: Tensor, moment: Tensor) -> None:
    """Raise where a moment has not its leaf's shape, or, as an empty mark (..., 0), not its members."""
    if moment.shape[-1:] == (0,):
        fits = leaf.shape[: moment.ndim - 1] == moment.shape[:-1]
    else:
        fits = leaf.shape == moment.shape
    if not fits:
        raise StackError(
            f"Leaf {name!r} has shape {tuple(leaf.shape)}, its moment in the state {tuple(moment.shape)}: "
            "the state was made for other params. Take, stack and cat the state together with the params."
        )


def _meant_to_stay(name: str, leaf: Tensor, trainable: Selector | None) -> None:
    """Raise where a leaf has a gradient and should move, but was not there when the state was made."""
    # Ever declared: a delta built since may train the name, which is no reason to stop a running training.
    if callable(trainable):
        forgotten = name in _moving({name: leaf}, trainable)
    else:
        forgotten = trainable is None and leaf.is_floating_point() and not was_declared_constant(name)
    if forgotten:
        raise ParamsError(
            f"Leaf {name!r} has a gradient but no moments in the state, which was made for other params. "
            "Write state = opt.init(params)."
        )
