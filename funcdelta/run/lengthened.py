"""The inputs of a model extended for a prompt of ``P`` rows, on copies: masks, token types, position numbers.

Every input that has one value per position gets ``P`` more in front. If a row is padded in front, the prompt then moves
behind the padding, right before the text. Inputs that the library does not know how to extend are refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ParamsError
from ..plan.attachment import Attachment
from .entrance import SECOND_INPUT, Entrance
from .positions import CACHES, before, behind_padding, leading, reordered

EXPAND = (("attention_mask", 1), ("token_type_ids", 0))
"""The value that is put in front of each of these inputs, unless the method has ``other_expand_ids``."""

NUMBERS = ("position_ids", "cache_position")

EXTENDED = ("input_ids", "inputs_embeds", "labels", SECOND_INPUT, *NUMBERS, *CACHES)
"""Inputs that the library extends by special rules."""

MARKS = ("visual_pos_masks",)
"""Inputs that mark positions with images; the prompt's get 0."""

PACKED = ("cu_seq_lens_q", "cu_seqlens", "seq_idx")
"""Inputs that say where each of several texts in one row ends."""

Given = dict[str, Any]


def text_of(given: Given) -> Tensor | None:
    """The input that holds the text: token ids (b, s), or their embeddings (b, s, d).

    >>> text_of({"input_ids": None, "inputs_embeds": torch.zeros(1, 2, 4)}).shape
    torch.Size([1, 2, 4])
    """
    return given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")


def is_of_tokens(mask: Any) -> bool:
    """Whether a mask has one value per token, (b, s).

    >>> is_of_tokens(torch.ones(1, 2)), is_of_tokens(torch.ones(1, 1, 2, 2)), is_of_tokens(None)
    (True, False, False)
    """
    return isinstance(mask, Tensor) and mask.ndim == 2


def expand_values(attachment: Attachment) -> dict[str, float]:
    """The value that is put in front of each input that has one per position."""
    told = attachment.acts().expand_ids
    return dict(EXPAND if told is None else told)


def hides(attachment: Attachment) -> bool:
    """Whether the mask hides a prompt from the text."""
    return not expand_values(attachment).get("attention_mask", 1)


def check_mask(mask: Any) -> None:
    """Raise ``ParamsError`` unless the mask has one value per token.

    >>> check_mask(torch.ones(1, 1, 2, 2))
    Traceback (most recent call last):
    ...
    funcdelta.errors.ParamsError: attention_mask has the shape (1, 1, 2, 2); a prompt can only be added to a mask (b,...
    """
    if is_of_tokens(mask):
        return
    found = f"the shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    raise ParamsError(
        f"attention_mask has {found}; a prompt can only be added to a mask (b, s), because a prepared mask does not "
        f"say who may see the prompt. Give the mask of the tokens: 1 for a token, 0 for padding."
    )


def check_one_text(given: Given, readable: bool) -> None:
    """Raise ``ParamsError`` if several texts share a row; ``readable`` says whether position numbers can be read.

    >>> check_one_text({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}, readable=True)
    Traceback (most recent call last):
    ...
    funcdelta.errors.ParamsError: position_ids says that several texts share a row, and a prompt would be in front of...
    """
    packed = [name for name in PACKED if given.get(name) is not None]
    at, mask = given.get("position_ids"), given.get("attention_mask")
    if not packed and readable and is_of_tokens(at):
        back = at.diff(dim=1) < 0  # pyright: ignore[reportOptionalMemberAccess]
        if is_of_tokens(mask) and mask.shape[1] == back.shape[1] + 1:  # pyright: ignore[reportOptionalMemberAccess]
            back = back & mask[:, 1:].ne(0) & mask[:, :-1].ne(0)  # pyright: ignore[reportOptionalSubscript]
        packed = ["position_ids"] if bool(back.any()) else []
    if packed:
        raise ParamsError(
            f"{packed[0]} says that several texts share a row, and a prompt would be in front of the first of them "
            f"only. Give each text its own row, with an attention_mask if it is padded."
        )


def numbered(given: Given, rows: int, lead: Tensor | None, first: int) -> Given:
    """Explicit position numbers with those of ``rows`` prompt rows in front, after which the text's continue.

    ``lead`` is the padding in front of each row. ``first`` is the number of a text's first position; smaller numbers
    belong to padding and stay.

    >>> numbered({"position_ids": torch.tensor([[0, 0, 0, 1]])}, 2, torch.tensor([2]), 0)["position_ids"]
    tensor([[0, 1, 2, 2, 2, 3]])
    """
    new = dict(given)
    for name in NUMBERS:
        at = given.get(name)
        if not isinstance(at, Tensor):
            continue
        begin = at[..., :1]
        if lead is not None and at.ndim > 1:
            at = at.expand(*at.shape[:-2], len(lead), -1)
            begin = at.gather(-1, lead.unsqueeze(1).expand(*at.shape[:-1], 1))
        start = begin.clamp(min=first) + torch.arange(rows, device=at.device, dtype=at.dtype)
        moved = at + rows if first == 0 else torch.where(at < first, at, at + rows)
        new[name] = torch.cat([start, moved], -1)
    return new


def extended(given: Given, attachment: Attachment, length: int, x: Tensor, entrance: Entrance) -> Given:
    """The inputs that accompany the embeddings ``x``, with ``prompt_rows`` positions before their ``length``."""
    rows, new = attachment.prompt_rows, dict(given)
    values = dict.fromkeys(MARKS, 0) | expand_values(attachment)
    if given.get("attention_mask") is not None:
        check_mask(given["attention_mask"])
    elif hides(attachment):
        given = {**given, "attention_mask": torch.ones(x.shape[0], length, dtype=torch.long, device=x.device)}
    for name, value in values.items():
        tensor = given.get(name)
        if tensor is None:
            continue  # without a mask the model sees every position, the prompt's too
        if tensor.ndim < 2 or tensor.shape[1] not in (length, length + rows):
            raise ParamsError(
                f"{name} has the shape {tuple(tensor.shape)}, but the input has {length} positions. Give one value for "
                f"each of them, and none for the prompt."
            )
        new[name] = before(tensor, rows, value) if tensor.shape[1] == length else tensor
    for name in entrance.inputs:
        other = given.get(name)
        if not isinstance(other, Tensor) or name in (*values, *EXTENDED) or name.startswith("encoder_"):
            continue
        if length in (other.shape[1:2] if other.ndim <= 3 else other.shape[-2:-1]):
            advice = "call the model without it" if other.ndim > 3 else f'add ("{name}", value) to other_expand_ids'
            raise ParamsError(
                f"{name} has the shape {tuple(other.shape)}, which seems to hold a value for each of the {length} "
                f"positions, and the value for the prompt is unknown: {advice}."
            )
    return new


def in_order(given: Given, order: Tensor, attachments: Sequence[Attachment]) -> Given:
    """The inputs with each row's positions in the order that ``order`` (b, length) gives.

    >>> in_order({"position_ids": torch.tensor([[3, 4, 5]]), "use_cache": True}, torch.tensor([[1, 0, 2]]), [])
    {'position_ids': tensor([[4, 3, 5]]), 'use_cache': True}
    """
    names = {*EXTENDED, *MARKS}.union(*map(expand_values, attachments))
    moved = dict(given)
    for name in names & given.keys():
        value, axis = given[name], -1 if name in NUMBERS else 1
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[axis] == order.shape[1]:
            moved[name] = reordered(value, order, axis)
    return moved


def continued(given: Given, attachments: Sequence[Attachment], cached: int, length: int, behind: bool) -> Given:
    """The inputs of a call that continues from a cache of ``cached`` positions, which include the prompt's.

    ``behind`` says whether the prompt comes behind a row's padding.
    """
    rows, new, counts_prompt = sum(a.prompt_rows for a in attachments), dict(given), False
    mask: Any = given.get("attention_mask")
    if mask is None and any(map(hides, attachments)):
        like: Any = text_of(given)
        mask = torch.ones(like.shape[0], cached + length - rows, dtype=torch.long, device=like.device)
    if mask is not None:
        check_mask(mask)
        counts_prompt = mask.shape[1] == cached + length
        if not counts_prompt and mask.shape[1] + rows != cached + length:
            raise ParamsError(
                f"attention_mask has {mask.shape[1]} positions, the cache {cached} and the input {length}. As the "
                f"cache holds a prompt of {rows}, the mask needs {cached + length - rows} positions (or "
                f"{cached + length}, with the prompt's). A cache that was filled without the prompt cannot be "
                f"continued."
            )
        order = behind_padding(leading(mask[:, rows:] if counts_prompt else mask), rows, cached + length)
        mask = mask if counts_prompt else lengthened(mask, attachments)
        new["attention_mask"] = reordered(mask, order) if behind else mask
    for name in NUMBERS:
        if isinstance(given.get(name), Tensor) and not counts_prompt:
            new[name] = given[name] + rows
    return new


def lengthened(mask: Tensor, attachments: Sequence[Attachment]) -> Tensor:
    """The mask of the tokens with the prompts' values in front."""
    for attachment in attachments:
        mask = before(mask, attachment.prompt_rows, expand_values(attachment).get("attention_mask", 1))
    return mask
