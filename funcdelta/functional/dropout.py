"""Dropout whose rate may be a number or a tensor, with one rate per member."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def dropout(x: Tensor, rate: float | Tensor, training: bool) -> Tensor:
    """``x m / (1 - rate)`` with m zero with probability ``rate`` and one otherwise; ``x`` itself if not training.

    With a rate of 0, whether a number or a tensor, nothing is dropped.

    >>> x = torch.ones(2, 3)
    >>> dropout(x, 0.5, training=False) is x, bool((dropout(x, torch.tensor(0.0), training=True) == x).all())
    (True, True)
    """
    if not training:
        return x
    if not isinstance(rate, Tensor):
        return F.dropout(x, rate) if rate else x
    if has_torch_function((x,)):
        # As torch's own functions do, so that modes that turn dropout off affect this one, too.
        return handle_torch_function(dropout, (x,), x, rate, training)
    return x * (torch.rand_like(x) >= rate) / (1 - rate)
