"""Ensembles: the uncertainty of several members together, their disagreement, and detection of foreign inputs.

A deep ensemble is a stack whose members differ in their seeds (Lakshminarayanan et al. 2017, "Simple and Scalable
Predictive Uncertainty Estimation using Deep Ensembles"); ``delta.apply_many`` computes all its logits in one pass.
``probabilities`` are (n, ..., C): members, rows, classes. Draws from SWAG or a Laplace posterior are members, too.
Entropies are in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

import funcdelta as fd


def entropy(probabilities: Tensor) -> Tensor:
    """H(p) = -Σ_c p_c ln p_c, (..., C) → (...): 0 for a certain answer, ln C for a uniform one; 0 ln 0 is 0.

    >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor([0.6931, 0.0000])
    """
    return torch.special.entr(probabilities).sum(-1)


def predictive_entropy(probabilities: Tensor) -> Tensor:
    """H((1/n) Σᵢ pᵢ), (n, ..., C) → (...): the total uncertainty of the ensemble.

    >>> predictive_entropy(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
    tensor([0.6931])
    """
    _members(probabilities)
    return entropy(probabilities.mean(0))


def disagreement(probabilities: Tensor) -> Tensor:
    """H((1/n) Σᵢ pᵢ) - (1/n) Σᵢ H(pᵢ), (n, ..., C) → (...): the uncertainty due to disagreement between members.

    It is the mutual information of the class and the member, from 0 (all agree) to ln n; BALD queries labels for the
    rows where it is largest (Houlsby et al. 2011, "Bayesian Active Learning for Classification and Preference
    Learning"). Rounding may make it slightly negative.

    >>> disagreement(torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]))
    tensor([0.6931, 0.0000])
    """
    return predictive_entropy(probabilities) - entropy(probabilities).mean(0)


def auroc(inside: Tensor, outside: Tensor) -> Tensor:
    """P(outside > inside) + ½ P(outside = inside) over all pairs: how well a score separates two sets of rows.

    The area under the ROC curve, by Mann and Whitney's count of pairs; ½ is chance, 1 is perfect. ``inside`` (..., a)
    has scores of rows like those trained on, ``outside`` (..., b) of foreign rows; the result is (...), NaN for NaN.

    >>> auroc(torch.tensor([0.1, 0.2, 0.4]), torch.tensor([0.3, 0.4]))
    tensor(0.7500)
    """
    if 0 in (inside.ndim, outside.ndim, inside.numel(), outside.numel()) or inside.shape[:-1] != outside.shape[:-1]:
        raise fd.errors.ParamsError(
            f"auroc compares scores (..., a) with (..., b), a and b at least 1; found {tuple(inside.shape)} and "
            f"{tuple(outside.shape)}. Write auroc(scores[..., known], scores[..., foreign])."
        )
    ordered, asked = inside.sort(-1).values, outside.contiguous()
    below = torch.searchsorted(ordered, asked)  # numbers of inside scores below, and (next line) not above
    upto = torch.searchsorted(ordered, asked, right=True)
    area = (below + upto).to(inside.dtype).mean(-1) / (2 * inside.shape[-1])
    unknown = inside.isnan().any(-1) | outside.isnan().any(-1)  # sorting would rank NaN above all
    return area.masked_fill(unknown, torch.nan)


def _members(probabilities: Tensor) -> None:
    """Raise unless there is a member axis in front of the class axis."""
    if probabilities.ndim < 2:
        raise fd.errors.ParamsError(
            f"An ensemble's probabilities must be (n, ..., C): members, rows, classes; found "
            f"{tuple(probabilities.shape)}. Write delta.apply_many(stack, ...).softmax(-1), or, for one member, "
            f"entropy(probabilities)."
        )
