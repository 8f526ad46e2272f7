"""Federated averaging: clients train a delta on their own data, and a server combines the results.

The mean of factors does not give the mean change: mean(B) mean(A) ≠ mean(B A). ``exact`` averages the changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import funcdelta as fd

Params = dict[str, Tensor]
Train = Callable[..., Params]


def clients(train: Train, params: Params, *data: Any) -> Params:
    """``train(params, *data)`` of every client in one mapped run; ``data`` have the client axis first.

    >>> clients(lambda params, x: {"w": params["w"] + x}, {"w": torch.zeros(1)}, torch.tensor([[1.0], [3.0]]))["w"]
    tensor([[1.],
            [3.]])
    """
    return torch.vmap(lambda p, *own: train(p, *own), in_dims=(None, *(0 for _ in data)), randomness="different")(
        params, *data
    )


def exact(
    delta: fd.DeltaModel, stack: Params, rank: int, weights: Sequence[float] | None = None
) -> tuple[fd.DeltaModel, Params]:
    """The change of rank ``rank`` closest to Σ wᵢ Bᵢ Aᵢ; the clients' weights are equal by default.

    The aggregation of FLoRA and FedEx-LoRA (Wang et al. 2024, Singhal et al. 2024), truncated to one rank for the next
    round. Trained backbone leaves (heads) are averaged.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
    >>> stack = fd.tree.randn_like(delta.init(0, n=3), seed=0)
    >>> merged, params = exact(delta, stack, rank=6)
    >>> mean = fd.algebra.materialise(delta, stack)["0.weight"].mean(0)
    >>> torch.allclose(fd.algebra.materialise(merged, params)["0.weight"], mean, atol=1e-5)
    True
    """
    n = fd.members(stack)
    total, wide = fd.algebra.sum_exact((delta, stack), weights=weights if weights is not None else [1 / n] * n)
    return fd.algebra.truncate(total, wide, rank)


def naive(stack: Params, weights: Sequence[float] | None = None) -> Params:
    """Σ wᵢ leafᵢ, factor by factor (FedIT): exact only if one factor is the same for all clients (FFA-LoRA).

    A leaf that is equal for all clients, such as a constant of a delta, keeps its value.

    >>> naive({"w": torch.tensor([[1.0], [3.0]])}, weights=[0.25, 0.75])
    {'w': tensor([2.5000])}
    """
    n = fd.members(stack)
    shares = torch.tensor(weights if weights is not None else [1 / n] * n, dtype=torch.float64, device="cpu")
    moved, mean = fd.partition(stack, lambda name, leaf: leaf.is_floating_point()), fd.take(stack, 0)
    total = fd.tree.map(lambda leaf: leaf.sum(0), fd.tree.scale(moved[0], shares, per_member=True))
    return {**mean, **{k: torch.where((stack[k] == mean[k]).all(), mean[k], total[k]) for k in total}}
