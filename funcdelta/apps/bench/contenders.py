"""funcdelta's own training steps, and the contenders of each table, all on the same tokens and values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import funcdelta as fd
from funcdelta.apps.bench.rivals import ALPHA, RANK, HandWritten, Peft, bare_step, regression_loss
from funcdelta.apps.bench.subjects import Shape, Subject

Gradients = dict[str, Tensor]

CALLS = 5

FOLD, VMAP, LOOP = "fold", "vmap", "loop"
PEFT_SWITCHING, PEFT_ONE = "PEFT in turn, set_adapter", "PEFT in turn, one adapter"
HAND, PEFT, APPLY = "hand-written, autograd", "PEFT, autograd", "apply, autograd"
HAND_FUNC, PEFT_FUNC, APPLY_FUNC = "hand-written, func.grad", "PEFT, func.grad", "apply, func.grad"


@dataclass(frozen=True)
class Contender:
    """One way to the gradients: `step` is timed, `gradients` puts its result under the delta's names.

    `share` is the part of the members that one step trains; seconds are divided by it.
    """

    label: str
    step: Callable[[], Any]
    gradients: Callable[[Any], Gradients]
    share: float = 1.0


@dataclass(frozen=True)
class Contest:
    """Contenders with the gradients that each must give: {label: gradients by hand-written LoRA}."""

    contenders: tuple[Contender, ...]
    expected: Mapping[str, Gradients]


def random_stack(delta: fd.DeltaModel, members: int, seed: int = 2) -> dict[str, Tensor]:
    """A stack whose trainable leaves are all random: with B = 0 the gradient of A would vanish.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> random_stack(lora(tiny()), 64)["layers.0.self_attn.q_proj.lora.lora_B"].shape
    torch.Size([64, 16, 8])
    """
    rng = torch.Generator().manual_seed(seed)
    return {
        name: 0.05 * torch.randn(leaf.shape, generator=rng) if delta.trainable(name) else leaf
        for name, leaf in delta.init(0, n=members).items()
    }


def lora(subject: Subject) -> fd.DeltaModel:
    """The delta that is timed: LoRA r = 8, alpha = 16, on the subject's targets.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> len(lora(tiny()).sites)
    4
    """
    return fd.DeltaModel(
        subject.backbone, fd.LoraConfig(lora_r=RANK, lora_alpha=ALPHA, modified_modules=subject.targets)
    )


def stacked(steps: Sequence[Gradients]) -> Gradients:
    """Gradients of one member each, as one dict with a member axis.

    >>> stacked([{"a": torch.ones(2)}, {"a": torch.zeros(2)}])["a"].shape
    torch.Size([2, 2])
    """
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]}


def engine_step(
    delta: fd.DeltaModel, stack: dict[str, Tensor], tokens: Tensor, goals: Tensor, engine: str
) -> Gradients:
    """Gradients (n, ...) of every member's leaves in one step of `engine`.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> subject, shape = tiny(), Shape(3, 1, 4)
    >>> delta = lora(subject)
    >>> stack = random_stack(delta, 3)
    >>> grads = engine_step(delta, stack, subject.tokens(shape), subject.goals(shape), "fold")
    >>> grads.keys() == stack.keys()
    True
    """

    def losses(params: dict[str, Tensor], tokens: Tensor, goals: Tensor) -> Tensor:
        output = delta.apply_many(params, input_ids=tokens, in_dims=0, engine=engine)
        return regression_loss(output.last_hidden_state, goals)

    with warnings.catch_warnings():
        # vmap says once that it has no rule for the attention kernel; what that costs, the table shows.
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        return fd.value_and_grad(losses, in_dims=0)(stack, tokens, goals)[1]


def many(subject: Subject, shape: Shape, one_at_a_time: int = 64) -> Contest:
    """Contenders for a step of n members; those that go one by one take at most `one_at_a_time` members.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> [contender.label for contender in many(tiny(), Shape(2, 1, 4)).contenders]
    ['fold', 'vmap', 'loop', 'PEFT in turn, set_adapter', 'PEFT in turn, one adapter']
    """
    delta = lora(subject)
    stack = random_stack(delta, shape.members)
    tokens, goals = subject.tokens(shape), subject.goals(shape)
    turn = min(one_at_a_time, shape.members)
    share = turn / shape.members
    few = fd.take(stack, list(range(turn)))
    singles = fd.unstack(few)
    leaves = [name for name in stack if delta.trainable(name)]

    def trainable(gradients: Gradients) -> Gradients:
        return {name: gradients[name][:turn] for name in leaves}

    switching, one = Peft(subject, singles), Peft(subject, singles[:1])
    hand = HandWritten(subject, singles[0])
    expected_one = stacked([hand.gradients(tokens[i], goals[i]) for i in range(turn)])
    expected = []
    for index, single in enumerate(singles):
        hand.load(single)
        expected.append(hand.gradients(tokens[index], goals[index]))
    contenders = (
        Contender(FOLD, lambda: engine_step(delta, stack, tokens, goals, "fold"), trainable),
        Contender(VMAP, lambda: engine_step(delta, stack, tokens, goals, "vmap"), trainable),
        Contender(LOOP, lambda: engine_step(delta, few, tokens[:turn], goals[:turn], "loop"), trainable, share),
        Contender(PEFT_SWITCHING, lambda: switching.in_turn(tokens[:turn], goals[:turn]), stacked, share),
        Contender(PEFT_ONE, lambda: one.without_switching(tokens[:turn], goals[:turn]), stacked, share),
    )
    every = stacked(expected)
    return Contest(contenders, {c.label: expected_one if c.label == PEFT_ONE else every for c in contenders})


def single(subject: Subject, rows: int, length: int) -> Contest:
    """Contenders for a step of one member on (b, s) tokens, by `autograd.grad` and by `func.grad`.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> [contender.label for contender in single(tiny(), 1, 4).contenders][:3]
    ['hand-written, autograd', 'PEFT, autograd', 'apply, autograd']
    """
    delta = lora(subject)
    params = fd.take(random_stack(delta, 1), 0)
    shape = Shape(1, rows, length)
    tokens, goal = subject.tokens(shape)[0], subject.goals(shape)[0]
    trained = {name: leaf.clone().requires_grad_() for name, leaf in params.items() if delta.trainable(name)}
    constants = {name: leaf for name, leaf in params.items() if name not in trained}
    plain = {name: leaf.detach() for name, leaf in trained.items()}

    def loss(leaves: Mapping[str, Tensor]) -> Tensor:
        return regression_loss(delta.apply({**leaves, **constants}, input_ids=tokens).last_hidden_state, goal)

    def by_autograd() -> Gradients:
        return dict(zip(trained, torch.autograd.grad(loss(trained), list(trained.values())), strict=True))

    hand, rival = HandWritten(subject, params), Peft(subject, [params])
    contenders = (
        Contender(HAND, lambda: hand.gradients(tokens, goal), dict),
        Contender(PEFT, lambda: rival.gradients(tokens, goal), dict),
        Contender(APPLY, by_autograd, dict),
        Contender(HAND_FUNC, lambda: hand.functional_gradients(tokens, goal), dict),
        Contender(PEFT_FUNC, lambda: rival.functional_gradients(tokens, goal), dict),
        Contender(APPLY_FUNC, lambda: torch.func.grad(loss)(plain), dict),
    )
    expected = hand.gradients(tokens, goal)
    return Contest(contenders, {contender.label: expected for contender in contenders})


def forwards(subject: Subject, rows: int, length: int) -> tuple[dict[str, Callable[[], object]], int]:
    """`CALLS` forward passes without gradient, hand-written and by `apply`, and the number of leaves.

    A call after another's finds that one's data in the caches; several in a row make it matter less.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> calls, leaves = forwards(tiny(), 1, 4)
    >>> leaves
    12
    """
    delta = lora(subject)
    params = fd.take(random_stack(delta, 1), 0)
    tokens = subject.tokens(Shape(1, rows, length))[0]
    hand = HandWritten(subject, params)

    def by_hand() -> object:
        with torch.no_grad():
            return [hand.hidden(tokens) for _ in range(CALLS)]

    def by_apply() -> object:
        with torch.no_grad():
            return [delta.apply(params, input_ids=tokens) for _ in range(CALLS)]

    return {HAND: by_hand, APPLY: by_apply}, len(params)


def disagreement(found: Gradients, expected: Gradients) -> float:
    """The largest over leaves of max|found - expected| / max|expected|; inf where names or shapes differ.

    >>> disagreement({"a": torch.tensor([1.0, 2.2])}, {"a": torch.tensor([1.0, 2.0])})
    0.1
    >>> disagreement({}, {"a": torch.ones(1)})
    inf
    """
    if found.keys() != expected.keys() or any(found[name].shape != expected[name].shape for name in expected):
        return float("inf")
    worst = 0.0
    for name, leaf in expected.items():
        error = (found[name] - leaf).abs().max() / leaf.abs().max()
        # A NaN compares false with everything: it must not pass for agreement.
        worst = max(worst, float(error)) if torch.isfinite(error) else float("inf")
    return round(worst, 7)


def bare(subject: Subject, shape: Shape) -> Callable[[], Tensor]:
    """The yardstick on the tokens of `many`: forward and input gradient of the bare backbone.

    >>> from funcdelta.apps.bench.subjects import tiny
    >>> bare(tiny(), Shape(3, 2, 5))().shape
    torch.Size([6, 5, 16])
    """
    tokens, goals = subject.tokens(shape), subject.goals(shape)
    return lambda: bare_step(subject, tokens, goals)
