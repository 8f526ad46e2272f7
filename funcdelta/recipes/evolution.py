"""Evolution strategies: a gradient from scores alone, without a backward pass.

The perturbations are those of the leaves (factor space), and are drawn anew from their seeds: none is stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import funcdelta as fd

Params = dict[str, Tensor]


def gradient(score: Callable[[Params], Tensor], params: Params, seed: int, *, n: int, sigma: float) -> Params:
    """(1/(2 n σ)) Σᵢ (f(θ + σ εᵢ) - f(θ - σ εᵢ)) εᵢ: an estimate of ∇f from n mirrored pairs.

    ``score(stack)`` gives one number a member, (2n,): all members run in one folded pass. Salimans et al. 2017,
    "Evolution Strategies as a Scalable Alternative to Reinforcement Learning".

    >>> def score(stack):
    ...     return -(stack["w"] ** 2).sum(-1)
    >>> gradient(score, {"w": torch.tensor([1.0, 0.0])}, seed=0, n=1000, sigma=0.1)["w"].round()
    tensor([-2.,  0.])
    """
    noise = fd.tree.randn_like(fd.broadcast(params, n), fd.seeds(seed, n))
    step = fd.tree.scale(noise, sigma)
    centre = fd.broadcast(params, n)
    with torch.no_grad():
        plus, minus = score(fd.cat([fd.tree.add(centre, step), fd.tree.sub(centre, step)])).chunk(2)
    return fd.tree.mean(fd.tree.scale(noise, (plus - minus) / (2 * sigma), per_member=True))
