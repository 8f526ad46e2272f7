"""funcdelta's own training steps, and the contenders of each table, all on the same tokens and values."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import funcdelta as fd
from funcdelta.apps.bench.measure import disagreement, held
from funcdelta.apps.bench.rivals import ALPHA, RANK, HandWritten, Peft, bare_step, regression_loss
from funcdelta.apps.bench.subjects import Shape, Subject

Gradients = dict[str, Tensor]

FOLD, VMAP, LOOP = "fold", "vmap", "loop"
PEFT_SWITCHING, PEFT_ONE = "PEFT in turn, set_adapter", "PEFT in turn, one adapter"
HAND, PEFT, APPLY = "hand-written, autograd", "PEFT, autograd", "apply, autograd"
HAND_FUNC, PEFT_FUNC, APPLY_FUNC = "hand-written, func.grad", "PEFT, func.grad", "apply, func.grad"


@dataclass(frozen=True)
class Contender:
    """One way to the gradients: `step` is timed, `gradients` puts its result under the delta's names.

    `expected` are the gradients by hand-written LoRA. `share` is the part of the members that one step trains.
    """

    label: str
    step: Callable[[], Any]
    gradients: Callable[[Any], Gradients]
    expected: Mapping[str, Tensor]
    share: float = 1.0


def agree(contenders: Sequence[Contender]) -> float:
    """The largest disagreement of any contender's gradients with hand-written LoRA's; above 1e-4 it raises."""
    return max(
        held(disagreement(each.gradients(each.step()), each.expected), each.label, "gradients") for each in contenders
    )


def random_stack(delta: fd.DeltaModel, members: int, seed: int = 2) -> dict[str, Tensor]:
    """A stack whose trainable leaves are all random: with B = 0 the gradient of A would vanish."""
    rng = torch.Generator().manual_seed(seed)
    return {
        name: 0.05 * torch.randn(leaf.shape, generator=rng) if delta.trainable(name) else leaf
        for name, leaf in delta.init(0, n=members).items()
    }


def lora(subject: Subject) -> fd.DeltaModel:
    """The delta that is timed: LoRA r = 8, alpha = 16, on the subject's targets."""
    config = fd.LoraConfig(lora_r=RANK, lora_alpha=ALPHA, modified_modules=subject.targets)
    return fd.DeltaModel(subject.backbone, config)


def stacked(steps: Sequence[Gradients]) -> Gradients:
    """Gradients of one member each, as one dict with a member axis.

    >>> stacked([{"a": torch.ones(2)}, {"a": torch.zeros(2)}])["a"].shape
    torch.Size([2, 2])
    """
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]}


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """vmap says once that it has no rule for the attention kernel; what that costs, the tables show."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        yield


def losses_by(
    delta: fd.DeltaModel, engine: str, constants: Mapping[str, Tensor] | None = None
) -> Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]:
    """`losses(stack, tokens, goals)`, one a member (n,), by `engine`; `constants` are added to the stack."""

    def losses(stack: Mapping[str, Tensor], tokens: Tensor, goals: Tensor) -> Tensor:
        output = delta.apply_many({**stack, **(constants or {})}, input_ids=tokens, in_dims=0, engine=engine)
        return regression_loss(output.last_hidden_state, goals)

    return losses


def engine_step(
    delta: fd.DeltaModel, stack: dict[str, Tensor], tokens: Tensor, goals: Tensor, engine: str
) -> Gradients:
    """Gradients (n, ...) of every member's leaves in one step of `engine`."""
    with unwarned():
        return fd.value_and_grad(losses_by(delta, engine), in_dims=0)(stack, tokens, goals)[1]


def many(subject: Subject, shape: Shape, one_at_a_time: int = 64) -> tuple[Contender, ...]:
    """Contenders for a step of n members; those that go one by one take at most `one_at_a_time` members."""
    delta = lora(subject)
    stack = random_stack(delta, shape.members)
    tokens, goals = subject.tokens(shape), subject.goals(shape)
    turn = min(one_at_a_time, shape.members)
    share = turn / shape.members
    few, some, aims = fd.take(stack, list(range(turn))), tokens[:turn], goals[:turn]
    singles = fd.unstack(few)

    def trainable(gradients: Gradients) -> Gradients:
        return {name: gradients[name][:turn] for name in stack if delta.trainable(name)}

    switching, one = Peft(subject, singles), Peft(subject, singles[:1])
    hand = HandWritten(subject, singles[0])
    first = stacked([hand.gradients(*each) for each in zip(some, aims, strict=True)])
    own = []
    for index, single in enumerate(singles):
        hand.load(single)
        own.append(hand.gradients(tokens[index], goals[index]))
    every = stacked(own)
    return (
        Contender(FOLD, lambda: engine_step(delta, stack, tokens, goals, FOLD), trainable, every),
        Contender(VMAP, lambda: engine_step(delta, stack, tokens, goals, VMAP), trainable, every),
        Contender(LOOP, lambda: engine_step(delta, few, some, aims, LOOP), trainable, every, share),
        Contender(PEFT_SWITCHING, lambda: switching.in_turn(some, aims), stacked, every, share),
        Contender(PEFT_ONE, lambda: one.without_switching(some, aims), stacked, first, share),
    )


def single(subject: Subject, rows: int, length: int) -> tuple[Contender, ...]:
    """Contenders for a step of one member on (b, s) tokens, by `autograd.grad` and by `func.grad`."""
    delta = lora(subject)
    params = fd.take(random_stack(delta, 1), 0)
    shape = Shape(1, rows, length)
    tokens, goal = subject.tokens(shape)[0], subject.goals(shape)[0]
    plain, constants = fd.partition(params, delta.trainable)
    trained = {name: leaf.clone().requires_grad_() for name, leaf in plain.items()}

    def loss(leaves: Mapping[str, Tensor]) -> Tensor:
        return regression_loss(delta.apply({**leaves, **constants}, input_ids=tokens).last_hidden_state, goal)

    def by_autograd() -> Gradients:
        return dict(zip(trained, torch.autograd.grad(loss(trained), list(trained.values())), strict=True))

    hand, rival = HandWritten(subject, params), Peft(subject, [params])
    steps: dict[str, Callable[[], Gradients]] = {
        HAND: lambda: hand.gradients(tokens, goal),
        PEFT: lambda: rival.gradients(tokens, goal),
        APPLY: by_autograd,
        HAND_FUNC: lambda: hand.functional_gradients(tokens, goal),
        PEFT_FUNC: lambda: rival.functional_gradients(tokens, goal),
        APPLY_FUNC: lambda: torch.func.grad(loss)(plain),
    }
    expected = hand.gradients(tokens, goal)
    return tuple(Contender(label, step, dict, expected) for label, step in steps.items())


def bare(subject: Subject, shape: Shape) -> Callable[[], Tensor]:
    """The yardstick on the tokens of `many`: forward and input gradient of the bare backbone."""
    tokens, goals = subject.tokens(shape), subject.goals(shape)
    return lambda: bare_step(subject, tokens, goals)
