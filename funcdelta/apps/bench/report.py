"""The tables as rich text, JSON and a plot. Rich and matplotlib are imported where they are used."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from funcdelta.apps.bench.measure import BARE, Row, Table
from funcdelta.apps.bench.subjects import BenchError
from funcdelta.apps.bench.timing import Ratio

if TYPE_CHECKING:
    import rich.table


def machine() -> dict[str, Any]:
    """What a reader must know about the machine: torch version, threads, cores, processor, system."""
    return {
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "peft": _version("peft"),
        "funcdelta": _version("funcdelta"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "processor": _processor(),
        "platform": platform.platform(),
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name as Linux gives it, else Python's."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def heading(facts: dict[str, Any]) -> str:
    """One line about the machine."""
    return (
        f"torch {facts['torch']}, {facts['threads']} threads of {facts['cpu_count']} cores "
        f"({facts['processor']}), transformers {facts['transformers']}, peft {facts['peft']}, "
        f"python {facts['python']}"
    )


def rich_table(table: Table) -> rich.table.Table:
    """The table as rich shows it: medians, paired ratios with their range, targets."""
    from rich.table import Table as RichTable

    caption = (
        f"{table.yardstick}{f' spreads by {100 * table.spread:.0f} %' if table.spread else ''}"
        + (f", measured {table.attempts} times" if table.attempts > 1 else "")
        + (" [bold red]NOISY: run again on a quiet machine[/]" if table.noisy else "")
        + f"; {table.compared} agree to {table.disagreement:.0e}"
    )
    shown = RichTable(title=table.title, caption=caption if table.compared else None)
    shown.add_column(table.what)
    shown.add_column(table.unit, justify="right")
    # Where PEFT itself is the yardstick, one column is enough.
    against_yardstick = not table.yardstick.startswith("PEFT")
    if against_yardstick:
        shown.add_column("/ bare" if table.yardstick == BARE else f"/ {table.yardstick}", justify="right")
    against_peft = any(row.to_peft is not None for row in table.rows)
    if against_peft:
        shown.add_column("/ PEFT", justify="right")
    shown.add_column("target")
    shown.add_column("met")
    for row in table.rows:
        cells = [row.label + (f" [dim]({row.note})[/]" if row.note else ""), f"{row.value:.4g}"]
        if against_yardstick:
            cells.append(_ratio(row.to_yardstick))
        if against_peft:
            cells.append(_ratio(row.to_peft))
        shown.add_row(*cells, *_target(row))
    return shown


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    if ratio.low == ratio.high:
        return _number(ratio.median)
    return f"{_number(ratio.median)} [dim]({_number(ratio.low)}-{_number(ratio.high)})[/]"


def _number(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _target(row: Row) -> tuple[str, str]:
    if row.target is None:
        return "", ""
    verdict = "[green]yes[/]" if row.target.met else "[red]no[/]"
    return f"{row.target.text}: {row.target.value:.2f}", verdict


def write_json(path: Path, facts: dict[str, Any], tables: Sequence[Table]) -> None:
    """Everything measured, every second of every round included, as JSON."""
    body = {
        "machine": facts,
        "tables": [{**dataclasses.asdict(table), "noisy": table.noisy} for table in tables],
    }
    path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def plot(path: Path, facts: dict[str, Any], tables: Sequence[Table]) -> None:
    """Bars of each contender's ratio to its yardstick, one panel a table."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError("--plot needs matplotlib: pip install 'funcdelta[demo]'") from error
    figure = Figure(figsize=(9, 2.2 * len(tables) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    for panel, table in zip(panels, tables, strict=True):
        drawn = [row for row in table.rows if row.to_yardstick is not None]
        values = [row.to_yardstick.median for row in drawn if row.to_yardstick is not None]
        bars = panel.barh([row.label for row in drawn], values, color="tab:blue")
        panel.bar_label(bars, [f"{value:.2f}" for value in values], padding=3)
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_xlim(0, 1.15 * max(values))
        panel.invert_yaxis()
        panel.set_title(
            f"{table.title}: {table.unit} / {table.yardstick}" + (" (noisy)" if table.noisy else ""), loc="left"
        )
    figure.suptitle(heading(facts), fontsize=8)
    figure.savefig(path, dpi=120)
