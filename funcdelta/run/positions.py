"""Inputs and outputs that count positions, as pure functions: made longer, made shorter, counted, put in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import EngineError, ParamsError

CACHES = ("cache", "past_key_values")
HIDDEN_OUTPUTS = ("last_hidden_state", "hidden_states", "logits")


def before(tensor: Tensor, rows: int, value: float) -> Tensor:
    """``rows`` times ``value`` before the second axis, on a copy.

    >>> before(torch.zeros(1, 2, dtype=torch.long), 3, 1)
    tensor([[1, 1, 1, 0, 0]])
    """
    return torch.cat([tensor.new_full((tensor.shape[0], rows, *tensor.shape[2:]), value), tensor], 1)


def cached_length(given: dict[str, Any]) -> int:
    """How many positions the cache among the inputs holds, the prompt's among them.

    >>> cached_length({"input_ids": torch.ones(1, 2), "cache": None})
    0
    """
    cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
    try:
        seen = seen_length(given)
    except ValueError as error:  # a cache of states alone, without positions
        raise EngineError(
            f"{type(cache).__name__} does not tell whether the prompt was read already ({error}) Call the "
            f"model on the whole text: use_cache=False, in generate too."
        ) from error
    if getattr(cache, "is_compileable", False):
        raise EngineError(
            f"{type(cache).__name__} was made for the text without the prompt, and so were the masks that go with it: "
            f"use a dynamic cache (in generate, leave out cache_implementation)."
        )
    return seen


def seen_length(given: dict[str, Any]) -> int:
    """How many positions of earlier calls the cache among the inputs holds, whatever its kind.

    >>> seen_length({"past_key_values": ((torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4)),)})
    5
    """
    cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
    if isinstance(cache, (tuple, list)):
        return cache[0][0].shape[-2]
    return int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0


def named(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> dict[str, Any]:
    """All inputs by name.

    >>> named(("input_ids", "attention_mask"), (1,), {"attention_mask": 2}, "bert")
    {'input_ids': 1, 'attention_mask': 2}
    """
    if len(args) > len(names):
        raise ParamsError(
            f"{path or 'The model'} was given {len(args)} inputs by position, of which {len(names)} have names: give "
            f"them as keywords."
        )
    return {**dict(zip(names, args, strict=False)), **kwargs}


def by_position(output: Any, length: int, change: Callable[[Tensor], Tensor]) -> Any:
    """The output with ``change`` made to what has ``length`` positions: hidden states and logits (b, length, …).

    Attention maps and caches keep the prompt, which is a part of them.

    >>> by_position((torch.zeros(2, 5, 3), None), 5, lambda x: x[:, 2:])[0].shape
    torch.Size([2, 3, 3])
    """
    if isinstance(output, Tensor):
        return change(output) if output.ndim == 3 and output.shape[1] == length else output
    if isinstance(output, (tuple, list)):
        return type(output)(by_position(value, length, change) for value in output)
    if isinstance(output, dict):
        changes = {
            name: by_position(output[name], length, change) for name in HIDDEN_OUTPUTS if output.get(name) is not None
        }
        return type(output)(**{**output, **changes})
    return output


# -- left padding --------------------------------------------------------------------------------------------------


def leading(mask: Tensor) -> Tensor:
    """How many positions the mask (b, s) hides before the first that it shows; 0 where it shows none.

    >>> leading(torch.tensor([[0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]))
    tensor([2, 0, 0])
    """
    hidden = mask.ne(0).cumsum(1).eq(0).sum(1)
    return torch.where(hidden == mask.shape[1], 0, hidden)


def counted(lead: Tensor, start: int, length: int, first: int = 0, hidden: int = 0) -> Tensor:
    """The numbers of ``length`` positions from ``start`` on, as each row's text has them without its padding.

    The text's numbers begin with ``first``; padding in front has the number ``hidden``.

    >>> counted(torch.tensor([2, 0]), 0, 4)
    tensor([[0, 0, 0, 1],
            [0, 1, 2, 3]])
    """
    at = torch.arange(start, start + length, device=lead.device) - lead.unsqueeze(1)
    return torch.where(at < 0, hidden, at + first)


def behind_padding(lead: Tensor, rows: int, length: int) -> Tensor:
    """Where each of ``length`` positions comes from when ``rows`` in front move behind each row's padding.

    >>> behind_padding(torch.tensor([2, 0]), 3, 6)
    tensor([[3, 4, 0, 1, 2, 5],
            [0, 1, 2, 3, 4, 5]])
    """
    at, lead = torch.arange(length, device=lead.device), lead.unsqueeze(1)
    return torch.where(at < lead, at + rows, torch.where(at < lead + rows, at - lead, at))


def in_front(lead: Tensor, rows: int, length: int) -> Tensor:
    """The way back from :func:`behind_padding`.

    >>> lead = torch.tensor([2])
    >>> in_front(lead, 3, 6), behind_padding(lead, 3, 6).gather(1, in_front(lead, 3, 6))
    (tensor([[2, 3, 4, 0, 1, 5]]), tensor([[0, 1, 2, 3, 4, 5]]))
    """
    at, lead = torch.arange(length, device=lead.device), lead.unsqueeze(1)
    return torch.where(at < rows, at + lead, torch.where(at < lead + rows, at - rows, at))


def reordered(tensor: Tensor, order: Tensor, axis: int = 1) -> Tensor:
    """The positions along ``axis``, each row's in its own order (b, length); rows are on the axis before it.

    >>> reordered(torch.tensor([[7, 8, 9]]), torch.tensor([[2, 0, 1]]))
    tensor([[9, 7, 8]])
    """
    axis = axis % tensor.ndim
    shape = [1] * tensor.ndim
    shape[axis - 1 : axis + 1] = order.shape
    return torch.take_along_dim(tensor, order.view(shape), axis)
