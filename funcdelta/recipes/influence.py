"""Influence of training rows: what a loss would be, had a row been left out of the training.

At a minimum of (1/n) Σᵢ Lᵢ + (damping/2) ‖θ‖², leaving row i out moves θ by (1/n) (H + damping)⁻¹ ∇Lᵢ to first order
(Koh and Liang 2017, "Understanding Black-box Predictions via Influence Functions"). ``losses(params, *data)`` gives
one number a row, (b,); ``params`` are the leaves that train, others are closed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import funcdelta as fd

Params = dict[str, Tensor]


def without_each(
    losses: Callable[..., Tensor],
    params: Params,
    train: Sequence[Tensor],
    test: Sequence[Tensor],
    *,
    damping: float,
    steps: int = 20,
) -> Tensor:
    """(1/n) ⟨∇Lᵢ, (H + damping)⁻¹ ∇L_test⟩, (n,): the change of the mean test loss without training row i.

    One solve by ``steps`` of conjugate gradients, and one forward derivative for all rows: no gradient of a row is
    ever held. H + damping has to be positive definite, as it is at a minimum.

    >>> def losses(params, x):
    ...     return (params["w"] - x).square().sum(1) / 2
    >>> x, goal = torch.tensor([[-1.0], [0.0], [4.0]]), torch.tensor([[0.0]])
    >>> without_each(losses, {"w": torch.ones(1)}, [x], [goal], damping=0.0, steps=1)  # w is the mean of x
    tensor([ 0.6667,  0.3333, -1.0000])
    """
    n = len(train[0])
    wanted = torch.func.grad(lambda p: losses(p, *test).mean())(params)

    def product(v: Params) -> Params:
        return fd.grad.hvp(lambda p: losses(p, *train).mean(), params, v)

    direction = fd.grad.conjugate_gradient(product, wanted, steps=steps, damping=damping)
    return fd.grad.jvp(losses, params, direction, *train) / n


def newton_without_each(
    losses: Callable[..., Tensor],
    params: Params,
    train: Sequence[Tensor],
    test: Sequence[Tensor],
    *,
    damping: float,
    steps: int = 20,
    chunk_size: int | None = None,
) -> Tensor:
    """L_test(θ + (H₋ᵢ + damping)⁻¹ ∇Lᵢ / n) - L_test(θ), (n,): `without_each` with the curvature of the other rows.

    H₋ᵢ is that of Σⱼ Lⱼ / n without row i, so that the change is one Newton step of retraining, and exact where the
    losses are quadratic and the training's ridge is ``damping``. It matters where a row carries much of the curvature
    along its own gradient; where the losses are far from quadratic, as in the factors of LoRA, the step overshoots for
    some such rows, and the derivative is the safer order of all. One solve a row, ``chunk_size`` of them at once, each
    over all rows. Source: Pregibon 1981, "Logistic Regression Diagnostics".

    >>> def losses(params, x):
    ...     return (params["w"] - x).square().sum(1) / 2
    >>> x, goal = torch.tensor([[-1.0], [0.0], [4.0]]), torch.tensor([[0.0]])
    >>> newton_without_each(losses, {"w": torch.ones(1)}, [x], [goal], damping=0.0, steps=1)  # w: 2, 1.5 and -0.5
    tensor([ 1.5000,  0.6250, -0.3750])
    """
    n, before = len(train[0]), losses(params, *test).mean()

    def change(own: Tensor) -> Tensor:
        def product(v: Params) -> Params:
            return fd.grad.hvp(lambda p: ((1 - own) * losses(p, *train)).sum() / n, params, v)

        slope = torch.func.grad(lambda p: (own * losses(p, *train)).sum() / n)(params)
        moved = fd.grad.conjugate_gradient(product, slope, steps=steps, damping=damping)
        return losses(fd.tree.add(params, moved), *test).mean() - before

    return torch.vmap(change, chunk_size=chunk_size)(torch.eye(n, dtype=before.dtype, device=before.device))


def self_influence(losses: Callable[..., Tensor], params: Params, data: Sequence[Tensor]) -> Tensor:
    """‖∇Lᵢ‖², (b,): how much a row's own loss feeds on the row; large for rows that nothing else explains.

    TracIn with one checkpoint (Pruthi et al. 2020), by ghost norms: of matrices that act on tokens.

    >>> def losses(params, x):
    ...     return F.linear(x, params["w"]).square().sum(1) / 2
    >>> self_influence(losses, {"w": torch.ones(1, 2)}, [torch.tensor([[1.0, 0.0], [1.0, 1.0]])]).round()
    tensor([1., 8.])
    """
    return fd.grad.ghost_norms(fd.grad.taps(losses, params, *data)).square()
