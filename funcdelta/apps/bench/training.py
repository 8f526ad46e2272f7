"""A training step of many members against the bare backbone, and a step of one against PEFT."""

from __future__ import annotations

import torch

import funcdelta as fd
from funcdelta.apps.bench import contenders as c
from funcdelta.apps.bench.measure import BARE, Effort, Notify, Race, Row, Table, Target, silent
from funcdelta.apps.bench.rivals import HandWritten
from funcdelta.apps.bench.subjects import Shape, Subject, narrowed
from funcdelta.apps.bench.timing import Samples, interleave

CALLS = 5
"""Forward passes in a row, since the first one finds another contender's data in the caches."""


def members_table(subject: Subject, shape: Shape, effort: Effort, notify: Notify = silent) -> Table:
    """One training step of n members by every contender, against the bare backbone."""
    title = f"{subject.name} {shape}"
    notify(f"{title}: comparing gradients")
    contenders = c.many(subject, shape, effort.one_at_a_time)
    error = c.agree(contenders)
    shares = {each.label: each.share for each in contenders if each.share < 1}
    race = Race(
        title,
        subject.name,
        (BARE, c.bare(subject, shape)),
        {each.label: each.step for each in contenders},
        shares=shares,
        note=lambda label, _: (
            f"{round(shares[label] * shape.members)} members timed, scaled" if label in shares else ""
        ),
        target=lambda label, samples: members_target(label, shape, samples) if subject.judged else None,
        peft=c.PEFT_SWITCHING,
    )
    return race.run(effort, notify, disagreement=error)


def members_target(label: str, shape: Shape, samples: Samples) -> Target | None:
    """What a contender of many members is held to at that shape."""
    if label == c.FOLD:
        return Target.at_most("x bare", 1.10, samples.ratio(label).median)
    # Members with many tokens fill the machine even one at a time, so PEFT's bounds hold for this shape alone.
    if shape == Shape(64, 1, 16) and label in (c.PEFT_SWITCHING, c.PEFT_ONE):
        bound = 6.0 if label == c.PEFT_SWITCHING else 4.0
        return Target.at_least("x fold", bound, samples.ratio_between(label, c.FOLD).median)
    return None


def single_table(
    subject: Subject, rows: int, length: int, effort: Effort, notify: Notify = silent, overhead: bool = True
) -> Table:
    """One training step of one member by `apply`, PEFT and by hand, and `apply`'s overhead a 100 leaves."""
    title = f"{subject.name} single step ({rows},{length})"
    notify(f"{title}: comparing gradients")
    contenders = c.single(subject, rows, length)
    error = c.agree(contenders)
    steps = {each.label: each.step for each in contenders}
    yardstick = steps.pop(c.PEFT)

    def target(label: str, samples: Samples) -> Target | None:
        if subject.judged and label == c.APPLY:
            return Target.at_most("x PEFT", 1.05, samples.ratio(label).median)
        if subject.judged and label == c.APPLY_FUNC:
            # Like is held against like: func.grad costs PEFT and hand-written modules more than autograd too.
            return Target.at_most("x PEFT by func.grad", 1.05, samples.ratio_between(label, c.PEFT_FUNC).median)
        return None

    race = Race(title, subject.name, (c.PEFT, yardstick), steps, target=target, peft=c.PEFT)
    found = race.run(effort, notify, rounds=3, disagreement=error)
    if not overhead:
        return found
    notify(f"{title}: timing the overhead of a call")
    return Table(**{**vars(found), "rows": (*found.rows, _overhead_row(subject, 9 * effort.repeats))})


def _overhead_row(subject: Subject, repeats: int) -> Row:
    """`apply`'s forward less the hand-written one on 4 tokens, no gradient: the cost of the call itself."""
    # A difference of a tenth of a millisecond would drown in the noise of wide products.
    narrow = narrowed(subject)
    delta = c.lora(narrow)
    params = fd.take(c.random_stack(delta, 1), 0)
    tokens = narrow.tokens(Shape(1, 1, 4))[0]
    hand = HandWritten(narrow, params)
    calls = {
        c.HAND: lambda: [hand.hidden(tokens) for _ in range(CALLS)],
        c.APPLY: lambda: [delta.apply(params, input_ids=tokens) for _ in range(CALLS)],
    }
    with torch.no_grad():
        samples = interleave(calls[c.HAND], calls, repeats)
    overhead = 1e3 * samples.difference(c.APPLY, c.HAND) / CALLS * 100 / len(params)
    target = Target.at_most("ms / 100 leaves", 0.6, overhead) if subject.judged else None
    note = f"width {narrow.width}, {len(params)} leaves"
    return Row("apply, overhead a 100 leaves", overhead, target=target, note=note)
