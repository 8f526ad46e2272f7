"""Prompts: rows added before the embedded input, ``x' = [prompt; embed(ids)]``, without touching the caller's inputs.

A method gives ``prompt(site, p) -> (P, d)``; its site is the module that the input embeddings enter. Shapes there:
ids (b, s) become embeddings (b, P + s, d), and everything that counts positions is extended on copies: masks, token
types, explicit position numbers, labels where the head above would compare them with longer logits, and the mask by
which a decoder attends to the encoder. A row that is padded in front, ``[0; text]``, becomes ``[0; prompt; text]``,
what the model computes for the padded text of a longer row; the text stays at its place from the end. With a filled
cache nothing is inserted: the prompt is in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError, EngineError, ParamsError
from ..planning.plan import Attachment
from ..transforms import concrete
from .call import Call, Host
from .counting import CALLERS, Counting, readable
from .entrance import SECOND_INPUT, Entrance, inputs_of
from .masks import with_prompt
from .padding import check_padding, checkable
from .positions import (
    CACHES,
    before,
    behind_padding,
    by_position,
    cached_length,
    in_front,
    leading,
    named,
    reordered,
)

Act = Callable[..., tuple[Tensor, int | None]]

EXPAND = (("attention_mask", 1), ("token_type_ids", 0))
"""What is put before each of these inputs, where a method has no ``other_expand_ids`` of its own."""

MEMORIES = ("mems", "cache_params", "state")
"""Memories of other kinds, which do not tell how many positions they hold."""

EXTENDED = ("input_ids", "inputs_embeds", "position_ids", "cache_position", "labels", SECOND_INPUT, *CACHES)
"""Inputs that the library extends by rules of their own."""

MARKS = ("visual_pos_masks",)
"""Inputs that mark the positions which hold images: the prompt's do not."""

PACKED = ("cu_seq_lens_q", "cu_seqlens", "seq_idx")
"""Inputs that say where one of several texts in a row ends."""

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
        self.attachments = [(a, (_rows_before(a, False), _rows_before(a, True))) for a in attachments]
        self.entrance = Entrance(skeleton.module, path)
        self.counting = Counting(skeleton, path)
        self.checked = 0  # the longest padded input that was compared with its row alone
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
        lead = self.counting.lead(call, _of_text(given.get("attention_mask"), length, rows))
        self._check_one_text(call, given, lead)
        numbers = {} if x is not None else self.entrance.positions(given)
        numbers = numbers or self.counting.numbers(call, given, lead, 0, length)
        given = {**given, **numbers, **self.entrance.identities(given, rows)}
        x = self.entrance.embedding(ids) if x is None else x
        x = self._prepended(call, present, x, module.training)
        given = self._numbered(given, rows, lead)
        for attachment, _ in present:
            given = self._extended(given, attachment, length, x)
            length += attachment.prompt_rows
        given |= {"input_ids": None, "inputs_embeds": x}
        entered = Entered(rows, length)
        if lead is not None and self.entrance.behind_padding:
            given = _reordered(given, behind_padding(lead, rows, length), length)
            if not (self.entrance.causal or self.entrance.decoders):
                entered = Entered(rows, length, in_front(lead, rows, length))
        if made is not None:
            given["attention_mask"] = self._masks(made, given, rows, lead)
        elif lead is not None:
            self._check_padding(call, given, lead, rows, present[0][0].name, tuple(numbers))
        call.note(PROMPTED)[self.path] = entered
        return (), given

    def _go_on(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that goes on from a cache has the prompt in it, which masks made further in have to count."""
        call = self.skeleton.under_way(self.path)
        present = self._present(call)
        given = self.counting.asked(call) if present else None
        like = _text(given) if given else None
        if given is None or like is None or not (cached := cached_length(given)):
            return None
        given = call.note(CALLERS)[self.path] = self._continued(given, present, cached, like.shape[1])
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
        like = _text(given)
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
        order = behind_padding(leading(mask), rows, states.shape[1]) if self.entrance.behind_padding else None
        for attachment, _ in present:
            mask = before(mask, attachment.prompt_rows, expand_values(attachment).get("attention_mask", 1))
        return (), {**given, "encoder_attention_mask": mask if order is None else reordered(mask, order)}

    # -- parts -----------------------------------------------------------------------------------------------------

    def _present(self, call: Call) -> list[tuple[Attachment, tuple[Any, Any]]]:
        return [(a, functions) for a, functions in self.attachments if a.key in call.params]

    def _strips(self, present: Sequence[tuple[Attachment, Any]]) -> bool:
        return self.entrance.head_counts_ids or any(getattr(a.config, "strip", False) for a, _ in present)

    def _prepended(self, call: Call, present: Sequence[tuple[Attachment, Any]], x: Tensor, training: bool) -> Tensor:
        if call.lift is not None and getattr(call.lift, "present", None) is not None:
            raise EngineError(
                f"{present[0][0].name} makes the input longer, so rows of the bare backbone (index -1) do not fit "
                f"into one batch with the others: run them by themselves, delta.apply({{}}, ...). (Inside compiled "
                f"code and transforms the index cannot be read, and every row counts as one that may be bare.)"
            )
        dim = None
        if call.lift is not None and call.watch is not None:
            dim = call.watch.axis(self.key, x)
            call.watch.site(self.key, dim, dim)
        elif call.lift is not None:
            dim = call.where(self.key).x
        for attachment, functions in present:
            x, dim = self.act(call, self.path, functions[training], attachment.of(call.params), (x,), (dim,))
        return x

    def _own_mask(self, call: Call, given: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """The inputs with the mask that the caller gave, and what a model around this one made of it, if one did."""
        mask, asked = given.get("attention_mask"), self.counting.asked(call)
        if mask is None or _is_of_tokens(mask) or asked is None:
            return given, None
        own = asked.get("attention_mask")
        return ({**given, "attention_mask": own}, mask) if own is None or _is_of_tokens(own) else (given, None)

    def _masks(self, made: Any, given: dict[str, Any], rows: int, lead: Tensor | None) -> Any:
        x, mask, positions = given["inputs_embeds"], given.get("attention_mask"), given.get("position_ids")
        masks = with_prompt(made, self.entrance.module, x, mask, positions, rows, lead)
        if masks is NotImplemented:
            self._check_two_axes("attention_mask", made)
        return masks

    def _numbered(self, given: dict[str, Any], rows: int, lead: Tensor | None) -> dict[str, Any]:
        """Explicit numbers of positions with those of ``rows`` more in front: the prompt's go on to the text's."""
        first, new = self.entrance.first_position, dict(given)
        for name in ("position_ids", "cache_position"):
            at = given.get(name)
            if not isinstance(at, Tensor):
                continue
            begin = at[..., :1]
            if lead is not None and at.ndim > 1:
                at = at.expand(*at.shape[:-2], len(lead), -1)
                begin = at.gather(-1, lead.unsqueeze(1).expand(*at.shape[:-1], 1))
            start = begin.clamp(min=first) + torch.arange(rows, device=at.device, dtype=at.dtype)
            # Below the first position is the number of padding, which no prompt moves.
            moved = at + rows if first == 0 else torch.where(at < first, at, at + rows)
            new[name] = torch.cat([start, moved], -1)
        return new

    def _extended(self, given: dict[str, Any], attachment: Attachment, length: int, x: Tensor) -> dict[str, Any]:
        """The inputs beside the embeddings ``x`` for ``prompt_rows`` more positions before ``length``."""
        rows, new = attachment.prompt_rows, dict(given)
        values = dict.fromkeys(MARKS, 0) | expand_values(attachment)
        for name, value in values.items():
            tensor = given.get(name)
            if tensor is None and name == "attention_mask" and not value:
                tensor = torch.ones(x.shape[0], length, dtype=torch.long, device=x.device)
            if tensor is None:
                continue  # nothing is padded: the model sees every position
            if name == "attention_mask":
                self._check_two_axes(name, tensor)
            if tensor.ndim < 2 or tensor.shape[1] not in (length, length + rows):
                raise ParamsError(
                    f"{name} has the shape {tuple(tensor.shape)} beside an input of {length} positions: give one "
                    f"value for each of them, without the prompt's."
                )
            new[name] = before(tensor, rows, value) if tensor.shape[1] == length else tensor
        for name in self.entrance.inputs:
            other = given.get(name)
            if not isinstance(other, Tensor) or name in (*values, *EXTENDED) or name.startswith("encoder_"):
                continue
            if length in (other.shape[1:2] if other.ndim <= 3 else other.shape[-2:-1]):
                advice = "call the model without it" if other.ndim > 3 else f'add ("{name}", value) to other_expand_ids'
                raise ParamsError(
                    f"{name} has the shape {tuple(other.shape)}, as if for each of the {length} positions, and it is "
                    f"not known what the prompt's are to have: {advice}."
                )
        return new

    def _from_cache(
        self, call: Call, given: dict[str, Any], present: Sequence[tuple[Attachment, Any]], cached: int, length: int
    ) -> dict[str, Any]:
        """The inputs of a call that goes on from a cache, where the entrance gets them."""
        if self.counting.asked(call) is None:
            given = self._continued(given, present, cached, length)
        mask = self.counting.mask(call, given)
        lead = self.counting.lead(call, mask)
        if lead is not None:
            hidden = _count([a for a in present if not expand_values(a[0]).get("attention_mask", 1)])
            lead = (lead - hidden).clamp(min=0)
        return {**given, **self.counting.numbers(call, given, lead, cached, length)}

    def _continued(
        self, given: dict[str, Any], present: Sequence[tuple[Attachment, Any]], cached: int, length: int
    ) -> dict[str, Any]:
        """The inputs of a call that goes on from a cache that holds the prompt."""
        mask, new, counts_prompt = given.get("attention_mask"), dict(given), False
        rows = _count(present)
        if mask is None and not all(expand_values(a).get("attention_mask", 1) for a, _ in present):
            like: Any = _text(given)
            mask = torch.ones(like.shape[0], cached + length - rows, dtype=torch.long, device=like.device)
        if mask is not None:
            self._check_two_axes("attention_mask", mask)
            counts_prompt = mask.shape[1] == cached + length
            if not counts_prompt and mask.shape[1] + rows != cached + length:
                raise ParamsError(
                    f"attention_mask has {mask.shape[1]} positions, the cache {cached} and the input {length}: with a "
                    f"prompt of {rows} in the cache the mask has to have {cached + length - rows} (or, with the "
                    f"prompt, {cached + length}). A cache that was filled without the prompt cannot be gone on from."
                )
            lead = leading(mask[:, rows:] if counts_prompt else mask)
            if not counts_prompt:
                for attachment, _ in present:
                    value = expand_values(attachment).get("attention_mask", 1)
                    mask = before(mask, attachment.prompt_rows, value)
            order = behind_padding(lead, rows, cached + length)
            new["attention_mask"] = reordered(mask, order) if self.entrance.behind_padding else mask
        for name in ("position_ids", "cache_position"):
            if isinstance(given.get(name), Tensor) and not counts_prompt:
                new[name] = given[name] + rows
        return new

    def _check_padding(
        self, call: Call, given: dict[str, Any], lead: Tensor, rows: int, name: str, made: tuple[str, ...]
    ) -> None:
        """Compare a padded row with itself alone, where the numbers of positions do not settle that they agree."""
        length = given["inputs_embeds"].shape[1]
        settled = self.entrance.causal and self.counting.settles
        if settled or length <= self.checked or not checkable(self.skeleton, call, lead):
            return
        start = 0 if self.entrance.behind_padding else rows
        what = f"{name} at {self.path or type(self.entrance.module).__name__}"
        found = check_padding(
            self.skeleton, self.entrance.module, given, lead, lambda n: slice(start, start + n), {}, what, made
        )
        # What is known of a causal model does not depend on the length.
        self.checked = length if found and not self.entrance.causal else 2**62 if found else self.checked

    def _check_one_text(self, call: Call, given: dict[str, Any], lead: Tensor | None) -> None:
        """Refuse several texts in one row: the prompt would be in front of the first of them alone."""
        at, packed = given.get("position_ids"), [name for name in PACKED if given.get(name) is not None]
        if not packed and isinstance(at, Tensor) and at.ndim == 2 and readable(call, at):
            index = torch.arange(at.shape[1] - 1, device=at.device)
            seen = index >= (0 if lead is None else concrete(lead).unsqueeze(1))
            packed = ["position_ids"] if bool(((at.diff(dim=1) < 0) & seen).any()) else []
        if packed:
            raise ParamsError(
                f"{packed[0]} says that several texts share a row, and a prompt would be in front of the first of them "
                f"alone. Give each text a row of its own, with an attention_mask where it is padded."
            )

    def _check_two_axes(self, name: str, tensor: Any) -> None:
        if not isinstance(tensor, Tensor) or tensor.ndim != 2:
            found = f"the shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ParamsError(
                f"{name} has {found}; a prompt can be added to one of two axes only, (b, s), for a prepared mask does "
                f"not say who may see the prompt. Give the mask of the tokens, 1 where there is one."
            )


def _count(present: Sequence[tuple[Attachment, Any]]) -> int:
    """How many rows these prompts have together."""
    return sum(attachment.prompt_rows for attachment, _ in present)


def _text(given: dict[str, Any]) -> Tensor | None:
    """The tokens among the inputs, or their embeddings."""
    return given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")


def _is_of_tokens(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2


def _of_text(mask: Any, length: int, rows: int) -> Tensor | None:
    """The mask of the text alone, also where the caller counted the prompt."""
    if not _is_of_tokens(mask):
        return None
    return mask[:, rows:] if mask.shape[1] == length + rows else mask


def _reordered(given: dict[str, Any], order: Tensor, length: int) -> dict[str, Any]:
    """The inputs with their positions in another order."""
    moved = dict(given)
    for name, value in given.items():
        axis = -1 if name in ("position_ids", "cache_position") else 1
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[axis] == length:
            moved[name] = reordered(value, order, axis)
    return moved


def expand_values(attachment: Attachment) -> dict[str, float]:
    """What is put before each input that has a value a position."""
    return dict(getattr(attachment.config, "other_expand_ids", EXPAND))


def _rows_before(attachment: Attachment, training: bool) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """The method's rows in the embeddings' dtype, before each row of the batch."""
    config, site = attachment.config, attachment.at(training)

    def act(p: dict[str, Tensor], x: Tensor) -> Tensor:
        rows = config.prompt(site, p)
        if rows.shape != (attachment.prompt_rows, x.shape[-1]):
            raise ConfigError(
                f"{type(config).__name__}.prompt gave {tuple(rows.shape)} at {site.path or 'the model'}; expected "
                f"{(attachment.prompt_rows, x.shape[-1])}: as many rows as at the start, as wide as the embeddings."
            )
        return torch.cat([rows.to(x.dtype).expand(*x.shape[:-2], -1, -1), x], -2)

    return act
