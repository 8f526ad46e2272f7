"""A picture of a run: how each member's loss fell, and how well each member does on the test texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SMOOTHING = 0.8
"""The weight of past losses in the running mean that is drawn."""


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: the training losses on the left, the test accuracies by learning rate on the right."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rates = sorted({row["lr"] for row in report["members"]})
    colors = {rate: colormaps["viridis"](0.85 * place / max(1, len(rates) - 1)) for place, rate in enumerate(rates)}
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    labelled: set[float] = set()
    for row in report["members"]:
        rate = row["lr"]
        label = None if rate in labelled else f"learning rate {rate:g}"
        labelled.add(rate)
        curve = _smooth([step[row["member"]] for step in report["losses"]])
        left.plot(range(1, len(curve) + 1), curve, color=colors[rate], label=label, linewidth=1)
        if row["test"]["accuracy"] is not None:
            right.plot(f"{rate:g}", row["test"]["accuracy"], "o", color=colors[rate], alpha=0.7)
    left.set(xlabel="step", ylabel="training loss (running mean)", yscale="log")
    left.legend()
    if report["ensemble"] is not None:
        best = report["members"][report["best"]]["test"]["accuracy"]
        right.axhline(report["ensemble"]["test"]["accuracy"], color="black", label="ensemble of all members")
        right.axhline(best, color="gray", linestyle="--", label="best member (by validation)")
        right.legend(loc="lower right")
    right.set(xlabel="learning rate", ylabel="test accuracy")
    # Dates and versions in the file would make equal runs differ.
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _smooth(values: list[float | None]) -> list[float]:
    """The running mean, corrected for its start, up to the first loss that is not finite."""
    mean, weight, found = 0.0, 0.0, []
    for value in values:
        if value is None:
            break
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        found.append(mean / weight)
    return found
