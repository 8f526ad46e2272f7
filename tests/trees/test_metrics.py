"""The metrics of the main job against loops written from their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from funcdelta import metrics
from funcdelta.errors import FuncdeltaError

SHAPES = [(), (1,), (5,), (2, 3)]


def draw(lead: tuple[int, ...], rows: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*lead, rows, classes, generator=rng, dtype=torch.float64)
    return logits.softmax(-1), torch.randint(classes, (rows,), generator=rng)


def slow_accuracy(rows: list[list[float]], labels: list[int]) -> float:
    return sum(row.index(max(row)) == label for row, label in zip(rows, labels, strict=True)) / len(labels)


def slow_nll(rows: list[list[float]], labels: list[int]) -> float:
    return -sum(math.log(row[label]) for row, label in zip(rows, labels, strict=True)) / len(labels)


def slow_calibration_error(rows: list[list[float]], labels: list[int], bins: int) -> float:
    total = 0.0
    for k in range(bins):
        inside = [i for i, row in enumerate(rows) if k / bins < max(row) <= (k + 1) / bins]
        if inside:
            correct = sum(rows[i].index(max(rows[i])) == labels[i] for i in inside) / len(inside)
            confidence = sum(max(rows[i]) for i in inside) / len(inside)
            total += len(inside) / len(rows) * abs(correct - confidence)
    return total


@pytest.mark.parametrize("lead", SHAPES)
@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (7, 3), (64, 5)])
def test_metrics_equal_their_definitions(lead: tuple[int, ...], rows: int, classes: int) -> None:
    probabilities, labels = draw(lead, rows, classes, seed=rows)
    found = metrics.summary(probabilities, labels)
    for name, slow in (
        ("accuracy", slow_accuracy),
        ("nll", slow_nll),
        ("ece", lambda p, y: slow_calibration_error(p, y, metrics.BINS)),
    ):
        assert found[name].shape == lead
        flat = probabilities.reshape(-1, rows, classes)
        expected = torch.tensor([slow(member.tolist(), labels.tolist()) for member in flat], dtype=torch.float64)
        torch.testing.assert_close(found[name].reshape(-1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bins", [1, 2, 4, 15])
def test_calibration_error_follows_the_number_of_bins(bins: int) -> None:
    probabilities, labels = draw((), 200, 4, seed=bins)
    expected = slow_calibration_error(probabilities.tolist(), labels.tolist(), bins)
    assert metrics.calibration_error(probabilities, labels, bins=bins).item() == pytest.approx(expected, abs=1e-12)


def test_an_edge_belongs_to_the_bin_below() -> None:
    # Confidences 0.5 (right) and 0.625 (wrong): one bin would give 0.0625, two bins on either side of 0.5 give 0.5625.
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.625, 0.25, 0.125]])
    labels = torch.tensor([0, 1])
    assert metrics.calibration_error(probabilities, labels, bins=2).item() == pytest.approx(0.25 + 0.3125)
    assert metrics.calibration_error(probabilities, labels, bins=1).item() == pytest.approx(0.0625)


def test_extremes() -> None:
    certain = torch.eye(3)
    right, wrong = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    assert metrics.accuracy(certain, right) == 1
    assert metrics.accuracy(certain, wrong) == 0
    assert metrics.negative_log_likelihood(certain, right) == 0
    assert metrics.negative_log_likelihood(certain, wrong) == math.inf
    assert metrics.calibration_error(certain, right) == 0
    assert metrics.calibration_error(certain, wrong) == 1


def test_metrics_map_over_members_with_vmap() -> None:
    probabilities, labels = draw((6,), 40, 5, seed=0)
    direct = metrics.summary(probabilities, labels)
    mapped = torch.vmap(metrics.summary, in_dims=(0, None))(probabilities, labels)
    for name, value in direct.items():
        torch.testing.assert_close(mapped[name], value)


@pytest.mark.parametrize("shapes", [((4, 3), (5,)), ((0, 3), (0,)), ((4, 3), (4, 1)), ((3,), (3,))])
def test_shapes_that_do_not_fit_are_named(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(FuncdeltaError, match=r"probabilities \(\.\.\., b, C\) with labels \(b,\)"):
        metrics.accuracy(torch.zeros(shapes[0]), torch.zeros(shapes[1], dtype=torch.long))


def test_less_than_one_bin_is_an_error() -> None:
    with pytest.raises(FuncdeltaError, match="write bins=15"):
        metrics.calibration_error(torch.ones(2, 1), torch.zeros(2, dtype=torch.long), bins=0)
