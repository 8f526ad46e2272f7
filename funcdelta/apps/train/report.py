"""The results of a run: figures as JSON-ready data, and the same as a table on the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ... import metrics
from .sweep import Member

PARTS = ("validation", "test")


def results(
    members: Sequence[Member], probabilities: Mapping[str, Tensor], labels: Mapping[str, Tensor], losses: Tensor
) -> dict[str, Any]:
    """Metrics of every member, the best one, and the ensemble, on ``validation`` and ``test``.

    The ensemble is the mean of the members' probabilities, without members whose probabilities are not finite; those
    are listed in ``diverged``. The best member has the highest validation accuracy, then the lowest validation negative
    log-likelihood; the test part plays no role in the choice.

    Shapes: ``probabilities`` (n, rows, C) and ``labels`` (rows,) by part, ``losses`` (steps, n).

    >>> import torch
    >>> from funcdelta.apps.train.sweep import grid
    >>> p = torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]]])
    >>> y = torch.tensor([0])
    >>> found = results(grid(["lr=0.1"], seeds=2), {"validation": p, "test": p}, {"validation": y, "test": y}, p[0])
    >>> found["best"], [round(x, 2) for x in found["ensemble"]["test"].values()]
    (0, [1.0, 0.6, 0.45])
    """
    figures = {part: metrics.summary(probabilities[part], labels[part]) for part in PARTS}
    finite = [all(bool(probabilities[part][i].isfinite().all()) for part in PARTS) for i in range(len(members))]
    rows = []
    for i, member in enumerate(members):
        row: dict[str, Any] = {"member": member.index, **asdict(member)}
        del row["index"]
        for part in PARTS:
            row[part] = {name: _number(value[i]) for name, value in figures[part].items()}
        row["loss"] = _number(losses[-1, i]) if len(losses) else None
        rows.append(row)
    sound = [i for i, good in enumerate(finite) if good]
    best = max(sound, key=lambda i: _quality(rows[i]["validation"]), default=None)
    ensemble = None
    if sound:
        means = {part: probabilities[part][sound].mean(0) for part in PARTS}
        ensemble = {
            part: {name: _number(value) for name, value in metrics.summary(means[part], labels[part]).items()}
            for part in PARTS
        }
    diverged = [i for i, good in enumerate(finite) if not good]
    history = [[_number(loss) for loss in step] for step in losses]
    return {"members": rows, "best": best, "ensemble": ensemble, "diverged": diverged, "losses": history}


def _quality(figures: Mapping[str, float | None]) -> tuple[float, float]:
    nll = figures["nll"]
    return figures["accuracy"] or 0.0, -(math.inf if nll is None else nll)


def _number(value: Tensor) -> float | None:
    """A figure for JSON, which has neither NaN nor infinity."""
    number = float(value)
    return number if math.isfinite(number) else None


def show(report: Mapping[str, Any]) -> None:
    """Print the table of a report: the members, the best one, the ensemble, and the speed."""
    from rich.console import Console
    from rich.table import Table

    swept = ["lr", "weight_decay"] if len({row["weight_decay"] for row in report["members"]}) > 1 else ["lr"]
    table = Table()
    names = {"lr": "learning rate", "weight_decay": "weight decay"}
    heads = ["member", *(names[name] for name in swept), "seed", "validation", "test", "NLL", "ECE"]
    for head in heads:
        table.add_column(head, justify="right")
    for row in report["members"]:
        style = "bold green" if row["member"] == report["best"] else None
        cells = [str(row["member"]), *(f"{row[name]:g}" for name in swept), str(row["seed"]), *_figures(row)]
        table.add_row(*cells, style=style)
    table.add_section()
    blank = [""] * len(swept)
    if report["best"] is not None:
        table.add_row("best", *blank, str(report["best"]), *_figures(report["members"][report["best"]]))
        table.add_row("ensemble", *blank, "all", *_figures(report["ensemble"]), style="bold")
    console = Console()
    console.print(_title(report), highlight=False, soft_wrap=True)
    console.print(table)
    console.print(_notes(report), highlight=False, soft_wrap=True)


def _title(report: Mapping[str, Any]) -> str:
    data, run = report["data"], report["settings"]
    sizes = f"{data['train']} training, {data['validation']} validation, {data['test']} test texts"
    return (
        f"{run['delta']}, {len(report['members'])} members in one folded run; {sizes}, {len(data['classes'])} classes"
    )


def _notes(report: Mapping[str, Any]) -> str:
    speed, reloaded = report["speed"], report["reloaded"]
    lines = [
        "validation, test: accuracy; NLL: negative log-likelihood and ECE: calibration error, on the test texts. The "
        "best member is chosen on the validation texts.",
        f"{_rate(report)}training {speed['training_seconds']:.0f} s, evaluation "
        f"{speed['evaluation_seconds']:.0f} s, in all {speed['total_seconds']:.0f} s.",
        f"Saved, reloaded and run again: the same validation accuracy for {reloaded['same_accuracy']} of "
        f"{len(report['members'])} members.",
    ]
    if report["diverged"]:
        lines.append(f"Diverged, left out of the ensemble: members {report['diverged']}; lower their learning rate.")
    return "\n".join(lines)


def _rate(report: Mapping[str, Any]) -> str:
    speed, n = report["speed"], len(report["members"])
    # A run resumed after its last step has none to time.
    if speed["steps_per_second"] is None:
        return ""
    return (
        f"{speed['steps_per_second']:.2f} steps/s of {n} members "
        f"({speed['member_steps_per_second']:.1f} member steps/s); "
    )


def _figures(row: Mapping[str, Any]) -> list[str]:
    test = row["test"]
    values = (row["validation"]["accuracy"], test["accuracy"], test["nll"], test["ece"])
    return ["diverged" if value is None else f"{value:.3f}" for value in values]
