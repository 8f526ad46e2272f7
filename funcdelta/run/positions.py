"""Inputs and outputs that count positions, as pure functions: made longer, made shorter, counted in a cache."""

from __future__ import annotations

from collections.abc import Sequence
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
    """How many positions the cache among the inputs holds.

    >>> cached_length({"input_ids": torch.ones(1, 2), "cache": None})
    0
    """
    cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
    if isinstance(cache, (tuple, list)):
        return cache[0][0].shape[-2]
    if getattr(cache, "is_compileable", False):
        raise EngineError(
            f"{type(cache).__name__} was made for the text without the prompt, and so were the masks that go with it: "
            f"use a dynamic cache (in generate, leave out cache_implementation)."
        )
    if cache is not None and hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except ValueError as error:  # a cache of states alone, without positions
            raise EngineError(
                f"{type(cache).__name__} does not tell whether the prompt was read already ({error}) Call the "
                f"model on the whole text: use_cache=False, in generate too."
            ) from error
    return 0


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


def without_prompt(output: Any, rows: int, length: int) -> Any:
    """The output without the first ``rows`` of ``length`` positions: hidden states and logits (b, length, …).

    Attention maps and caches keep the prompt, which is a part of them.

    >>> without_prompt((torch.zeros(2, 5, 3), None), 2, 5)[0].shape
    torch.Size([2, 3, 3])
    """
    if isinstance(output, Tensor):
        return output[:, rows:] if output.ndim == 3 and output.shape[1] == length else output
    if isinstance(output, (tuple, list)):
        return type(output)(without_prompt(value, rows, length) for value in output)
    if isinstance(output, dict):
        changes = {
            name: without_prompt(output[name], rows, length) for name in HIDDEN_OUTPUTS if output.get(name) is not None
        }
        return type(output)(**{**output, **changes})
    return output
