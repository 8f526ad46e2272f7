"""Prompts: rows added before the embedded input, ``x' = [prompt; embed(ids)]``, without touching the caller's inputs.

A method gives ``prompt(site, p) -> (P, d)``; its site is the module that the input embeddings enter. Shapes there:
ids (b, s) become embeddings (b, P + s, d), and everything that counts positions is extended on copies: masks, token
types, explicit position numbers, labels where the head above would compare them with longer logits, and the mask by
which a decoder attends to the encoder. A row that is padded in front, ``[0; text]``, becomes ``[0; prompt; text]``,
what the model computes for the padded text of a longer row; the text stays at its place from the end. With a filled
cache nothing is inserted: the prompt is in the cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError, EngineError
from ..methods.acts import Acts
from ..plan.attachment import Attachment
from .bound import Bound
from .call import Call, Host
from .counting import CALLERS, Counting, readable
from .entrance import Entrance
from .lengthened import (
    check_mask,
    check_one_text,
    continued,
    extended,
    hides,
    in_order,
    is_of_tokens,
    lengthened,
    numbered,
    text_of,
)
from .masks import with_prompt
from .opened import where
from .padding import check_padding, checkable
from .positions import before, behind_padding, by_position, cached_length, in_front, leading, named, reordered
from .text_model import inputs_of

Act = Callable[..., tuple[Tensor, int | None]]
MEMORIES = ("mems", "cache_params", "state")
"""Memories of other kinds, which do not tell how many positions they hold."""

SPANS = ("start_positions", "end_positions")

PROMPTED = "prompted"
"""Where a call notes what was entered at an entrance."""


class Entered(NamedTuple):
    """How many rows were added, how many positions the input then has, and the order in which its output leaves."""

    rows: int = 0
    length: int = 0
    back: Tensor | None = None


class Prompts:
    """The hooks by which the prompts at one site of a skeleton enter; ``act`` runs a member's function at a site.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    >>> delta = fd.SoftPromptModel(BertModel(BertConfig(vocab_size=20, **sizes)).eval(), soft_token_num=3)
    >>> batch = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 0]])}
    >>> delta.apply(delta.init(0), **batch).last_hidden_state.shape, batch["attention_mask"]
    (torch.Size([1, 5, 8]), tensor([[1, 0]]))
    """

    def __init__(self, skeleton: Host, path: str, attachments: Sequence[Attachment], act: Act) -> None:
        self.skeleton, self.path, self.act = skeleton, path, act
        self.prompting = [Bound(a, functools.partial(_rows_before, a)) for a in attachments]
        self.entrance = Entrance(skeleton.module, path)
        self.counting = Counting(skeleton, path)
        self.checked: float = 0  # the longest padded input that was compared with its row alone
        self.inputs = {id(m): inputs_of(m) for m in (*self.entrance.decoders, self.entrance.labelled) if m is not None}
        self.key = f"{path or 'the model'} (prompt)"

    def open(self) -> None:
        """Register what has to run before everything else at the site, and above it and beside it."""
        self.counting.open()
        if self.counting.caller is not None:
            self.counting.caller.register_forward_pre_hook(self._go_on, with_kwargs=True)
        owner = self.entrance.labelled
        if owner is not None:
            owner.register_forward_pre_hook(self._label, with_kwargs=True)
        self.entrance.module.register_forward_pre_hook(self._enter, with_kwargs=True)
        for decoder in self.entrance.decoders:
            decoder.register_forward_pre_hook(self._cross, with_kwargs=True)

    def close(self) -> None:
        """Register what has to run after everything else at the site."""
        if not self.entrance.decoders:
            self.entrance.module.register_forward_hook(self._leave)

    # -- hooks -----------------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.skeleton.under_way(self.path)
        if call.reached is not None:
            call.reached.add(self.path)
        present = self._present(call)
        call.note(PROMPTED)[self.path] = Entered()
        if not present:
            return None
        given = named(self.entrance.inputs, args, kwargs, self.path)
        ids, x = given.get("input_ids"), given.get("inputs_embeds")
        if (ids is None) == (x is None):
            return None  # the model says what it expects
        for name in MEMORIES:
            if given.get(name) is not None:
                raise EngineError(
                    f"{self.path or 'The model'} was given {name}, which does not tell whether the prompt was read "
                    f"already: call it without, on the whole text (generate with use_cache=False)."
                )
        cached, rows = cached_length(given), _count(present)
        length = (ids if x is None else x).shape[1]  # pyright: ignore[reportOptionalMemberAccess]
        self.entrance.check_length(cached + length + (0 if cached else rows), cached + length)
        if cached:
            return (), self._from_cache(call, given, present, cached, length)
        given, made = self._own_mask(call, given)
        lead = self.counting.lead(_of_text(given.get("attention_mask"), length, rows))
        check_one_text(given, readable(call, given.get("position_ids")))
        numbers = {} if x is not None else self.entrance.positions(given)
        numbers = numbers or self.counting.numbers(call, given, lead, 0, length)
        given = {**given, **numbers, **self.entrance.identities(given, rows)}
        x = self._prepended(call, present, self.entrance.embedding(ids) if x is None else x, module.training)
        given = numbered(given, rows, lead, self.entrance.first_position)
        for attachment in _attachments(present):
            given = extended(given, attachment, length, x, self.entrance)
            length += attachment.prompt_rows
        given |= {"input_ids": None, "inputs_embeds": x}
        entered = Entered(rows, length)
        if lead is not None and self.entrance.behind_padding:
            given = in_order(given, behind_padding(lead, rows, length), _attachments(present))
            if not (self.entrance.causal or self.entrance.decoders):
                entered = Entered(rows, length, in_front(lead, rows, length))
        if made is not None:
            given["attention_mask"] = self._masks(made, given, rows, lead)
        elif lead is not None:
            self._check_padding(call, given, lead, rows, present[0].attachment.name, tuple(numbers))
        call.note(PROMPTED)[self.path] = entered
        return (), given

    def _go_on(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that goes on from a cache has the prompt in it, which masks made further in have to count."""
        call = self.skeleton.under_way(self.path)
        present = self._present(call)
        given = self.counting.asked(call) if present else None
        like = text_of(given) if given else None
        if given is None or like is None or not (cached := cached_length(given)):
            return None
        behind = self.entrance.behind_padding
        given = continued(given, _attachments(present), cached, like.shape[1], behind)
        call.note(CALLERS)[self.path] = given
        return (), given

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call = self.skeleton.under_way(self.path)
        rows, length, back = call.note(PROMPTED).get(self.path, Entered())
        if back is not None:
            output = by_position(output, length, lambda x: reordered(x, back))
        if rows and self._strips(self._present(call)):
            return by_position(output, length, lambda x: x[:, rows:])
        return output

    def _label(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Labels a token get ``-100`` for the prompt, and answers' positions move behind it."""
        present = self._present(self.skeleton.under_way(self.path))
        if not present or self._strips(present):
            return None
        given = named(self.inputs[id(module)], args, kwargs, self.path)
        like = text_of(given)
        if like is None or cached_length(given):
            return None
        rows, changed = _count(present), {}
        labels = given.get("labels")
        # A floating label is a value a class, not a token; (b,) is one label a row.
        if isinstance(labels, Tensor) and labels.shape == like.shape[:2] and not labels.is_floating_point():
            changed["labels"] = before(labels, rows, -100)
            mask = given.get("attention_mask")
            if self.entrance.causal and isinstance(mask, Tensor) and mask.shape == labels.shape:
                # They move with the positions: the prompt's last row gives the first token.
                order = behind_padding(leading(mask), rows, rows + labels.shape[1])
                changed["labels"] = reordered(changed["labels"], order)
        for name in SPANS:
            if isinstance(given.get(name), Tensor):
                changed[name] = given[name] + rows
        return ((), {**given, **changed}) if changed else None

    def _cross(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The decoder sees the prompt's states too; those of an encoder run without it come with a mask that fits."""
        call = self.skeleton.under_way(self.path)
        given = named(self.inputs[id(module)], args, kwargs, self.path)
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if states is not None and call.reached is not None:
            call.reached.add(self.path)
        present = self._present(call)
        if not present or not isinstance(states, Tensor) or not isinstance(mask, Tensor) or mask.ndim != 2:
            return None
        rows = _count(present)
        if states.shape[1] != mask.shape[1] + rows:
            return None
        longer = lengthened(mask, _attachments(present))
        if self.entrance.behind_padding:
            longer = reordered(longer, behind_padding(leading(mask), rows, states.shape[1]))
        return (), {**given, "encoder_attention_mask": longer}

    # -- parts -----------------------------------------------------------------------------------------------------

    def _present(self, call: Call) -> list[Bound]:
        return [bound for bound in self.prompting if bound.key in call.params]

    def _strips(self, present: Sequence[Bound]) -> bool:
        return self.entrance.head_counts_ids or any(bound.acts[0].strip for bound in present)

    def _prepended(self, call: Call, present: Sequence[Bound], x: Tensor, training: bool) -> Tensor:
        if call.lift is not None and getattr(call.lift, "present", None) is not None:
            raise EngineError(
                f"{present[0].attachment.name} makes the input longer, so rows of the bare backbone (index -1) do not "
                f"fit into one batch with the others: run them by themselves, delta.apply({{}}, ...). (Inside compiled "
                f"code and transforms the index cannot be read, and every row counts as one that may be bare.)"
            )
        dim = None
        if call.lift is not None and call.watch is not None:
            dim = call.watch.axis(self.key, x)
            call.watch.site(self.key, dim, dim)
        elif call.lift is not None:
            dim = where(call, self.key).x
        for bound in present:
            x, dim = self.act(call, self.path, bound, training, (x,), (dim,))
        return x

    def _own_mask(self, call: Call, given: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """The inputs with the mask that the caller gave, and what a model around this one made of it, if one did."""
        mask, asked = given.get("attention_mask"), self.counting.asked(call)
        if mask is None or is_of_tokens(mask) or asked is None:
            return given, None
        own = asked.get("attention_mask")
        return ({**given, "attention_mask": own}, mask) if own is None or is_of_tokens(own) else (given, None)

    def _masks(self, made: Any, given: dict[str, Any], rows: int, lead: Tensor | None) -> Any:
        x, mask, positions = given["inputs_embeds"], given.get("attention_mask"), given.get("position_ids")
        masks = with_prompt(made, self.entrance.module, x, mask, positions, rows, lead)
        if masks is NotImplemented:
            check_mask(made)
        return masks

    def _from_cache(
        self, call: Call, given: dict[str, Any], present: Sequence[Bound], cached: int, length: int
    ) -> dict[str, Any]:
        """The inputs of a call that goes on from a cache, where the entrance gets them."""
        if self.counting.asked(call) is None:
            given = continued(given, _attachments(present), cached, length, self.entrance.behind_padding)
        lead = self.counting.lead(self.counting.mask(call, given))
        if lead is not None:
            hidden = sum(attachment.prompt_rows for attachment in _attachments(present) if hides(attachment))
            lead = (lead - hidden).clamp(min=0)
        return {**given, **self.counting.numbers(call, given, lead, cached, length)}

    def _check_padding(
        self, call: Call, given: dict[str, Any], lead: Tensor, rows: int, name: str, made: tuple[str, ...]
    ) -> None:
        """Compare a padded row with itself alone, where the numbers of positions do not settle that they agree."""
        length, causal = given["inputs_embeds"].shape[1], self.entrance.causal
        settled = causal and self.counting.settles
        if settled or length <= self.checked or not checkable(self.skeleton, call, lead):
            return
        start = 0 if self.entrance.behind_padding else rows
        what = f"{name} at {self.path or type(self.entrance.module).__name__}"
        if check_padding(
            self.skeleton, self.entrance.module, given, lead, lambda n: slice(start, start + n), {}, what, made
        ):
            # A window may be longer than this input; of what comes before alone the length changes nothing.
            self.checked = math.inf if causal else length


def _attachments(present: Sequence[Bound]) -> list[Attachment]:
    return [bound.attachment for bound in present]


def _count(present: Sequence[Bound]) -> int:
    """How many rows these prompts have together."""
    return sum(attachment.prompt_rows for attachment in _attachments(present))


def _of_text(mask: Any, length: int, rows: int) -> Tensor | None:
    """The mask of the text alone, also where the caller counted the prompt."""
    if not is_of_tokens(mask):
        return None
    return mask[:, rows:] if mask.shape[1] == length + rows else mask


def _rows_before(attachment: Attachment, acts: Acts) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """The method's rows in the embeddings' dtype, before each row of the batch."""
    config, site, prompt = attachment.config, attachment.site, acts.prompt
    assert prompt is not None

    def act(p: dict[str, Tensor], x: Tensor) -> Tensor:
        rows = prompt(p)
        if rows.shape != (attachment.prompt_rows, x.shape[-1]):
            raise ConfigError(
                f"{type(config).__name__}.prompt gave {tuple(rows.shape)} at {site.path or 'the model'}; expected "
                f"{(attachment.prompt_rows, x.shape[-1])}: as many rows as at the start, as wide as the embeddings."
            )
        return torch.cat([rows.to(x.dtype).expand(*x.shape[:-2], -1, -1), x], -2)

    return act
