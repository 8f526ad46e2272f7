"""Derivatives with respect to params beyond one gradient: per row, along a direction, and through a linear solve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import tree
from ..errors import ParamsError

__all__ = ["conjugate_gradient", "hvp", "per_sample_grads"]

Tree = TypeVar("Tree")


def per_sample_grads(loss: Callable[..., Tensor], chunk_size: int | None = None) -> Callable[..., Any]:
    """A function of ``(params, *data)`` that gives ∇ Lᵢ for every row i of ``data``: leaves (b, ...).

    ``loss(params, *rows)`` is one number, (); it gets one row at a time, as a batch of one, (1, ...), for models want a
    batch axis. Their mean over rows is the gradient of the mean loss. ``chunk_size`` rows run at a time. Params are one
    member's; for a stack map over it: ``torch.vmap(per_sample_grads(loss), in_dims=(0, None))(stack, data)``.

    Raises ``ParamsError`` for data of unlike lengths, and for a loss that is no single number.

    >>> def loss(params, x):
    ...     return (x @ params["w"]).square().mean()
    >>> per_sample_grads(loss)({"w": torch.ones(2)}, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    {'w': tensor([[2., 0.],
            [4., 4.]])}
    """

    def alone(params: Any, data: Any) -> Tensor:
        value = loss(params, *pytree.tree_map_only(Tensor, lambda row: row.unsqueeze(0), data))
        if not isinstance(value, Tensor) or value.ndim:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ParamsError(f"per_sample_grads needs one loss, (), for a batch of one row; found {found}.")
        return value

    def grads(params: Any, *data: Any) -> Any:
        lengths = [leaf.shape[:1] for leaf in pytree.tree_leaves(data) if isinstance(leaf, Tensor)]
        if not lengths or len(set(lengths)) > 1 or not lengths[0]:
            raise ParamsError(
                f"per_sample_grads maps over the rows of its data, the first axis of every tensor: expected one "
                f"length, found {[tuple(length) for length in lengths]}."
            )
        mapped = torch.vmap(torch.func.grad(alone), in_dims=(None, 0), chunk_size=chunk_size, randomness="different")
        return mapped(params, data)

    return grads


def hvp(loss: Callable[..., Tensor], params: Tree, vector: Tree, *data: Any) -> Tree:
    """H v, with H the Hessian of ``loss(params, *data)`` in params: the derivative of the gradient along ``vector``.

    Reverse over reverse, ∇⟨∇L, v⟩, so that it needs no forward derivative of any operator; a pass costs about two
    gradients. Fused attention is replaced by its mathematical form where the loss calls a delta.

    >>> hvp(lambda params: (params["w"] ** 3).sum(), {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 0.0])})
    {'w': tensor([6., 0.])}
    """
    return torch.func.grad(lambda p: tree.vdot(torch.func.grad(loss)(p, *data), vector))(params)


def conjugate_gradient(matvec: Callable[[Tree], Tree], b: Tree, steps: int, damping: float | Tensor = 0.0) -> Tree:
    """x with (A + damping · I) x ≈ b, after ``steps`` steps of conjugate gradients from 0; A positive semi-definite.

    Exact after as many steps as A + damping · I has distinct eigenvalues (Hestenes and Stiefel 1952). The number of
    steps is fixed, so that it maps under ``torch.vmap``; a residual that has reached 0 stays there. Implicit gradients
    (iMAML) and influence functions take ``matvec`` from :func:`hvp`.

    >>> conjugate_gradient(lambda x: {"w": x["w"] * torch.tensor([1.0, 4.0])}, {"w": torch.tensor([1.0, 2.0])}, steps=2)
    {'w': tensor([1.0000, 0.5000])}
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ParamsError(f"conjugate_gradient(steps={steps!r}): write a whole number, 1 or more.")
    x, residual, direction = tree.scale(b, 0.0), b, b
    rest = tree.vdot(residual, residual)
    for _ in range(steps):
        image = tree.add(matvec(direction), tree.scale(direction, damping))
        length = _ratio(rest, tree.vdot(direction, image))
        x = tree.add(x, tree.scale(direction, length))
        residual = tree.sub(residual, tree.scale(image, length))
        before, rest = rest, tree.vdot(residual, residual)
        direction = tree.add(residual, tree.scale(direction, _ratio(rest, before)))
    return x


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0: there is nothing left to solve."""
    zero = b == 0
    return torch.where(zero, torch.zeros_like(a), a / torch.where(zero, torch.ones_like(b), b))
