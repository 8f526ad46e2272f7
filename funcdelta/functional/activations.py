"""Activations by the names of OpenDelta's configs; other names are looked up in Transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..match import near

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "swish": F.silu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "gelu_orig": F.gelu,
    "leakyrelu": F.leaky_relu,
}


def activation(name: str) -> Activation:
    """The elementwise function called ``name``, in upper or lower case.

    >>> activation("ReLU")(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """
    lowered = name.lower()
    if lowered in ACTIVATIONS:
        return ACTIVATIONS[lowered]
    from transformers.activations import ACT2FN, get_activation

    if lowered not in ACT2FN:
        raise ConfigError(f"There is no activation {name!r}.{near(lowered, [*ACTIVATIONS, *ACT2FN])}")
    # Kept, so that tracing finds it in the table instead of importing Transformers.
    return ACTIVATIONS.setdefault(lowered, get_activation(lowered))
