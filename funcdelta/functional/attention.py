"""Attention with second derivatives: replaces fused attention by its mathematical form, in this thread only.

Fused scaled-dot-product kernels have neither a double backward nor forward-mode derivatives. torch's own switch,
``sdpa_kernel``, is global to the process and would change what other threads compute, so a thread-local function mode
replaces the call instead.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..transforms import constant_while_tracing, wants_mathematical_attention


class _Wanted(threading.local):
    """Whether this thread is inside :func:`higher_order`."""

    yes = False


wanted = _Wanted()


def mathematical_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(q kᵀ scale + mask) v`` by operations that can be differentiated any number of times.

    >>> q = torch.randn(1, 2, 3, 4)
    >>> torch.allclose(mathematical_attention(q, q, q), F.scaled_dot_product_attention(q, q, q), atol=1e-6)
    True
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # The operator adds the mask, and would add a boolean one as 0 and 1.
        zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = zeros.masked_fill(attn_mask.logical_not(), -torch.inf)
    out, _ = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )
    return out


class AttentionBy(TorchFunctionMode):
    """A block in which ``attention`` replaces ``scaled_dot_product_attention``, in this thread only.

    >>> q = torch.ones(1, 1, 1, 2)
    >>> with AttentionBy(lambda query, key, value: value + 1):
    ...     F.scaled_dot_product_attention(q, q, q)
    tensor([[[[2., 2.]]]])
    """

    def __init__(self, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (self.attention if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


class MathematicalAttention(AttentionBy):
    """A block with :func:`mathematical_attention`, which also reaches into torch's own attention module."""

    def __init__(self) -> None:
        super().__init__(mathematical_attention)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward and not kwargs.get("need_weights", True):
            # A mode does not see the attention inside it; with need_weights it uses plain matrix products.
            out, _ = func(*args, **{**kwargs, "need_weights": True})
            return out, None
        return super().__torch_function__(func, types, args, kwargs)


@contextlib.contextmanager
def higher_order() -> Iterator[None]:
    """Make calls inside the block twice differentiable by ``torch.autograd.grad(..., create_graph=True)``.

    ``torch.func`` transforms need no such block, because nested ones are detected. ``create_graph`` is not known yet
    when the forward runs, so it has to be announced.

    >>> with higher_order():
    ...     needs_mathematical_attention()
    True
    """
    before, wanted.yes = wanted.yes, True
    try:
        yield
    finally:
        wanted.yes = before


def needs_mathematical_attention() -> bool:
    """Whether this call runs inside ``higher_order()`` or transforms that fused attention does not support.

    >>> needs_mathematical_attention()
    False
    """
    return wanted.yes or wants_mathematical_attention()


@constant_while_tracing
def _needed_while_tracing() -> bool:
    return needs_mathematical_attention()


def attention_for_this_call() -> contextlib.AbstractContextManager[Any]:
    """The context for a call of the backbone: with mathematical attention if it is needed, else empty."""
    needed = _needed_while_tracing() if torch.compiler.is_compiling() else needs_mathematical_attention()
    return MathematicalAttention() if needed else contextlib.nullcontext()
