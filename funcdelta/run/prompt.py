"""Prompts: rows added before the embedded input, ``x' = [prompt; embed(ids)]``, without touching the caller's inputs.

A method defines ``prompt(site, p) -> (P, d)``; its site is the module that the input embeddings enter. There ids (b, s)
become embeddings (b, P + s, d), and everything that counts positions is extended on copies: masks, token types,
explicit position numbers, labels that the head above compares with the longer logits, and the mask by which a decoder
attends to the encoder. A row padded in front, ``[0; text]``, becomes ``[0; prompt; text]``, as if prompt and text were
one padded text; counted from the end, the text stays in its place. With a filled cache nothing is inserted, because
the prompt is in the cache.
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
"""Caches of other kinds, which do not tell how many positions they hold."""

SPANS = ("start_positions", "end_positions")

PROMPTED = "prompted"
"""The key under which a call keeps an :class:`Entered` for each entrance."""


class Entered(NamedTuple):
    """What entered: prompt rows, the input's length with them, and the order that puts the output's positions back."""

    rows: int = 0
    length: int = 0
    back: Tensor | None = None


class Prompts:
    """The hooks that add the prompts at one site of a skeleton; ``act`` runs a member's function at a site.

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
        self.checked: float = 0  # the length of the longest padded input that passed check_padding
        self.inputs = {id(m): inputs_of(m) for m in (*self.entrance.decoders, self.entrance.labelled) if m is not None}
        self.key = f"{path or 'the model'} (prompt)"

    def open(self) -> None:
        """Register the hooks that run before everything else at the site, and those on modules around it."""
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
        """Register the hook that runs after everything else at the site."""
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
            return None  # let the model raise its own error
        for name in MEMORIES:
            if given.get(name) is not None:
                raise EngineError(
                    f"{self.path or 'The model'} was given {name}, which does not tell whether it holds the prompt "
                    f"already. Call it without {name}, on the whole text (generate with use_cache=False)."
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
        """Extend the inputs above the entrance if a cache holds the prompt: masks built further in have to count it."""
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
        """Extend labels per token by ``-100`` for the prompt, and shift the positions of answers by its length."""
        present = self._present(self.skeleton.under_way(self.path))
        if not present or self._strips(present):
            return None
        given = named(self.inputs[id(module)], args, kwargs, self.path)
        like = text_of(given)
        if like is None or cached_length(given):
            return None
        rows, changed = _count(present), {}
        labels = given.get("labels")
        # Floating-point labels hold a value per class, not per token; labels (b,) hold one per row.
        if isinstance(labels, Tensor) and labels.shape == like.shape[:2] and not labels.is_floating_point():
            changed["labels"] = before(labels, rows, -100)
            mask = given.get("attention_mask")
            if self.entrance.causal and isinstance(mask, Tensor) and mask.shape == labels.shape:
                # Labels move with the positions, so that the prompt's last row predicts the first token.
                order = behind_padding(leading(mask), rows, rows + labels.shape[1])
                changed["labels"] = reordered(changed["labels"], order)
        for name in SPANS:
            if isinstance(given.get(name), Tensor):
                changed[name] = given[name] + rows
        return ((), {**given, **changed}) if changed else None

    def _cross(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the decoder attend to the prompt's states; states of an encoder that ran without it fit their mask."""
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
                f"fit into one batch with the others. Run them separately: delta.apply({{}}, ...). (Compiled code and "
                f"transforms cannot read the index, and treat every row as one that may be bare.)"
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
        """The inputs with the caller's mask (b, s), and the mask that a model around this one built from it, if any."""
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
        """The entrance's inputs in a call that continues from a cache."""
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
        """Compare a padded row with the same row alone, unless position numbers guarantee that they agree."""
        length, causal = given["inputs_embeds"].shape[1], self.entrance.causal
        settled = causal and self.counting.settles
        if settled or length <= self.checked or not checkable(self.skeleton, call, lead):
            return
        start = 0 if self.entrance.behind_padding else rows
        what = f"{name} at {self.path or type(self.entrance.module).__name__}"
        if check_padding(
            self.skeleton, self.entrance.module, given, lead, lambda n: slice(start, start + n), {}, what, made
        ):
            # A longer input may exceed a window, and is checked again; in a causal model the length changes nothing.
            self.checked = math.inf if causal else length


def _attachments(present: Sequence[Bound]) -> list[Attachment]:
    return [bound.attachment for bound in present]


def _count(present: Sequence[Bound]) -> int:
    """The number of rows of all these prompts."""
    return sum(attachment.prompt_rows for attachment in _attachments(present))


def _of_text(mask: Any, length: int, rows: int) -> Tensor | None:
    """The text's part of a mask, which may or may not cover the prompt."""
    if not is_of_tokens(mask):
        return None
    return mask[:, rows:] if mask.shape[1] == length + rows else mask


def _rows_before(attachment: Attachment, acts: Acts) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """The act ``x -> [prompt(p); x]`` on every row of the batch, in the dtype of ``x``."""
    config, site, prompt = attachment.config, attachment.site, acts.prompt
    assert prompt is not None

    def act(p: dict[str, Tensor], x: Tensor) -> Tensor:
        rows = prompt(p)
        if rows.shape != (attachment.prompt_rows, x.shape[-1]):
            raise ConfigError(
                f"{type(config).__name__}.prompt returned {tuple(rows.shape)} at {site.path or 'the model'}; expected "
                f"{(attachment.prompt_rows, x.shape[-1])}: as many rows as when the delta was built, and as wide as "
                f"the embeddings."
            )
        return torch.cat([rows.to(x.dtype).expand(*x.shape[:-2], -1, -1), x], -2)

    return act
