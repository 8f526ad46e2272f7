"""An ensemble on one batch with deltas on the last layers: what n members cost, against (1 − q) + q n passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

import funcdelta as fd
from funcdelta.apps.bench.contenders import unwarned
from funcdelta.apps.bench.measure import BARE, Effort, Notify, Race, Row, Table, Target, disagreement, held, silent
from funcdelta.apps.bench.rivals import ALPHA, RANK
from funcdelta.apps.bench.subjects import Shape, Subject, deep_llama, llama
from funcdelta.apps.bench.timing import Ratio, Samples

SHAPE = Shape(32, 2, 32)
ENGINES = ("trunk", "fold", "vmap")


def trunk_tables(
    subjects: Mapping[str, Callable[[], Subject]], effort: Effort, points: int | None = None, notify: Notify = silent
) -> Iterator[Table]:
    """The tables of every subject along `curve`, or the first `points` of each."""
    for name, load in subjects.items():
        notify(f"loading {name}")
        subject = deep_llama() if load is llama else load()
        for layers in curve(subject)[:points]:
            yield table(subject, layers, effort, notify)


def curve(subject: Subject) -> list[int]:
    """Numbers of adapted layers to measure: a quarter of them first, then from a sixth to all.

    >>> curve(deep_llama())
    [3, 2, 4, 6, 8, 10, 12]
    """
    layers = depth(subject)
    quarter = [layers // 4] if layers % 4 == 0 else []
    sixths = sorted({max(1, round(layers * share / 6)) for share in range(1, 7)})
    return [*quarter, *(count for count in sixths if count not in quarter)]


def depth(subject: Subject) -> int:
    """How many layers the subject has."""
    return int(subject.backbone.config.num_hidden_layers)


def last_layers(subject: Subject, count: int) -> fd.DeltaModel:
    """LoRA at the subject's targets in its last `count` layers.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> last_layers(tiny(), 1).sites
    ('layers.1.self_attn.q_proj', 'layers.1.self_attn.v_proj')
    """
    paths = [path for path, _ in subject.backbone.named_modules()]
    first = next(path for path in paths if path.endswith(".0"))
    below = [path.removeprefix(f"{first}.") for path in paths if path.startswith(f"{first}.")]
    last = range(depth(subject) - count, depth(subject))
    ends = [f"{layer}.{path}" for layer in last for path in below if path.endswith(subject.targets)]
    return fd.LoraModel(subject.backbone, lora_r=RANK, lora_alpha=ALPHA, modified_modules=ends)


def table(subject: Subject, layers: int, effort: Effort, notify: Notify = silent, shape: Shape = SHAPE) -> Table:
    """Forward passes of n members with LoRA in the last `layers` layers, against the bare backbone on the one batch.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> found = table(tiny(), 1, Effort(repeats=1, attempts=1), shape=Shape(3, 1, 4))
    >>> [row.label for row in found.rows]
    ['bare backbone', 'trunk', 'fold', 'vmap', '(1 - q) + q n']
    """
    share = layers / depth(subject)
    passes = (1 - share) + share * shape.members
    title = f"{subject.name} one batch {shape}, the last {layers} of {depth(subject)} layers"
    delta, tokens = last_layers(subject, layers), subject.tokens(shape)[0]
    stack = delta.random_members(shape.members, frozenset(delta.plan.names))

    def by(engine: str) -> Callable[[], Any]:
        return lambda: delta.apply_many(stack, input_ids=tokens, engine=engine).last_hidden_state

    def target(label: str, samples: Samples) -> Target | None:
        if not subject.judged or label != "trunk":
            return None
        return Target.at_most("x ((1 - q) + q n)", 1.15, samples.ratio(label).median / passes)

    steps = {engine: by(engine) for engine in ENGINES}
    race = Race(title, subject.name, (BARE, lambda: subject.backbone(input_ids=tokens)), steps, target=target)
    notify(f"{title}: comparing outputs")
    with torch.no_grad(), unwarned():
        expected = {"": by("loop")()}
        errors = {engine: disagreement({"": step()}, expected) for engine, step in steps.items()}
        error = max(held(each, title, f"outputs by {name}", "a loop over members") for name, each in errors.items())
        found = race.run(effort, notify, disagreement=error, what="one forward pass", compared="outputs")
    ideal = Row("(1 - q) + q n", passes * found.rows[0].value, Ratio(passes, passes, passes))
    return replace(found, rows=(*found.rows, ideal))
