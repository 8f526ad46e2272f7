"""What the checks of every call cost, each timed by itself, as a share of one training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import funcdelta as fd
from funcdelta.apps.bench import contenders as c
from funcdelta.apps.bench.measure import Effort, Notify, Row, Table, Target, silent
from funcdelta.apps.bench.subjects import Shape, Subject
from funcdelta.apps.bench.timing import ONCE, Ratio, measured, spread, timed
from funcdelta.run.call import Call
from funcdelta.run.engines import visible
from funcdelta.run.inputs import Inputs
from funcdelta.run.layouts import key_of, layout_of
from funcdelta.run.opened import where

ALLOWED = 3.0
TIMES = 20
"""Checks take microseconds: so many in a row are timed together."""

STEP, ALL = "one training step, fold", "all checks"


def checks_table(subject: Subject, shape: Shape, effort: Effort, notify: Notify = silent) -> Table:
    """Microseconds of each check of a call, and of all of them as a share of a training step."""
    title = f"{subject.name} {shape} checks of every call"
    delta = c.lora(subject)
    stack = c.random_stack(delta, shape.members)
    tokens, goals = subject.tokens(shape), subject.goals(shape)
    checks = checks_of(delta, stack, tokens)
    c.engine_step(delta, stack, tokens, goals, "fold")  # what the first call builds is not part of a step
    seconds: dict[str, list[float]] = {label: [] for label in (STEP, *checks)}
    for index in range(effort.repeats):
        notify(f"{title}: round {index + 1} of {effort.repeats}")
        seconds[STEP].append(timed(lambda: c.engine_step(delta, stack, tokens, goals, "fold")))
        for label, check in checks.items():
            seconds[label].append(timed(lambda check=check: [check() for _ in range(TIMES)]) / TIMES)
    seconds[ALL] = [sum(each) for each in zip(*(seconds[label] for label in checks), strict=True)]
    rows = [Row(STEP, 1e6 * measured(seconds[STEP]).median, ONCE)]
    for label in (*checks, ALL):
        ratio = Ratio.of([value / step for value, step in zip(seconds[label], seconds[STEP], strict=True)])
        share = 100 * ratio.median
        target = Target.at_most("% of a step", ALLOWED, share) if label == ALL and subject.judged else None
        rows.append(Row(label, 1e6 * measured(seconds[label]).median, ratio, None, target, f"{share:.2f} %"))
    kept = {label: tuple(values) for label, values in seconds.items()}
    facts: dict[str, Any] = {"seconds": kept, "what": "checks of one call", "unit": "µs", "compared": ""}
    return Table(title, subject.name, "step", tuple(rows), spread(seconds[STEP]), **facts)


def checks_of(delta: fd.DeltaModel, stack: dict[str, Tensor], tokens: Tensor) -> dict[str, Callable[[], Any]]:
    """`{what is checked: how}`, as one fold of `stack` on `tokens` (n, b, s) does it."""
    program, plan = delta.program, delta.plan

    def read() -> Inputs:
        return delta._readings.read(tokens.shape[0], (), {"input_ids": tokens}, 0)

    with torch.no_grad():
        output = delta.apply_many(stack, input_ids=tokens, in_dims=0, engine="fold")
    inputs, skeleton = read(), program.skeletons.get(program.training)
    layout = layout_of(program, stack, inputs)

    def sites() -> None:
        call = Call(stack, layout=layout)
        for path in plan.attachments:
            where(call, path)

    def memory() -> None:
        skeleton.memory.follow()
        skeleton.memory.end_call()

    return {
        "the stack's leaves": lambda: delta._stack(stack)[0],
        "rows of the inputs": read,
        "the inputs' key": lambda: key_of(program, stack, inputs),
        "whether the backbone is the same": program.skeletons.check,
        "what modules remember": memory,
        "axes at the sites": sites,
        "sites reached, outputs": lambda: (program.is_verified(stack), visible(output)),
    }
