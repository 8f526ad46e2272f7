"""Meta-learning: finds params from which a few steps of gradient descent learn a new task.

A task has a support set to adapt to and a query set for evaluation. ``loss(params, *data)`` is one task's loss, ();
``support`` and ``query`` are tuples of tensors whose first axis is the task axis t. Tasks are mapped, so they all adapt
in one pass over the backbone. Constants of a delta stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import funcdelta as fd

Params = dict[str, Tensor]
Loss = Callable[..., Tensor]
Selector = Callable[[str, Tensor], bool] | str | Sequence[str]


def adapt(
    loss: Loss,
    params: Params,
    support: Sequence[Tensor],
    *,
    steps: int,
    lr: float | Tensor,
    first_order: bool = False,
    trainable: Selector | None = None,
) -> Params:
    """θₖ₊₁ = θₖ - lr ∇L(θₖ, support), ``steps`` times: one task's params, differentiable in ``params`` and ``lr``.

    ``first_order=True`` treats gradients as constants (FOMAML). ``trainable`` selects the leaves that adapt; with the
    head alone this is ANIL (Raghu et al. 2020, "Rapid Learning or Feature Reuse?").

    >>> def loss(params, x):
    ...     return ((params["w"] - x) ** 2).sum()
    >>> adapt(loss, {"w": torch.zeros(2)}, [torch.ones(2)], steps=1, lr=0.25)
    {'w': tensor([0.5000, 0.5000])}
    """
    optimizer = fd.optim.sgd(lr, trainable=trainable)
    state = optimizer.init(params)
    for _ in range(steps):
        grads = torch.func.grad(loss)(params, *support)
        grads = fd.tree.map(torch.Tensor.detach, grads) if first_order else grads
        updates, state = optimizer.update(grads, state, params)
        params = fd.tree.add(params, updates)
    return params


def maml_loss(
    loss: Loss,
    params: Params,
    support: Sequence[Tensor],
    query: Sequence[Tensor],
    *,
    steps: int,
    lr: float | Tensor,
    first_order: bool = False,
    trainable: Selector | None = None,
    checkpoint: bool = False,
) -> Tensor:
    """(1/t) Σᵢ L(adapt(θ, supportᵢ), queryᵢ): MAML's objective in θ; its ``torch.func.grad`` is the meta-gradient.

    Finn et al. 2017, "Model-Agnostic Meta-Learning"; ``first_order=True`` is their FOMAML. For many inner steps,
    ``checkpoint=True`` stores each step's params instead of its activations. Each step is then computed twice, and the
    meta-gradient must be taken by ``torch.autograd.grad`` (see ``fd.grad.unroll``).

    >>> def loss(params, x):
    ...     return ((params["w"] - x) ** 2).sum()
    >>> goals = (torch.tensor([[1.0], [3.0]]),)
    >>> torch.func.grad(lambda p: maml_loss(loss, p, goals, goals, steps=1, lr=0.25))({"w": torch.zeros(1)})
    {'w': tensor([-1.])}
    """
    adapted = _adapt_each(loss, params, support, steps, lr, first_order, trainable, checkpoint)
    return torch.vmap(loss, randomness="different")(adapted, *query).mean()


def reptile(
    loss: Loss, params: Params, support: Sequence[Tensor], *, steps: int, lr: float | Tensor, rate: float = 1.0
) -> Params:
    """θ + rate · (mean over tasks of adapt(θ, supportᵢ) - θ): one step of Reptile, which needs no query set.

    Nichol et al. 2018, "On First-Order Meta-Learning Algorithms".

    >>> def loss(params, x):
    ...     return ((params["w"] - x) ** 2).sum()
    >>> reptile(loss, {"w": torch.zeros(1)}, (torch.tensor([[1.0], [3.0]]),), steps=1, lr=0.25)
    {'w': tensor([1.])}
    """
    each = _adapt_each(loss, params, support, steps, lr)
    # The mean of differences, not the difference of means, so that leaves that did not move are not rounded.
    moved = fd.tree.mean(fd.tree.sub(each, fd.broadcast(params, fd.members(each))))
    return fd.tree.add(params, fd.tree.scale(moved, rate))


def _adapt_each(
    loss: Loss,
    params: Params,
    support: Sequence[Tensor],
    steps: int,
    lr: float | Tensor,
    first_order: bool = False,
    trainable: Selector | None = None,
    checkpoint: bool = False,
) -> Params:
    """`adapt` for every task, as a stack of t members; a step of all tasks together is the unit of recomputation."""

    def step(each: Params, _: int, support: Sequence[Tensor], lr: float | Tensor) -> Params:
        def one(params: Params, support: Sequence[Tensor]) -> Params:
            return adapt(loss, params, support, steps=1, lr=lr, first_order=first_order, trainable=trainable)

        return torch.vmap(one, randomness="different")(each, support)

    tasks = fd.broadcast(params, len(support[0]))
    return fd.grad.unroll(step, tasks, steps, tuple(support), lr, checkpoint=checkpoint)
