"""Table 5: one second-order MAML step over several tasks, folded and mapped, against a loop over tasks.

With a learning rate η of the inner step, the gradient in θ of Σₜ L_query,t(θ - η ∇ L_support,t(θ)), through ∇.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import funcdelta as fd
from funcdelta.apps.bench import contenders as c
from funcdelta.apps.bench.measure import (
    NOISE,
    TOLERANCE,
    DisagreementError,
    Effort,
    Notify,
    Row,
    Table,
    in_milliseconds,
)
from funcdelta.apps.bench.rivals import HandWritten, regression_loss
from funcdelta.apps.bench.subjects import Shape, Subject
from funcdelta.apps.bench.timing import Ratio, interleave, quiet

LOOP, FOLD, VMAP, HAND = "loop over tasks", "tasks folded", "tasks mapped", "hand-written, loop over tasks"
RATE = 0.1

Leaves = Mapping[str, Tensor]


@dataclass(frozen=True)
class Tasks:
    """Tokens (t, b, s) and goals (t, b, d) to adapt to, and those to be judged by."""

    support: Tensor
    support_goals: Tensor
    query: Tensor
    query_goals: Tensor

    @classmethod
    def of(cls, subject: Subject, shape: Shape) -> Tasks:
        """Random tasks, one a member of the shape.

        >>> from funcdelta.apps.bench.subjects import tiny
        >>> Tasks.of(tiny(), Shape(3, 2, 4)).query.shape
        torch.Size([3, 2, 4])
        """
        return cls(subject.tokens(shape), subject.goals(shape), subject.tokens(shape, 3), subject.goals(shape, 4))


def adapted(leaves: Leaves, loss: Callable[[Leaves], Tensor]) -> dict[str, Tensor]:
    """`leaves` after one step of gradient descent on `loss`, differentiable in `leaves`.

    >>> adapted({"a": torch.tensor([1.0])}, lambda p: (p["a"] ** 2).sum())
    {'a': tensor([0.8000])}
    """
    gradient = torch.func.grad(lambda p: loss(p))(dict(leaves))
    return {name: leaf - RATE * gradient[name] for name, leaf in leaves.items()}


def maml(leaves: Leaves, tasks: int, losses: Callable[[Leaves, bool], Tensor]) -> dict[str, Tensor]:
    """The second-order gradient in one member's leaves, all tasks at once.

    `losses(stack, query)` gives (t,) losses of a stack with a member a task, on its support or its query.

    >>> maml({"a": torch.tensor([1.0])}, 2, lambda stack, query: (stack["a"] ** 2).sum(-1))
    {'a': tensor([2.5600])}
    """

    def outer(leaves: dict[str, Tensor]) -> Tensor:
        stack = {name: leaf.expand(tasks, *leaf.shape) for name, leaf in leaves.items()}
        # Members do not meet, so the gradient of the sum is each member's own.
        return losses(adapted(stack, lambda stack: losses(stack, False).sum()), True).sum()

    return torch.func.grad(outer)(dict(leaves))


def steps_of(subject: Subject, shape: Shape) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """`{label: step}`, each the same gradient.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> list(steps_of(tiny(), Shape(2, 1, 4)))
    ['loop over tasks', 'tasks folded', 'tasks mapped', 'hand-written, loop over tasks']
    """
    delta = c.lora(subject)
    params = fd.take(c.random_stack(delta, 1), 0)
    leaves, constants = fd.partition(params, delta.trainable)
    fixed = {name: leaf.expand(shape.members, *leaf.shape) for name, leaf in constants.items()}
    tasks = Tasks.of(subject, shape)
    hand = HandWritten(subject, params)
    places = {name: f"{name.replace('.lora.', '.')}" for name in leaves}

    def many(engine: str) -> Callable[[Leaves, bool], Tensor]:
        def losses(stack: Leaves, query: bool) -> Tensor:
            tokens, goals = (tasks.query, tasks.query_goals) if query else (tasks.support, tasks.support_goals)
            out = delta.apply_many({**stack, **fixed}, input_ids=tokens, in_dims=0, engine=engine)
            return regression_loss(out.last_hidden_state, goals)

        return losses

    def by_apply(leaves: Leaves, tokens: Tensor, goals: Tensor) -> Tensor:
        return regression_loss(delta.apply({**leaves, **constants}, input_ids=tokens).last_hidden_state, goals)

    def by_hand(leaves: Leaves, tokens: Tensor, goals: Tensor) -> Tensor:
        swapped = {places[name]: leaf for name, leaf in leaves.items()}
        out = torch.func.functional_call(hand.model, swapped, kwargs={"input_ids": tokens}, tie_weights=False)
        return regression_loss(out.last_hidden_state, goals)

    def loop(loss: Callable[[Leaves, Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for support, support_goals, query, query_goals in zip(
            tasks.support, tasks.support_goals, tasks.query, tasks.query_goals, strict=True
        ):

            def outer(p: dict[str, Tensor], s: Tensor, s_goals: Tensor, q: Tensor, q_goals: Tensor) -> Tensor:
                return loss(adapted(p, lambda p: loss(p, s, s_goals)), q, q_goals)

            gradient = torch.func.grad(outer)(leaves, support, support_goals, query, query_goals)
            total = {name: total[name] + g if total else g for name, g in gradient.items()}
        return total

    def loop_by_hand() -> dict[str, Tensor]:
        # torch's fast attention has no second derivative; funcdelta sees by itself when one is taken.
        with sdpa_kernel(SDPBackend.MATH):
            return loop(by_hand)

    def mapped() -> dict[str, Tensor]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
            return maml(leaves, shape.members, many("vmap"))

    return {
        LOOP: lambda: loop(by_apply),
        FOLD: lambda: maml(leaves, shape.members, many("fold")),
        VMAP: mapped,
        HAND: loop_by_hand,
    }


def meta_table(subject: Subject, shape: Shape, effort: Effort, notify: Notify = lambda _: None) -> Table:
    """One second-order MAML step over `shape.members` tasks, against a loop over tasks.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> meta_table(tiny(), Shape(2, 1, 4), Effort(repeats=1, attempts=1)).rows[1].label
    'tasks folded'
    """
    title = f"{subject.name} second-order MAML, {shape.members} tasks of ({shape.rows},{shape.length})"
    notify(f"{title}: comparing gradients")
    steps = steps_of(subject, shape)
    expected = steps[HAND]()
    error = 0.0
    for label, step in steps.items():
        error = max(error, worst := c.disagreement(step(), expected))
        if worst > TOLERANCE:
            raise DisagreementError(f"{title}: gradients by {label} differ from hand-written LoRA by {worst:.1e}")
    yardstick = steps.pop(LOOP)
    notify(f"{title}: timing {effort.repeats} rounds")
    samples, attempts = quiet(lambda: interleave(yardstick, steps, effort.repeats), NOISE, effort.attempts)
    rows = [Row(LOOP, in_milliseconds(samples.yardstick), Ratio(1.0, 1.0, 1.0))]
    rows += [Row(label, in_milliseconds(samples.times[label]), samples.ratio(label)) for label in steps]
    seconds = {LOOP: samples.yardstick, **samples.times}
    return Table(title, subject.name, LOOP, tuple(rows), samples.spread, attempts, error, seconds, what="one MAML step")
