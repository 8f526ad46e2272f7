"""``funcdelta plan`` as asked for on the command line: its options, and its answer as a table or as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from typing import Any

from ..errors import ConfigError
from .devices import DEVICES, Device, this_cpu
from .formulas import Job
from .layouts import Placed, advice, layouts
from .sizes import Backbone, Member, from_config, from_numbers, with_vocabulary

UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}


def number(text: str) -> float:
    """A positive number: ``7e9``, ``7B``, ``80G``.

    >>> number("7B"), number("1.5e3")
    (7000000000.0, 1500.0)
    """
    unit = UNITS.get(text[-1:].lower(), 1.0)
    try:
        value = float(text[:-1] if text[-1:].lower() in UNITS else text) * unit
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"write a positive number such as 7e9, 7B or 80G, not {text!r}")
    return value


def whole(text: str) -> int:
    """A whole number of at least 1, written as in :func:`number`.

    >>> whole("1k")
    1000
    """
    value = number(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"write a whole number of at least 1, not {text!r}")
    return int(value)


def add_options(plan: argparse.ArgumentParser) -> None:
    """Add the options of ``funcdelta plan`` to its parser.

    >>> parser = argparse.ArgumentParser()
    >>> add_options(parser)
    >>> parser.parse_args(["--layers", "32", "--width", "4096"]).members
    1
    """
    what = plan.add_argument_group("the backbone and its members")
    what.add_argument("--backbone", metavar="FOLDER", help="folder with a model's config.json; weights are not read")
    what.add_argument("--parameters", metavar="N", type=whole, help="numbers of a backbone without a config: 7B")
    what.add_argument("--layers", metavar="L", type=whole, help="its layers (with --width)")
    what.add_argument("--width", metavar="D", type=whole, help="its width (with --layers)")
    what.add_argument("--vocabulary", metavar="V", type=whole, help="outputs of a model's head, where not counted")
    what.add_argument("--members", metavar="N", type=whole, default=1, help="how many deltas (1)")
    what.add_argument("--delta", metavar="TYPE", default="lora", help="the method, with --backbone (lora)")
    what.add_argument("--rank", metavar="R", type=whole, default=8, help="LoRA's rank (8)")
    what.add_argument("--modules", metavar="NAMES", help="its sites, with --backbone: q_proj,v_proj (the method's own)")
    how = plan.add_argument_group("a step")
    how.add_argument("--decode", action="store_true", help="generation, one token a row, instead of training")
    how.add_argument("--rows", metavar="B", type=whole, default=1, help="rows of each member (1)")
    how.add_argument("--length", metavar="S", type=whole, default=512, help="tokens of a row (512)")
    how.add_argument("--chunk", metavar="N", type=whole, help="members at a time (chunk_size)")
    how.add_argument("--trained-layers", metavar="K", type=whole, help="sites in the last K layers alone")
    where = plan.add_argument_group("devices")
    names = ", ".join(["cpu", *DEVICES])
    where.add_argument("--device", metavar="NAME", default="cpu", help=f"{names}; cpu is measured here (cpu)")
    where.add_argument("--devices", metavar="N", type=whole, default=1, help="how many (1)")
    where.add_argument("--shards", metavar="K", type=whole, help="parts of the backbone where both are sharded")
    where.add_argument("--flops", metavar="F", type=number, help="operations a second instead: 989T")
    where.add_argument("--bandwidth", metavar="BW", type=number, help="bytes a second of its memory: 3.35T")
    where.add_argument("--memory", metavar="BYTES", type=number, help="its memory: 80G")
    where.add_argument("--link", metavar="BW", type=number, help="bytes a second to other devices: 450G")
    where.add_argument("--efficiency", metavar="E", type=number, help="the part of both reached (0.5; cpu 0.75)")
    where.add_argument("--weight-bytes", metavar="W", type=whole, help="bytes a number of the backbone (2; cpu 4)")
    plan.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> str:
    """The answer to ``options``; raises ``FuncdeltaError`` where they do not fit together.

    >>> parser = argparse.ArgumentParser()
    >>> add_options(parser)
    >>> words = ["--layers", "2", "--width", "8", "--device", "h100", "--json"]
    >>> json.loads(run(parser.parse_args(words)))["layouts"][0]["fits"]
    True
    """
    backbone, member = _sizes(options)
    device = _device(options)
    job = Job(options.members, options.rows, options.length, options.chunk, options.trained_layers)
    found = layouts(backbone, member, job, device, options.devices, options.shards, options.decode)
    if options.json:
        return json.dumps(_data(backbone, member, device, job, found), indent=2)
    return _text(backbone, member, device, job, found, options)


def _sizes(options: argparse.Namespace) -> tuple[Backbone, Member]:
    numbers = (options.parameters, options.layers, options.width)
    if options.backbone is not None:
        if any(given is not None for given in numbers):
            raise ConfigError("--backbone tells the sizes: leave out --parameters, --layers and --width.")
        modules = options.modules.split(",") if options.modules else None
        return from_config(options.backbone, options.rank, modules, options.delta)
    if options.modules or options.delta != "lora":
        raise ConfigError("--modules and --delta need --backbone: without it members are LoRA on queries and values.")
    backbone, member = from_numbers(*numbers, rank=options.rank)
    return (with_vocabulary(backbone, options.vocabulary) if options.vocabulary else backbone), member


def _device(options: argparse.Namespace) -> Device:
    if options.device != "cpu" and options.device not in DEVICES:
        raise ConfigError(
            f"--device {options.device}: it is none of {', '.join(['cpu', *DEVICES])}; name the nearest one and give "
            f"--flops, --bandwidth, --memory and --link."
        )
    if options.efficiency is not None and options.efficiency > 1:
        raise ConfigError(f"--efficiency {options.efficiency:g}: write a part of the peak, at most 1.")
    fields = ("flops", "bandwidth", "memory", "link", "efficiency", "weight_bytes")
    given = {name: getattr(options, name) for name in fields if getattr(options, name) is not None}
    device = this_cpu() if options.device == "cpu" else DEVICES[options.device]
    return dataclasses.replace(device, **given)


def _data(backbone: Backbone, member: Member, device: Device, job: Job, found: list[Placed]) -> dict[str, Any]:
    rows = []
    for placed in found:
        facts = {key: value for key, value in vars(placed).items() if key != "cost"}
        cost = vars(placed.cost) | {"step_on_one_device": placed.cost.seconds}
        rows.append(cost | facts | {"total": placed.cost.total, "seconds": placed.seconds})
    parts = {"backbone": vars(backbone), "member": vars(member), "device": vars(device), "job": vars(job)}
    return parts | {"layouts": rows, "advice": advice(found)}


def _text(
    backbone: Backbone, member: Member, device: Device, job: Job, found: list[Placed], options: argparse.Namespace
) -> str:
    what = "a step of generation" if options.decode else "a step of training"
    lines = [
        f"{backbone.name}: {_short(backbone.parameters)} numbers in {backbone.layers} layers; a member has "
        f"{_short(member.trained)}",
        f"{job.members} members x {job.rows} rows x {job.length} tokens, {what}; {options.devices} x {device.name} "
        f"({_short(device.flops)}FLOP/s, {_short(device.bandwidth)}B/s, {_bytes(device.memory)}, "
        f"{device.efficiency:.0%} of it reached)",
        "",
    ]
    kinds = list(found[0].cost.memory)
    header = ["layout", "devices", "members each", *kinds, "total", "step", "bound by", "fits"]
    rows = [header]
    for placed in found:
        devices = str(placed.devices)
        if 1 < placed.shards < placed.devices:
            devices = f"{placed.devices // placed.shards} x {placed.shards}"
        memory = [_bytes(placed.cost.memory[kind]) for kind in kinds]
        bound = "exchange" if placed.exchange > placed.cost.seconds else placed.cost.bound
        fits = "yes" if placed.fits else "no"
        facts = [devices, str(placed.members), *memory, _bytes(placed.cost.total), _time(placed.seconds), bound, fits]
        rows.append([placed.layout, *facts])
    notes = [f"{placed.layout}: {placed.why_not}." for placed in found if placed.why_not]
    if any(placed.shards > 1 for placed in found):
        whole = _bytes(device.weight_bytes * backbone.parameters)
        notes.append(f"Memory is one device's. Each process also keeps the plain backbone in its host's: {whole}.")
    if options.decode:
        notes.append(
            "A step of generation is a lower bound: many small operations take longer than their bytes. On two CPU "
            "cores 2 to 11 times as long was measured."
        )
    return "\n".join([*lines, _table(rows), "", *notes, advice(found)])


def _table(rows: list[list[str]]) -> str:
    if importlib.util.find_spec("rich") is None:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    import io

    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    page = io.StringIO()
    Console(file=page, width=max(100, 14 * len(rows[0]))).print(table)
    return page.getvalue().rstrip("\n")


def _short(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "


def _bytes(value: float) -> str:
    return f"{_short(value)}B"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
