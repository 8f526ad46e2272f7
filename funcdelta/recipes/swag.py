"""SWAG: a Gaussian around the mean of the params along a training run (Maddox et al. 2019).

It is a Gaussian over leaves (factor space), not over changes of weights. A leaf that training does not move (a constant
of a delta) has no deviation and is the same in every draw. A stack has one Gaussian per member.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import funcdelta as fd

Params = dict[str, Tensor]


class Moments(NamedTuple):
    """The number of params seen, their mean and mean square, and the last (at most K) differences from the mean.

    >>> collect(None, {"w": torch.tensor([3.0])})
    Moments(steps=1, mean={'w': tensor([3.])}, square={'w': tensor([9.])}, deviations=())
    """

    steps: int
    mean: Params
    square: Params
    deviations: tuple[Params, ...]


def collect(moments: Moments | None, params: Params, *, rank: int = 10) -> Moments:
    """m ← m + (θ - m)/k, s ← s + (θ² - s)/k, and θ - m is appended to the last ``rank`` deviations.

    >>> moments = collect(collect(None, {"w": torch.tensor([1.0])}), {"w": torch.tensor([3.0])})
    >>> moments.mean, moments.square
    ({'w': tensor([2.])}, {'w': tensor([5.])})
    """
    square = fd.tree.map(torch.square, params)
    if moments is None:
        return Moments(1, params, square, ())
    count = moments.steps + 1
    mean = fd.tree.lerp(moments.mean, params, 1 / count)
    deviations = (*moments.deviations, fd.tree.sub(params, mean))[-rank:]
    return Moments(count, mean, fd.tree.lerp(moments.square, square, 1 / count), deviations)


def sample(moments: Moments, seed: int) -> Params:
    """A draw m + σ ε/√2 + Σₖ dₖ zₖ/√(2(K - 1)) from N(m, ½(diag σ² + D Dᵀ/(K - 1))), with σ² = s - m².

    >>> moments = collect(collect(None, {"w": torch.tensor([1.0])}), {"w": torch.tensor([1.0])})
    >>> sample(moments, seed=0)
    {'w': tensor([1.])}
    """
    deviation = fd.tree.map(lambda s, m: (s - m.square()).clamp(min=0).sqrt(), moments.square, moments.mean)
    noise = fd.tree.map(torch.mul, fd.tree.randn_like(moments.mean, seed), deviation)
    drawn = fd.tree.add(moments.mean, fd.tree.scale(noise, 0.5**0.5))
    k = len(moments.deviations)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(k, generator=generator, dtype=torch.float32, device="cpu") / (2 * max(k - 1, 1)) ** 0.5
    for weight, difference in zip(weights, moments.deviations, strict=True):
        drawn = fd.tree.add(drawn, fd.tree.scale(difference, weight))
    return drawn
