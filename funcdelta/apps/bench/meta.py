"""One second-order MAML step over several tasks, folded and mapped, against a loop over tasks.

With a learning rate η of the inner step, the gradient in θ of Σₜ L_query,t(θ - η ∇ L_support,t(θ)), through ∇.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import funcdelta as fd
from funcdelta.apps.bench import contenders as c
from funcdelta.apps.bench.measure import Effort, Notify, Race, Table, disagreement, held, silent
from funcdelta.apps.bench.rivals import HandWritten, regression_loss
from funcdelta.apps.bench.subjects import Shape, Subject

LOOP, FOLD, VMAP, HAND = "loop over tasks", "tasks folded", "tasks mapped", "hand-written, loop over tasks"
RATE = 0.1

Leaves = Mapping[str, Tensor]
Loss = Callable[[Leaves, Tensor, Tensor], Tensor]


def meta_table(subject: Subject, shape: Shape, effort: Effort, notify: Notify = silent) -> Table:
    """One second-order MAML step over `shape.members` tasks, against a loop over tasks."""
    title = f"{subject.name} second-order MAML, {shape.members} tasks of ({shape.rows},{shape.length})"
    notify(f"{title}: comparing gradients")
    steps = steps_of(subject, shape)
    expected = steps[HAND]()
    found = {label: disagreement(step(), expected) for label, step in steps.items()}
    error = max(held(each, title, f"gradients by {label}") for label, each in found.items())
    race = Race(title, subject.name, (LOOP, steps.pop(LOOP)), steps)
    return race.run(effort, notify, disagreement=error, what="one MAML step")


def adapted(leaves: Leaves, loss: Callable[[Leaves], Tensor]) -> dict[str, Tensor]:
    """`leaves` after one step of gradient descent on `loss`, differentiable in `leaves`.

    >>> adapted({"a": torch.tensor([1.0])}, lambda p: (p["a"] ** 2).sum())
    {'a': tensor([0.8000])}
    """
    gradient = torch.func.grad(lambda p: loss(p))(dict(leaves))
    return {name: leaf - RATE * gradient[name] for name, leaf in leaves.items()}


def steps_of(subject: Subject, shape: Shape) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """`{label: step}`, each the same gradient."""
    delta = c.lora(subject)
    leaves, constants = fd.partition(fd.take(c.random_stack(delta, 1), 0), delta.trainable)
    fixed = {name: leaf.expand(shape.members, *leaf.shape) for name, leaf in constants.items()}
    # Random tasks, one a member of the shape: what each adapts to, and what it is judged by.
    support = subject.tokens(shape), subject.goals(shape)
    query = subject.tokens(shape, 3), subject.goals(shape, 4)
    hand = HandWritten(subject, leaves)

    def together(engine: str) -> dict[str, Tensor]:
        losses = c.losses_by(delta, engine, fixed)

        def outer(leaves: dict[str, Tensor]) -> Tensor:
            stack = {name: leaf.expand(shape.members, *leaf.shape) for name, leaf in leaves.items()}
            # Members do not meet, so the gradient of the sum is each member's own.
            return losses(adapted(stack, lambda stack: losses(stack, *support).sum()), *query).sum()

        with c.unwarned():
            return torch.func.grad(outer)(dict(leaves))

    def by_apply(leaves: Leaves, tokens: Tensor, goals: Tensor) -> Tensor:
        return regression_loss(delta.apply({**leaves, **constants}, input_ids=tokens).last_hidden_state, goals)

    def by_hand(leaves: Leaves, tokens: Tensor, goals: Tensor) -> Tensor:
        return regression_loss(hand.functional(leaves, tokens), goals)

    def loop(loss: Loss) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for s, s_goals, q, q_goals in zip(*support, *query, strict=True):
            gradient = torch.func.grad(_outer(loss))(leaves, s, s_goals, q, q_goals)
            total = {name: total[name] + g if total else g for name, g in gradient.items()}
        return total

    def loop_by_hand() -> dict[str, Tensor]:
        # torch's fast attention has no second derivative; funcdelta sees by itself when one is taken.
        with sdpa_kernel(SDPBackend.MATH):
            return loop(by_hand)

    return {
        LOOP: lambda: loop(by_apply),
        FOLD: lambda: together("fold"),
        VMAP: lambda: together("vmap"),
        HAND: loop_by_hand,
    }


def _outer(loss: Loss) -> Callable[..., Tensor]:
    """The loss of one task after it was adapted to."""
    return lambda p, s, s_goals, q, q_goals: loss(adapted(p, lambda p: loss(p, s, s_goals)), q, q_goals)
