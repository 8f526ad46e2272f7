"""`funcdelta bench`: many LoRA members trained, routed and meta-learnt, beside the bare backbone and PEFT."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

TABLES = ("members", "memory", "routed", "trunk", "single", "meta", "core", "experts")
ASKED_FOR = ("routed", "core", "experts")
"""Tables that are measured only where they are named."""
DEFAULT_SHAPES = ("64,1,16", "32,2,32", "8,8,64")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0 when measured, 1 when contenders disagree, 2 for wrong arguments.

    >>> main(["--shapes", "64,1"])  # standard error says why
    2
    """
    options = parser().parse_args(argv)
    # The parser needs no torch: help and usage errors come at once.
    from funcdelta.apps.bench.measure import DisagreementError
    from funcdelta.apps.bench.subjects import BenchError

    try:
        _run(options)
    except DisagreementError as error:
        print(f"funcdelta bench: {error}", file=sys.stderr)
        return 1
    except BenchError as error:
        print(f"funcdelta bench: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's arguments.

    >>> parser().parse_args(["--quick"]).model
    'minilm'
    """
    result = argparse.ArgumentParser(
        prog="funcdelta bench",
        description="Time one training step of n LoRA members by fold, vmap, loop and PEFT against the bare "
        "backbone's forward and input gradient on the same tokens, and a single step against PEFT and "
        "hand-written LoRA; rows that each have a member of their own, in a forward and in greedy decoding; a "
        "second-order MAML step over tasks; an ensemble on one batch with deltas on the last layers; memory; what "
        "starting and calls cost besides arithmetic (core); and models with experts. "
        "Ratios are medians of ratios paired within a round; a table whose yardstick spreads by more than 10 % is "
        "measured again, and marked if it stays so.",
    )
    result.add_argument(
        "--table",
        nargs="+",
        choices=TABLES,
        default=[name for name in TABLES if name not in ASKED_FOR],
        metavar="NAME",
        help=f"of {', '.join(TABLES)} (all but {', '.join(ASKED_FOR)})",
    )
    result.add_argument(
        "--model",
        choices=("minilm", "llama", "smollm", "tiny", "all"),
        default="minilm",
        help="(minilm, and smollm for routed rows); all: minilm, llama and smollm",
    )
    result.add_argument(
        "--shapes",
        nargs="*",
        default=list(DEFAULT_SHAPES),
        metavar="n,b,s",
        help="members, rows, tokens (several)",
    )
    result.add_argument("--thousand", action="store_true", help="also (1024,1,8)")
    result.add_argument("--repeats", type=_positive, default=5, help="rounds a table (5)")
    result.add_argument("--attempts", type=_positive, default=2, help="tries for a quiet yardstick (2)")
    result.add_argument("--threads", type=_positive, default=None, help="torch threads (torch's own default)")
    result.add_argument("--json", type=Path, default=None, metavar="FILE", help="write every measured second")
    result.add_argument("--plot", type=Path, default=None, metavar="FILE", help="write a picture of the ratios")
    result.add_argument("--quick", action="store_true", help="3 rounds, first size only, one attempt")
    return result


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


def _run(options: argparse.Namespace) -> None:
    from funcdelta.apps.bench import measure, report, tables
    from funcdelta.apps.bench.subjects import SPEAKERS, SUBJECTS, BenchError, Shape

    try:
        from rich.console import Console
    except ImportError as error:
        raise BenchError("the tables need rich: pip install 'funcdelta[demo]'") from error
    for path in (options.json, options.plot):
        # Better found out before minutes of measuring than after.
        if path is not None and not path.absolute().parent.is_dir():
            raise BenchError(f"{path}: the folder {path.absolute().parent} does not exist")
    try:
        shapes = [Shape.parse(text) for text in options.shapes]
    except ValueError as error:
        raise BenchError(f"--shapes: {error}") from error
    effort = measure.Effort(options.repeats, options.attempts)
    sizes = tables.Sizes()
    if options.quick:
        shapes, effort = shapes[:1], measure.Effort(3, 1)
        sizes = replace(sizes, singles=sizes.singles[:1], routed=sizes.routed[:1], points=1, widths=sizes.widths[:1])
    if options.thousand:
        shapes.append(Shape(1024, 1, 8))
    names = {"all": ("minilm", "llama", "smollm"), "minilm": ("minilm", "smollm")}.get(options.model, (options.model,))
    chosen = {name: SUBJECTS[name] for name in names if name in SUBJECTS}
    speakers = {name: SPEAKERS[name] for name in names if name in SPEAKERS}
    # A file or a pipe has no width to keep to, and wrapped cells are hard to read.
    console, errors = Console(width=None if sys.stdout.isatty() else 140), Console(stderr=True)
    # Libraries warn about one another while they are imported.
    for library in ("torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    measured: list[measure.Table] = []
    with _threads(options.threads):
        facts = report.machine()
        console.print(report.heading(facts))
        with errors.status("starting") as status:
            sizes = replace(sizes, shapes=tuple(shapes))
            for table in tables.run(options.table, chosen, speakers, sizes, effort, status.update):
                measured.append(table)
                console.print(report.rich_table(table))
    if options.json is not None:
        report.write_json(options.json, facts, measured)
    if options.plot is not None:
        report.plot(options.plot, facts, measured)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
