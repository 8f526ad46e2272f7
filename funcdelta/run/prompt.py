"""Prompts: rows added before the embedded input, ``x' = [prompt; embed(ids)]``, without touching the caller's inputs.

A method gives ``prompt(site, p) -> (P, d)``; its site is the module that the input embeddings enter. Shapes there:
ids (b, s) become embeddings (b, P + s, d), and everything that counts positions is extended on copies: masks, token
types, explicit position numbers, labels where the head above would compare them with longer logits, and the mask by
which a decoder attends to the encoder. With a filled cache nothing is inserted: the prompt stands in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, EngineError, ParamsError
from ..planning.plan import Attachment
from .entrance import Entrance, inputs_of
from .positions import CACHES, before, cached_length, named, without_prompt

if TYPE_CHECKING:
    from .skeleton import Call, Skeleton

Act = Callable[..., tuple[Tensor, int | None]]

EXPAND = (("attention_mask", 1), ("token_type_ids", 0))
"""What is put before each of these inputs, where a method has no ``other_expand_ids`` of its own."""

MEMORIES = ("mems", "cache_params", "state")
"""Memories of other kinds, which do not tell how many positions they hold."""

EXTENDED = ("input_ids", "inputs_embeds", "position_ids", "cache_position", "labels", *CACHES)
"""Inputs that the library extends by rules of their own."""

SPANS = ("start_positions", "end_positions")

PROMPTED = "prompted"
"""Where a call notes how many rows were added at an entrance, and how many positions its input then has."""


class Prompts:
    """The hooks by which the prompts at one site of a skeleton enter; ``act`` runs a member's function at a site.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    >>> delta = fd.SoftPromptModel(BertModel(BertConfig(vocab_size=20, **sizes)).eval(), soft_token_num=3)
    >>> batch = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 0]])}
    >>> delta.apply(delta.init(0), **batch).last_hidden_state.shape, batch["attention_mask"]
    (torch.Size([1, 5, 8]), tensor([[1, 0]]))
    """

    def __init__(self, skeleton: Skeleton, path: str, attachments: Sequence[Attachment], act: Act) -> None:
        self.skeleton, self.path, self.act = skeleton, path, act
        self.attachments = [(a, (_rows_before(a, False), _rows_before(a, True))) for a in attachments]
        self.entrance = Entrance(skeleton.module, path)
        self.inputs = {id(m): inputs_of(m) for m in (*self.entrance.decoders, self.entrance.labelled) if m is not None}
        self.key = f"{path or 'the model'} (prompt)"

    def open(self) -> None:
        """Register what has to run before everything else at the site, and above it and beside it."""
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
        call.note(PROMPTED)[self.path] = (0, 0)
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
        cached = cached_length(given)
        length = (ids if x is None else x).shape[1]  # pyright: ignore[reportOptionalMemberAccess]
        total = cached + length + (0 if cached else sum(a.prompt_rows for a, _ in present))
        self.entrance.check_length(total, cached + length)
        if cached:
            return (), self._continued(given, present, cached, length)
        if x is None:
            given = {**given, **self.entrance.positions(given)}
            x = self.entrance.embedding(ids)
        x = self._prepended(call, present, x, module.training)
        for attachment, _ in present:
            given = self._extended(given, attachment, length)
            length += attachment.prompt_rows
        call.note(PROMPTED)[self.path] = (sum(a.prompt_rows for a, _ in present), length)
        return (), {**given, "input_ids": None, "inputs_embeds": x}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call = self.skeleton.under_way(self.path)
        rows, length = call.note(PROMPTED).get(self.path, (0, 0))
        return without_prompt(output, rows, length) if rows and self._strips(self._present(call)) else None

    def _label(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Labels a token get ``-100`` for the prompt, and answers' positions move behind it."""
        present = self._present(self.skeleton.under_way(self.path))
        if not present or self._strips(present):
            return None
        given = named(self.inputs[id(module)], args, kwargs, self.path)
        like = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if like is None or cached_length(given):
            return None
        rows, changed = sum(a.prompt_rows for a, _ in present), {}
        labels = given.get("labels")
        # A floating label is a value a class, not a token; (b,) is one label a row.
        if isinstance(labels, Tensor) and labels.shape == like.shape[:2] and not labels.is_floating_point():
            changed["labels"] = before(labels, rows, -100)
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
        if states.shape[1] != mask.shape[1] + sum(a.prompt_rows for a, _ in present):
            return None
        for attachment, _ in present:
            mask = before(mask, attachment.prompt_rows, expand_values(attachment).get("attention_mask", 1))
        return (), {**given, "encoder_attention_mask": mask}

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

    def _extended(self, given: dict[str, Any], attachment: Attachment, length: int) -> dict[str, Any]:
        """The inputs beside the embeddings for ``prompt_rows`` more positions before ``length``."""
        rows, new = attachment.prompt_rows, dict(given)
        for name, value in expand_values(attachment).items():
            tensor = given.get(name)
            if tensor is None:
                continue  # nothing is padded: the model sees every position
            if name == "attention_mask":
                self._check_two_axes(name, tensor)
            if tensor.ndim < 2 or tensor.shape[1] not in (length, length + rows):
                raise ParamsError(
                    f"{name} has the shape {tuple(tensor.shape)} beside an input of {length} positions: give one "
                    f"value for each of them, without the prompt's."
                )
            if tensor.shape[1] == length:
                new[name] = before(tensor, rows, value)
        for name in self.entrance.inputs:
            other = given.get(name)
            counts = isinstance(other, Tensor) and 2 <= other.ndim <= 3 and other.shape[1] == length
            if (
                isinstance(other, Tensor)
                and counts
                and name not in (*expand_values(attachment), *EXTENDED)
                and not name.startswith("encoder_")
            ):
                raise ParamsError(
                    f"{name} has the shape {tuple(other.shape)}, as if for each of the {length} positions, and it is "
                    f'not known what the prompt\'s are to have: add ("{name}", value) to other_expand_ids.'
                )
        first = self.entrance.first_position
        for name in ("position_ids", "cache_position"):
            at = given.get(name)
            if isinstance(at, Tensor):
                start = torch.arange(first, first + rows, device=at.device, dtype=at.dtype)
                # Below the first position stands the number of padding, which no prompt moves.
                moved = at + rows if first == 0 else torch.where(at < first, at, at + rows)
                new[name] = torch.cat([start.expand(*at.shape[:-1], rows), moved], -1)
        return new

    def _continued(
        self, given: dict[str, Any], present: Sequence[tuple[Attachment, Any]], cached: int, length: int
    ) -> dict[str, Any]:
        """The inputs of a call that goes on from a cache in which the prompt stands."""
        mask, new, counts_prompt = given.get("attention_mask"), dict(given), False
        rows = sum(a.prompt_rows for a, _ in present)
        if mask is not None:
            self._check_two_axes("attention_mask", mask)
            counts_prompt = mask.shape[1] == cached + length
            if not counts_prompt and mask.shape[1] + rows != cached + length:
                raise ParamsError(
                    f"attention_mask has {mask.shape[1]} positions, the cache {cached} and the input {length}: with a "
                    f"prompt of {rows} in the cache the mask has to have {cached + length - rows} (or, with the "
                    f"prompt, {cached + length}). A cache that was filled without the prompt cannot be gone on from."
                )
            if not counts_prompt:
                for attachment, _ in present:
                    value = expand_values(attachment).get("attention_mask", 1)
                    new["attention_mask"] = mask = before(mask, attachment.prompt_rows, value)
        for name in ("position_ids", "cache_position"):
            if isinstance(given.get(name), Tensor) and not counts_prompt:
                new[name] = given[name] + rows
        return new

    def _check_two_axes(self, name: str, tensor: Any) -> None:
        if not isinstance(tensor, Tensor) or tensor.ndim != 2:
            found = f"the shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ParamsError(
                f"{name} has {found}; a prompt can be added to one of two axes only, (b, s), for a prepared mask does "
                f"not say who may see the prompt. Give the mask of the tokens, 1 where there is one."
            )


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
