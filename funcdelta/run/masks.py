"""Masks that a model around the entrance has already built, with a prompt's rows and columns added in front.

Models of images and text build the masks of their text model themselves, one for each kind of layer, because an image
attends to all of itself. What they built for the text stays as it is; the new rows and columns are those that the text
model's own mask builder returns for the longer input.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BUILDERS = "transformers.masking_utils"
BUILDER = "create_masks_for_generate"


def with_prompt(
    made: Any, module: nn.Module, x: Tensor, mask: Tensor | None, positions: Any, rows: int, lead: Tensor | None
) -> Any:
    """The masks ``made`` for the text, extended by ``rows`` positions; ``NotImplemented`` for masks of unknown form.

    Args:
        module: the text model, whose config says what its masks are like.
        x, mask, positions: its longer input: embeddings (b, length, d), mask (b, length) and position numbers.
        lead: how much padding each row has in front of the prompt.

    >>> from transformers import GPT2Config, GPT2Model
    >>> gpt2 = GPT2Model(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    >>> both_ways = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    >>> with_prompt(both_ways, gpt2, torch.zeros(1, 3, 8), None, None, rows=1, lead=None).int()
    tensor([[[[1, 0, 0],
              [1, 1, 1],
              [1, 1, 1]]]], dtype=torch.int32)
    """
    build = getattr(sys.modules.get(BUILDERS), BUILDER, None)
    config: Any = getattr(module, "config", None)
    if build is None or config is None:
        return NotImplemented
    positions = positions if isinstance(positions, Tensor) and positions.ndim == 2 else None
    built = build(config=config, inputs_embeds=x, attention_mask=mask, cache=None, position_ids=positions)
    if isinstance(made, dict) != isinstance(built, dict):
        return NotImplemented
    if not isinstance(made, dict):
        return _joined(made, built, rows, lead, x.shape[1])
    if not made.keys() <= built.keys():
        return NotImplemented
    joined = {kind: _joined(mask, built[kind], rows, lead, x.shape[1]) for kind, mask in made.items()}
    return NotImplemented if any(mask is NotImplemented for mask in joined.values()) else joined


def _joined(made: Any, built: Any, rows: int, lead: Tensor | None, length: int) -> Any:
    """``made`` between two tokens of the text, ``built`` for pairs with one in the prompt or the padding."""
    if made is None:
        return built  # no mask means the default, which the builder knows
    if not isinstance(made, Tensor) or made.ndim != 4 or made.shape[-2:] != (length - rows, length - rows):
        return NotImplemented
    if built is None:
        built = torch.ones(length, length, dtype=torch.bool, device=made.device).tril().view(1, 1, length, length)
    if not isinstance(built, Tensor) or built.dtype != made.dtype:
        return NotImplemented
    first = torch.zeros(1, device=made.device) if lead is None else lead
    text = torch.arange(length, device=made.device) >= (first + rows).unsqueeze(1)
    both = (text.unsqueeze(1) & text.unsqueeze(2)).unsqueeze(1)
    return torch.where(both, F.pad(made, (rows, 0, rows, 0)), built)
