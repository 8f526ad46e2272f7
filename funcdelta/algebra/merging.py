"""Merges dense changes by sums of task vectors and TIES, and makes changes sparse by pruning and DARE.

``changes`` come from :func:`materialise`: a list of ``{name of a weight: ΔW}``, or the dict of a stack, whose tensors
are (n, ...). The result is one dict without the member axis, for :func:`from_dense` or to add to the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ParamsError
from ..trees.arithmetic import map as map_leaves
from ..trees.arithmetic import ravel
from ..trees.leaves import check_tree, compute_dtype, dense
from ..trees.seeding import derive
from ..trees.stack import members, stack, take

Change = Mapping[str, Tensor]


def task_arithmetic(changes: Sequence[Change] | Change, weights: Sequence[float] | Tensor) -> dict[str, Tensor]:
    """Σ wᵢ ΔWᵢ with one weight per change; a negative weight removes a task.

    Ilharco et al. 2022, "Editing Models with Task Arithmetic". For low-rank deltas :func:`sum_exact` does the same
    without dense matrices.

    >>> changes = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 5.0])}]
    >>> fd.algebra.task_arithmetic(changes, [1.0, -1.0])
    {'w': tensor([-2., -3.])}
    """
    found = _stack(changes)
    return weighted_sum(found, shares_of(weights, members(found), "task_arithmetic needs one weight per change"))


def ties(changes: Sequence[Change] | Change, density: float = 0.2, weight: float = 1.0) -> dict[str, Tensor]:
    """λ times the entrywise mean of the trimmed changes that have the elected sign.

    Each change keeps the fraction ``density`` of its entries that is largest in magnitude over all its weights. The
    elected sign of an entry is that of the sum of kept values; the mean is over kept values of that sign only.
    ``weight`` is the paper's λ. Yadav et al. 2023, "TIES-Merging".

    >>> changes = [{"w": torch.tensor([4.0, 0.1, -3.0])}, {"w": torch.tensor([2.0, 0.2, 5.0])}]
    >>> fd.algebra.ties(changes, density=2 / 3)
    {'w': tensor([3., 0., 5.])}
    """
    if not 0 < density <= 1:
        raise ParamsError(f"ties: density={density}; write the fraction of entries that each change keeps, in (0, 1].")
    vectors, unravel = ravel(_stack(changes), per_member=True)
    values = vectors.to(compute_dtype(vectors.dtype))
    kept = _largest(values, density)
    elected = kept.detach().sum(0).sign()
    agreeing = (kept.detach().sign() == elected) & (elected != 0)
    mean = (kept * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)
    return take(unravel(weight * mean.unsqueeze(0)), 0)


def prune(change: Change, density: float) -> dict[str, Tensor]:
    """Keep the fraction ``density`` of entries that is largest in magnitude over all weights; the others become 0.

    Takes one change; for a stack write ``torch.vmap(lambda change: fd.algebra.prune(change, 0.2))(changes)``. This is
    magnitude pruning of ΔW, because single entries of factors mean nothing.

    >>> fd.algebra.prune({"v": torch.tensor([0.1, -3.0]), "w": torch.tensor([2.0, 0.5])}, density=0.5)
    {'v': tensor([ 0., -3.]), 'w': tensor([2., 0.])}
    """
    if not 0 < density <= 1:
        raise ParamsError(f"prune: density={density}; write the fraction of entries to keep, in (0, 1].")
    vector, unravel = ravel(_checked(change))
    return unravel(_largest(vector, density))


def dare(change: Change, drop: float, seed: int) -> dict[str, Tensor]:
    """``m ⊙ ΔW / (1 - p)``, where m is 0 with probability p = ``drop`` and 1 otherwise: sparse, with expectation ΔW.

    An entry's mask depends only on the seed, the weight's name and the entry's position; it is drawn on the CPU, so it
    is the same on every device. Takes one change, or that of a stack, whose members get different masks. Yu et al.
    2023, "Language Models are Super Mario".

    >>> fd.algebra.dare({"w": torch.ones(6)}, drop=0.5, seed=0)["w"].unique()
    tensor([0., 2.])
    """
    if not 0 <= drop < 1:
        raise ParamsError(f"dare: drop={drop}; write a probability in [0, 1).")

    def masked(name: str, leaf: Tensor) -> Tensor:
        rng = torch.Generator().manual_seed(derive(seed, "dare", name))
        drawn = torch.rand(leaf.shape, generator=rng, dtype=torch.float32, device="cpu")
        return leaf * (drawn >= drop).to(leaf) / (1 - drop)

    return {name: masked(name, leaf) for name, leaf in _checked(change).items()}


def shares_of(weights: Sequence[float] | Tensor, n: int, needs: str) -> Tensor:
    """``weights`` as a tensor (n,), float64 for Python numbers; a ``ParamsError`` begins with ``needs``.

    >>> shares_of([0.5, 0.5], 2, "soup needs one weight per member")
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    try:
        found = weights if isinstance(weights, Tensor) else torch.tensor(weights, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError) as error:
        raise ParamsError(f"{needs}, {n} numbers; found {weights!r}.") from error
    if tuple(found.shape) != (n,):
        raise ParamsError(f"{needs}, ({n},); found shape {tuple(found.shape)}.")
    return found


def weighted_sum(stack: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Σ wᵢ leafᵢ over the first axis of every leaf; weights are (n,).

    >>> weighted_sum({"w": torch.tensor([[1.0], [3.0]])}, torch.tensor([0.5, 0.5]))
    {'w': tensor([2.])}
    """
    return map_leaves(lambda leaf: torch.tensordot(weights.to(leaf), leaf, dims=1), dict(stack))


def _largest(values: Tensor, density: float) -> Tensor:
    """``values`` (..., d), zero except for the fraction ``density`` of largest magnitude along the last axis."""
    if not values.shape[-1]:
        return values
    top = values.detach().abs().topk(max(1, round(density * values.shape[-1]))).indices
    return torch.zeros_like(values).scatter(-1, top, 1.0) * values


def _stack(changes: Sequence[Change] | Change) -> dict[str, Tensor]:
    """The changes stacked, each tensor (n, ...)."""
    if isinstance(changes, Mapping):
        members(changes)
        return _checked(changes)
    if not isinstance(changes, Sequence) or isinstance(changes, str):
        raise ParamsError(
            f"changes must be a list of dicts {{name of a weight: ΔW}}, or the dict of a stack; found "
            f"{type(changes).__name__}."
        )
    return stack([_checked(change) for change in changes])


def _checked(change: Change) -> dict[str, Tensor]:
    """One change as a dict; raises unless it has real tensors by names of weights."""
    if not isinstance(change, Mapping):
        raise ParamsError(f"A change must be a dict {{name of a weight: ΔW}}; found {type(change).__name__}.")
    check_tree(change)
    for name, leaf in change.items():
        if not isinstance(leaf, Tensor) or not dense(name, leaf).is_floating_point():
            found = str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ParamsError(f"The change of {name!r} is {found}; expected a tensor of real numbers.")
    return dict(change)
