"""Embeddings whose padding has no gradient even if ``torch.vmap`` maps both the table and the tokens.

In that case torch puts the tables of all members side by side and shifts the tokens to their member's table, but not
``padding_idx``, so that only the first member's padding would have no gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class PaddedLookups(TorchFunctionMode):
    """A block in which a row looked up by ``padding_idx`` has no gradient, whichever operands are mapped.

    >>> def summed(table, tokens):
    ...     return F.embedding(tokens, table, padding_idx=0).sum()
    >>> tables, tokens = torch.ones(2, 3, 1), torch.tensor([[0, 1], [0, 2]])
    >>> with PaddedLookups():
    ...     grads = torch.func.vmap(torch.func.grad(summed))(tables, tokens)
    >>> grads.squeeze(-1).tolist()
    [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:
            return _lookup(*args, **kwargs)
        return func(*args, **kwargs)


def _lookup(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    rows = F.embedding(input, weight, None, *args, **kwargs)
    if padding_idx is None:
        return rows
    return torch.where((input == padding_idx % weight.shape[0]).unsqueeze(-1), rows.detach(), rows)


def padded(modules: Iterable[nn.Module]) -> bool:
    """Whether any of these modules has a ``padding_idx``.

    >>> padded([nn.Embedding(3, 2)]), padded([nn.Embedding(3, 2, padding_idx=0)])
    (False, True)
    """
    return any(getattr(module, "padding_idx", None) is not None for module in modules)


def padded_lookups(needed: bool) -> contextlib.AbstractContextManager[Any]:
    """:class:`PaddedLookups` if they are ``needed``, else a block without effect."""
    return PaddedLookups() if needed else contextlib.nullcontext()
