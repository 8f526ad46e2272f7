"""As many rows as members, each row with its own, in one forward and in greedy decoding."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import funcdelta as fd
from funcdelta.apps.bench.contenders import lora, random_stack
from funcdelta.apps.bench.measure import BARE, Effort, Notify, Race, Table, Target, disagreement, held, silent
from funcdelta.apps.bench.rivals import HandWritten, Peft
from funcdelta.apps.bench.subjects import Shape, Subject
from funcdelta.apps.bench.timing import Samples

ROUTED, PEFT_NAMES, PEFT_TURN = "members routed", "PEFT, adapter_names", "PEFT in turn"
PROMPT, NEW = 8, 8
"""Tokens of a prompt, and tokens that are decoded after it."""
CHECKED = 4
"""Rows that go one by one: those whose outputs are compared, and timed in turn."""
FASTER = {16: 1.4, 64: 2.0}
"""How many times faster than PEFT's adapter_names routed rows have to be."""


def forward_table(subject: Subject, rows: int, effort: Effort, notify: Notify = silent) -> Table:
    """A forward of `rows` rows with a member each, logits of the last token, against the bare backbone and PEFT."""
    case = Routed(subject, rows, notify, f"{subject.name} routed forward, {rows} rows of {PROMPT} tokens")
    steps: dict[str, Callable[[], Tensor]] = {
        BARE: lambda: case.logits(subject.backbone),
        ROUTED: lambda: case.logits(lambda **inputs: case.delta.apply_rows(case.stack, case.index, **inputs)),
        PEFT_NAMES: lambda: case.logits(case.peft.model, adapter_names=case.peft.names),
        PEFT_TURN: lambda: case.in_turn(lambda row: case.logits(case.peft.model, row)),
    }
    return case.table("apply_rows", steps, case.by_hand(case.logits), effort)


def decode_table(subject: Subject, rows: int, effort: Effort, notify: Notify = silent) -> Table:
    """Greedy decoding of `rows` rows with a member each, by `bind_rows(...).generate`."""
    case = Routed(subject, rows, notify, f"{subject.name} greedy decode, {rows} rows, {PROMPT} + {NEW} tokens")
    view: Any = case.delta.bind_rows(case.stack, case.index)
    steps: dict[str, Callable[[], Tensor]] = {
        BARE: lambda: case.decode(subject.backbone),
        # Routed anew each time, so that the members are picked within what is timed.
        ROUTED: lambda: case.decode(view.route(case.index)),
        PEFT_NAMES: lambda: case.decode(case.peft.model, adapter_names=case.peft.names),
        PEFT_TURN: lambda: case.in_turn(lambda row: case.decode(case.peft.model, row)),
    }
    return case.table("bind_rows(...).generate", steps, case.by_hand(case.decode), effort)


def resident_table(subject: Subject, residents: tuple[int, ...], effort: Effort, notify: Notify = silent) -> Table:
    """Greedy decoding of 16 rows out of stacks of several sizes: the cost must not grow with what is resident."""
    rows, fewest = 16, residents[0]
    title = f"{subject.name} greedy decode, {rows} rows of {fewest} to {residents[-1]} resident members"
    notify(f"{title}: preparing")
    delta = lora(subject)
    few = random_stack(delta, fewest)
    tokens = subject.tokens(Shape(rows, 1, PROMPT))[:, 0]
    steps: dict[str, Callable[[], Tensor]] = {}
    for n in residents:
        # Every stack holds its own memory; the members used are spread over all of it, and the same in all.
        stack = fd.take(few, [i % fewest for i in range(n)])
        index = [(n - fewest) * row // rows // fewest * fewest + row % fewest for row in range(rows)]
        view: Any = delta.bind_rows(stack, index)
        steps[f"{n} resident"] = lambda view=view, index=index: generated(view.route(index), tokens)
    first = f"{fewest} resident"
    expected = {"logits": steps[first]()}
    error = max(disagreement({"logits": step()}, expected) for step in steps.values())
    held(error, title, "logits", "those of the same members among fewer")

    def target(label: str, samples: Samples) -> Target | None:
        return Target.at_most(f"x {first}", 1.05, samples.ratio(label).median) if subject.judged else None

    race = Race(title, subject.name, (first, steps.pop(first)), steps, target=target)
    return race.run(effort, notify, disagreement=error, what="bind_rows(...).generate", compared="logits")


def generated(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """The logits (rows, steps, vocabulary) of `NEW` greedily decoded tokens after `tokens` (rows, s)."""
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

    Two tokens may be equally likely up to rounding, and what is decoded after them need not agree.

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
    """As many members as rows on one language model, and the same members as PEFT's adapters."""

    def __init__(self, subject: Subject, rows: int, notify: Notify = silent, title: str = "") -> None:
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
        """The last token's logits (rows, vocabulary) of all rows, or of one."""
        with torch.no_grad():
            return model(input_ids=self._tokens(row), logits_to_keep=1, use_cache=False, **options).logits[:, -1]

    def decode(self, model: Any, row: int | None = None, **options: Any) -> Tensor:
        """The logits of all decoded tokens, of all rows or of one."""
        return generated(model, self._tokens(row), **options)

    def _tokens(self, row: int | None) -> Tensor:
        return self.tokens if row is None else self.tokens[row : row + 1]

    def in_turn(self, call: Callable[[int], Tensor]) -> Tensor:
        """The first rows one by one, each with its adapter made active."""
        outputs = []
        for row in range(self.turn):
            self.peft.model.set_adapter(self.peft.names[row])
            outputs.append(call(row))
        return torch.cat(outputs)

    def by_hand(self, call: Callable[[Any, int], Tensor]) -> Tensor:
        """The same by LoRA written into the modules."""
        hand = HandWritten(self.subject, self.members[0])
        outputs = []
        for row in range(self.turn):
            hand.load(self.members[row])
            outputs.append(call(hand.model, row))
        return torch.cat(outputs)

    def table(self, what: str, steps: Mapping[str, Callable[[], Tensor]], expected: Tensor, effort: Effort) -> Table:
        """The table of `steps`, whose first rows must be `expected`; the first row is the bare backbone's."""
        others = {label: step for label, step in steps.items() if label != BARE}
        share = self.turn / self.rows
        race = Race(
            self.title,
            self.subject.name,
            (BARE, steps[BARE]),
            others,
            shares={PEFT_TURN: share},
            note=lambda label, _: f"{self.turn} rows timed, scaled" if label == PEFT_TURN and share < 1 else "",
            target=self._target,
            peft=PEFT_NAMES,
        )
        error = 0.0
        with quiet_names():
            for label, step in others.items():
                found, wanted = comparable(step()[: self.turn], expected)
                worst = disagreement({"logits": found}, {"logits": wanted})
                error = max(error, held(worst, self.title, f"logits by {label}"))
            return race.run(effort, self.notify, disagreement=error, what=what, compared="logits")

    def _target(self, label: str, samples: Samples) -> Target | None:
        if self.subject.judged and label == ROUTED:
            return Target.at_most("x bare", 1.10, samples.ratio(label).median)
        if self.subject.judged and label == PEFT_NAMES and self.rows in FASTER:
            return Target.at_least(f"x {ROUTED}", FASTER[self.rows], samples.ratio_between(label, ROUTED).median)
        return None


@contextlib.contextmanager
def quiet_names() -> Iterator[None]:
    """Inside, `generate` does not repeat at each step what it says about settings that all contenders share."""
    logger = logging.getLogger("transformers.generation")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
