"""Keys and values added to an attention site: ``softmax(q [p; k]ᵀ s + [0; m]) [w; v]``, a member's p and w in front.

Transformers' models call one function with the attention module, its queries, keys and values and a mask. The site's
module in a skeleton gets a config of its own that names another function, which puts the added keys and values in
front, widens the mask and the position bias by visible columns, and calls the function that the model would have
called. Whatever builds the mask still reads the model's own config. Nothing is kept in a cache: the positions of real
tokens stay what they are, and generation adds the same keys at every step.

Shapes inside: keys and values (rows, heads, length, size), a mask (rows or 1, heads or 1, queries, length).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, MatchError
from ..methods.site import AttentionShape
from ..structures.modules.interface import INTERFACE, attending_forward

SUFFIX = "|funcdelta"
SEAM = "_funcdelta_attention"

Attention = Callable[..., Any]


@dataclass(frozen=True)
class Added:
    """Keys and values (rows, heads, P, size) for every row in front of those of one site.

    Attributes:
        visible: (rows,), for which rows; ``None``: for all.
        widen_bias: ``(module, bias, P)`` → the position bias with P columns in front.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor | None
    widen_bias: Callable[[nn.Module, Tensor, int], Tensor]


def open_attention(path: str, module: nn.Module, attention: Callable[..., Any]) -> None:
    """Let ``module`` call ``attention(original, implementation, module, query, key, value, mask, ...)``.

    ``original`` is the function that the module would have called and ``implementation`` its name. The config that
    the module shares with the rest of its model is not changed; later changes of its implementation are followed.
    """
    shared: Any = module.config
    forward = attending_forward(module)
    interface = forward.__globals__[INTERFACE]
    # The one implementation without an entry of its own: each file of Transformers has another.
    eager = next((name for name in forward.__code__.co_names if name.endswith("eager_attention_forward")), None)
    default = forward.__globals__.get(eager)

    def seam(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        implementation = shared._attn_implementation
        return attention(interface.get_interface(implementation, default), implementation, module, *args, **kwargs)

    own = copy.copy(shared)
    own._attn_implementation_internal = f"{shared._attn_implementation}{SUFFIX}"
    type(interface).register(own._attn_implementation_internal, _through_seam)
    module.config = own
    setattr(module, SEAM, seam)


def _through_seam(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The registered function: the skeleton's module says what to do."""
    return getattr(module, SEAM)(module, *args, **kwargs)


def attention_mark(path: str) -> str:
    """What a call notes when the attention function of the module at ``path`` was called.

    >>> attention_mark("layer.0.self_attn")
    'the attention function of layer.0.self_attn'
    """
    return f"the attention function of {path}"


def shape_of(query: Tensor, key: Tensor, value: Tensor) -> AttentionShape:
    """Heads and sizes of what a module hands to its attention function.

    >>> shape_of(torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 4))
    AttentionShape(heads=2, key_size=8, value_size=4, query_heads=4)
    """
    return AttentionShape(key.shape[1], key.shape[-1], value.shape[-1], query_heads=query.shape[1])


def attend_with(
    added: list[Added],
    path: str,
    original: Attention,
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The module's attention with ``added`` keys and values in front of its own."""
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    # Only fused attention draws the triangle itself; others are given it in their mask.
    causal = causal and implementation != "eager"
    _refuse(path, implementation, attention_mask, kwargs, sum(one.keys.shape[2] for one in added) + key.shape[2])
    for one in added:
        flash = "flash" in implementation
        attention_mask = _widen_mask(attention_mask, one.keys.shape[2], one.visible, query, key, causal, flash)
        if isinstance(kwargs.get("position_bias"), Tensor):
            kwargs["position_bias"] = one.widen_bias(module, kwargs["position_bias"], one.keys.shape[2])
        key = torch.cat([one.keys, key.expand(one.keys.shape[0], *key.shape[1:])], 2)
        value = torch.cat([one.values, value.expand(one.values.shape[0], *value.shape[1:])], 2)
    return original(module, query, key, value, attention_mask, *args, **kwargs)


def _refuse(path: str, implementation: str, mask: Any, kwargs: dict[str, Any], length: int) -> None:
    """Raise for what keys in front would make silently wrong."""
    reason = None
    if implementation.startswith("paged|"):
        reason = f"{implementation} reads its keys from pages of a cache"
    elif not (mask is None or isinstance(mask, Tensor)):
        reason = f"{implementation} takes a {type(mask).__name__} for a mask, which cannot be widened"
    elif "flash" in implementation:
        window = kwargs.get("sliding_window")
        if window is not None and window < length:
            reason = f"{implementation} would lose them behind its sliding window of {window}"
        elif any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seqlens", "block_table")):
            reason = f"{implementation} is given several sequences packed into one"
    if reason is not None:
        raise MatchError(
            f"Keys and values cannot be put in front at {path}: {reason}. Load the backbone with "
            f'attn_implementation="sdpa" (or "eager").'
        )


def _widen_mask(
    mask: Tensor | None, added: int, visible: Tensor | None, query: Tensor, key: Tensor, causal: bool, flash: bool
) -> Tensor | None:
    """The mask with ``added`` columns in front that every query sees, or those rows alone that ``visible`` says."""
    queries, length = query.shape[2], key.shape[2]
    if mask is None:
        if flash:
            # It aligns the triangle with the last key, so that what is in front is seen.
            mask = None if visible is None else query.new_ones((query.shape[0], length), dtype=torch.bool)
        elif causal and queries > 1:
            at = torch.arange(length, device=query.device)
            mask = (at <= at[:queries].unsqueeze(1)).view(1, 1, queries, length)
        elif visible is not None:
            # Added to the scores by some functions, so a number and not a truth value.
            mask = query.new_zeros((1, 1, 1, length))
        if mask is None:
            return None
    # Some builders make room for more keys than there are.
    mask = mask[..., :length].expand(*mask.shape[:-1], length)
    front = mask.new_ones(()) if flash or mask.dtype == torch.bool else mask.new_zeros(())
    if visible is not None:
        mask = mask.expand(visible.shape[0], *mask.shape[1:])
        hidden = torch.zeros_like(front) if flash or mask.dtype == torch.bool else front + torch.finfo(mask.dtype).min
        front = torch.where(visible.view(-1, *[1] * (mask.ndim - 1)), front, hidden)
    return torch.cat([front.expand(*mask.shape[:-1], added), mask], -1)


def by_head(rows: Tensor, heads: int) -> Tensor:
    """(rows, P, heads · size) → (rows, heads, P, size).

    >>> by_head(torch.zeros(3, 5, 8), 2).shape
    torch.Size([3, 2, 5, 4])
    """
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(path: str, shape: AttentionShape, keys: Tensor, values: Tensor) -> Tensor:
    """Keys and values of one member side by side, (P, key width + value width), checked against the site.

    >>> joined("attn", AttentionShape(2, 4, 4, 2), torch.zeros(3, 8), torch.ones(3, 8)).shape
    torch.Size([3, 16])
    """
    wanted = (shape.key_width, shape.value_width)
    if keys.ndim != 2 or values.ndim != 2 or len(keys) != len(values) or (keys.shape[1], values.shape[1]) != wanted:
        raise ConfigError(
            f"attend gave keys {tuple(keys.shape)} and values {tuple(values.shape)} at {path}; expected (P, "
            f"{wanted[0]}) and (P, {wanted[1]}): {shape.heads} heads of {shape.key_size} and {shape.value_size}."
        )
    return torch.cat([keys, values], -1)
