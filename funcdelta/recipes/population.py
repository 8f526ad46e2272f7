"""Populations: members of one stack that compete while they train.

A population is any pytree whose leaves have the member axis first: a stack, or a pair of a stack and its optimiser's
state. ``scores`` is one number per member, (n,); higher is better, nan is worst. Learning rates, (n,), are separate:
``fd.optim.adamw(lr=rates)`` has no state of its own, so an optimiser with new rates continues from the old state.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

import funcdelta as fd

Population = TypeVar("Population")


def exploit_and_explore(
    population: Population, rates: Tensor, scores: Tensor, seed: int, *, share: float = 0.25, factor: float = 1.2
) -> tuple[Population, Tensor, Tensor]:
    """Replace the worst ``share`` of members by copies of the best, with rates multiplied or divided by ``factor``.

    Population-based training (Jaderberg et al. 2017). Returns the population, the rates, and each member's parent.

    >>> population, rates, parents = exploit_and_explore(
    ...     {"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}, torch.ones(4), torch.tensor([0.1, 0.9, 0.5, 0.4]), seed=0
    ... )
    >>> population["w"], parents
    (tensor([2., 2., 3., 4.]), tensor([1, 1, 2, 3]))
    >>> rates[1:], float(rates[0]) != 1.0
    (tensor([1., 1., 1.]), True)
    """
    n = fd.members(population)
    order = scores.nan_to_num(nan=-torch.inf).argsort(descending=True)  # torch ranks nan highest
    replaced = max(1, int(share * n))
    parents = torch.arange(n, device=scores.device)
    parents[order[-replaced:]] = order[:replaced]
    generator = torch.Generator().manual_seed(seed)
    coin = torch.rand(n, generator=generator, dtype=torch.float32, device="cpu").to(rates.device) < 0.5
    changed = torch.where(coin, torch.full_like(rates, factor), torch.full_like(rates, 1 / factor))
    copied = (parents != torch.arange(n, device=scores.device)).to(rates.device)
    rates = rates[parents.to(rates.device)] * torch.where(copied, changed, torch.ones_like(changed))
    return fd.take(population, parents), rates, parents


def halve(population: Population, scores: Tensor, *, keep: float = 0.5) -> tuple[Population, Tensor]:
    """The best members, in their old order, and their indices: one rung of successive halving.

    Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification". The survivors get the steps that a rung
    saves: half of the members, twice the steps.

    >>> halve({"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}, torch.tensor([0.1, 0.9, 0.5, 0.4]))
    ({'w': tensor([2., 3.])}, tensor([1, 2]))
    """
    finite = scores.nan_to_num(nan=-torch.inf)  # torch ranks nan highest
    survivors = finite.topk(max(1, int(keep * fd.members(population)))).indices.sort().values
    return fd.take(population, survivors), survivors
