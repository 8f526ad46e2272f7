"""The tables: contenders are checked against each other, timed side by side, and held to the targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from funcdelta.apps.bench import contenders as c
from funcdelta.apps.bench.subjects import Shape, Subject, narrowed
from funcdelta.apps.bench.timing import Ratio, Samples, interleave, quiet

TOLERANCE = 1e-4
NOISE = 0.10
BARE = "bare backbone"

Notify = Callable[[str], None]


class DisagreementError(Exception):
    """Contenders gave different gradients, so their times are not comparable."""


@dataclass(frozen=True)
class Effort:
    """Rounds a table, attempts at a quiet yardstick, and members timed by contenders that go one by one."""

    repeats: int = 7
    attempts: int = 2
    one_at_a_time: int = 64


@dataclass(frozen=True)
class Target:
    """A bound on one figure: `text` says it, `value` is the measured figure.

    >>> Target.at_most("x bare", 1.15, 1.10).met, Target.at_least("x faster", 6.0, 5.0).met
    (True, False)
    """

    text: str
    value: float
    met: bool

    @classmethod
    def at_most(cls, what: str, bound: float, value: float) -> Target:
        """`value` must not exceed `bound`.

        >>> Target.at_most("x bare", 1.15, 1.2).text
        '<= 1.15 x bare'
        """
        return cls(f"<= {bound:g} {what}", value, value <= bound)

    @classmethod
    def at_least(cls, what: str, bound: float, value: float) -> Target:
        """`value` must reach `bound`.

        >>> Target.at_least("x faster", 6.0, 8.0).met
        True
        """
        return cls(f">= {bound:g} {what}", value, value >= bound)


@dataclass(frozen=True)
class Row:
    """One contender: median figure in the table's unit, ratios to the yardstick and to PEFT, target and verdict."""

    label: str
    value: float
    to_yardstick: Ratio | None = None
    to_peft: Ratio | None = None
    target: Target | None = None
    note: str = ""


@dataclass(frozen=True)
class Table:
    """One subject at one shape, measured in one run; `noisy`: the yardstick wandered by more than 10 %.

    `what` was measured, in `unit`; `compared` says what contenders agree in.
    """

    title: str
    subject: str
    yardstick: str
    rows: tuple[Row, ...]
    spread: float
    attempts: int
    disagreement: float
    seconds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    what: str = "one training step"
    unit: str = "ms"
    compared: str = "gradients"

    @property
    def noisy(self) -> bool:
        """Whether the yardstick spread by more than 10 %, so that the figures need another run.

        >>> Table("", "", "", (), 0.2, 1, 0.0).noisy
        True
        """
        return self.spread > NOISE


def agree(contest: c.Contest) -> float:
    """The largest disagreement of any contender's gradients with hand-written LoRA's; above 1e-4 it raises.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> agree(c.single(tiny(), 1, 16)) < 1e-4
    True
    """
    worst = 0.0
    for contender in contest.contenders:
        error = c.disagreement(contender.gradients(contender.step()), contest.expected[contender.label])
        if error > TOLERANCE:
            raise DisagreementError(
                f"{contender.label}: gradients differ from hand-written LoRA by {error:.1e}, "
                f"allowed {TOLERANCE:.0e}; no ratios are given for contenders that compute different things"
            )
        worst = max(worst, error)
    return worst


def members_table(subject: Subject, shape: Shape, effort: Effort, notify: Notify = lambda _: None) -> Table:
    """One training step of n members by every contender, against the bare backbone.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> members_table(tiny(), Shape(2, 1, 4), Effort(repeats=1, attempts=1)).rows[1].label
    'fold'
    """
    title = f"{subject.name} {shape}"
    notify(f"{title}: comparing gradients")
    contest = c.many(subject, shape, effort.one_at_a_time)
    error = agree(contest)
    yardstick = c.bare(subject, shape)
    steps = {contender.label: contender.step for contender in contest.contenders}

    def attempt() -> Samples:
        notify(f"{title}: timing {effort.repeats} rounds")
        return interleave(yardstick, steps, effort.repeats)

    samples, attempts = quiet(attempt, NOISE, effort.attempts)
    samples = _whole(samples, {contender.label: contender.share for contender in contest.contenders})
    rows = [Row(BARE, in_milliseconds(samples.yardstick), Ratio(1.0, 1.0, 1.0))]
    for contender in contest.contenders:
        label = contender.label
        rows.append(
            Row(
                label,
                in_milliseconds(samples.times[label]),
                samples.ratio(label),
                samples.ratio_between(label, c.PEFT_SWITCHING),
                _members_target(label, shape, samples) if subject.judged else None,
                "" if contender.share == 1 else f"{round(contender.share * shape.members)} members timed, scaled",
            )
        )
    seconds = {BARE: samples.yardstick, **samples.times}
    return Table(title, subject.name, BARE, tuple(rows), samples.spread, attempts, error, seconds)


def single_table(
    subject: Subject,
    rows: int,
    length: int,
    effort: Effort,
    notify: Notify = lambda _: None,
    overhead: bool = True,
) -> Table:
    """One training step of one member by `apply`, PEFT and by hand, and `apply`'s overhead a 100 leaves.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> single_table(tiny(), 1, 4, Effort(repeats=1, attempts=1)).yardstick
    'PEFT, autograd'
    """
    title = f"{subject.name} single step ({rows},{length})"
    notify(f"{title}: comparing gradients")
    contest = c.single(subject, rows, length)
    error = agree(contest)
    steps = {contender.label: contender.step for contender in contest.contenders}
    yardstick = steps.pop(c.PEFT)
    # A single step is short: more rounds cost little and steady the medians.
    repeats = 3 * effort.repeats

    def attempt() -> Samples:
        notify(f"{title}: timing {repeats} rounds")
        return interleave(yardstick, steps, repeats)

    samples, attempts = quiet(attempt, NOISE, effort.attempts)
    result = [Row(c.PEFT, in_milliseconds(samples.yardstick), Ratio(1.0, 1.0, 1.0), Ratio(1.0, 1.0, 1.0))]
    for label in steps:
        ratio = samples.ratio(label)
        target = None
        if subject.judged and label == c.APPLY:
            target = Target.at_most("x PEFT", 1.05, ratio.median)
        if subject.judged and label == c.APPLY_FUNC:
            # Like is held against like: func.grad costs PEFT and hand-written modules more than autograd too.
            like = samples.ratio_between(label, c.PEFT_FUNC)
            target = Target.at_most("x PEFT by func.grad", 1.05, like.median)
        result.append(Row(label, in_milliseconds(samples.times[label]), ratio, ratio, target))
    if overhead:
        notify(f"{title}: timing the overhead of a call")
        result.append(_overhead_row(subject, repeats))
    seconds = {c.PEFT: samples.yardstick, **samples.times}
    return Table(title, subject.name, c.PEFT, tuple(result), samples.spread, attempts, error, seconds)


def _overhead_row(subject: Subject, repeats: int) -> Row:
    """`apply`'s forward less the hand-written one on 4 tokens, no gradient: the cost of the call itself."""
    # A difference of a tenth of a millisecond would drown in the noise of wide products.
    narrow = narrowed(subject)
    calls, leaves = c.forwards(narrow, 1, 4)
    samples = interleave(calls[c.HAND], calls, 3 * repeats)
    overhead = 1e3 * samples.difference(c.APPLY, c.HAND) / c.CALLS * 100 / leaves
    target = Target.at_most("ms / 100 leaves", 0.6, overhead) if subject.judged else None
    return Row("apply, overhead a 100 leaves", overhead, target=target, note=f"width {narrow.width}, {leaves} leaves")


def _members_target(label: str, shape: Shape, samples: Samples) -> Target | None:
    if label == c.FOLD:
        return Target.at_most("x bare", 1.10, samples.ratio(label).median)
    # Members with many tokens fill the machine one at a time too: PEFT's bounds belong to this shape.
    if shape == Shape(64, 1, 16) and label in (c.PEFT_SWITCHING, c.PEFT_ONE):
        bound = 6.0 if label == c.PEFT_SWITCHING else 4.0
        return Target.at_least("x fold", bound, samples.ratio_between(label, c.FOLD).median)
    return None


def _whole(samples: Samples, shares: Mapping[str, float]) -> Samples:
    """Seconds of all members, where only a share of them was timed."""
    times = {label: tuple(value / shares[label] for value in values) for label, values in samples.times.items()}
    return Samples(samples.yardstick, times, samples.beside)


def in_milliseconds(seconds: tuple[float, ...]) -> float:
    """The median of some seconds, in milliseconds.

    >>> in_milliseconds((0.001, 0.002, 0.009))
    2.0
    """
    return 1e3 * statistics.median(seconds)
