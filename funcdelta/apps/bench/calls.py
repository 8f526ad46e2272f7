"""How many functions of this library a call passes through, and in how many files: what a reader has to follow."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import funcdelta as fd
from funcdelta.apps.bench import contenders as c
from funcdelta.apps.bench.measure import Notify, Row, Table, Target, silent
from funcdelta.apps.bench.subjects import Shape, tiny_bert
from funcdelta.apps.bench.timing import Ratio

PACKAGE = Path(fd.__file__).parent
BENCH = Path(__file__).parent

Step = Callable[[], Any]


@dataclass(frozen=True)
class Count:
    """Calls of Python functions of this library, and the files that they are in.

    `elsewhere` counts calls into Python's own modules, beyond those of the bare backbone.
    """

    calls: int
    files: int
    elsewhere: int = 0


BEFORE = {"apply": Count(114, 15), "fold": Count(240, 21)}
ALLOWED = {"apply": Count(60, 8), "fold": Count(120, 12)}


def calls_table(notify: Notify = silent) -> Table:
    """What a later `apply` and a later fold call, in a BERT with LoRA at 4 sites."""
    subject, shape = tiny_bert(), Shape(3, 2, 5)
    delta = c.lora(subject)
    title = f"calls of functions in a later call, {subject.name} with {len(delta.sites)} sites"
    notify(title)
    stack, tokens = c.random_stack(delta, shape.members), subject.tokens(shape)[0]
    one, wide = fd.take(stack, 0), tokens.repeat(shape.members, 1)
    found = {
        "apply": counted(lambda: delta.apply(one, input_ids=tokens), lambda: subject.backbone(input_ids=tokens)),
        "fold": counted(
            lambda: delta.apply_many(stack, input_ids=tokens, engine="fold"), lambda: subject.backbone(input_ids=wide)
        ),
    }
    rows = []
    for label, count in found.items():
        for what in ("calls", "files"):
            value, before, allowed = (getattr(each, what) for each in (count, BEFORE[label], ALLOWED[label]))
            note = f"before: {before}"
            note += f"; {count.elsewhere} more in Python's own modules" if what == "calls" else ""
            ratio, target = Ratio(*[value / before] * 3), Target.at_most(what, allowed, value)
            rows.append(Row(f"{label}, {what}", value, ratio, None, target, note))
    return Table(title, subject.name, "before", tuple(rows), what="one call", unit="", compared="")


def counted(step: Step, bare: Step) -> Count:
    """How many functions of this library a later `step` calls, and in how many files."""
    files = [Path(code.co_filename) for code in called(step)]
    own = [file for file in files if file.is_relative_to(PACKAGE) and not file.is_relative_to(BENCH)]
    others = sum(map(_is_elsewhere, files)) - sum(_is_elsewhere(Path(code.co_filename)) for code in called(bare))
    return Count(len(own), len(set(own)), others)


def called(step: Step) -> list[CodeType]:
    """The Python functions that `step` calls, torch's and Transformers' too, in order; after one call of it.

    >>> [code.co_name for code in called(lambda: max([1, 2], key=lambda x: -x))]
    ['<lambda>', '<lambda>', '<lambda>']
    """
    found: list[CodeType] = []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            found.append(frame.f_code)

    step()
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(before)
    return found


def _is_elsewhere(file: Path) -> bool:
    return not {"torch", "transformers", PACKAGE.name} & {*file.parts}
