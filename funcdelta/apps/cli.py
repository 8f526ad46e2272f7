"""The command line: ``train`` runs the main job, ``bench`` measures, ``plan`` counts what a job costs, ``docs`` prints
the reference."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ..errors import FuncdeltaError
from ..files.configfile import funcdelta_version
from .costs.report import add_options

UNDOCUMENTED, WRONG, STOPPED = 1, 2, 130
"""Exit codes: a public name is not documented; something is wrong with what was asked for; Ctrl-C."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line.

    >>> Parser(prog="funcdelta train").parse_args(["--no-such"])
    Traceback (most recent call last):
    ...
    SystemExit: 2
    """

    def error(self, message: str) -> NoReturn:
        """Write ``message`` and leave with exit code 2."""
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(WRONG)


class Version(argparse.Action):
    """Prints the installed version, which is looked up only when asked for.

    >>> main(["--version"])
    funcdelta ...
    0
    """

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        """Print the version and leave with exit code 0."""
        print(f"{parser.prog} {funcdelta_version()}")
        raise SystemExit(0)


def build_parser() -> Parser:
    """The parser of all commands.

    >>> vars(build_parser().parse_args(["train", "--steps", "5"]))["steps"]
    5
    """
    parser = Parser(prog="funcdelta", description="Deltas as pure functions of their parameters.")
    parser.add_argument(
        "--version", action=Version, nargs=0, default=argparse.SUPPRESS, help="print the installed version and leave"
    )
    commands = parser.add_subparsers(dest="command", metavar="{train,bench,plan,docs}", required=True)
    train = commands.add_parser(
        "train",
        help="train a sweep of members on labelled texts, all in one folded run",
        description=(
            "Train a sweep of members on labelled texts, all in one folded run, then compare them, save and reload "
            "them. Without arguments: 3 learning rates x 4 seeds of LoRA on MiniLM-L6 and BBC News, in about two "
            "minutes on two cores. Needs the extra 'demo'."
        ),
        # An option left out keeps its default, or with --resume the value that the run began with.
        argument_default=argparse.SUPPRESS,
    )
    what = train.add_argument_group("what is trained on what")
    what.add_argument("--backbone", metavar="PATH", help="folder or hub id of a text encoder (MiniLM-L6)")
    what.add_argument("--data", metavar="FILE", help="csv (with a header) or jsonl with labelled texts (BBC News)")
    what.add_argument("--test-data", metavar="FILE", help="test texts (default: a part of the data is set aside)")
    what.add_argument("--text", metavar="NAME", help="the column of texts (text)")
    what.add_argument("--label", metavar="NAME", help="the column of labels (label)")
    what.add_argument("--delta", metavar="TYPE", help="the method: lora, adapter, bitfit ... (lora)")
    what.add_argument(
        "--set", metavar="NAME=VALUE", action="append", help="a field of the method's config; may be repeated"
    )
    what.add_argument("--layers", metavar="K", type=_count, help="adapt the last K layers (2)")
    how = train.add_argument_group("how")
    how.add_argument(
        "--sweep",
        metavar="NAME=VALUE,VALUE",
        action="append",
        help="one value a member of lr or weight_decay; may be repeated (lr=3e-3,5e-3,7e-3)",
    )
    how.add_argument("--seeds", metavar="N", type=_count, help="members for each combination (4)")
    how.add_argument("--steps", metavar="N", type=_count, help="steps of every member (120)")
    how.add_argument("--batch-size", metavar="N", type=_count, help="texts a member sees at each step (4)")
    how.add_argument("--length", metavar="N", type=_count, help="tokens of a text; the rest is cut (48)")
    how.add_argument("--dropout", action="store_true", help="train with dropout (of backbone and delta)")
    how.add_argument("--threads", metavar="N", type=_count, help="threads that torch uses")
    run = train.add_argument_group("the run")
    run.add_argument("--out", metavar="FOLDER", type=Path, help="where to write (./funcdelta-run)")
    run.add_argument("--resume", action="store_true", help="continue the run in --out; the result is the same")
    run.add_argument("--quiet", action="store_true", help="print nothing but errors")
    commands.add_parser("bench", help="time members by fold, vmap, loop and PEFT side by side", add_help=False)
    plan = commands.add_parser(
        "plan",
        help="how much memory and how many operations n members on one backbone take",
        description=(
            "Memory and operations of one step of training n members on one backbone, counted by torch's counters in "
            "a run on the meta device. No weights are read and nothing is computed. Times are not predicted: "
            "'funcdelta bench' measures them."
        ),
    )
    add_options(plan)
    docs = commands.add_parser(
        "docs",
        help="the reference of all public names, as pages or a name at a time",
        description=(
            "The reference of all public names, made from their docstrings and signatures. It refuses to write pages "
            "while a public name has no docstring, no types or no example, and lists those names."
        ),
    )
    docs.add_argument(
        "what",
        metavar="NAME|FOLDER",
        nargs="?",
        help="a public name to print, such as LoraConfig or optim.adamw; else the folder to write Markdown pages to",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 or 2 after an error, 130 after Ctrl-C.

    >>> main(["train", "--data", "no-such.csv", "--quiet"])
    2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:
        from .bench import main as bench

        return bench(arguments[1:])
    try:
        options = build_parser().parse_args(arguments)
        if options.command == "plan":
            return _plan(options)
        if options.command == "docs":
            return _docs(options)
        given = vars(options)
        given.pop("command")
        return _train(given)
    except KeyboardInterrupt:
        print("funcdelta: stopped.", file=sys.stderr)
        return STOPPED
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else WRONG


def _plan(options: argparse.Namespace) -> int:
    from .costs.report import run as answer

    try:
        print(answer(options))
    except (FuncdeltaError, OSError, ValueError) as error:
        print(f"funcdelta plan: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG
    return 0


def _docs(options: argparse.Namespace) -> int:
    from .docs.command import UndocumentedError, run

    try:
        print(run(options.what))
    except UndocumentedError as error:
        print(f"funcdelta docs: these public names are not documented:\n{error}", file=sys.stderr)
        return UNDOCUMENTED
    except (FuncdeltaError, OSError) as error:
        print(f"funcdelta docs: {error}", file=sys.stderr)
        return WRONG
    return 0


def _train(given: dict[str, object]) -> int:
    from .train import InterruptedRunError, Options, run

    how = {name: given.pop(name) for name in ("out", "resume", "quiet") if name in given}
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    try:
        run(Options(given=settings, **how))  # pyright: ignore[reportArgumentType] - argparse made the types
    except InterruptedRunError as stopped:
        print(f"funcdelta train: {stopped}", file=sys.stderr)
        return STOPPED
    except (FuncdeltaError, OSError) as error:
        # The library's errors may list names over several lines.
        print(f"funcdelta train: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG
    return 0


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"write a whole number of at least 1, not {text!r}")
    return number
