"""Dropout at a rate that may be a number or a tensor, one rate a member."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def dropout(x: Tensor, rate: float | Tensor, training: bool) -> Tensor:
    """``x m / (1 - rate)`` with m one or, with probability ``rate``, zero; ``x`` itself outside of training.

    A rate that is a tensor is drawn anew at each call like any other; a member whose rate is 0 loses nothing.

    >>> x = torch.ones(2, 3)
    >>> dropout(x, 0.5, training=False) is x, bool((dropout(x, torch.tensor(0.0), training=True) == x).all())
    (True, True)
    """
    if not training:
        return x
    if not isinstance(rate, Tensor):
        return F.dropout(x, rate) if rate else x
    if has_torch_function((x,)):
        # As torch's own functions do, so that what turns dropout off can turn this off, too.
        return handle_torch_function(dropout, (x,), x, rate, training)
    return x * (torch.rand_like(x) >= rate) / (1 - rate)
