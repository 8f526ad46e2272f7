"""What a sweep costs besides its passes through the model: the optimiser's step, and drawing its fresh members.

The optimiser steps the members of the other tables of that shape; a thousand members are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import funcdelta as fd
from funcdelta.apps.bench import contenders as c
from funcdelta.apps.bench.measure import Effort, Notify, Race, Table, Target, held, silent
from funcdelta.apps.bench.subjects import Shape, Subject
from funcdelta.apps.bench.timing import Samples

FUSED = "torch.optim.AdamW(fused=True)"
UPDATE, STEP, DONATED = "update, apply_updates", "step", "step, donate=True"
STEP_ALLOWED, STEP_BEFORE = 1.3, 7.3
CLOSE = 1e-5

RAW, INIT = "torch.randn, as many numbers", "delta.init"
DRAWN, INIT_ALLOWED, INIT_BEFORE = 1000, 2, 7.7

LR = 1e-3


def upkeep_tables(
    subject: Subject, shape: Shape, effort: Effort, notify: Notify = silent, drawn: int = DRAWN
) -> Iterator[Table]:
    """Both tables of this file."""
    yield step_table(subject, shape, effort, notify)
    yield fresh_table(subject, drawn, effort, notify)


def step_table(subject: Subject, shape: Shape, effort: Effort, notify: Notify = silent) -> Table:
    """AdamW's step of a stack, beside torch's fused one, in place, on the same tensors."""
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
    apart = max(_apart(way(), leaves, stack) for way in ways.values())
    error = held(apart, title, "the steps", "torch's, as a share of the way that they go,", CLOSE)
    notes = {UPDATE: f"before: {STEP_BEFORE:g} x", STEP: "new tensors", DONATED: "into the tensors that it is given"}
    race = Race(
        title,
        subject.name,
        (FUSED, fused.step),
        ways,
        note=lambda label, _: notes.get(label, ""),
        target=_bound(subject, DONATED, "x torch's fused step", STEP_ALLOWED),
    )
    facts = {"disagreement": round(error, 9), "what": "one step of the optimiser", "compared": "params"}
    return race.run(effort, notify, rounds=4, **facts)


def _bound(subject: Subject, label: str, what: str, allowed: float) -> Callable[[str, Samples], Target | None]:
    """The target of the one contender that has one, on subjects whose figures mean something."""

    def target(each: str, samples: Samples) -> Target | None:
        judged = subject.judged and each == label
        return Target.at_most(what, allowed, samples.ratio(label).median) if judged else None

    return target


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
        # A sum in float32 is rounded relative to its own size, not to that of the step.
        rounding = {name: torch.finfo(leaf.dtype).eps * leaf.abs() for name, leaf in expected.items()}
        apart = ((found[name] - leaf).abs() - rounding[name] for name, leaf in expected.items())
        return max(float(each.clamp_min(0).max()) for each in apart) / way


def fresh_table(subject: Subject, members: int, effort: Effort, notify: Notify = silent) -> Table:
    """A stack of fresh members, beside one draw of as many numbers at once."""
    delta = c.lora(subject)
    numbers = sum(leaf.numel() for leaf in delta.init(0, n=members).values())
    rng = torch.Generator().manual_seed(0)
    race = Race(
        f"{subject.name}, {members} fresh members, {numbers / 1e6:.1f} million numbers",
        subject.name,
        (RAW, lambda: torch.randn(numbers, generator=rng)),
        {INIT: lambda: delta.init(0, n=members)},
        note=lambda label, _: f"before: {INIT_BEFORE:g} x" if label == INIT else "",
        target=_bound(subject, INIT, "x one draw", INIT_ALLOWED),
    )
    return race.run(effort, notify, what="fresh members", compared="")
