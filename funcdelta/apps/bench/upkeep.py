"""What a sweep costs besides its passes through the model: the optimiser's step, and drawing its fresh members.

Members are as in the other tables of the same shape; drawn are a thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import funcdelta as fd
from funcdelta.apps.bench import contenders as c
from funcdelta.apps.bench.measure import NOISE, DisagreementError, Effort, Notify, Row, Table, Target, in_milliseconds
from funcdelta.apps.bench.subjects import Shape, Subject
from funcdelta.apps.bench.timing import Ratio, Samples, interleave, quiet

FUSED = "torch.optim.AdamW(fused=True)"
UPDATE, STEP, DONATED = "update, apply_updates", "step", "step, donate=True"
STEP_ALLOWED, STEP_BEFORE = 1.3, 7.3
CLOSE = 1e-5

RAW, INIT = "torch.randn, as many numbers", "delta.init"
DRAWN, INIT_ALLOWED, INIT_BEFORE = 1000, 2, 7.7

LR = 1e-3


def upkeep_tables(
    subject: Subject, shape: Shape, effort: Effort, notify: Notify = lambda _: None, drawn: int = DRAWN
) -> Iterator[Table]:
    """Both tables of this file.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> [table.what for table in upkeep_tables(tiny(), Shape(2, 1, 4), Effort(repeats=1, attempts=1), drawn=3)]
    ['one step of the optimiser', 'fresh members']
    """
    yield step_table(subject, shape, effort, notify)
    yield fresh_table(subject, drawn, effort, notify)


def step_table(subject: Subject, shape: Shape, effort: Effort, notify: Notify = lambda _: None) -> Table:
    """AdamW's step of a stack, beside torch's fused one, in place, on the same tensors.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> [row.label for row in step_table(tiny(), Shape(2, 1, 4), Effort(repeats=1, attempts=1)).rows]
    ['torch.optim.AdamW(fused=True)', 'update, apply_updates', 'step', 'step, donate=True']
    """
    title = f"{subject.name}, {shape.members} members, a step of AdamW"
    delta = c.lora(subject)
    stack = c.random_stack(delta, shape.members)
    rng = torch.Generator().manual_seed(1)
    grads = {name: torch.randn(x.shape, generator=rng) for name, x in stack.items() if delta.trainable(name)}
    leaves = {name: nn.Parameter(stack[name].clone()) for name in grads}
    for name, leaf in leaves.items():
        leaf.grad = grads[name]
    fused = torch.optim.AdamW(leaves.values(), lr=LR, fused=True)
    ways = {label: _walk(label, stack, grads) for label in (UPDATE, STEP, DONATED)}
    notify(f"{title}: comparing params")
    fused.step()
    error = max(_apart(way(), leaves, stack) for way in ways.values())
    # A NaN compares false with everything: it must not pass for agreement.
    if not error <= CLOSE:
        raise DisagreementError(f"{title}: the steps differ from torch's by {error:.1e} of the way that they go")
    notify(f"{title}: timing")
    repeats = 4 * effort.repeats  # a step is short: more rounds steady the medians
    samples, attempts = quiet(lambda: interleave(fused.step, ways, repeats), NOISE, effort.attempts)
    found = samples.ratio(DONATED).median
    target = Target.at_most("x torch's fused step", STEP_ALLOWED, found) if subject.judged else None
    notes = {UPDATE: f"before: {STEP_BEFORE:g} x", STEP: "new tensors", DONATED: "into the tensors that it is given"}
    rows = [Row(FUSED, in_milliseconds(samples.yardstick), Ratio(1.0, 1.0, 1.0))]
    for label in ways:
        value, ratio = in_milliseconds(samples.times[label]), samples.ratio(label)
        rows.append(Row(label, value, ratio, None, target if label == DONATED else None, notes[label]))
    return _table(title, subject, FUSED, rows, samples, attempts, error, "one step of the optimiser", "params")


def _walk(label: str, stack: dict[str, Tensor], grads: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """One step after another, each from where the last one ended."""
    optimiser = fd.optim.adamw(LR)
    params = {name: x.clone() if name in grads else x for name, x in stack.items()}
    state: Any = optimiser.init(params, n=fd.members(stack))

    def step() -> dict[str, Tensor]:
        nonlocal params, state
        if label == UPDATE:
            updates, state = optimiser.update(grads, state, params)
            params = fd.optim.apply_updates(params, updates)
        else:
            params, state = optimiser.step(grads, state, params, donate=label == DONATED)
        return params

    return step


def _apart(found: dict[str, Tensor], expected: dict[str, nn.Parameter], start: dict[str, Tensor]) -> float:
    """How far two ends of one step lie apart, as a share of the way from where it began."""
    with torch.no_grad():
        way = max(float((leaf - start[name]).abs().max()) for name, leaf in expected.items())
        # A sum in float32 is rounded to its own size, which is none of the step's.
        rounding = {name: torch.finfo(leaf.dtype).eps * leaf.abs() for name, leaf in expected.items()}
        apart = ((found[name] - leaf).abs() - rounding[name] for name, leaf in expected.items())
        return max(float(each.clamp_min(0).max()) for each in apart) / way


def fresh_table(subject: Subject, members: int, effort: Effort, notify: Notify = lambda _: None) -> Table:
    """A stack of fresh members, beside one draw of as many numbers at once.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> [row.label for row in fresh_table(tiny(), 3, Effort(repeats=1, attempts=1)).rows]
    ['torch.randn, as many numbers', 'delta.init']
    """
    delta = c.lora(subject)
    numbers = sum(leaf.numel() for leaf in delta.init(0, n=members).values())
    title = f"{subject.name}, {members} fresh members, {numbers / 1e6:.1f} million numbers"
    notify(f"{title}: timing")
    rng = torch.Generator().manual_seed(0)
    ways = {INIT: lambda: delta.init(0, n=members)}
    samples, attempts = quiet(
        lambda: interleave(lambda: torch.randn(numbers, generator=rng), ways, effort.repeats), NOISE, effort.attempts
    )
    ratio = samples.ratio(INIT)
    target = Target.at_most("x one draw", INIT_ALLOWED, ratio.median) if subject.judged else None
    rows = [
        Row(RAW, in_milliseconds(samples.yardstick), Ratio(1.0, 1.0, 1.0)),
        Row(INIT, in_milliseconds(samples.times[INIT]), ratio, None, target, f"before: {INIT_BEFORE:g} x"),
    ]
    return _table(title, subject, RAW, rows, samples, attempts, 0.0, "fresh members", "")


def _table(
    title: str,
    subject: Subject,
    yardstick: str,
    rows: list[Row],
    samples: Samples,
    attempts: int,
    error: float,
    what: str,
    compared: str,
) -> Table:
    seconds = {yardstick: samples.yardstick, **samples.times}
    spread, error = samples.spread, round(error, 9)
    return Table(title, subject.name, yardstick, tuple(rows), spread, attempts, error, seconds, what, "ms", compared)
