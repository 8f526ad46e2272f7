"""What is paid besides arithmetic: starting, functions called, the first fold, overhead a site, checks of every call.

The figures that these had before the core was rebuilt are given beside them.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

import funcdelta as fd
from funcdelta.apps.bench import contenders as c
from funcdelta.apps.bench.calls import calls_table
from funcdelta.apps.bench.checks import checks_table
from funcdelta.apps.bench.measure import (
    BARE,
    NOISE,
    TOLERANCE,
    DisagreementError,
    Effort,
    Notify,
    Row,
    Table,
    Target,
    in_milliseconds,
)
from funcdelta.apps.bench.rivals import ALPHA, RANK, HandWritten, sites_of
from funcdelta.apps.bench.starting import starting_table
from funcdelta.apps.bench.subjects import Shape, Subject, narrow_llama
from funcdelta.apps.bench.timing import Ratio, Samples, interleave, quiet, spread, timed

MEMBERS, ROWS, LENGTH = 8, 2, 16
LATER = 5
"""Folds after the first one; the median of them stands for all."""

HAND, OURS = "written by hand", "funcdelta"

Step = Callable[[], Any]


def core_tables(
    subject: Subject, shape: Shape, layers: int, effort: Effort, notify: Notify = lambda _: None
) -> Iterator[Table]:
    """The tables of this file; checks are held against a training step of `subject`, the rest is of small models.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> tables = core_tables(tiny(), Shape(2, 1, 4), 1, Effort(repeats=1, attempts=1))
    >>> [table.what for table in tables]
    ['processor time', 'one call', 'one forward pass', 'one forward pass', 'one forward pass', 'checks of one call']
    """
    yield starting_table(effort, notify)
    yield calls_table(notify)
    yield first_table(layers, effort, notify)
    yield from overhead_tables(layers, effort, notify)
    yield checks_table(subject, shape, effort, notify)


# -- the first fold ----------------------------------------------------------------------------------------------------

FIRST_BEFORE, FIRST_ALLOWED = 15, 4


def first_table(layers: int, effort: Effort, notify: Notify = lambda _: None) -> Table:
    """The first fold of an input structure, by a fresh delta that has made one `apply`, against a later one.

    >>> [row.label for row in first_table(1, Effort(repeats=1, attempts=1)).rows]
    ['a later fold', 'the first fold', 'the first apply', 'building the delta']
    """
    subject, shape = narrow_llama(layers), Shape(MEMBERS, ROWS, LENGTH)
    title = f"first fold, {subject.name}, all linears, {shape}"
    tokens = subject.tokens(shape)[0]
    seconds: dict[str, list[float]] = {"a later fold": [], "the first fold": [], "the first apply": []}
    seconds["building the delta"] = []
    sites = 0
    with torch.no_grad():
        for index in range(effort.repeats):
            notify(f"{title}: fresh delta {index + 1} of {effort.repeats}")
            begin = time.perf_counter()
            delta = c.lora(subject)
            seconds["building the delta"].append(time.perf_counter() - begin)
            sites = len(delta.sites)
            stack = c.random_stack(delta, shape.members)
            one = fd.take(stack, 0)
            seconds["the first apply"].append(timed(lambda d=delta, p=one: d.apply(p, input_ids=tokens)))
            folds = [
                timed(lambda d=delta, p=stack: d.apply_many(p, input_ids=tokens, engine="fold"))
                for _ in range(1 + LATER)
            ]
            seconds["the first fold"].append(folds[0])
            seconds["a later fold"].append(sorted(folds[1:])[LATER // 2])
    later = seconds["a later fold"]
    rows = []
    for label, values in seconds.items():
        ratio = Ratio.of([value / other for value, other in zip(values, later, strict=True)])
        target, note = None, ""
        if label == "the first fold":
            target = Target.at_most("x a later fold", FIRST_ALLOWED, ratio.median)
            note = f"{sites} sites; before: {FIRST_BEFORE} x"
        rows.append(Row(label, in_milliseconds(tuple(values)), ratio, None, target, note))
    kept = {label: tuple(values) for label, values in seconds.items()}
    return Table(
        title,
        subject.name,
        "a later fold",
        tuple(rows),
        spread(later),
        1,
        0.0,
        kept,
        what="one forward pass",
        compared="",
    )


# -- overhead a site ---------------------------------------------------------------------------------------------------

OVERHEAD_BEFORE, OVERHEAD_ALLOWED = {"one member": 1.5, f"a fold of {MEMBERS}": 1.9}, 1.3


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


def many_by_hand(subject: Subject, stack: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the backbone whose sites are `ManyLora`, with the values of all members.

    >>> subject = narrow_llama(1)
    >>> stack = c.random_stack(c.lora(subject), 2)
    >>> type(many_by_hand(subject, stack).layers[0].mlp.up_proj).__name__
    'ManyLora'
    """
    model = copy.deepcopy(subject.backbone)
    for site in sites_of(stack):
        down, up = stack[f"{site}.lora.lora_A"], stack[f"{site}.lora.lora_B"]
        base = cast(nn.Linear, model.get_submodule(site))
        model.set_submodule(site, ManyLora(base, down, up, ALPHA / RANK))
    return model


def overhead_tables(layers: int, effort: Effort, notify: Notify = lambda _: None) -> Iterator[Table]:
    """What LoRA at every linear layer adds to a forward pass, by this library and by hand, for one member and a fold.

    >>> [table.rows[2].label for table in overhead_tables(1, Effort(repeats=1, attempts=1))]
    ['funcdelta', 'funcdelta']
    """
    subject, shape = narrow_llama(layers), Shape(MEMBERS, ROWS, LENGTH)
    delta = c.lora(subject)
    stack = c.random_stack(delta, shape.members)
    one, tokens = fd.take(stack, 0), subject.tokens(shape)[0]
    wide = tokens.repeat(shape.members, 1)
    single, many = HandWritten(subject, one), many_by_hand(subject, stack)
    ways: dict[str, tuple[Step, Step, Step]] = {
        "one member": (
            lambda: subject.backbone(input_ids=tokens).last_hidden_state,
            lambda: single.hidden(tokens),
            lambda: delta.apply(one, input_ids=tokens).last_hidden_state,
        ),
        f"a fold of {MEMBERS}": (
            lambda: subject.backbone(input_ids=wide).last_hidden_state,
            lambda: many(input_ids=wide).last_hidden_state,
            lambda: delta.apply_many(stack, input_ids=tokens, engine="fold").last_hidden_state,
        ),
    }
    for label, steps in ways.items():
        title = f"overhead a site, {label}, {subject.name}, all linears, {ROWS} rows of {LENGTH}"
        yield _overhead_table(title, subject, len(delta.sites), label, steps, effort, notify)


def _overhead_table(
    title: str,
    subject: Subject,
    sites: int,
    label: str,
    steps: tuple[Step, Step, Step],
    effort: Effort,
    notify: Notify,
) -> Table:
    bare, by_hand, ours = map(_without_gradient, steps)
    notify(f"{title}: comparing outputs")
    expected, found = by_hand(), ours()
    error = float((found.reshape(expected.shape) - expected).abs().max() / expected.abs().max())
    # A NaN compares false with everything: it must not pass for agreement.
    if not error <= TOLERANCE:
        raise DisagreementError(f"{title}: outputs differ from hand-written LoRA by {error:.1e}")
    # One pass is short: more rounds cost little and steady the medians.
    repeats = 4 * effort.repeats
    notify(f"{title}: timing {repeats} rounds")
    samples, attempts = quiet(lambda: interleave(bare, {HAND: by_hand, OURS: ours}, repeats), NOISE, effort.attempts)
    added = {who: _added(samples, who) for who in (HAND, OURS)}
    ratio = added[OURS] / added[HAND]
    notes = {who: f"{1e6 * seconds / sites:.1f} µs a site" for who, seconds in added.items()}
    target = Target.at_most("x what is written by hand", OVERHEAD_ALLOWED, ratio)
    notes[OURS] += f", {sites} sites; before: {OVERHEAD_BEFORE[label]:g} x"
    rows = [Row(BARE, in_milliseconds(samples.yardstick), Ratio(1.0, 1.0, 1.0))]
    for who in (HAND, OURS):
        value = in_milliseconds(samples.times[who])
        rows.append(Row(who, value, samples.ratio(who), None, target if who == OURS else None, notes[who]))
    seconds = {BARE: samples.yardstick, **samples.times}
    return Table(
        title,
        subject.name,
        BARE,
        tuple(rows),
        samples.spread,
        attempts,
        round(error, 9),
        seconds,
        what="one forward pass",
        compared="outputs",
    )


def _without_gradient(step: Step) -> Step:
    def run() -> Any:
        with torch.no_grad():
            return step()

    return run


def _added(samples: Samples, label: str) -> float:
    """What a way adds to the yardstick's runs around it, in seconds: the median."""
    return statistics.median(own - bare for own, bare in zip(samples.times[label], samples.beside[label], strict=True))
