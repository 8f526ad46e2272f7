"""iMAML: the meta-gradient from the solution of the inner loop, not from its steps (Rajeswaran et al. 2019).

The inner problem is φ* = argmin L(φ, support) + (λ/2) ‖φ - θ‖². The implicit function theorem gives ∂φ*/∂θ, so memory
does not grow with the inner steps. Tasks are mapped, as in :mod:`funcdelta.recipes.meta_learning`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import funcdelta as fd

Params = dict[str, Tensor]


def adapt(
    loss: Callable[..., Tensor], params: Params, support: Sequence[Tensor], *, strength: float, steps: int, lr: float
) -> Params:
    """φ ← φ - lr (∇L(φ, support) + λ (φ - θ)), ``steps`` times from θ = ``params``; λ is ``strength``.

    >>> def loss(params, x):
    ...     return ((params["w"] - x) ** 2).sum() / 2
    >>> adapt(loss, {"w": torch.zeros(1)}, [torch.ones(1)], strength=1.0, steps=20, lr=0.5)
    {'w': tensor([0.5000])}
    """
    start = params
    for _ in range(steps):
        pull = fd.tree.scale(fd.tree.sub(params, start), strength)
        step = fd.tree.add(torch.func.grad(loss)(params, *support), pull)
        params = fd.tree.sub(params, fd.tree.scale(step, lr))
    return params


def meta_gradient(
    loss: Callable[..., Tensor],
    params: Params,
    support: Sequence[Tensor],
    query: Sequence[Tensor],
    *,
    strength: float,
    steps: int,
    lr: float,
    solve: int = 5,
) -> Params:
    """(1/t) Σᵢ (I + Hᵢ/λ)⁻¹ ∇L(φᵢ*, queryᵢ), where Hᵢ is the Hessian of L(·, supportᵢ) at φᵢ*.

    Solved by ``solve`` steps of conjugate gradients. ``params`` are the leaves that train; close ``loss`` over the
    others, ``fd.partition(params, delta.trainable)``. I + H/λ must be positive definite, so λ must exceed the magnitude
    of the most negative curvature.

    >>> def loss(params, x):
    ...     return ((params["w"] - x) ** 2).sum() / 2
    >>> goals = (torch.tensor([[1.0], [3.0]]),)
    >>> meta_gradient(loss, {"w": torch.zeros(1)}, goals, goals, strength=1.0, steps=20, lr=0.5)
    {'w': tensor([-0.5000])}
    """

    def one(support: Sequence[Tensor], query: Sequence[Tensor]) -> Params:
        adapted = adapt(loss, params, support, strength=strength, steps=steps, lr=lr)

        def product(v: Params) -> Params:
            return fd.tree.add(v, fd.tree.scale(fd.grad.hvp(loss, adapted, v, *support), 1 / strength))

        return fd.grad.conjugate_gradient(product, torch.func.grad(loss)(adapted, *query), steps=solve)

    return fd.tree.mean(torch.vmap(one, randomness="different")(tuple(support), tuple(query)))
