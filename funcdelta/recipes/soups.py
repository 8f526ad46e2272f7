"""Model soups: averages members into one (Wortsman et al. 2022, "Model Soups")."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import funcdelta as fd

Params = dict[str, Tensor]
Pair = tuple[fd.DeltaModel, Params]


def mean(delta: fd.DeltaModel, stack: Params, members: list[int]) -> Pair:
    """(1/k) Σ Bᵢ Aᵢ over k chosen members, exact; its rank is k times theirs (``fd.algebra.truncate`` reduces it).

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
    >>> mean(delta, delta.init(0, n=4), [0, 3])[0].configs[0].lora_r
    4
    """
    chosen = fd.take(stack, members)
    return fd.algebra.sum_exact((delta, chosen), weights=[1 / len(members)] * len(members))


def greedy(delta: fd.DeltaModel, stack: Params, score: Callable[[fd.DeltaModel, Params], float]) -> list[int]:
    """The members of the greedy soup: starting from the best, each one that does not lower the mean's score.

    ``score(delta, params)`` scores held-out data, higher is better; it is called at most 2n times.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
    >>> stack = fd.tree.randn_like(delta.init(0, n=3), seed=0)
    >>> goal = fd.algebra.materialise(delta, fd.take(stack, 2))["0.weight"]
    >>> greedy(delta, stack, lambda d, p: -float((fd.algebra.materialise(d, p)["0.weight"] - goal).norm()))
    [2]
    """
    alone = [score(*mean(delta, stack, [i])) for i in range(fd.members(stack))]
    order = sorted(range(len(alone)), key=lambda i: -alone[i])
    soup, best = order[:1], alone[order[0]]
    for candidate in order[1:]:
        found = score(*mean(delta, stack, [*soup, candidate]))
        if found >= best:
            soup, best = [*soup, candidate], found
    return soup
