"""Muon: steps by the orthogonalised momentum of a matrix (Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..errors import ConfigError, StackError
from ..trees.leaves import named
from ..trees.selecting import Selector, select
from .groups import Groups
from .hyper import Hyper, Values, checked, is_zero
from .moving import How, Tree, alive, begin, decayed, told, zeros
from .rules import AdamState, Optimizer, Rule, adamw

__all__ = ["MuonState", "muon", "orthogonalise"]

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Jordan's coefficients: steep at 0, with singular values within about [0.7, 1.2] after five steps."""


class MuonState(NamedTuple):
    """``step``: steps taken; ``mu``: the matrices' momentum by leaf name; ``adam``: the state of the other leaves.

    >>> state = muon(1e-3).init({"w": torch.ones(2, 2), "b": torch.ones(2)})
    >>> list(state.mu), list(state.adam.mu)
    (['w'], ['b'])
    """

    step: Tensor
    mu: dict[str, Tensor]
    adam: AdamState


def muon(
    lr: Hyper,
    momentum: Hyper = 0.95,
    weight_decay: Hyper = 1e-2,
    *,
    nesterov: bool = True,
    iterations: int = 5,
    matrices: Selector | None = None,
    betas: tuple[Hyper, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    trainable: Selector | None = None,
    groups: Mapping[Any, Hyper] | None = None,
    decay_mask: Selector | None = None,
) -> Optimizer:
    """m ← μm + (1-μ)g; p ← p - lr·(0.2·√max(rows, columns)·orthogonalise(m) + wd·p); AdamW if p is not a matrix.

    With ``nesterov``, m is replaced by μm + (1-μ)g. The factor 0.2·√max(rows, columns) makes a matrix's step as large
    as AdamW's, so that an lr tuned for AdamW suits all leaves. ``iterations`` is passed to :func:`orthogonalise`.

    ``matrices`` selects the leaves for Muon; AdamW with ``betas`` and ``eps`` moves the others. By default, Muon moves
    every leaf with two axes per member. For a stack write ``opt.init(stack, n=...)``, so that its first axis does not
    count. ``trainable``, ``groups`` and ``decay_mask`` are those of :func:`~funcdelta.optim.sgd`.

    Raises `StackError` if a leaf has three axes and nothing says whether the first is the member axis.

    Source: Jordan et al. 2024, Muon; for the factor, Liu et al. 2025, Muon is Scalable for LLM Training.

    >>> opt = muon(lr=0.1, weight_decay=0.0)
    >>> params = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
    >>> gradient = {"w": torch.tensor([[3.0, 0.0], [0.0, 0.001]]), "b": torch.tensor([5.0, -0.1])}
    >>> updates, state = opt.update(gradient, opt.init(params), params)
    >>> updates["b"]
    tensor([-0.1000,  0.1000])
    >>> updates["w"].diagonal() / (0.2 * 2**0.5)
    tensor([-0.0696, -0.0161])
    """
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ConfigError(f"iterations must be a whole number of at least 1; found {iterations!r}.")
    grouped = Groups(groups, decay_mask)
    others = cast(Rule, adamw(lr, betas, eps, weight_decay, groups=groups, decay_mask=grouped.decay_mask).update)
    hypers = checked(lr=lr, momentum=momentum, weight_decay=weight_decay, **grouped.hypers)
    decays = not is_zero(weight_decay)

    def init(params: Any, n: int | None = None) -> MuonState:
        first, moving = begin(params, hypers, trainable, n)
        grouped.of(params)
        chosen = _matrices(moving, matrices, first.ndim)
        mu = {name: zeros(leaf) for name, leaf in moving.items() if name in chosen}
        adam = ({name: zeros(leaf) for name, leaf in moving.items() if name not in chosen} for _ in range(2))
        return MuonState(first, mu, AdamState(first, *adam))

    def run(grads: Any, state: MuonState, params: Any, how: How) -> tuple[Any, MuonState]:
        tree = Tree(grads, {**state.mu, **state.adam.mu}, params, trainable)
        values, chosen, mu = Values(hypers, state.step), grouped.of(params), dict(state.mu)
        known = told(trainable, params, state.mu, state.adam.mu)
        values.of["fresh"] = 1 - values.of["momentum"]
        own = {name: gradient for name, gradient in named(grads) if name in state.adam.mu}
        theirs, adam = others.run(own, state.adam, params, how._replace(known=known))
        results = {name: leaf for name, leaf in named(theirs) if name in own}

        def move(name: str, p: Tensor, g: Tensor) -> Tensor:
            fresh = values("fresh", p, name)
            mu[name] = torch.lerp(mu[name], g, fresh)
            ahead = torch.lerp(mu[name], g, fresh) if nesterov else mu[name]
            direction = orthogonalise(ahead, iterations) * (0.2 * max(p.shape[-2:]) ** 0.5)
            if decays and chosen.decays(name):
                live = alive(known, state.step, mu[name])
                direction = decayed(direction, p, values("weight_decay", p, name), live)
            return direction * -chosen.scaled(values, "lr", p, name)

        for one in tree.moving:
            if one.name in mu:
                results[one.name] = how.result(one, move(one.name, one.value, one.gradient))
        return tree.filled(results, how), MuonState(state.step + 1, mu, adam)

    return Optimizer(init, Rule(run))


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Approximate UVᵀ of matrix = USVᵀ by Newton-Schulz: X ← (a + b·XXᵀ + c·(XXᵀ)²)X from X = matrix / ‖matrix‖.

    Args:
        matrix: one or more matrices, (..., rows, columns). A zero matrix stays zero.
        iterations: after five, singular values of at least 1 % of the norm are within about [0.7, 1.2].

    With r = min(rows, columns), an iteration takes 4·r²·max(rows, columns) + 2·r³ operations, which is cheap for the
    factors of LoRA.

    >>> found = orthogonalise(torch.tensor([[2.0, 0.0, 0.0], [0.0, -0.5, 0.0]]))
    >>> torch.linalg.svdvals(found)
    tensor([0.7429, 0.7374])
    """
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = matrix if wide else matrix.mT
    a, b, c = _QUINTIC
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def _matrices(moving: dict[str, Tensor], chosen: Selector | None, members: int) -> set[str]:
    """The names of leaves with two axes per member; raises `StackError` if that cannot be determined."""
    if chosen is None:
        unclear = next((name for name, leaf in moving.items() if not members and leaf.ndim > 2), None)
        if unclear is not None:
            shape = tuple(moving[unclear].shape)
            raise StackError(
                f"Leaf {unclear!r} has shape {shape}. For a stack write opt.init(stack, n={shape[0]}); if "
                "these are the axes of one member, write muon(..., matrices=lambda name, leaf: leaf.ndim == 2)."
            )
        return {name for name, leaf in moving.items() if leaf.ndim - members == 2}
    names = select(moving, chosen)
    for name, leaf in moving.items():
        if name in names and leaf.ndim - members != 2:
            raise StackError(
                f"matrices: leaf {name!r} has shape {tuple(leaf.shape)}"
                + (f" of {leaf.shape[0]} members" if members else "")
                + ", which is not one matrix (rows, columns) per member. For a stack write opt.init(stack, n=...)."
            )
    return names
