"""Models with experts: a training step of many members against the bare backbone, where rows meet in the router.

An expert gets tokens of all rows together, so parts of these models run once per member within a fold; `delta.explain`
says which.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import funcdelta as fd
from funcdelta.apps.bench import contenders as c
from funcdelta.apps.bench import measure
from funcdelta.apps.bench.measure import BARE, Effort, Notify, Race, Table, silent
from funcdelta.apps.bench.rivals import HandWritten, LoraLinear
from funcdelta.apps.bench.subjects import EXPERTS, Shape, Subject
from funcdelta.errors import UnreachedWarning

SHAPE = Shape(8, 2, 32)


def experts_tables(widths: tuple[int, ...], shape: Shape, effort: Effort, notify: Notify = silent) -> Iterator[Table]:
    """Every model with experts, at every width, adapted in attention and, where experts are modules, in them."""
    for load in EXPERTS.values():
        for width in widths:
            subject = load(width)
            yield experts_table(subject, "query and value", shape, effort, notify)
            inside = expert_linears(subject)
            if inside:
                yield experts_table(replace(subject, targets=inside), "the experts' layers", shape, effort, notify)


def expert_linears(subject: Subject) -> tuple[str, ...]:
    """The linear layers inside of experts; none where experts are held in one parameter of three axes."""
    modules = subject.backbone.named_modules()
    return tuple(path for path, module in modules if ".experts." in path and isinstance(module, nn.Linear))


def experts_table(subject: Subject, where: str, shape: Shape, effort: Effort, notify: Notify = silent) -> Table:
    """One training step of n members by the engines that can run it, against the bare backbone."""
    title = f"{subject.name} {shape}, LoRA on {where}"
    notify(f"{title}: comparing gradients")
    delta = c.lora(subject)
    stack = c.random_stack(delta, shape.members)
    tokens, goals = subject.tokens(shape), subject.goals(shape)
    expected = by_hand(subject, stack, shape)
    once = list(delta.explain(stack, input_ids=tokens, in_dims=0).once_per_member)
    steps: dict[str, Any] = {}
    refused: list[str] = []
    error = 0.0

    def run(engine: str) -> c.Gradients:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreachedWarning)  # an expert may get no tokens, which is right here
            return c.engine_step(delta, stack, tokens, goals, engine)

    for engine in (c.FOLD, c.VMAP, c.LOOP):
        steps[engine] = functools.partial(run, engine)
        try:
            gradients = steps[engine]()
        except fd.errors.EngineError as reason:
            refused.append(f"{engine} cannot run it: {str(reason)[:120]}")
            del steps[engine]
            continue
        error = max(error, measure.held(disagreement(gradients, expected), title, f"gradients by {engine}"))
    notes = {BARE: "; ".join(refused), c.FOLD: _once_per_member(once)}
    yardstick = (BARE, c.bare(subject, shape))
    race = Race(title, subject.name, yardstick, steps, note=lambda label, _: notes.get(label, ""))
    return race.run(effort, notify, disagreement=error)


def by_hand(subject: Subject, stack: dict[str, torch.Tensor], shape: Shape) -> c.Gradients:
    """Gradients of every member's leaves, each run alone with LoRA written into the modules.

    An expert without tokens has none: 0.
    """
    members = fd.unstack(stack)
    hand, found = HandWritten(subject, members[0]), []
    for layer in hand.model.modules():
        if isinstance(layer, LoraLinear):
            layer.__dict__["weight"] = layer.base.weight  # some experts ask a layer for its dtype
    for member, tokens, goals in zip(members, subject.tokens(shape), subject.goals(shape), strict=True):
        hand.load(member)
        found.append(hand.gradients(tokens, goals, allow_unused=True, materialize_grads=True))
    return c.stacked(found)


def disagreement(found: c.Gradients, expected: c.Gradients) -> float:
    """As for other tables, over the leaves of `expected`; where no member's tokens meet an expert, both have to be 0.

    >>> none = {"a": torch.zeros(2)}
    >>> disagreement(none, none), disagreement({"a": torch.ones(2)}, none)
    (0.0, inf)
    """
    met = {name: leaf for name, leaf in expected.items() if leaf.any()}
    if any(found[name].any() for name in expected.keys() - met.keys()):
        return float("inf")
    return measure.disagreement({name: found[name] for name in met}, met)


def _once_per_member(paths: list[str]) -> str:
    """Which modules run once per member, in a few words."""
    if not paths:
        return "nothing runs once per member"
    kinds = sorted({path.rpartition(".")[2] or "the model" for path in paths})
    shown = ", ".join(kinds[:4]) + (", ..." if len(kinds) > 4 else "")
    return f"{len(paths)} modules run once per member: {shown}"
