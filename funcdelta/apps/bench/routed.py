"""Table 2: as many rows as members, each row with its own, in one forward and in greedy decoding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import funcdelta as fd
from funcdelta.apps.bench.contenders import disagreement, lora, random_stack
from funcdelta.apps.bench.measure import (
    BARE,
    NOISE,
    TOLERANCE,
    DisagreementError,
    Effort,
    Notify,
    Row,
    Table,
    Target,
    in_milliseconds,
)
from funcdelta.apps.bench.rivals import HandWritten, Peft
from funcdelta.apps.bench.subjects import Shape, Subject
from funcdelta.apps.bench.timing import Ratio, Samples, interleave, quiet

ROUTED, PEFT_NAMES, PEFT_TURN = "members routed", "PEFT, adapter_names", "PEFT in turn"
PROMPT, NEW = 8, 8
"""Tokens of a prompt, and tokens that are decoded after it."""
CHECKED = 4
"""Rows that go one by one: those whose outputs are compared, and timed in turn."""
FASTER = {16: 1.4, 64: 2.0}
"""How many times faster than PEFT's adapter_names the rows have to be."""


def forward_table(subject: Subject, rows: int, effort: Effort, notify: Notify = lambda _: None) -> Table:
    """A forward of `rows` rows with a member each, logits of the last token, against the bare backbone and PEFT.

    >>> from funcdelta.apps.bench.subjects import tiny_lm
    >>> forward_table(tiny_lm(), 4, Effort(repeats=1, attempts=1)).rows[1].label
    'members routed'
    """
    case = Routed(subject, rows, notify, f"{subject.name} routed forward, {rows} rows of {PROMPT} tokens")
    steps: dict[str, Callable[[], Tensor]] = {
        BARE: lambda: case.logits(subject.backbone),
        ROUTED: lambda: case.logits(lambda **inputs: case.delta.apply_rows(case.stack, case.index, **inputs)),
        PEFT_NAMES: lambda: case.logits(case.peft.model, adapter_names=case.peft.names),
        PEFT_TURN: lambda: case.in_turn(lambda row: case.logits(case.peft.model, row)),
    }
    return case.table("apply_rows", steps, case.by_hand(lambda model, row: case.logits(model, row)), effort)


def decode_table(subject: Subject, rows: int, effort: Effort, notify: Notify = lambda _: None) -> Table:
    """Greedy decoding of `rows` rows with a member each, by `bind_rows(...).generate`.

    >>> from funcdelta.apps.bench.subjects import tiny_lm
    >>> [row.label for row in decode_table(tiny_lm(), 4, Effort(repeats=1, attempts=1)).rows][2]
    'PEFT, adapter_names'
    """
    case = Routed(subject, rows, notify, f"{subject.name} greedy decode, {rows} rows, {PROMPT} + {NEW} tokens")
    view: Any = case.delta.bind_rows(case.stack, case.index)
    steps: dict[str, Callable[[], Tensor]] = {
        BARE: lambda: case.decode(subject.backbone),
        # Routed anew each time, so that the members are picked within what is timed.
        ROUTED: lambda: case.decode(view.route(case.index)),
        PEFT_NAMES: lambda: case.decode(case.peft.model, adapter_names=case.peft.names),
        PEFT_TURN: lambda: case.in_turn(lambda row: case.decode(case.peft.model, row)),
    }
    expected = case.by_hand(lambda model, row: case.decode(model, row))
    return case.table("bind_rows(...).generate", steps, expected, effort)


def resident_table(
    subject: Subject, residents: tuple[int, ...], effort: Effort, notify: Notify = lambda _: None
) -> Table:
    """Greedy decoding of 16 rows out of stacks of several sizes: the cost must not grow with what is resident.

    >>> from funcdelta.apps.bench.subjects import tiny_lm
    >>> resident_table(tiny_lm(), (2, 9), Effort(repeats=1, attempts=1)).yardstick
    '2 resident'
    """
    rows = 16
    title = f"{subject.name} greedy decode, {rows} rows of {residents[0]} to {residents[-1]} resident members"
    notify(f"{title}: preparing")
    delta = lora(subject)
    few = random_stack(delta, residents[0])
    tokens = subject.tokens(Shape(rows, 1, PROMPT))[:, 0]
    steps: dict[str, Callable[[], Tensor]] = {}
    for n in residents:
        # Every stack holds its own memory; the members used are spread over all of it, and the same in all.
        stack = fd.take(few, [i % residents[0] for i in range(n)])
        index = [
            (n - residents[0]) * row // rows // residents[0] * residents[0] + row % residents[0] for row in range(rows)
        ]
        view: Any = delta.bind_rows(stack, index)
        steps[f"{n} resident"] = lambda view=view, index=index: generated(view.route(index), tokens)
    first = next(iter(steps))
    expected = {first: steps[first]()}
    error = max(disagreement({first: step()}, expected) for step in steps.values())
    if error > TOLERANCE:
        raise DisagreementError(f"{title}: the same members decode to logits that differ by {error:.1e}")
    notify(f"{title}: timing")
    yardstick = steps.pop(first)
    samples, attempts = quiet(lambda: interleave(yardstick, steps, effort.repeats), NOISE, effort.attempts)
    table_rows = [Row(first, in_milliseconds(samples.yardstick), Ratio(1.0, 1.0, 1.0))]
    for label in steps:
        ratio = samples.ratio(label)
        target = Target.at_most(f"x {first}", 1.05, ratio.median) if subject.judged else None
        table_rows.append(Row(label, in_milliseconds(samples.times[label]), ratio, target=target))
    seconds = {first: samples.yardstick, **samples.times}
    return Table(
        title, subject.name, first, tuple(table_rows), samples.spread, attempts, error, seconds,
        what="bind_rows(...).generate", compared="logits",
    )  # fmt: skip


def generated(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """The logits (rows, steps, vocabulary) of `NEW` greedily decoded tokens after `tokens` (rows, s).

    >>> from funcdelta.apps.bench.subjects import tiny_lm
    >>> generated(tiny_lm().backbone, torch.ones(2, 3, dtype=torch.long)).shape
    torch.Size([2, 8, 50])
    """
    with torch.no_grad():
        out = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
    return torch.stack(out.logits, 1)


def comparable(found: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (rows, steps, vocabulary) as long as both chose the same tokens before; 0 after that.

    Two tokens may be equally likely up to rounding: what is decoded after that has no reason to agree.

    >>> same, other = torch.tensor([[[1.0, 0.0], [5.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [7.0, 0.0]]])
    >>> comparable(same, other)[0].tolist()
    [[[1.0, 0.0], [0.0, 0.0]]]
    """
    if found.ndim == 2:
        return found, expected
    same = (found.argmax(-1) == expected.argmax(-1)).long().cumprod(1)
    before = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], 1).unsqueeze(-1)
    return found * before, expected * before


class Routed:
    """As many members as rows on one language model, and the same members as PEFT's adapters.

    >>> from funcdelta.apps.bench.subjects import tiny_lm
    >>> Routed(tiny_lm(), 3).logits(tiny_lm().backbone).shape
    torch.Size([3, 50])
    """

    def __init__(self, subject: Subject, rows: int, notify: Notify = lambda _: None, title: str = "") -> None:
        self.subject, self.rows, self.notify, self.title = subject, rows, notify, title
        notify(f"{title}: preparing")
        self.delta = lora(subject)
        self.stack = random_stack(self.delta, rows)
        # Not in the members' own order: rows are picked, not just taken.
        self.index = list(range(rows))[::-1]
        self.tokens = subject.tokens(Shape(rows, 1, PROMPT))[:, 0]
        self.members = [fd.take(self.stack, i) for i in self.index]
        self.peft = Peft(subject, self.members, "CAUSAL_LM")
        self.turn = min(CHECKED, rows)

    def logits(self, model: Callable[..., Any], row: int | None = None, **options: Any) -> Tensor:
        """The last token's logits (rows, vocabulary) of all rows, or of one.

        >>> from funcdelta.apps.bench.subjects import tiny_lm
        >>> Routed(tiny_lm(), 3).logits(tiny_lm().backbone, 1).shape
        torch.Size([1, 50])
        """
        tokens = self.tokens if row is None else self.tokens[row : row + 1]
        with torch.no_grad():
            return model(input_ids=tokens, logits_to_keep=1, use_cache=False, **options).logits[:, -1]

    def decode(self, model: Any, row: int | None = None, **options: Any) -> Tensor:
        """The logits of all decoded tokens, of all rows or of one.

        >>> from funcdelta.apps.bench.subjects import tiny_lm
        >>> Routed(tiny_lm(), 3).decode(tiny_lm().backbone, 1).shape
        torch.Size([1, 8, 50])
        """
        return generated(model, self.tokens if row is None else self.tokens[row : row + 1], **options)

    def in_turn(self, call: Callable[[int], Tensor]) -> Tensor:
        """The first rows one by one, each with its adapter made active.

        >>> from funcdelta.apps.bench.subjects import tiny_lm
        >>> Routed(tiny_lm(), 3).in_turn(lambda row: torch.ones(1, 2) * row).tolist()
        [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
        """
        outputs = []
        for row in range(self.turn):
            self.peft.model.set_adapter(self.peft.names[row])
            outputs.append(call(row))
        return torch.cat(outputs)

    def by_hand(self, call: Callable[[Any, int], Tensor]) -> Tensor:
        """The same by LoRA written into the modules.

        >>> from funcdelta.apps.bench.subjects import tiny_lm
        >>> case = Routed(tiny_lm(), 3)
        >>> case.by_hand(lambda model, row: case.logits(model, row)).shape
        torch.Size([3, 50])
        """
        hand = HandWritten(self.subject, self.members[0])
        outputs = []
        for row in range(self.turn):
            hand.load(self.members[row])
            outputs.append(call(hand.model, row))
        return torch.cat(outputs)

    def table(self, what: str, steps: dict[str, Callable[[], Tensor]], expected: Tensor, effort: Effort) -> Table:
        """The table of `steps`, whose first rows must be `expected`; the bare backbone's step stands first.

        >>> from funcdelta.apps.bench.subjects import tiny_lm
        >>> case = Routed(tiny_lm(), 2)
        >>> steps = {BARE: lambda: torch.ones(2, 3), ROUTED: lambda: torch.zeros(2, 3)}
        >>> case.table("nothing", steps, torch.ones(2, 3), Effort())
        Traceback (most recent call last):
        ...
        funcdelta...DisagreementError: : logits by members routed differ from hand-written LoRA by 1.0e+00
        """
        steps = dict(steps)
        yardstick = steps.pop(BARE)
        error = 0.0
        with quiet_names():
            for label, step in steps.items():
                found, wanted = comparable(step()[: self.turn], expected)
                error = max(error, worst := disagreement({"logits": found}, {"logits": wanted}))
                if worst > TOLERANCE:
                    raise DisagreementError(
                        f"{self.title}: logits by {label} differ from hand-written LoRA by {worst:.1e}"
                    )
            self.notify(f"{self.title}: timing {effort.repeats} rounds")
            samples, attempts = quiet(lambda: interleave(yardstick, steps, effort.repeats), NOISE, effort.attempts)
        share = self.turn / self.rows
        times = {label: samples.times[label] for label in steps}
        if PEFT_TURN in times:
            times[PEFT_TURN] = tuple(value / share for value in times[PEFT_TURN])
        samples = Samples(samples.yardstick, times, samples.beside)
        rows = [Row(BARE, in_milliseconds(samples.yardstick), Ratio(1.0, 1.0, 1.0))]
        for label in steps:
            to_peft = samples.ratio_between(label, PEFT_NAMES) if PEFT_NAMES in steps else None
            note = f"{self.turn} rows timed, scaled" if label == PEFT_TURN and share < 1 else ""
            target = self._target(label, samples) if self.subject.judged else None
            rows.append(Row(label, in_milliseconds(samples.times[label]), samples.ratio(label), to_peft, target, note))
        seconds = {BARE: samples.yardstick, **samples.times}
        return Table(
            self.title, self.subject.name, BARE, tuple(rows), samples.spread, attempts, error, seconds,
            what=what, compared="logits",
        )  # fmt: skip

    def _target(self, label: str, samples: Samples) -> Target | None:
        if label == ROUTED:
            return Target.at_most("x bare", 1.10, samples.ratio(label).median)
        if label == PEFT_NAMES and self.rows in FASTER:
            return Target.at_least(f"x {ROUTED}", FASTER[self.rows], samples.ratio_between(label, ROUTED).median)
        return None


@contextlib.contextmanager
def quiet_names() -> Iterator[None]:
    """What PEFT and `generate` say about settings that all contenders share is not said at each step.

    >>> with quiet_names(): pass
    """
    import logging

    logger = logging.getLogger("transformers.generation")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
