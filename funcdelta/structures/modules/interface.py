"""Attention modules of Transformers: which look up their attention function where another can be put."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""The name under which Transformers' models look up their attention function."""


def attention_below(path: str, module: nn.Module) -> list[str]:
    """Paths of the attention modules that ``module`` is or holds, of those that use Transformers' interface.

    >>> attention_below("layer", nn.MultiheadAttention(4, 2))
    []
    """
    found = [below for below, child in module.named_modules() if uses_interface(child)]
    return [".".join(filter(None, (path, below))) for below in found]


def uses_interface(module: nn.Module) -> bool:
    """Whether the module's forward looks up its attention function where a skeleton can give another.

    >>> uses_interface(nn.MultiheadAttention(4, 2))
    False
    """
    return attending_forward(module) is not None and hasattr(getattr(module, "config", None), "_attn_implementation")


def attending_forward(module: nn.Module) -> Any:
    """The forward, as its author wrote it, that calls the interface; ``None`` if the module's class has none.

    >>> attending_forward(nn.MultiheadAttention(4, 2)) is None
    True
    """
    for kind in type(module).__mro__:
        forward = inspect.unwrap(vars(kind)["forward"]) if "forward" in vars(kind) else None
        if forward is not None and INTERFACE in getattr(getattr(forward, "__code__", None), "co_names", ()):
            return forward
    return None
