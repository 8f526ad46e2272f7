"""An ensemble on one batch with deltas on the last layers: what n members cost, against (1 − q) + q n passes."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch

import funcdelta as fd
from funcdelta.apps.bench.measure import BARE, NOISE, DisagreementError, Effort, Notify, Row, Table, Target
from funcdelta.apps.bench.subjects import Shape, Subject, _llama, llama
from funcdelta.apps.bench.timing import Ratio, Samples, interleave, quiet

MEMBERS, ROWS, LENGTH = 32, 2, 32
ENGINES = ("trunk", "fold", "vmap")
TOLERANCE = 1e-4


def last_layers(subject: Subject, count: int) -> fd.DeltaModel:
    """LoRA at the subject's targets in its last `count` layers.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> last_layers(tiny(), 1).sites
    ('layers.1.self_attn.q_proj', 'layers.1.self_attn.v_proj')
    """
    last = range(depth(subject) - count, depth(subject))
    ends = [f"{layer}.{target}" for layer in last for target in _below(subject)]
    return fd.LoraModel(subject.backbone, lora_r=8, lora_alpha=16, modified_modules=ends)


def depth(subject: Subject) -> int:
    """How many layers the subject has.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> depth(tiny())
    2
    """
    return int(subject.backbone.config.num_hidden_layers)


def _below(subject: Subject) -> list[str]:
    """The targets' paths below their layer."""
    paths = [path for path, _ in subject.backbone.named_modules()]
    first = next(path for path in paths if path.endswith(".0"))
    return [p.removeprefix(f"{first}.") for p in paths if p.startswith(f"{first}.") and p.endswith(subject.targets)]


def ideal(share: float, members: int) -> float:
    """Forward passes of `members` that differ in the last `share` q of the layers: (1 − q) + q n.

    >>> ideal(0.25, 32)
    8.75
    """
    return (1 - share) + share * members


def table(
    subject: Subject, layers: int, effort: Effort, notify: Notify = lambda _: None, shape: Shape | None = None
) -> Table:
    """Forward passes of n members with LoRA in the last `layers` layers, against the bare backbone on the one batch.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> found = table(tiny(), 1, Effort(repeats=1, attempts=1), shape=Shape(3, 1, 4))
    >>> [row.label for row in found.rows]
    ['bare backbone', 'trunk', 'fold', 'vmap', '(1 - q) + q n']
    """
    shape = shape or Shape(MEMBERS, ROWS, LENGTH)
    share = layers / depth(subject)
    title = f"{subject.name} one batch {shape}, the last {layers} of {depth(subject)} layers"
    delta, tokens = last_layers(subject, layers), subject.tokens(shape)[0]
    stack = delta.random_members(shape.members, frozenset(delta.plan.names))

    def by(engine: str) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            with torch.no_grad(), warnings.catch_warnings():
                # vmap says once that it has no rule for the attention kernel; what that costs, the table shows.
                warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
                return delta.apply_many(stack, input_ids=tokens, engine=engine).last_hidden_state

        return call

    def bare() -> object:
        with torch.no_grad():
            return subject.backbone(input_ids=tokens)

    notify(f"{title}: comparing outputs")
    steps = {engine: by(engine) for engine in ENGINES}
    error = _disagreement(steps, by("loop")())

    def attempt() -> Samples:
        notify(f"{title}: timing {effort.repeats} rounds")
        return interleave(bare, steps, effort.repeats)

    samples, attempts = quiet(attempt, NOISE, effort.attempts)
    passes = ideal(share, shape.members)
    rows = [Row(BARE, _milliseconds(samples.yardstick), Ratio(1.0, 1.0, 1.0))]
    for engine in ENGINES:
        ratio, target = samples.ratio(engine), None
        if subject.judged and engine == "trunk":
            target = Target.at_most("x ((1 - q) + q n)", 1.15, ratio.median / passes)
        rows.append(Row(engine, _milliseconds(samples.times[engine]), ratio, target=target))
    rows.append(Row("(1 - q) + q n", passes * _milliseconds(samples.yardstick), Ratio(passes, passes, passes)))
    return Table(
        title,
        subject.name,
        BARE,
        tuple(rows),
        samples.spread,
        attempts,
        error,
        {BARE: samples.yardstick, **samples.times},
        what="one forward pass",
        compared="outputs",
    )


def curve(subject: Subject) -> list[int]:
    """Numbers of adapted layers to measure: a quarter of them first, then from a sixth to all.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> curve(tiny()), curve(deep_llama())
    ([1, 2], [3, 2, 4, 6, 8, 10, 12])
    """
    layers = depth(subject)
    quarter = [layers // 4] if layers % 4 == 0 else []
    sixths = sorted({max(1, round(layers * share / 6)) for share in range(1, 7)})
    return [*quarter, *(count for count in sixths if count not in quarter)]


def deep_llama() -> Subject:
    """The Llama of the other tables with 12 layers, which have a quarter.

    >>> depth(deep_llama())
    12
    """
    return _llama("llama-12", vocabulary=4096, width=384, layers=12, heads=12)


def trunk_tables(
    subjects: Mapping[str, Callable[[], Subject]],
    effort: Effort,
    points: int | None = None,
    notify: Notify = lambda _: None,
) -> Iterator[Table]:
    """The tables of every subject along :func:`curve`, or the first ``points`` of each.

    >>> list(trunk_tables({}, Effort()))
    []
    """
    for name, load in subjects.items():
        notify(f"loading {name}")
        subject = deep_llama() if load is llama else load()
        for layers in curve(subject)[:points]:
            yield table(subject, layers, effort, notify)


def _disagreement(steps: dict[str, Callable[[], torch.Tensor]], expected: torch.Tensor) -> float:
    worst = 0.0
    for engine, step in steps.items():
        error = float((step() - expected).abs().max() / expected.abs().max())
        # A NaN compares false with everything: it must not pass for agreement.
        if not error <= TOLERANCE:
            raise DisagreementError(f"{engine}: outputs differ from a loop over members by {error:.1e}")
        worst = max(worst, error)
    return round(worst, 7)


def _milliseconds(seconds: tuple[float, ...]) -> float:
    return 1e3 * statistics.median(seconds)
