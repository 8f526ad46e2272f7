"""Side-by-side timing: medians of ratios, each of a run to the yardstick's runs just before and after it.

A machine that others use drifts by tens of per cent within a minute: times taken apart cannot be compared.
Here a round is `yardstick, c1, yardstick, c2, ..., yardstick`, and the ratio of a contender in that round is

    t(contender) / ((t(yardstick just before) + t(yardstick just after)) / 2)

which cancels any drift that is linear over three runs. The order is reversed in every second round.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Clock = Callable[[], float]
Step = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, with the smallest and the largest of them.

    >>> Ratio.of([1.0, 1.3, 1.1])
    Ratio(median=1.1, low=1.0, high=1.3)
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        """The summary of `values`, one per round.

        >>> Ratio.of([2.0]).median
        2.0
        """
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Samples:
    """Seconds `times[label][round]`; `beside[label][round]` is the mean of the yardstick's runs around it."""

    yardstick: tuple[float, ...]
    times: dict[str, tuple[float, ...]]
    beside: dict[str, tuple[float, ...]]

    def ratio(self, label: str) -> Ratio:
        """t(label) / t(yardstick beside it), paired within a round.

        >>> Samples((2.0, 2.0), {"a": (3.0,)}, {"a": (2.0,)}).ratio("a").median
        1.5
        """
        return Ratio.of([own / other for own, other in zip(self.times[label], self.beside[label], strict=True)])

    def ratio_between(self, label: str, base: str) -> Ratio:
        """t(label) / t(base), paired within a round.

        >>> Samples((), {"a": (3.0, 8.0), "b": (1.0, 2.0)}, {}).ratio_between("a", "b")
        Ratio(median=3.5, low=3.0, high=4.0)
        """
        return Ratio.of([own / other for own, other in zip(self.times[label], self.times[base], strict=True)])

    def difference(self, label: str, base: str) -> float:
        """The median of t(label) - t(base), paired within a round, in seconds.

        >>> Samples((), {"a": (3.0, 8.0, 9.0), "b": (1.0, 2.0, 8.0)}, {}).difference("a", "b")
        2.0
        """
        return statistics.median(a - b for a, b in zip(self.times[label], self.times[base], strict=True))

    @property
    def spread(self) -> float:
        """The spread of the yardstick: see `spread`."""
        return spread(self.yardstick)


def spread(values: Sequence[float]) -> float:
    """(third quartile - first quartile) / median: how far a repeated measurement wanders, outliers aside.

    >>> spread([1.0, 1.0, 1.0, 1.0])
    0.0
    >>> spread([0.8, 1.0, 1.2])
    0.2
    """
    if len(values) < 2:
        return 0.0
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return round((third - first) / middle, 6)


def timed(step: Step, clock: Clock = time.perf_counter) -> float:
    """Seconds of one call of `step`.

    >>> ticks = iter([1.0, 3.5])
    >>> timed(lambda: None, clock=lambda: next(ticks))
    2.5
    """
    begin = clock()
    result = step()
    seconds = clock() - begin
    # The result is dropped after the clock is read: freeing gradients is not part of a step.
    del result
    return seconds


def interleave(
    yardstick: Step,
    contenders: Mapping[str, Step],
    repeats: int,
    warmup: int = 1,
    clock: Clock = time.perf_counter,
) -> Samples:
    """Times every contender `repeats` times, each between two runs of the yardstick.

    >>> ticks = iter(range(100))
    >>> samples = interleave(lambda: 0, {"a": lambda: 1}, repeats=2, clock=lambda: float(next(ticks)))
    >>> samples.times, samples.ratio("a").median, len(samples.yardstick)
    ({'a': (1.0, 1.0)}, 1.0, 4)
    """
    if repeats < 1:
        raise ValueError(f"interleave: repeats must be at least 1, found {repeats}")
    for _ in range(warmup):
        yardstick()
        for step in contenders.values():
            step()
    every: list[float] = []
    times: dict[str, list[float]] = {label: [] for label in contenders}
    beside: dict[str, list[float]] = {label: [] for label in contenders}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for round_index in range(repeats):
            labels = list(contenders) if round_index % 2 == 0 else list(contenders)[::-1]
            # The last round's cycles are collected here, outside every timed run; older objects are left alone.
            gc.collect(1)
            before = timed(yardstick, clock)
            every.append(before)
            for label in labels:
                own = timed(contenders[label], clock)
                after = timed(yardstick, clock)
                every.append(after)
                times[label].append(own)
                beside[label].append((before + after) / 2)
                before = after
    finally:
        if collecting:
            gc.enable()
    return Samples(
        tuple(every),
        {label: tuple(values) for label, values in times.items()},
        {label: tuple(values) for label, values in beside.items()},
    )


def quiet(measure: Callable[[], Samples], limit: float = 0.10, attempts: int = 2) -> tuple[Samples, int]:
    """The first attempt whose yardstick spreads by at most `limit`, else the quietest; and how many ran.

    >>> noisy, calm = Samples((1.0, 2.0, 3.0), {}, {}), Samples((1.0, 1.0, 1.0), {}, {})
    >>> feed = iter([noisy, calm])
    >>> quiet(lambda: next(feed), attempts=3) == (calm, 2)
    True
    """
    if attempts < 1:
        raise ValueError(f"quiet: attempts must be at least 1, found {attempts}")
    tried: list[Samples] = []
    while len(tried) < attempts:
        tried.append(measure())
        if tried[-1].spread <= limit:
            break
    return min(tried, key=lambda samples: samples.spread), len(tried)
