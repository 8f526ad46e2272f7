"""Models with experts: a training step of many members against the bare backbone, where rows meet in the router.

What an expert is given are tokens of all rows together, so parts of these models run once per member within a fold;
`delta.explain` says which.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import funcdelta as fd
from funcdelta.apps.bench import contenders as c
from funcdelta.apps.bench.measure import (
    BARE,
    NOISE,
    TOLERANCE,
    DisagreementError,
    Effort,
    Notify,
    Row,
    Table,
    in_milliseconds,
)
from funcdelta.apps.bench.rivals import HandWritten, LoraLinear, regression_loss
from funcdelta.apps.bench.subjects import EXPERTS, Shape, Subject
from funcdelta.apps.bench.timing import Ratio, interleave, quiet
from funcdelta.errors import UnreachedWarning

SHAPE = Shape(8, 2, 32)
ENGINES = (c.FOLD, c.VMAP, c.LOOP)


def expert_linears(subject: Subject) -> tuple[str, ...]:
    """The linear layers inside of experts; none where experts are held in one parameter of three axes.

    >>> from funcdelta.apps.bench.subjects import mixtral, switch
    >>> expert_linears(switch(16))[0], expert_linears(mixtral(16))
    ('encoder.block.1.layer.1.mlp.experts.expert_0.wi', ())
    """
    modules = subject.backbone.named_modules()
    return tuple(path for path, module in modules if ".experts." in path and isinstance(module, nn.Linear))


def by_hand(subject: Subject, stack: dict[str, torch.Tensor], shape: Shape) -> c.Gradients:
    """Gradients of every member's leaves, each run alone with LoRA written into the modules.

    An expert without tokens has none: 0.

    >>> from funcdelta.apps.bench.subjects import switch
    >>> subject, shape = switch(16), Shape(2, 1, 4)
    >>> stack = c.random_stack(c.lora(subject), 2)
    >>> by_hand(subject, stack, shape)["encoder.block.0.layer.0.SelfAttention.q.lora.lora_A"].shape
    torch.Size([2, 8, 16])
    """
    tokens, goals = subject.tokens(shape), subject.goals(shape)
    members = fd.unstack(stack)
    hand, found = HandWritten(subject, members[0]), []
    for layer in hand.model.modules():
        if isinstance(layer, LoraLinear):
            layer.__dict__["weight"] = layer.base.weight  # some experts ask a layer for its dtype
    for index, member in enumerate(members):
        hand.load(member)
        loss = regression_loss(hand.hidden(tokens[index]), goals[index])
        leaves = list(hand.parameters.values())
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        found.append(dict(zip(hand.parameters, gradients, strict=True)))
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
    return c.disagreement({name: found[name] for name in met}, met)


def experts_table(subject: Subject, where: str, shape: Shape, effort: Effort, notify: Notify = lambda _: None) -> Table:
    """One training step of n members by the engines that can run it, against the bare backbone.

    >>> from funcdelta.apps.bench.subjects import mixtral
    >>> table = experts_table(mixtral(16), "attention", Shape(2, 1, 4), Effort(repeats=1, attempts=1))
    >>> [row.label for row in table.rows][:2]
    ['bare backbone', 'fold']
    """
    title = f"{subject.name} {shape}, LoRA on {where}"
    notify(f"{title}: comparing gradients")
    delta = c.lora(subject)
    stack = c.random_stack(delta, shape.members)
    tokens, goals = subject.tokens(shape), subject.goals(shape)
    expected = by_hand(subject, stack, shape)
    explained = delta.explain(stack, input_ids=tokens, in_dims=0)
    steps: dict[str, Any] = {}
    refused: list[str] = []
    error = 0.0
    for engine in ENGINES:

        def step(engine: str = engine) -> c.Gradients:
            with warnings.catch_warnings():
                # An expert may get no tokens, which is right here.
                warnings.simplefilter("ignore", UnreachedWarning)
                return c.engine_step(delta, stack, tokens, goals, engine)

        try:
            gradients = step()
        except fd.errors.EngineError as reason:
            refused.append(f"{engine} cannot run it: {str(reason)[:120]}")
            continue
        worst = disagreement(gradients, expected)
        if worst > TOLERANCE:
            raise DisagreementError(f"{title}: gradients by {engine} differ from hand-written LoRA by {worst:.1e}")
        error, steps[engine] = max(error, worst), step
    yardstick = c.bare(subject, shape)
    notify(f"{title}: timing {effort.repeats} rounds")
    samples, attempts = quiet(lambda: interleave(yardstick, steps, effort.repeats), NOISE, effort.attempts)
    rows = [Row(BARE, in_milliseconds(samples.yardstick), Ratio(1.0, 1.0, 1.0), note="; ".join(refused))]
    for engine in steps:
        note = _once_per_member(explained) if engine == c.FOLD else ""
        rows.append(Row(engine, in_milliseconds(samples.times[engine]), samples.ratio(engine), note=note))
    seconds = {BARE: samples.yardstick, **samples.times}
    return Table(title, subject.name, BARE, tuple(rows), samples.spread, attempts, error, seconds)


def _once_per_member(explained: Any) -> str:
    """Which modules run once per member, in a few words."""
    paths = list(explained.once_per_member)
    if not paths:
        return "nothing runs once per member"
    kinds = sorted({path.rpartition(".")[2] or "the model" for path in paths})
    shown = ", ".join(kinds[:4]) + (", ..." if len(kinds) > 4 else "")
    return f"{len(paths)} modules run once per member: {shown}"


def experts_tables(
    widths: tuple[int, ...], shape: Shape, effort: Effort, notify: Notify = lambda _: None
) -> Iterator[Table]:
    """Every model with experts, at every width, adapted in attention and, where experts are modules, in them.

    >>> list(experts_tables((), SHAPE, Effort()))
    []
    """
    for load in EXPERTS.values():
        for width in widths:
            subject = load(width)
            yield experts_table(subject, "query and value", shape, effort, notify)
            inside = expert_linears(subject)
            if inside:
                yield experts_table(replace(subject, targets=inside), "the experts' layers", shape, effort, notify)
