"""Accuracy, negative log-likelihood and expected calibration error of probabilities, for each member."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import FuncdeltaError

__all__ = ["accuracy", "calibration_error", "negative_log_likelihood", "summary"]

BINS = 15
"""How many equal confidence bins the calibration error uses (Guo et al. 2017 use 15)."""


def accuracy(probabilities: Tensor, labels: Tensor) -> Tensor:
    r"""The share of rows whose most probable class is the label: :math:`\frac{1}{b} \sum_i [\arg\max_c p_{ic} = y_i]`.

    Shapes: ``probabilities`` (..., b, C), ``labels`` (b,); returns (...,) in the dtype of the probabilities.
    Raises `FuncdeltaError` if the shapes do not fit.

    >>> accuracy(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([0, 0]))
    tensor(0.5000)
    """
    _check(probabilities, labels)
    return _correct(probabilities, labels).mean(-1)


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> Tensor:
    r"""The mean surprise at the labels, in nats: :math:`-\frac{1}{b} \sum_i \ln p_{i y_i}`.

    Shapes: ``probabilities`` (..., b, C), ``labels`` (b,); returns (...,). A label of probability 0 gives infinity.
    Raises `FuncdeltaError` if the shapes do not fit.

    >>> negative_log_likelihood(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([0, 1]))
    tensor(0.6931)
    """
    _check(probabilities, labels)
    index = labels.long().expand(probabilities.shape[:-1]).unsqueeze(-1)
    return -probabilities.gather(-1, index).squeeze(-1).log().mean(-1)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Tensor:
    r"""The expected calibration error: :math:`\sum_k \frac{|B_k|}{b} |\mathrm{acc}(B_k) - \mathrm{conf}(B_k)|`.

    A row's confidence is its largest probability :math:`c_i`. Bin :math:`B_k` holds the rows with
    :math:`k/K < c_i \le (k+1)/K`, for K bins of equal width; acc is the accuracy and conf the mean confidence of
    the rows in it. Empty bins do not count. 0 means perfectly calibrated, 1 means certain and always wrong.

    Shapes: ``probabilities`` (..., b, C), ``labels`` (b,); returns (...,).
    Raises `FuncdeltaError` if the shapes do not fit or ``bins`` is less than 1.

    >>> calibration_error(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 0]))
    tensor(0.2500)
    """
    _check(probabilities, labels)
    if bins < 1:
        raise FuncdeltaError(f"calibration_error(bins={bins}): expected at least one bin; write bins={BINS}.")
    confidence = probabilities.max(-1).values
    surplus = _correct(probabilities, labels) - confidence
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)[1:-1]
    # right=False puts a confidence that equals an edge into the bin below it.
    index = torch.bucketize(confidence, edges)
    # |B_k|/b · |acc - conf| is |Σ (correct - confidence)| / b over the bin, so no bin needs a division by its size.
    sums = surplus.new_zeros((*surplus.shape[:-1], bins)).scatter_add(-1, index, surplus)
    return sums.abs().sum(-1) / labels.shape[0]


def summary(probabilities: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """``{"accuracy", "nll", "ece": (...,)}`` of probabilities (..., b, C); see the functions above.

    >>> found = summary(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
    >>> {name: round(value.item(), 3) for name, value in found.items()}
    {'accuracy': 1.0, 'nll': 0.288, 'ece': 0.25}
    """
    return {
        "accuracy": accuracy(probabilities, labels),
        "nll": negative_log_likelihood(probabilities, labels),
        "ece": calibration_error(probabilities, labels),
    }


def _correct(probabilities: Tensor, labels: Tensor) -> Tensor:
    return (probabilities.argmax(-1) == labels).to(probabilities.dtype)


def _check(probabilities: Tensor, labels: Tensor) -> None:
    if labels.ndim != 1 or labels.shape[0] == 0 or probabilities.shape[-2:-1] != labels.shape:
        raise FuncdeltaError(
            f"Metrics compare probabilities (..., b, C) with labels (b,), b > 0; found {tuple(probabilities.shape)} "
            f"and {tuple(labels.shape)}. Rows are the second-to-last axis of the probabilities."
        )
    if labels.device != probabilities.device:
        raise FuncdeltaError(
            f"Labels are on {labels.device}, but probabilities on {probabilities.device}. Write "
            f"labels.to({str(probabilities.device)!r})."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise FuncdeltaError(f"Labels are class indices, integers from 0; found {labels.dtype}. Write labels.long().")
    classes = probabilities.shape[-1]
    strange = (labels < 0) | (labels >= classes)
    if _known_true(strange.any()):
        raise FuncdeltaError(
            f"With {classes} classes, labels go from 0 to {classes - 1}; found {int(labels[strange][0])}. Leave such "
            f"rows out: known = labels >= 0, then probabilities[..., known, :] and labels[known]."
        )


def _known_true(value: Tensor) -> bool:
    """Whether a boolean tensor is true; False if its value cannot be read."""
    try:
        return not torch.compiler.is_compiling() and bool(value)
    except RuntimeError:  # a transform or the meta device hides it
        return False
