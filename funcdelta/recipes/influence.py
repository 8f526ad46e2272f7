"""Influence of training rows: how a loss would change if a row were left out of training.

At a minimum of (1/n) Σᵢ Lᵢ + (damping/2) ‖θ‖², leaving out row i moves θ by (1/n) (H + damping)⁻¹ ∇Lᵢ to first order
(Koh and Liang 2017, "Understanding Black-box Predictions via Influence Functions"). ``losses(params, *data)`` returns
one number per row, (b,); ``params`` are the leaves that train, and ``losses`` is closed over the others.
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

    It takes one solve by ``steps`` of conjugate gradients and one forward derivative for all rows, and holds no
    gradient of single rows. H + damping must be positive definite, as it is at a minimum.

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

    H₋ᵢ is the Hessian of Σⱼ Lⱼ / n without row i, so the change is one Newton step of retraining. It is exact if the
    losses are quadratic and the training's ridge is ``damping``, and differs from `without_each` for rows that carry
    much of the curvature along their own gradient. If losses are far from quadratic, as in the factors of LoRA, the
    step overshoots for some of these rows, and `without_each` ranks rows more reliably. One solve per row, each over
    all rows, ``chunk_size`` at a time. Source: Pregibon 1981, "Logistic Regression Diagnostics".

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
    """‖∇Lᵢ‖², (b,): a row's influence on its own loss, large for rows that no other row explains.

    TracIn with one checkpoint (Pruthi et al. 2020), by ghost norms, and so over matrices that act on tokens only.

    >>> def losses(params, x):
    ...     return F.linear(x, params["w"]).square().sum(1) / 2
    >>> self_influence(losses, {"w": torch.ones(1, 2)}, [torch.tensor([[1.0, 0.0], [1.0, 1.0]])]).round()
    tensor([1., 8.])
    """
    return fd.grad.ghost_norms(fd.grad.taps(losses, params, *data)).square()
