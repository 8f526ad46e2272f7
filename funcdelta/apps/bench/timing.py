"""Side-by-side timing: medians of ratios, each of a run to the yardstick's runs just before and after it.

A machine that others use drifts by tens of per cent within a minute, so times taken apart cannot be compared. Here a
round is `yardstick, c1, yardstick, c2, ..., yardstick`, and the ratio of a contender in that round is

    t(contender) / ((t(yardstick just before) + t(yardstick just after)) / 2)

which cancels any drift that is linear over three runs. The order is reversed in every second round.
`torch.utils.benchmark.Timer` runs one statement many times in a row and so cannot alternate; its clock, which waits for
the accelerator, and its `Measurement` do the rest.
"""

from __future__ import annotations

import gc
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch.utils.benchmark import Measurement, TaskSpec, timer

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
        """The summary of `values`, one a round."""
        return cls(measured(values).median, min(values), max(values))


ONCE = Ratio(1.0, 1.0, 1.0)
"""The yardstick's ratio to itself."""


@dataclass(frozen=True)
class Samples:
    """Seconds `times[label][round]`; `beside[label][round]` is the mean of the yardstick's runs around it.

    >>> samples = Samples((2.0, 2.0), {"a": (3.0, 8.0), "b": (1.0, 2.0)}, {"a": (2.0, 4.0)})
    >>> samples.ratio("a").median, samples.ratio_between("a", "b").median, samples.difference("a", "b")
    (1.75, 3.5, 4.0)
    """

    yardstick: tuple[float, ...]
    times: dict[str, tuple[float, ...]]
    beside: dict[str, tuple[float, ...]]

    def ratio(self, label: str) -> Ratio:
        """t(label) / t(yardstick beside it), paired within a round."""
        return Ratio.of([own / other for own, other in zip(self.times[label], self.beside[label], strict=True)])

    def ratio_between(self, label: str, base: str) -> Ratio:
        """t(label) / t(base), paired within a round."""
        return Ratio.of([own / other for own, other in zip(self.times[label], self.times[base], strict=True)])

    def difference(self, label: str, base: str) -> float:
        """The median of t(label) - t(base), paired within a round, in seconds."""
        return measured([a - b for a, b in zip(self.times[label], self.times[base], strict=True)]).median

    def added(self, label: str) -> float:
        """The median of t(label) - t(yardstick beside it), in seconds."""
        return measured([own - bare for own, bare in zip(self.times[label], self.beside[label], strict=True)]).median

    @property
    def spread(self) -> float:
        """How far the yardstick wanders: see `spread`."""
        return spread(self.yardstick)

    def whole(self, shares: Mapping[str, float]) -> Samples:
        """The seconds of all members, where only a share of them was timed."""
        times = {name: tuple(each / shares.get(name, 1) for each in values) for name, values in self.times.items()}
        return Samples(self.yardstick, times, self.beside)


def measured(seconds: Sequence[float]) -> Measurement:
    """Runs of one call each, with torch's statistics of them.

    >>> measured([1.0, 2.0, 9.0]).median
    2.0
    """
    return Measurement(1, list(seconds), TaskSpec(stmt="", setup=""))


def in_milliseconds(seconds: Sequence[float]) -> float:
    """The median, in milliseconds."""
    return 1e3 * measured(seconds).median


def spread(values: Sequence[float]) -> float:
    """(third quartile - first quartile) / median: how far a repeated measurement wanders, outliers aside.

    >>> spread([1.0, 1.0, 1.0, 1.0]), spread([0.8, 1.0, 1.2])
    (0.0, 0.2)
    """
    found = measured(values)
    return round(found.iqr / found.median, 6) if values else 0.0


def timed(step: Step, clock: Clock = timer) -> float:
    """Seconds of one call of `step`, without the garbage collector."""
    kept: list[object] = []
    # The result is kept until the clock has been read: freeing gradients is no part of a step.
    return timeit.Timer(lambda: kept.append(step()), timer=clock).timeit(1)


def interleave(
    yardstick: Step, contenders: Mapping[str, Step], repeats: int, warmup: int = 1, clock: Clock = timer
) -> Samples:
    """Times every contender `repeats` times, each between two runs of the yardstick.

    >>> ticks = iter(range(100))
    >>> samples = interleave(lambda: 0, {"a": lambda: 1}, repeats=2, clock=lambda: float(next(ticks)))
    >>> samples.times, samples.ratio("a").median, len(samples.yardstick)
    ({'a': (1.0, 1.0)}, 1.0, 4)
    """
    if repeats < 1:
        raise ValueError(f"interleave: repeats must be at least 1, found {repeats}")
    for step in (yardstick, *contenders.values()) * warmup:
        step()
    every: list[float] = []
    times: dict[str, list[float]] = {label: [] for label in contenders}
    beside: dict[str, list[float]] = {label: [] for label in contenders}
    for number in range(repeats):
        # The last round's cycles are collected here, outside every timed run; older objects are left alone.
        gc.collect(1)
        every.append(timed(yardstick, clock))
        for label in list(contenders)[:: -1 if number % 2 else 1]:
            times[label].append(timed(contenders[label], clock))
            every.append(timed(yardstick, clock))
            beside[label].append((every[-2] + every[-1]) / 2)
    return Samples(tuple(every), *({k: tuple(v) for k, v in each.items()} for each in (times, beside)))


def quiet(measure: Callable[[], Samples], limit: float = 0.10, attempts: int = 2) -> tuple[Samples, int]:
    """The first attempt whose yardstick spreads by at most `limit`, else the quietest; and how many ran."""
    if attempts < 1:
        raise ValueError(f"quiet: attempts must be at least 1, found {attempts}")
    tried: list[Samples] = []
    while len(tried) < attempts:
        tried.append(measure())
        if tried[-1].spread <= limit:
            break
    return min(tried, key=lambda samples: samples.spread), len(tried)
