"""Which tables there are, on which backbones, at which sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from funcdelta.apps.bench.core import core_tables
from funcdelta.apps.bench.experts import SHAPE as EXPERTS_SHAPE
from funcdelta.apps.bench.experts import experts_tables
from funcdelta.apps.bench.measure import Effort, Notify, Table, silent
from funcdelta.apps.bench.memory import memory_table
from funcdelta.apps.bench.meta import meta_table
from funcdelta.apps.bench.routed import decode_table, forward_table, resident_table
from funcdelta.apps.bench.subjects import Shape, Subject
from funcdelta.apps.bench.training import members_table, single_table
from funcdelta.apps.bench.trunk import trunk_tables
from funcdelta.apps.bench.upkeep import upkeep_tables

META = Shape(8, 2, 16)
Load = Callable[[], Subject]


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        shapes: members, rows and tokens of the tables of many members.
        singles: rows and tokens of a single step.
        routed: rows of the routed tables.
        residents: members of the stacks that rows are picked from.
        meta: tasks, rows and tokens of a MAML step.
        points: of the cost curve of members that see one batch; `None`: all.
        layers: of the narrow Llama whose calls are measured besides their arithmetic.
        experts, widths: members, rows and tokens of a step of models with experts, and their widths.
    """

    shapes: tuple[Shape, ...] = ()
    singles: tuple[tuple[int, int], ...] = ((1, 16), (8, 64))
    routed: tuple[int, ...] = (16, 64)
    residents: tuple[int, ...] = (5, 100, 1000)
    meta: Shape = META
    points: int | None = None
    layers: int = 40
    experts: Shape = EXPERTS_SHAPE
    widths: tuple[int, ...] = (64, 256)


def run(
    names: Sequence[str],
    subjects: Mapping[str, Load],
    speakers: Mapping[str, Load],
    sizes: Sizes,
    effort: Effort,
    notify: Notify = silent,
) -> Iterator[Table]:
    """The tables of these names, each as soon as it is measured.

    `subjects` are trained, `speakers` are language models that are routed.
    """
    # A pass of a language model or a MAML step is slow: with fewer rounds the whole command takes minutes.
    fewer = replace(effort, repeats=max(1, effort.repeats // 2), attempts=1)
    for number, (name, load) in enumerate(subjects.items()):
        if not {"members", "memory", "single", "meta", "core"} & set(names):
            break
        notify(f"loading {name}")
        subject = load()
        if "members" in names:
            for shape in sizes.shapes:
                yield members_table(subject, shape, effort, notify)
        # What follows from arithmetic and the autograd tape is the same for all backbones of a size: one is enough.
        if "memory" in names and number == 0 and sizes.shapes:
            yield memory_table(subject, sizes.shapes[0], notify)
        if "single" in names:
            for index, (rows, length) in enumerate(sizes.singles):
                # The overhead of a call does not depend on the batch: once a subject is enough.
                yield single_table(subject, rows, length, effort, notify, overhead=index == 0)
        if "meta" in names and number == 0:
            yield meta_table(subject, sizes.meta, fewer, notify)
        if "core" in names and number == 0 and sizes.shapes:
            yield from core_tables(subject, sizes.shapes[0], sizes.layers, effort, notify)
            yield from upkeep_tables(subject, sizes.shapes[0], effort, notify)
    if "experts" in names:
        yield from experts_tables(sizes.widths, sizes.experts, effort, notify)
    if "trunk" in names:
        yield from trunk_tables(subjects, fewer, sizes.points, notify)
    for name, load in speakers.items() if "routed" in names else ():
        notify(f"loading {name}")
        subject = load()
        for rows in sizes.routed:
            yield forward_table(subject, rows, fewer, notify)
            yield decode_table(subject, rows, fewer, notify)
        yield resident_table(subject, sizes.residents, effort, notify)
