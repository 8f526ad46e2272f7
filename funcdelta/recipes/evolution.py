"""Evolution strategies: gradients estimated from scores, without a backward pass.

Perturbations are drawn from seeds. ``gradient`` perturbs leaves (factor space), ``rank_one`` weights. Constants of a
delta are not perturbed; their estimate is 0, like their gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import funcdelta as fd

Params = dict[str, Tensor]
Selector = Callable[..., bool] | str | Sequence[str]


def gradient(
    score: Callable[[Params], Tensor],
    params: Params,
    seed: int,
    *,
    n: int,
    sigma: float,
    trainable: Selector | None = None,
) -> Params:
    """(1/(2 n σ)) Σᵢ (f(θ + σ εᵢ) - f(θ - σ εᵢ)) εᵢ: an estimate of ∇f from n mirrored pairs.

    ``score(stack)`` returns one number per member, (2n,), so all members can run in one folded pass. ``trainable``, a
    predicate (``delta.trainable``) or names as in ``fd.partition``, selects the leaves to perturb. By default ``score``
    runs once more, on two members, to find the leaves that it depends on (``fd.grad.reached``). Salimans et al. 2017,
    "Evolution Strategies as a Scalable Alternative to Reinforcement Learning".

    >>> def score(stack):
    ...     return -(stack["w"] ** 2).sum(-1)
    >>> gradient(score, {"w": torch.tensor([1.0, 0.0])}, seed=0, n=1000, sigma=0.1)["w"].round()
    tensor([-2.,  0.])
    """
    if trainable is None:
        names = fd.grad.reached(score, fd.broadcast(params, 2))
        moving, fixed = fd.partition(params, lambda name: name in names)
    else:
        moving, fixed = fd.partition(params, trainable)
    noise = fd.tree.randn_like(fd.broadcast(moving, n), fd.seeds(seed, n))
    step = fd.tree.scale(noise, sigma)
    centre = fd.broadcast(moving, n)
    pairs = fd.cat([fd.tree.add(centre, step), fd.tree.sub(centre, step)])
    with torch.no_grad():
        plus, minus = score(fd.combine(pairs, fd.broadcast(fixed, 2 * n), order=params)).chunk(2)
    slope = fd.tree.mean(fd.tree.scale(noise, (plus - minus) / (2 * sigma), per_member=True))
    return fd.combine(slope, fd.tree.map(torch.zeros_like, fixed), order=params)


def rank_one(
    score: Callable[[fd.DeltaModel, Params], Tensor],
    current: tuple[fd.DeltaModel, Params],
    thin: fd.DeltaModel,
    seed: int,
    *,
    n: int,
    sigma: float,
) -> tuple[fd.DeltaModel, Params]:
    """(1/(2 n σ)) Σᵢ (f(W + σ Eᵢ) - f(W - σ Eᵢ)) Eᵢ with Eᵢ = bᵢ aᵢᵀ: an estimate of ∂f/∂W, as a delta of rank n.

    ``current`` is the present delta, and ``thin`` a delta of rank 1 at the same sites (``lora_r=1, lora_alpha=1``) that
    draws the perturbations. ``score(delta, stack)`` returns one number per member, (n,). The step is
    ``fd.algebra.sum_exact([current, estimate], weights=[1, rate])``; ``fd.algebra.truncate`` limits its rank. Sarkar et
    al. 2025, "Evolution Strategies at the Hyperscale" (EGGROLL).

    >>> thin = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=1, lora_alpha=1, modified_modules=["0"])
    >>> def score(delta, stack):
    ...     return fd.algebra.materialise(delta, stack)["0.weight"][:, 0, 0]
    >>> slope = rank_one(score, (thin, thin.init(0)), thin, seed=0, n=2000, sigma=0.1)
    >>> fd.algebra.materialise(*slope)["0.weight"][0, :2].round().abs()
    tensor([1., 0.])
    """
    drawn, constants = fd.partition(thin.init(0, n=n), thin.trainable)
    noise = fd.combine(fd.tree.randn_like(drawn, fd.seeds(seed, n)), constants)
    centre = (current[0], fd.broadcast(current[1], n))
    with torch.no_grad():
        plus, minus = (score(*fd.algebra.sum_exact([centre, (thin, noise)], weights=[1.0, s])) for s in (sigma, -sigma))
    return fd.algebra.sum_exact((thin, noise), weights=(plus - minus) / (2 * n * sigma))
