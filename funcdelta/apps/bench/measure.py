"""What every table is made of: contenders are compared, timed side by side, and held to targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from funcdelta.apps.bench.timing import ONCE, Ratio, Samples, Step, in_milliseconds, interleave, quiet, spread

TOLERANCE = 1e-4
NOISE = 0.10
BARE = "bare backbone"

Notify = Callable[[str], None]
Gradients = Mapping[str, Tensor]


def silent(_: str) -> None:
    """Reports no progress."""


class DisagreementError(Exception):
    """Contenders computed different things, so their times are not comparable."""


@dataclass(frozen=True)
class Effort:
    """Rounds a table, attempts at a quiet yardstick, and members timed by contenders that go one by one."""

    repeats: int = 7
    attempts: int = 2
    one_at_a_time: int = 64


@dataclass(frozen=True)
class Target:
    """A bound on one figure: `text` says it, `value` is the measured figure.

    >>> Target.at_most("x bare", 1.15, 1.10)
    Target(text='<= 1.15 x bare', value=1.1, met=True)
    """

    text: str
    value: float
    met: bool

    @classmethod
    def at_most(cls, what: str, bound: float, value: float) -> Target:
        """`value` must not exceed `bound`."""
        return cls(f"<= {bound:g} {what}", value, value <= bound)

    @classmethod
    def at_least(cls, what: str, bound: float, value: float) -> Target:
        """`value` must reach `bound`."""
        return cls(f">= {bound:g} {what}", value, value >= bound)


@dataclass(frozen=True)
class Row:
    """One contender: its median in the table's unit, its ratios to the yardstick and to PEFT, its target."""

    label: str
    value: float
    to_yardstick: Ratio | None = None
    to_peft: Ratio | None = None
    target: Target | None = None
    note: str = ""


@dataclass(frozen=True)
class Table:
    """One subject at one shape, measured in one run.

    `what` was measured, in `unit`; `compared` says what contenders agree in, to `disagreement`.
    """

    title: str
    subject: str
    yardstick: str
    rows: tuple[Row, ...]
    spread: float = 0.0
    attempts: int = 1
    disagreement: float = 0.0
    seconds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    what: str = "one training step"
    unit: str = "ms"
    compared: str = "gradients"

    @property
    def noisy(self) -> bool:
        """Whether the yardstick spread by more than 10 %, so that the figures need another run."""
        return self.spread > NOISE


@dataclass(frozen=True)
class Race:
    """How a table's contenders run: `{label: step}`, timed between runs of the `yardstick`.

    `shares` are the parts of the members that a step takes where it does not take all; seconds are divided by them.
    `target` says what a contender is held to, `note` what else there is to say, and `peft` is the contender that all
    are also compared with.
    """

    title: str
    subject: str
    yardstick: tuple[str, Step]
    steps: Mapping[str, Step]
    shares: Mapping[str, float] = field(default_factory=dict)
    note: Callable[[str, Samples], str] = lambda label, samples: ""
    target: Callable[[str, Samples], Target | None] = lambda label, samples: None
    peft: str = ""

    def run(self, effort: Effort, notify: Notify = silent, *, rounds: int = 1, **facts: Any) -> Table:
        """The table, of `rounds` times as many rounds as usual: of short steps, which steadies the medians.

        `facts` are further fields of the table.
        """
        name, yardstick = self.yardstick
        repeats = rounds * effort.repeats

        def attempt() -> Samples:
            notify(f"{self.title}: timing {repeats} rounds")
            return interleave(yardstick, self.steps, repeats)

        samples, attempts = quiet(attempt, NOISE, effort.attempts)
        samples = samples.whole(self.shares)
        own = ONCE if self.peft == name else None
        rows = [Row(name, in_milliseconds(samples.yardstick), ONCE, own, None, self.note(name, samples))]
        for label in self.steps:
            ratio = samples.ratio(label)
            own = samples.ratio_between(label, self.peft) if self.peft in self.steps else own and ratio
            value = in_milliseconds(samples.times[label])
            rows.append(Row(label, value, ratio, own, self.target(label, samples), self.note(label, samples)))
        seconds = {name: samples.yardstick, **samples.times}
        return Table(
            self.title, self.subject, name, tuple(rows), spread(samples.yardstick), attempts, seconds=seconds, **facts
        )


def disagreement(found: Gradients, expected: Gradients) -> float:
    """The largest over leaves of max|found - expected| / max|expected|; inf where names or shapes differ.

    >>> disagreement({"a": torch.tensor([1.0, 2.2])}, {"a": torch.tensor([1.0, 2.0])})
    0.1
    >>> disagreement({}, {"a": torch.ones(1)})
    inf
    """
    if found.keys() != expected.keys() or any(found[name].shape != expected[name].shape for name in expected):
        return float("inf")
    errors = [float((found[name] - leaf).abs().max() / leaf.abs().max()) for name, leaf in expected.items()]
    # A NaN compares false with everything: it must not pass for agreement.
    return round(max(errors, default=0.0), 7) if all(error < float("inf") for error in errors) else float("inf")


def held(error: float, where: str, what: str, than: str = "hand-written LoRA", allowed: float | None = None) -> float:
    """`error` if it is small; else it raises: ratios of contenders that compute different things mean nothing."""
    allowed = TOLERANCE if allowed is None else allowed
    if not error <= allowed:
        raise DisagreementError(
            f"{where}: {what} differ from {than} by {error:.1e}, allowed {allowed:.0e}; "
            "no ratios are given for contenders that compute different things"
        )
    return error
