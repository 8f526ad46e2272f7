"""Costs besides arithmetic: starting, functions called, the first fold, overhead a site, checks of every call.

The figures from before the core was rebuilt are shown for comparison.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import funcdelta as fd
from funcdelta.apps.bench import contenders as c
from funcdelta.apps.bench.calls import calls_table
from funcdelta.apps.bench.checks import checks_table
from funcdelta.apps.bench.measure import BARE, Effort, Notify, Race, Row, Table, Target, disagreement, held, silent
from funcdelta.apps.bench.rivals import ALPHA, RANK, HandWritten, adapted
from funcdelta.apps.bench.starting import starting_table
from funcdelta.apps.bench.subjects import Shape, Subject, narrow_llama
from funcdelta.apps.bench.timing import Ratio, Samples, in_milliseconds, measured, spread, timed

SHAPE = Shape(8, 2, 16)
LATER = 5
"""Folds after the first one, of which the median is taken."""

HAND, OURS = "written by hand", "funcdelta"
FIRST_BEFORE, FIRST_ALLOWED = 15, 4
OVERHEAD_BEFORE, OVERHEAD_ALLOWED = {"one member": 1.5, f"a fold of {SHAPE.members}": 1.9}, 1.3

Step = Callable[[], Any]


def core_tables(
    subject: Subject, shape: Shape, layers: int, effort: Effort, notify: Notify = silent
) -> Iterator[Table]:
    """The tables of this file: checks relative to a training step of `subject`, the rest on small models."""
    yield starting_table(effort, notify)
    yield calls_table(notify)
    yield first_table(layers, effort, notify)
    yield from overhead_tables(layers, effort, notify)
    yield checks_table(subject, shape, effort, notify)


def first_table(layers: int, effort: Effort, notify: Notify = silent) -> Table:
    """The first fold of an input structure, by a fresh delta that has made one `apply`, against a later one."""
    subject = narrow_llama(layers)
    title = f"first fold, {subject.name}, all linears, {SHAPE}"
    tokens = subject.tokens(SHAPE)[0]
    labels = ("a later fold", "the first fold", "the first apply", "building the delta")
    seconds: dict[str, list[float]] = {label: [] for label in labels}
    sites = 0
    with torch.no_grad():
        for index in range(effort.repeats):
            notify(f"{title}: fresh delta {index + 1} of {effort.repeats}")
            begin = time.perf_counter()
            delta = c.lora(subject)
            built = time.perf_counter() - begin
            sites = len(delta.sites)
            stack = c.random_stack(delta, SHAPE.members)
            one = fd.take(stack, 0)
            applied = timed(lambda d=delta, p=one: d.apply(p, input_ids=tokens))
            fold = lambda d=delta, p=stack: d.apply_many(p, input_ids=tokens, engine="fold")  # noqa: E731
            first, *later = [timed(fold) for _ in range(1 + LATER)]
            for label, value in zip(labels, (measured(later).median, first, applied, built), strict=True):
                seconds[label].append(value)
    rows = []
    for label, values in seconds.items():
        ratio = Ratio.of([value / other for value, other in zip(values, seconds[labels[0]], strict=True)])
        target, note = None, ""
        if label == "the first fold":
            target = Target.at_most("x a later fold", FIRST_ALLOWED, ratio.median)
            note = f"{sites} sites; before: {FIRST_BEFORE} x"
        rows.append(Row(label, in_milliseconds(values), ratio, None, target, note))
    kept = {label: tuple(values) for label, values in seconds.items()}
    wandered = spread(seconds[labels[0]])
    return Table(
        title, subject.name, labels[0], tuple(rows), wandered, seconds=kept, what="one forward pass", compared=""
    )


class ManyLora(nn.Module):
    """W x + b + s Bᵢ (Aᵢ x) for the rows of n members in one batch, with A (n, r, in) and B (n, out, r).

    >>> ManyLora(nn.Linear(4, 3), torch.zeros(5, 2, 4), torch.zeros(5, 3, 2), 1.0)(torch.ones(10, 7, 4)).shape
    torch.Size([10, 7, 3])
    """

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = nn.Parameter(down.clone()), nn.Parameter(up.clone())
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(self.lora_A.shape[0], -1, x.shape[-1])
        change = torch.bmm(torch.bmm(tokens, self.lora_A.mT), self.lora_B.mT)
        y = self.base(x)
        return y + change.view(y.shape) * self.scale


def overhead_tables(layers: int, effort: Effort, notify: Notify = silent) -> Iterator[Table]:
    """What LoRA at every linear layer adds to a forward pass, here and by hand, for one member and for a fold."""
    subject = narrow_llama(layers)
    delta = c.lora(subject)
    stack = c.random_stack(delta, SHAPE.members)
    one, tokens = fd.take(stack, 0), subject.tokens(SHAPE)[0]
    wide = tokens.repeat(SHAPE.members, 1)
    single, many = HandWritten(subject, one).model, adapted(subject, stack, ManyLora, ALPHA / RANK)
    ways: dict[str, tuple[Step, Step, Step]] = {
        "one member": (
            lambda: subject.backbone(input_ids=tokens),
            lambda: single(input_ids=tokens),
            lambda: delta.apply(one, input_ids=tokens),
        ),
        f"a fold of {SHAPE.members}": (
            lambda: subject.backbone(input_ids=wide),
            lambda: many(input_ids=wide),
            lambda: delta.apply_many(stack, input_ids=tokens, engine="fold"),
        ),
    }
    for label, (bare, by_hand, ours) in ways.items():
        title = f"overhead a site, {label}, {subject.name}, all linears, {SHAPE.rows} rows of {SHAPE.length}"

        def target(way: str, samples: Samples, label: str = label) -> Target | None:
            found = samples.added(OURS) / samples.added(HAND)
            return Target.at_most("x what is written by hand", OVERHEAD_ALLOWED, found) if way == OURS else None

        def note(way: str, samples: Samples, label: str = label) -> str:
            each = f"{1e6 * samples.added(way) / len(delta.sites):.1f} µs a site" if way != BARE else ""
            return each + f", {len(delta.sites)} sites; before: {OVERHEAD_BEFORE[label]} x" * (way == OURS)

        race = Race(title, subject.name, (BARE, bare), {HAND: by_hand, OURS: ours}, note=note, target=target)
        notify(f"{title}: comparing outputs")
        with torch.no_grad():
            expected, found = by_hand().last_hidden_state, ours().last_hidden_state
            error = disagreement({"": found.reshape(expected.shape)}, {"": expected})
            held(error, title, "outputs")
            facts = {"disagreement": error, "what": "one forward pass", "compared": "outputs"}
            table = race.run(effort, notify, rounds=4, **facts)
        yield table
