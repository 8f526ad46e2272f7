"""Lion: steps by the sign of an interpolated momentum (Chen et al. 2023, arXiv:2302.06675)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..trees.selecting import Selector
from .groups import Groups
from .hyper import Hyper, Values, checked, is_zero
from .moving import How, Tree, alive, begin, decayed, told, zeros
from .rules import Optimizer, Rule

__all__ = ["LionState", "lion"]


class LionState(NamedTuple):
    """``step``: steps taken; ``mu``: the momentum by leaf name.

    >>> lion(1e-4).init({"w": torch.ones(2)})
    LionState(step=tensor(0), mu={'w': tensor([0., 0.])})
    """

    step: Tensor
    mu: dict[str, Tensor]


def lion(
    lr: Hyper,
    betas: tuple[Hyper, Hyper] = (0.9, 0.99),
    weight_decay: Hyper = 0.0,
    *,
    trainable: Selector | None = None,
    groups: Mapping[Any, Hyper] | None = None,
    decay_mask: Selector | None = None,
) -> Optimizer:
    """p ← p - lr·(sign(β₁m + (1-β₁)g) + wd·p); then m ← β₂m + (1-β₂)g.

    It keeps one moment per leaf, and every entry moves by lr: choose lr three to ten times smaller than Adam's, and
    weight decay larger by the same factor. ``trainable``, ``groups`` and ``decay_mask`` are those of
    :func:`~funcdelta.optim.sgd`. The update is differentiable in lr and weight decay; the sign's derivative is 0.

    Source: Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, Algorithm 2.

    >>> opt = lion(lr=torch.tensor([0.1, 0.2]))
    >>> stack = {"w": torch.ones(2, 2)}
    >>> updates, state = opt.update({"w": torch.tensor([[3.0, -5.0], [0.0, 0.1]])}, opt.init(stack), stack)
    >>> updates["w"]
    tensor([[-0.1000,  0.1000],
            [-0.0000, -0.2000]])
    """
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ConfigError(f"betas must be a pair (beta1, beta2); found {betas!r}.")
    grouped = Groups(groups, decay_mask)
    hypers = checked(lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, **grouped.hypers)
    decays = not is_zero(weight_decay)

    def init(params: Any, n: int | None = None) -> LionState:
        first, moving = begin(params, hypers, trainable, n)
        grouped.of(params)
        return LionState(first, {name: zeros(leaf) for name, leaf in moving.items()})

    def run(grads: Any, state: LionState, params: Any, how: How) -> tuple[Any, LionState]:
        tree = Tree(grads, state.mu, params, trainable)
        values, chosen, mu = Values(hypers, state.step), grouped.of(params), dict(state.mu)
        known = told(trainable, params, state.mu)
        values.of["fresh1"], values.of["fresh2"] = 1 - values.of["beta1"], 1 - values.of["beta2"]

        def move(name: str, p: Tensor, g: Tensor) -> Tensor:
            direction = torch.lerp(mu[name], g, values("fresh1", p, name)).sign()
            mu[name] = torch.lerp(mu[name], g, values("fresh2", p, name))
            if decays and chosen.decays(name):
                live = alive(known, state.step, mu[name])
                direction = decayed(direction, p, values("weight_decay", p, name), live)
            return direction * -chosen.scaled(values, "lr", p, name)

        return tree.moved(move, how), LionState(state.step + 1, mu)

    return Optimizer(init, Rule(run))
