"""Training all members in one folded run, and evaluating all members on the same texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import optim
from ...derivatives.gradients import value_and_grad
from ...trees.seeding import derive
from ...trees.stack import members
from .resume import State
from .sweep import Member, hyper

if TYPE_CHECKING:
    from ...model import DeltaModel

Inputs = Mapping[str, Tensor]
ROWS = 96
"""How many rows an evaluation runs at once, members times texts: with more, hidden states no longer fit the caches."""
WARM_UP = 0.1
"""The share of the steps in which the learning rate grows."""


def schedule(step: Tensor, steps: int) -> Tensor:
    """The share of the learning rate at ``step`` (from 0): up in a straight line for a tenth of the steps, down to 0.

    Small batches need the small steps at the end; without them, luck in the last batches tells members apart.

    >>> schedule(torch.tensor([0, 1, 2, 11, 20]), steps=20)
    tensor([0.5000, 1.0000, 0.9474, 0.4737, 0.0000])
    """
    warm = max(1, round(WARM_UP * steps))
    up, down = (step + 1) / warm, (steps - step) / (steps - warm + 1)
    return torch.minimum(up, down).clamp(min=0)


def optimizer_for(sweep: Sequence[Member], delta: DeltaModel, steps: int) -> optim.Optimizer:
    """AdamW with the learning rate and weight decay of each member, under one :func:`schedule`.

    >>> import funcdelta as fd
    >>> from funcdelta.apps.train.sweep import grid
    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> delta = fd.DeltaModel(backbone, fd.LoraConfig(modified_modules=["0"]))
    >>> optimizer_for(grid(seeds=2), delta, steps=10).init(delta.init(0, n=6)).step.shape
    torch.Size([6])
    """
    rates, decays = hyper(sweep, "lr"), hyper(sweep, "weight_decay")

    def rate(step: Tensor) -> Tensor:
        return rates * schedule(step, steps)

    return optim.adamw(lr=rate, weight_decay=decays, trainable=delta.trainable)


def steps(
    delta: DeltaModel, optimizer: optim.Optimizer, state: State, batches: Tensor, inputs: Inputs, labels: Tensor
) -> Iterator[State]:
    """The states after each step from ``state`` on; a step depends on the state and its number alone.

    Shapes: ``batches`` (steps, n, b) says which rows of ``inputs`` (rows, ...) and ``labels`` (rows,) each member
    sees. Every member has its own batch; all of them run folded into one.
    """

    def loss(stack: dict[str, Tensor], batch: dict[str, Tensor], answers: Tensor) -> Tensor:
        logits = delta.apply_many(stack, in_dims=0, engine="fold", inputs=batch)
        return torch.vmap(F.cross_entropy)(logits, answers)

    gradients = value_and_grad(loss)
    for step in range(state.step, len(batches)):
        rows = batches[step]
        batch = {name: values[rows] for name, values in inputs.items()}
        with torch.random.fork_rng(devices=[]):
            # Dropout depends on the step alone, so a resumed run needs no generator state.
            torch.manual_seed(derive(0, "dropout", step))
            losses, grads = gradients(state.stack, batch, labels[rows])
        stack, optimizer_state = optimizer.step(grads, state.optimizer, state.stack)
        state = State(step + 1, stack, optimizer_state, torch.cat([state.losses, losses.detach().unsqueeze(0)]))
        yield state


@torch.no_grad()
def probabilities(
    delta: DeltaModel, stack: dict[str, Tensor], inputs: Inputs, advance: Callable[[int], Any] = lambda rows: None
) -> Tensor:
    """Every member's class probabilities on every row, (n, rows, classes) float64.

    All members see the same rows, so what comes before the first adapted layer runs once for all of them. ``advance``
    is called after every batch with its number of rows.
    """
    found = []
    rows = len(next(iter(inputs.values())))
    size = max(1, ROWS // members(stack))
    for start in range(0, rows, size):
        batch = {name: values[start : start + size] for name, values in inputs.items()}
        logits = delta.apply_many(stack, in_dims=None, inputs=batch)
        # Far from the label a float32 probability is 0 and its logarithm infinite.
        found.append(logits.double().softmax(-1))
        advance(len(next(iter(batch.values()))))
    return torch.cat(found, 1)
